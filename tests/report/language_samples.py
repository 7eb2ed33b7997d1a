"""Language runs made up for tests: metrics as the loops write them, healthy unless told otherwise."""

import json
from pathlib import Path

import numpy as np

from proximo.runs.directory import RunDirectory, write_config
from tests.report.samples import _plain

ALIGN = {
    "stage": "align",
    "algorithm": "ppo",
    "model": "sft",
    "reward": ["reward"],
    "beta": 0.05,
    "beta_control": "fixed",
    "beta_target": 6.0,
    "beta_horizon": 10_000.0,
    "learning_rate": 1e-5,
    "n_epochs": 4,
    "batch_size": 64,
    "max_new_tokens": 64,
    "missing_eos_penalty": 0.0,
    "n_iterations": 100,
    "prompts_per_iteration": 64,
    "value_pretraining_iterations": 0,
    "sharing": "separate",
    "seed": 1,
}


def align_rows(n=100, seed=0, **columns):
    """`n` rows of a run whose reward rises from 0 to 1.5 at a KL of 7; `columns` replaces metrics or adds some."""
    rng = np.random.default_rng(seed)
    share = np.arange(1, n + 1) / n
    learned = 1 - np.exp(-4 * share)
    noise = rng.lognormal(0.0, 0.3, n)
    table = {
        "iteration": np.arange(1, n + 1),
        "n_iterations": np.full(n, n),
        "n_responses": np.arange(1, n + 1) * 64,
        "reward_mean": 1.5 * learned + rng.normal(0, 0.08, n),
        "reward_std": 0.95 - 0.35 * share + rng.normal(0, 0.04, n),
        "rewards_missing": np.zeros(n, int),
        "kl_to_reference": 7 * learned * noise**0.2,
        "beta": np.full(n, 0.05),
        "response_length_mean": 26 + rng.normal(0, 1.0, n),
        "eos_fraction": np.minimum(1.0, 0.97 + rng.normal(0, 0.01, n)),
        "advantage_rows": np.ones(n),
        "repetition": 0.02 + 0.005 * rng.random(n),
        "approx_kl": 0.004 * noise,
        "approx_kl_max": 0.006 * noise,
        "policy_loss": -0.01 * noise,
        "value_loss": 0.3 * noise,
        "entropy": 1.15 - 0.25 * share + rng.normal(0, 0.01, n),
        "clip_fraction": 0.03 * noise,
        "grad_norm": 0.4 * noise,
        "n_updates": np.full(n, 4),
        "kl_stopped": np.zeros(n),
        "explained_variance": 0.4 * learned,
        "learning_rate": 1e-5 * (1 - share + 1 / n),
        "seconds": np.arange(1, n + 1) * 2.0,
        "tokens_per_second": 900 * noise,
        "seconds_collecting": np.full(n, 1.2),
        "seconds_updating": np.full(n, 0.8),
    } | columns
    table = {name: values if np.ndim(values) else [values] * n for name, values in table.items()}
    return [{name: _plain(values[i]) for name, values in table.items()} for i in range(n)]


def learning_rows(n=100, per_epoch=25, **columns):
    """`n` steps of a reward model's training, held-out pairs measured at the end of each epoch."""
    rng = np.random.default_rng(0)
    steps = np.arange(1, n + 1)
    loss, accuracy = 0.45 + 0.24 * np.exp(-steps / 20), 0.8 - 0.3 * np.exp(-steps / 20)
    at_end = steps % per_epoch == 0
    table = {
        "iteration": steps,
        "n_iterations": np.full(n, n),
        "epoch": steps / per_epoch,
        "loss": loss + rng.normal(0, 0.03, n),
        "accuracy": accuracy + rng.normal(0, 0.04, n),
        "score_mean": rng.normal(0, 0.1, n),
        "margin_mean": 2 * (accuracy - 0.5),
        "grad_norm": rng.lognormal(0.0, 0.3, n),
        "learning_rate": 1e-5 * (1 - steps / n),
        "held_out_loss": np.where(at_end, loss + 0.05, np.nan),
        "held_out_accuracy": np.where(at_end, accuracy - 0.03, np.nan),
        "seconds": steps * 0.3,
        "tokens_per_second": np.full(n, 7000.0),
    } | columns
    table = {name: values if np.ndim(values) else [values] * n for name, values in table.items()}
    return [{name: _plain(values[i]) for name, values in table.items()} for i in range(n)]


def make_language_run(path: Path, metrics, samples=(), **settings) -> RunDirectory:
    """A run's folder with these metrics, samples and settings."""
    path.mkdir(parents=True)
    run = RunDirectory(path)
    write_config(run, ALIGN | settings)
    run.metrics_path.write_text("".join(json.dumps(row) + "\n" for row in metrics))
    if samples:
        lines = [sample if isinstance(sample, str) else json.dumps(sample) for sample in samples]
        (path / "samples.jsonl").write_text("\n".join(lines) + "\n")
    return run
