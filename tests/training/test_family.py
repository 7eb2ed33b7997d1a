"""PPO's relatives in whole runs: that they learn, resume bit for bit, and are named in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import proximo
from proximo.cli import main
from proximo.errors import UserError
from proximo.runs.directory import RunDirectory, read_config
from proximo.runs.metrics import read_metrics

SMALL: dict[str, Any] = dict(n_envs=8, rollout_length=64, quiet=True, seed=1)


def trained(tmp_path: Path, algorithm: str, steps: int, name: str = "run", **settings: Any) -> Any:
    wanted = SMALL | {"algorithm": algorithm, "total_steps": steps, "run_dir": tmp_path / name} | settings
    return proximo.train("CartPole-v1", **wanted)


def metrics_of(run: Any) -> list[dict[str, Any]]:
    return read_metrics(RunDirectory(run.path).metrics_path)


@pytest.mark.parametrize(
    ("algorithm", "steps", "settings"),
    [
        ("a2c", 51_200, {"rollout_length": 16, "learning_rate": 4e-3}),
        ("reinforce", 61_440, {"learning_rate": 5e-3}),
        ("trpo", 20_480, {"max_kl": 0.02}),
    ],
)
def test_each_learns_to_balance_the_pole(tmp_path: Path, algorithm: str, steps: int, settings: dict[str, Any]):
    run = trained(tmp_path, algorithm, steps, **settings)
    first = next(row["return_mean"] for row in metrics_of(run) if row["return_mean"] is not None)
    assert first < 40
    assert proximo.evaluate(run, episodes=20)["return_mean"] > 120


def test_trpo_keeps_to_its_constraint_at_every_step(tmp_path: Path):
    run = trained(tmp_path, "trpo", 10_240, max_kl=0.005)
    kls = [row["kl_old_new"] for row in metrics_of(run)]
    assert max(kls) <= 0.005
    assert np.median(kls) > 0.0025  # and uses it


@pytest.mark.parametrize("algorithm", ["a2c", "reinforce", "trpo"])
def test_each_resumes_bit_for_bit(tmp_path: Path, algorithm: str):
    whole = trained(tmp_path, algorithm, 2_048, "whole", learning_rate_schedule="constant")
    half = trained(tmp_path, algorithm, 1_024, "half", learning_rate_schedule="constant")
    assert read_config(RunDirectory(half.path))["algorithm"] == algorithm
    half = proximo.resume(half, total_steps=2_048, quiet=True)
    assert half.config.algorithm_name == algorithm
    one, other = (proximo.load(run).state_dict() for run in (whole, half))
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_a_learning_rate_that_follows_the_kl_resumes_where_it_was(tmp_path: Path):
    settings = dict(
        learning_rate_schedule="kl_adaptive",
        clip_schedule="constant",
        learning_rate=1e-2,
        kl_target=0.004,
        batch_size=64,
        n_epochs=4,
    )
    whole = trained(tmp_path, "ppo", 4_096, "whole", **settings)
    rates = [row["learning_rate"] for row in metrics_of(whole)]
    assert rates[0] == 1e-2
    assert min(rates) < 5e-3  # it was far too high
    half = trained(tmp_path, "ppo", 2_048, "half", **settings)
    half = proximo.resume(half, total_steps=4_096, quiet=True)
    assert [row["learning_rate"] for row in metrics_of(half)] == rates
    one, other = (proximo.load(run).state_dict() for run in (whole, half))
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_on_the_command_line_with_settings_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["train", "CartPole-v1", "--algorithm", "trpo", "--max-kl", "0.02", "--total-steps", "2048", "--json"]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--quiet", "--run-dir", str(tmp_path / "run")])
    assert ended.value.code == 0
    told = json.loads(capsys.readouterr().out)
    assert told["env_steps"] > 0
    config = read_config(RunDirectory(tmp_path / "run"))
    assert (config["algorithm"], config["max_kl"]) == ("trpo", 0.02)
    assert "clip_epsilon" not in config


def test_an_algorithm_that_there_is_not_is_told_with_the_nearest(tmp_path: Path):
    with pytest.raises(UserError, match=r"there is no algorithm 'trop'. Did you mean 'trpo'\? There are: ppo, a2c"):
        trained(tmp_path, "trop", 2_048)
    with pytest.raises(
        UserError, match=r"there is no setting 'clip_epsilon'\. It is one of ppo, and the algorithm is trpo"
    ):
        trained(tmp_path, "trpo", 2_048, clip_epsilon=0.1)
