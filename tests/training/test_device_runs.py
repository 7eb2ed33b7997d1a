"""Runs whose environments live on a device, here the CPU: trained, resumed, evaluated, refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

import proximo
from proximo.collect.device_envs import DeviceStep, TorchCartPole
from proximo.collect.dlpack_envs import DLPackEnvs
from proximo.collect.envs import EnvironmentFault
from proximo.errors import UserError
from proximo.runs.checkpoint import newest_checkpoint
from proximo.runs.directory import RunDirectory
from proximo.runs.metrics import read_metrics
from proximo.training.control import CLOCK_METRICS
from tests.commands import said_by
from tests.on_device import stand_in

SMALL: dict[str, Any] = dict(
    n_envs=6,
    rollout_length=40,
    batch_size=60,
    n_epochs=2,
    hidden_sizes=[16],
    learning_rate=3e-3,
    learning_rate_schedule="constant",  # a shorter run must be the beginning of a longer one
    clip_schedule="constant",
    total_steps=6 * 40 * 6,
    vectorization="device",
    debug=True,
    quiet=True,
)
BOTH = dict(normalize_observations=True, normalize_rewards=True)


def end_of(run: proximo.Run) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Every tensor of the last checkpoint, and the metrics that no clock decides."""
    tensors = newest_checkpoint(RunDirectory(run.path).checkpoints).tensors
    rows = read_metrics(RunDirectory(run.path).metrics_path)
    everything = {f"{part}/{name}": tensor for part, group in tensors.items() for name, tensor in group.items()}
    return everything, [{name: row[name] for name in row if name not in CLOCK_METRICS} for row in rows]


