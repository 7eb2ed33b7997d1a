"""Runs on every kind of space, from training to a loaded policy: tasks that cannot be done without seeing all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

import proximo
from proximo.collect.envs import EnvironmentFault
from proximo.errors import UserError


class Matching(gym.Env):
    """Asks something new at each of 8 steps; the reward, up to 1, is how well the action answers it."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.t = 0
        return self.asked(), self.info()

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        reward = self.score(action)
        self.t += 1
        return self.asked(), reward, False, self.t == 8, self.info()

    def asked(self) -> Any:
        self.question = self.ask()
        return self.question

    def info(self) -> dict[str, Any]:
        return {}

    def ask(self) -> Any:
        raise NotImplementedError

    def score(self, action: Any) -> float:
        raise NotImplementedError


class Choices(Matching):
    """A MultiDiscrete to be repeated."""

    observation_space = spaces.MultiDiscrete([3, 4], start=[1, 0])
    action_space = spaces.MultiDiscrete([3, 4], start=[1, 0])

    def ask(self):
        return self.np_random.integers([1, 0], [4, 4])

    def score(self, action):
        return float((action == self.question).mean())


class Bits(Matching):
    """Bits to be turned around."""

    observation_space = spaces.MultiBinary(3)
    action_space = spaces.MultiBinary(3)

    def ask(self):
        return self.np_random.integers(0, 2, 3).astype(np.int8)

    def score(self, action):
        return float((action != self.question).mean())


class Room(Matching):
    """One of several rooms; the answer is its number modulo 3."""

    observation_space = spaces.Discrete(6, start=-2)
    action_space = spaces.Discrete(3)

    def ask(self):
        return int(self.np_random.integers(-2, 4))

    def score(self, action):
        return float(action == self.question % 3)


class Hybrid(Matching):
    """A button to press and a point to aim at, told in different places of a nested observation."""

    observation_space = spaces.Dict(
        {"where": spaces.Tuple([spaces.Box(-1.0, 1.0, (1,), np.float64)]), "which": spaces.Discrete(3)}
    )
    action_space = spaces.Dict({"aim": spaces.Box(-4.0, 4.0, (1,), np.float32), "button": spaces.Discrete(3)})

    def ask(self):
        return {"which": int(self.np_random.integers(3)), "where": (self.np_random.uniform(-1, 1, 1),)}

    def score(self, action):
        distance = abs(float(action["aim"][0]) - 4.0 * float(self.question["where"][0][0]))
        return 0.5 * float(action["button"] == self.question["which"]) + 0.5 * max(0.0, 1.0 - distance / 2.0)


class Seen(Matching):
    """A picture that is bright or dark, and a sign, each to be told."""

    observation_space = spaces.Dict(
        {"camera": spaces.Box(0, 255, (36, 36, 1), np.uint8), "sign": spaces.Box(-1.0, 1.0, (1,))}
    )
    action_space = spaces.MultiBinary(2)

    def ask(self):
        self.bright, self.sign = (int(x) for x in self.np_random.integers(0, 2, 2))
        camera = self.np_random.integers(0, 100, (36, 36, 1)) + 155 * self.bright
        return {"camera": camera.astype(np.uint8), "sign": np.array([2.0 * self.sign - 1.0], np.float32)}

    def score(self, action):
        return float((action == [self.bright, self.sign]).mean())


class Masked(Matching):
    """Two of twenty actions are possible, one of them is right; another one is an error of whoever chose it."""

    action_space = spaces.Discrete(20)
    mask_in = "info"

    def __init__(self) -> None:
        side = spaces.Box(0.0, 1.0, (1,), np.float32)
        self.observation_space = side
        if self.mask_in == "observation":
            self.observation_space = spaces.Dict({"side": side, "action_mask": spaces.MultiBinary(20)})

    def ask(self):
        self.possible = np.sort(self.np_random.choice(20, 2, replace=False))
        self.mask = np.zeros(20, np.int8)
        self.mask[self.possible] = 1
        self.right = int(self.np_random.integers(2))
        side = np.array([self.right], np.float32)
        return {"side": side, "action_mask": self.mask} if self.mask_in == "observation" else side

    def info(self):
        return {"action_mask": self.mask} if self.mask_in == "info" else {}

    def score(self, action):
        if not self.mask[action]:
            raise ValueError(f"action {action} is not possible")
        # The right one is the lower or the higher one of the two: of no use without knowing which are possible ...
        return float(action == self.possible[self.right])


class MaskedInObservation(Masked):
    mask_in = "observation"


SETTINGS: dict[str, Any] = dict(
    n_envs=8, rollout_length=64, batch_size=128, n_epochs=8, learning_rate=2e-3, entropy_coef=0.01, quiet=True
)


