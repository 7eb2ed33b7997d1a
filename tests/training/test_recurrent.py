"""Runs of policies that remember: tasks that need it, exact resume, every algorithm, bad settings."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import proximo
from proximo.algorithms.trpo import TRPO
from proximo.errors import UserError
from proximo.models.control import NetworkConfig
from proximo.runs.metrics import read_metrics
from proximo.training.config import ControlConfig, EnvironmentConfig

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from memory_tasks import CartPoleWithoutVelocities, PendulumWithoutVelocity, Repeat, TMaze

SMALL: dict[str, Any] = dict(
    n_envs=8, rollout_length=32, batch_size=64, n_epochs=2, memory="gru", memory_size=16, quiet=True, debug=True
)
LEARNS: dict[str, Any] = dict(
    n_envs=16, rollout_length=64, batch_size=256, n_epochs=4, learning_rate=1e-3, gamma=0.95, quiet=True
)


@pytest.mark.parametrize(
    "settings", [{"memory": "gru"}, {"memory": "lstm", "shared_memory": True, "sequence_length": 32}]
)
def test_the_sign_at_the_beginning_of_a_maze_is_remembered(tmp_path: Path, settings: dict[str, Any]):
    """Without memory nothing is better than to guess; here every turn is right, in the loaded policy as well."""
    run = proximo.train(TMaze, total_steps=20_480, seed=0, run_dir=tmp_path / "run", **(LEARNS | settings))
    assert proximo.evaluate(run, TMaze, episodes=20)["return_mean"] == 1.0
    policy, env, total = proximo.load(run), TMaze(), 0.0
    for seed in range(10):
        (observation, _), memory, ended = env.reset(seed=seed), policy.fresh_memory(), False
        while not ended:
            action, memory = policy(observation, memory=memory)
            observation, reward, ended, _, _ = env.step(int(action))
            total += reward
    assert total == 10.0


def test_without_memory_the_maze_is_guessed(tmp_path: Path):
    run = proximo.train(TMaze, total_steps=20_480, seed=0, run_dir=tmp_path / "run", **LEARNS)
    assert abs(proximo.evaluate(run, TMaze, episodes=100)["return_mean"]) < 0.5


def test_what_was_seen_two_steps_ago_is_repeated(tmp_path: Path):
    """A quarter of 30 is what guessing brings."""
    run = proximo.train(Repeat, total_steps=30_720, seed=0, run_dir=tmp_path / "run", memory="gru", **LEARNS)
    assert proximo.evaluate(run, Repeat, episodes=20)["return_mean"] > 15


@pytest.mark.parametrize(
    "settings",
    [
        {"memory": "lstm", "normalize_observations": True, "normalize_rewards": True},
        {"memory_layers": 2, "sequence_length": 8},
        {"shared_memory": True, "vectorization": "workers", "n_workers": 2},
        {"memory": "lstm", "update_path": "compiled"},
        {"distribution": "gsde", "sde_sample_freq": 5, "sequence_length": 16},
        {"algorithm": "a2c", "sequence_length": 4, "microbatch_size": 8},
        {"algorithm": "trpo", "sequence_length": 8},
    ],
)
def test_a_run_that_was_cut_ends_where_a_whole_one_does(tmp_path: Path, settings: dict[str, Any]):
    """Bit for bit, in the middle of episodes; every ratio before an update is 1 (debug)."""
    settings = SMALL | settings
    if settings.get("algorithm") == "a2c":
        settings = {name: value for name, value in settings.items() if name not in ("batch_size", "n_epochs")}
    make = PendulumWithoutVelocity if "distribution" in settings else CartPoleWithoutVelocities
    whole = proximo.train(make, total_steps=1_024, run_dir=tmp_path / "whole", **settings)
    half = proximo.train(make, total_steps=512, run_dir=tmp_path / "half", **settings)
    half = proximo.resume(half, make, total_steps=1_024, quiet=True)
    one, other = (proximo.load(run).state_dict() for run in (whole, half))
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_machine_code_learns_what_torch_does(tmp_path: Path):
    """The weights after two iterations; sigmoids and tanhs are 1e-6 apart, what comes of it is not much more."""
    settings = SMALL | {"total_steps": 512, "memory": "lstm", "memory_layers": 2, "learning_rate": 1e-4}
    weights = []
    for path in ("eager", "compiled"):
        run = proximo.train(CartPoleWithoutVelocities, run_dir=tmp_path / path, update_path=path, **settings)
        assert run.config.update_path == path
        weights.append(proximo.load(run).state_dict())
    for name, one in weights[0].items():
        np.testing.assert_allclose(one, weights[1][name], atol=2e-5, err_msg=name)


@pytest.mark.parametrize(
    ("settings", "piece", "n_updates"),
    [
        ({}, 32, 8),  # a rollout of 32 steps is no longer than a minibatch of 64
        ({"batch_size": 16}, 16, 32),
        ({"batch_size": 20}, 16, 32),
        ({"batch_size": 16, "sequence_length": 32}, 32, 16),  # a minibatch holds one piece at least
        ({"rollout_length": 31, "batch_size": 20}, 31, 16),  # a prime number of steps is not cut into single ones
        ({"batch_size": 16, "algorithm": "trpo"}, 16, 160),
    ],
)
def test_a_rollout_is_cut_so_that_minibatches_are_as_large_as_asked(tmp_path, settings, piece, n_updates):
    """And what was chosen stands in the config, so that a resumed run takes the same."""
    settings = {
        name: value for name, value in (SMALL | settings).items() if name != "n_epochs" or "algorithm" not in settings
    }
    run = proximo.train(CartPoleWithoutVelocities, total_steps=256, run_dir=tmp_path / "run", **settings)
    assert run.config.sequence_length == piece
    assert read_metrics(run.path / "metrics.jsonl")[0]["n_updates"] == n_updates
    if run.config.algorithm_name == "ppo":
        assert run.config.minibatches_per_epoch * 2 == n_updates
    assert f"sequence_length = {piece}" in (run.path / "config.toml").read_text()


@pytest.mark.parametrize("algorithm", ["ppo", "a2c", "reinforce", "trpo"])
def test_every_algorithm_learns_along_rows(tmp_path: Path, algorithm: str):
    """TRPO differentiates twice; its constraint holds with memory, too."""
    settings = {name: value for name, value in SMALL.items() if name not in ("batch_size", "n_epochs")}
    run = proximo.train(
        PendulumWithoutVelocity, total_steps=768, algorithm=algorithm, run_dir=tmp_path / "run", **settings
    )
    rows: list[dict[str, Any]] = read_metrics(run.path / "metrics.jsonl")
    assert len(rows) == 3
    assert all(np.isfinite(row["value_loss"]) for row in rows)
    if isinstance(run.config.algorithm, TRPO):
        max_kl = run.config.algorithm.max_kl
        assert all(row["kl_old_new"] <= max_kl for row in rows)
        assert any(row["kl_old_new"] > 0 for row in rows)


def test_the_kl_penalty_and_microbatches_go_with_memory(tmp_path: Path):
    settings = SMALL | {"objective": "kl_penalty", "batch_size": 256, "microbatch_size": 64}
    run = proximo.train(CartPoleWithoutVelocities, total_steps=512, run_dir=tmp_path / "run", **settings)
    rows: list[dict[str, Any]] = read_metrics(run.path / "metrics.jsonl")
    assert all(row["kl_old_new"] >= 0 for row in rows)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"memory": "rnn"}, "'none', 'lstm', 'gru'"),
        ({"memory_size": 0}, "memory_size is 0"),
        ({"memory_layers": 1.5}, "memory_layers"),
        ({"memory": "none"}, "memory_size is 16, but memory is 'none'"),
        ({"memory": "none", "memory_size": 64, "shared_memory": True}, "shared_memory is True, but memory is 'none'"),
        ({"sequence_length": 5}, "does not divide rollout_length, 32. Choose one that does, such as 4"),
        ({"sequence_length": 64}, "sequence_length is 64"),
        ({"memory": "none", "memory_size": 64, "sequence_length": 8}, "sequence_length is for policies with memory"),
        ({"update_path": "fused"}, "neither masks nor memory"),
        ({"update_path": "graphed"}, "policies without memory"),
    ],
)
def test_bad_settings(tmp_path: Path, settings: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        proximo.train(CartPoleWithoutVelocities, total_steps=512, run_dir=tmp_path / "run", **(SMALL | settings))


def test_environments_on_a_device_are_refused():
    with pytest.raises(UserError, match="environments on a device do not go with"):
        ControlConfig(environment=EnvironmentConfig(vectorization="device"), network=NetworkConfig(memory="gru"))