def assert_same(one: proximo.Run, other: proximo.Run) -> None:
    (ours, our_rows), (theirs, their_rows) = end_of(one), end_of(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert our_rows == their_rows


@pytest.mark.parametrize("path", ["auto", "graphed"])
def test_a_resumed_run_ends_bit_for_bit_where_an_undisturbed_one_ends(tmp_path: Path, path: str) -> None:
    settings = SMALL | BOTH | {"update_path": path, "target_kl": 0.02}
    whole = proximo.train("CartPole-v1", run_dir=tmp_path / "whole", **settings)
    half = proximo.train("CartPole-v1", run_dir=tmp_path / "half", **(settings | {"total_steps": 6 * 40 * 2}))
    assert_same(whole, proximo.resume(half.path, total_steps=whole.config.total_steps, quiet=True))
    assert whole.return_mean is not None


def test_capturing_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    for capture in (False, True):
        if capture:
            monkeypatch.setattr("proximo.collect.device_rollout.captured", stand_in)
            monkeypatch.setattr("proximo.algorithms.graphed.captured", stand_in)
        settings = SMALL | BOTH | {"update_path": "graphed"}
        runs.append(proximo.train("CartPole-v1", run_dir=tmp_path / str(capture), **settings))
    assert_same(*runs)


def test_from_the_command_line_and_back_to_gymnasiums_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--n-envs", "16", "--rollout-length", "32", "--batch-size", "128", "--total-steps", "1024"]
    words = ["--vectorization", "device", *sizes, "--run-dir", str(tmp_path / "run"), "--json"]
    code, out, error = said_by(capsys, "train", "CartPole-v1", *words)
    assert code == 0, error
    assert '"env_steps": 1024' in out
    code, _, error = said_by(capsys, "resume", str(tmp_path / "run"), "--total-steps", "1536")
    assert code == 0, error
    assert "exact: every environment is in the state it was in" in error
    scores = proximo.evaluate(tmp_path / "run", episodes=3)
    assert 8 <= scores["return_mean"] <= 500


@pytest.mark.slow
def test_it_learns(tmp_path: Path) -> None:
    settings: dict[str, Any] = dict(n_envs=64, rollout_length=32, batch_size=256, total_steps=102_400)
    run = proximo.train("CartPole-v1", run_dir=tmp_path / "run", vectorization="device", quiet=True, **settings)
    assert proximo.evaluate(run, episodes=20)["return_mean"] > 300


class Counters:
    """Another framework's: `n_envs` counters in NumPy arrays, rewarded for 1, cut after 5 steps."""

    single_observation_space = spaces.Box(0.0, 5.0, (1,), np.float32)
    single_action_space = spaces.Discrete(2)

    def __init__(self, num_envs: int) -> None:
        self.num_envs = num_envs
        self.counts = np.zeros((num_envs, 1), np.float32)

    def reset(self, *, seed: int | None = None) -> tuple[np.ndarray, dict]:
        self.counts = np.zeros_like(self.counts)
        return self.counts.copy(), {}

    def step(self, actions: np.ndarray) -> tuple[Any, ...]:
        after = self.counts + 1
        cut = after[:, 0] == 5
        self.counts = np.where(cut[:, None], np.float32(0), after)
        rewards = actions.astype(np.float32)
        return self.counts.copy(), rewards, np.zeros_like(cut), cut, {"final_obs": after}


def counters(n_envs: int, device: str, seed: int) -> DLPackEnvs:
    return DLPackEnvs(
        Counters(n_envs), device=device, seed=seed, autoreset="same_step", to_actions=np.from_dlpack, name="counters"
    )


def test_a_factory_of_another_frameworks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = SMALL | {"learning_rate": 0.02, "n_epochs": 4}
    run = proximo.train(counters, run_dir=tmp_path / "run", **settings)
    rows = read_metrics(RunDirectory(run.path).metrics_path)
    assert rows[0]["length_mean"] == 5.0
    assert rows[0]["n_episodes"] == 6 * 8
    assert run.return_mean is not None
    assert run.return_mean > 4.0  # of 5: it has learned to choose 1
    with pytest.raises(UserError, match="Name one environment of the same spaces"):
        proximo.evaluate(run, counters, episodes=1)
    capsys.readouterr()
    resumed = proximo.resume(run.path, counters, total_steps=2 * run.env_steps)
    assert resumed.env_steps == 2 * run.env_steps
    assert "6 of 6 environments could not be brought back" in "".join(capsys.readouterr())


def test_what_is_not_finite_ends_the_run_and_is_written_down(tmp_path: Path) -> None:
    class Spoilt(TorchCartPole):
        def step(self, actions: torch.Tensor) -> DeviceStep:
            step = super().step(actions)
            return step._replace(rewards=torch.where(self._n_steps == 20, torch.nan, step.rewards))

    with pytest.raises(EnvironmentFault, match="not finite") as caught:
        proximo.train(lambda n_envs, device, seed: Spoilt(n_envs, device, seed), run_dir=tmp_path / "run", **SMALL)
    assert "cannot be played again" in str(caught.value)
    assert len(list((tmp_path / "run").glob("replay-env*.json"))) == 1


@pytest.mark.parametrize(
    ("env", "settings", "message"),
    [
        ("Pendulum-v1", {}, "Pendulum-v1 has no version that lives on a device"),
        ("CartPole-v1", {"env_kwargs": {"sutton_barto_reward": True}}, "takes no arguments"),
        ("CartPole-v1", {"on_environment_fault": "restart"}, "device vector environment cannot be made anew"),
        ("CartPole-v1", {"device": "cuda:77"}, "device is 'cuda:77', which cannot be used here"),
        (counters, {"device": "nowhere"}, "device is 'nowhere', which cannot be used here"),
        (lambda n_envs, device, seed: 1, {}, "made a int, which does not live on a device"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    tmp_path: Path, env: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        proximo.train(env, run_dir=tmp_path / "run", **(SMALL | settings))
    assert not (tmp_path / "run").exists()


def test_another_number_of_environments_is_refused_at_resume(tmp_path: Path) -> None:
    run = proximo.train("CartPole-v1", run_dir=tmp_path / "run", **(SMALL | {"total_steps": 240}))
    path = RunDirectory(run.path).config_path
    path.write_text(path.read_text().replace("n_envs = 6", "n_envs = 5"))
    with pytest.raises(UserError, match="does not fit this run"):
        proximo.resume(run.path, total_steps=480, quiet=True)
