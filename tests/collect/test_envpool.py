"""EnvPool's environments behind the same contract as all others."""

from __future__ import annotations

import sys
import types
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

import proximo
from proximo.collect.envpool_envs import EnvPoolEnvs
from proximo.collect.native import NativeEnvs
from proximo.errors import UserError


class FakePool:
    """Two CartPoles that EnvPool would hand over in the wrong order; ends every third step."""

    observation_space = gym.make("CartPole-v1").observation_space
    action_space = gym.spaces.Discrete(2, dtype=np.int32)

    def __init__(self, seed: int, **options: Any) -> None:
        self.seed, self.options, self.t = seed, options, 0
        self.closed = False
        self.seen: list[np.ndarray] = []

    def _observations(self) -> np.ndarray:
        return np.array([[0.2, 0, 0, 0], [0.1, 0, 0, 0]], np.float32) + 0.01 * self.t

    def reset(self) -> tuple[np.ndarray, dict[str, Any]]:
        self.t = 0
        return self._observations(), {"env_id": np.array([1, 0])}

    def step(self, actions: np.ndarray) -> tuple[Any, ...]:
        self.seen.append(actions)
        self.t += 1
        ended = np.array([self.t == 3, False])
        rewards = np.array([2.0, 1.0])
        return self._observations(), rewards, ended, np.zeros(2, bool), {"env_id": np.array([1, 0])}

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def fake(monkeypatch) -> list[FakePool]:
    made: list[FakePool] = []

    def make_gymnasium(env_id: str, *, seed: int, **options: Any) -> FakePool:
        made.append(FakePool(seed, **options))
        return made[-1]

    module = types.ModuleType("envpool")
    module.list_all_envs = lambda: ["CartPole-v1", "Pendulum-v1"]  # type: ignore[attr-defined]
    module.make_gymnasium = make_gymnasium  # type: ignore[attr-defined]
    module.__spec__ = types.SimpleNamespace(name="envpool")  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "envpool", module)
    return made


def test_rows_come_in_the_order_of_the_environments(fake):
    envs = NativeEnvs(EnvPoolEnvs("CartPole-v1", 2, 2, {}), seed=5)  # type: ignore[arg-type]
    assert envs.reset()[:, 0] == pytest.approx([0.1, 0.2])
    step = envs.step(np.array([0, 1]))
    assert step.rewards.tolist() == [1.0, 2.0]
    assert step.observations[:, 0] == pytest.approx([0.11, 0.21])
    envs.step(np.array([0, 1]))
    step = envs.step(np.array([0, 1]))
    assert step.terminated.tolist() == [False, True]
    assert envs.step(np.array([0, 1])).valid.tolist() == [True, False]  # that step only resets
    assert fake[-1].seen[0].dtype == np.int32


def test_it_is_made_anew_for_every_seed_with_the_options(fake):
    envs = NativeEnvs(EnvPoolEnvs("CartPole-v1", 2, 1, {"max_episode_steps": 7}), seed=5)  # type: ignore[arg-type]
    envs.reset()
    assert fake[0].closed
    assert fake[1].options == {"num_envs": 2, "num_threads": 1, "max_episode_steps": 7}
    seed = fake[1].seed
    envs.step(np.array([0, 1]))
    observations, fresh = envs.restore(envs.snapshot())
    assert fresh == [0, 1]  # nothing of EnvPool's inside is known
    assert fake[-1].seed != seed
    assert observations[:, 0] == pytest.approx([0.1, 0.2])


def test_what_it_does_not_have_is_told(fake, monkeypatch):
    with pytest.raises(UserError, match="EnvPool has no Acrobot-v1"):
        EnvPoolEnvs("Acrobot-v1", 2, 1, {})
    with pytest.raises(UserError, match="another task"):
        EnvPoolEnvs("Pendulum-v1", 2, 1, {})  # the fake has CartPole's spaces
    monkeypatch.setitem(sys.modules, "envpool", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"EnvPool is not installed.*\[envpool\]"):
        EnvPoolEnvs("CartPole-v1", 2, 1, {})


def test_the_real_one_trains_and_is_evaluated_in_gymnasium(tmp_path):
    pytest.importorskip("envpool", reason="envpool is not installed")
    run = proximo.train(
        "CartPole-v1", vectorization="envpool", n_envs=8, total_steps=4096, run_dir=tmp_path / "run", quiet=True
    )
    assert run.return_mean is not None
    assert 8 < run.return_mean < 500
    assert proximo.evaluate(run, episodes=2)["return_mean"] > 5
