"""Runs made up for tests: metrics as the control loop writes them, healthy unless told otherwise."""

import json
from pathlib import Path

import numpy as np

from proximo.runs.directory import RunDirectory, write_config

SETTINGS = {
    "env_id": "CartPole-v1",
    "seed": 1,
    "total_steps": 100 * 2048,
    "n_envs": 8,
    "rollout_length": 256,
    "batch_size": 64,
    "n_epochs": 10,
    "learning_rate": 3e-4,
    "entropy_coef": 0.0,
    "vectorization": "serial",
}


def rows(n=100, **columns):
    """`n` rows of a run that learns from 20 to 500; `columns` replaces metrics by arrays, or by one value."""
    rng = np.random.default_rng(0)
    share = np.arange(1, n + 1) / n
    learned = 1 / (1 + np.exp(-14 * (share - 0.4)))
    noise = rng.lognormal(0.0, 0.4, n)
    table = {
        "iteration": np.arange(1, n + 1),
        "env_steps": np.arange(1, n + 1) * 2048,
        "n_episodes": np.arange(1, n + 1) * 12,
        "return_mean": 20 + 480 * learned,
        "length_mean": 20 + 480 * learned,
        "approx_kl": 0.01 * noise,
        "approx_kl_max": 0.02 * noise,
        "policy_loss": -0.01 * noise,
        "value_loss": 30 * noise,
        "entropy": 0.69 - 0.4 * learned,
        "clip_fraction": 0.1 * noise,
        "grad_norm": noise,
        "n_updates": np.full(n, 320),
        "kl_stopped": np.zeros(n),
        "explained_variance": 0.9 * learned,
        "advantage_std": 5 * noise,
        "terminated_share": 1.0 - 0.8 * learned,
        "reward_largest": np.ones(n),
        "observation_largest": 2.0 + 0.1 * noise,
        "observation_smallest": 0.2 + 0.01 * noise,
        "intrinsic_reward_mean": 0.1 / (1.0 + learned),
        "intrinsic_explained_variance": 0.5 * learned,
        "learning_rate": np.full(n, 3e-4),
        "clip_epsilon": np.full(n, 0.2),
        "seconds": np.arange(1, n + 1) * 0.5,
        "steps_per_second": 4096 * noise,
        "seconds_collecting": np.full(n, 0.2),
        "seconds_updating": np.full(n, 0.3),
    }
    table |= {name: values if np.ndim(values) else [values] * n for name, values in columns.items()}
    return [{name: _plain(values[i]) for name, values in table.items()} for i in range(n)]


def make_run(path: Path, metrics, **settings) -> RunDirectory:
    """A run's folder with these metrics and settings."""
    path.mkdir(parents=True)
    run = RunDirectory(path)
    write_config(run, SETTINGS | settings)
    run.metrics_path.write_text("".join(json.dumps(row) + "\n" for row in metrics))
    return run


def _plain(value):
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not np.isfinite(value) else value