@pytest.mark.parametrize(
    ("env", "steps", "wanted", "settings"),
    [
        (Choices, 4_096, 6.5, {}),
        (Bits, 6_144, 7.0, {}),
        (Room, 4_096, 7.0, {}),
        (Hybrid, 8_192, 5.5, {}),
        (Hybrid, 8_192, 5.0, {"distribution": "beta"}),
        (Hybrid, 8_192, 5.5, {"distribution": "squashed_gaussian", "state_dependent_std": True}),
        (Seen, 8_192, 7.0, {"learning_rate": 1e-3, "entropy_coef": 0.03}),
    ],
)
def test_learns(tmp_path: Path, env: type[gym.Env], steps: int, wanted: float, settings: dict[str, Any]):
    run = proximo.train(env, total_steps=steps, seed=0, run_dir=tmp_path / "run", **(SETTINGS | settings))
    scores = proximo.evaluate(run, env, episodes=20)
    assert scores["return_mean"] > wanted
    observation, _ = env().reset(seed=5)
    policy = proximo.load(run)
    assert env().action_space.contains(policy(observation))
    assert np.isfinite(policy.log_prob(observation, policy(observation)))


@pytest.mark.parametrize("env", [Masked, MaskedInObservation])
def test_only_what_is_possible_is_ever_done(tmp_path: Path, env: type[Masked]):
    """In training and in evaluation, sampled or not: the environment raises at anything else."""
    run = proximo.train(env, total_steps=4_096, seed=0, run_dir=tmp_path / "run", **SETTINGS)
    assert run.config.environment.action_mask == env.mask_in
    for deterministic in (True, False):
        proximo.evaluate(run, env, episodes=20, deterministic=deterministic)
    one = env()
    observation, info = one.reset(seed=1)
    given = {"action_mask": info["action_mask"]} if env.mask_in == "info" else {}
    policy = proximo.load(run)
    assert policy(observation, **given) in one.possible
    assert all(policy(observation, deterministic=False, seed=seed, **given) in one.possible for seed in range(20))


def test_a_run_with_masks_resumes_bit_for_bit(tmp_path: Path):
    whole = proximo.train(Masked, total_steps=2_048, run_dir=tmp_path / "whole", **SETTINGS)
    half = proximo.train(Masked, total_steps=1_024, run_dir=tmp_path / "half", **SETTINGS)
    half = proximo.resume(half, Masked, total_steps=2_048, quiet=True)
    one, other = (proximo.load(run).state_dict() for run in (whole, half))
    assert all(np.array_equal(one[name], other[name]) for name in one)


class AllMasked(Masked):
    def info(self):
        return {"action_mask": self.mask * (self.t < 3)}


def test_a_state_without_a_possible_action_is_an_error_that_says_where(tmp_path: Path):
    with pytest.raises(
        EnvironmentFault, match=r"environment 0, episode 0, step 3 .*: the action_mask forbids every action"
    ):
        proximo.train(AllMasked, total_steps=2_048, run_dir=tmp_path / "run", **SETTINGS)


def test_masks_that_are_not_wanted_are_not_looked_at(tmp_path: Path):
    with pytest.raises(EnvironmentFault, match="is not possible"):
        proximo.train(Masked, total_steps=2_048, run_dir=tmp_path / "run", action_mask="none", **SETTINGS)


@pytest.mark.parametrize("vectorization", ["serial", "workers"])
def test_worker_processes_hand_over_the_same_rows(tmp_path: Path, vectorization: str):
    settings = SETTINGS | {"n_envs": 2}
    run = proximo.train(Hybrid, total_steps=512, run_dir=tmp_path / "run", vectorization=vectorization, **settings)
    reference = proximo.train(Hybrid, total_steps=512, run_dir=tmp_path / "reference", **settings)
    one, other = (proximo.load(each).state_dict() for each in (run, reference))
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_masks_are_refused_where_nobody_would_look_at_them():
    for vectorization in ("native", "envpool", "device"):
        with pytest.raises(proximo.UserError, match="action_mask is 'info', but a"):
            proximo.train("CartPole-v1", action_mask="info", vectorization=vectorization)


@pytest.mark.parametrize("kind", ["squashed_gaussian", "beta", "gsde"])
def test_a_distribution_of_continuous_actions_is_refused_where_there_are_none(tmp_path: Path, kind: str):
    """It would have no effect, and stand in the run's settings as if it had."""
    with pytest.raises(UserError, match=r"is for continuous actions, and the action space is Discrete\(3\)"):
        proximo.train(Room, total_steps=512, run_dir=tmp_path / "run", distribution=kind, **SETTINGS)
    assert not (tmp_path / "run").exists()
