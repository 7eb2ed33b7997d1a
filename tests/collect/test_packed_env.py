"""Environments of any spaces as ones of arrays: what they hand over, and what is said where they break their spaces."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from proximo.collect.check import check_environment
from proximo.collect.envs import EnvironmentFault
from proximo.collect.packed_env import PackedEnv, mask_of, packed
from proximo.collect.serial_envs import SerialEnvs
from proximo.errors import UserError
from proximo.models.packing import PackedActions, PackedObservations


class Robot(gym.Env):
    """Two joints and a mode; at the third step of an episode it hands over `odd` instead of what its space has."""

    observation_space = spaces.Dict({"joints": spaces.Box(-1.0, 1.0, (2,), np.float32), "mode": spaces.Discrete(3)})
    action_space = spaces.Dict({"grip": spaces.Discrete(2, start=1), "turn": spaces.Box(-2.0, 2.0, (1,), np.float32)})

    def __init__(self, odd: dict[str, Any] | None = None, at: int = 3) -> None:
        self.odd, self.at, self.taken = odd or {}, at, []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.t = 0
        return self.seen(), {}

    def step(self, action):
        self.taken.append(action)
        self.t += 1
        return self.seen(), float(action["turn"][0]), self.t == 9, False, {}

    def seen(self):
        joints = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        whole = {"joints": joints, "mode": int(self.np_random.integers(3))}
        return {**whole, **self.odd} if self.t == self.at else whole


def envs_of(*args: Any, **settings: Any) -> SerialEnvs:
    return SerialEnvs(lambda: packed(Robot(*args)), 2, 0, **settings)


def play(envs: SerialEnvs, steps: int = 5) -> None:
    envs.reset()
    for _ in range(steps):
        envs.step(np.array([[1.0, 0.5], [2.0, -0.5]]))


def test_observations_and_actions_are_rows():
    env = Robot()
    rows = packed(env)
    assert isinstance(rows, PackedEnv)
    observation, _ = rows.reset(seed=0)
    assert observation.shape == (5,)
    rows.step(np.array([2.0, 0.25]))
    assert env.taken[0]["grip"] == 2
    assert env.action_space.contains(env.taken[0])


def test_a_reset_without_options_is_called_without_any():
    class Short(Robot):
        def reset(self, seed=None):
            return super().reset(seed=seed)

    assert packed(Short()).reset(seed=0)[0].shape == (5,)
    assert check_environment(Robot, "Robot", n_steps=30).ok


def test_what_is_an_array_already_is_left_alone():
    env = gym.make("CartPole-v1")
    assert packed(env) is env


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ({"joints": np.array([0.0, np.nan])}, r"observation\['joints'\]\[1\] is nan"),
        ({"joints": np.array([0.0, 7.0])}, r"observation\['joints'\]\[1\] is 7, outside its space's bounds \[-1, 1\]"),
        ({"joints": np.zeros(3)}, r"observation\['joints'\] has shape \(3,\), not \(2,\)"),
        ({"mode": 3}, r"observation\['mode'\] is 3, which is not in its space Discrete\(3\)"),
        ({"mode": None}, r"observation\['mode'\] is a NoneType, not an array of numbers"),
    ],
)
def test_a_broken_observation_is_told_with_its_place(odd: dict[str, Any], said: str):
    with pytest.raises(EnvironmentFault, match=rf"environment 0, episode 0, step 3.*: {said}"):
        play(envs_of(odd))


def test_after_a_reset_too():
    with pytest.raises(EnvironmentFault, match=r"after reset\(\), observation\['mode'\] is -1"):
        play(envs_of({"mode": -1}, 0))


def test_values_out_of_bounds_may_be_let_through():
    envs = envs_of({"joints": np.array([0.0, 7.0])}, on_space_violation="warn")
    play(envs)
    assert len(envs.warnings) == 1
    assert "observation['joints'][1] is 7" in envs.warnings[0]


def test_a_broken_environment_may_be_made_anew():
    envs = envs_of({"mode": 3}, max_restarts=9)
    play(envs)
    assert envs.n_restarts > 0
    assert "observation['mode'] is 3" in str(envs.faults[0])


def test_an_open_episode_is_played_again_to_the_same_row():
    envs = envs_of()
    play(envs, 4)
    snapshot = envs.snapshot()
    again = envs_of()
    observations, fresh = again.restore(snapshot)
    assert fresh == []
    assert np.array_equal(observations, snapshot.arrays["observations"])


class Told(Robot):
    action_space = spaces.MultiDiscrete([2, 3])
    observation_space = spaces.Box(0.0, 1.0, (1,))

    def mask(self):
        return np.array([1, 0, 1, 1, 0], np.int8) if self.t % 2 else np.array([0, 1, 0, 1, 1], np.int8)

    def seen(self):
        return np.zeros(1, np.float32)

    def reset(self, **kwargs: Any):
        observation, _ = super().reset(**kwargs)
        return observation, {"action_mask": self.mask()}

    def step(self, action):
        allowed = self.mask()
        if not (allowed[action[0]] and allowed[2 + action[1]]):
            raise ValueError(f"{action} is not possible")
        self.t += 1
        return self.seen(), 1.0, self.t == 9, False, {"action_mask": self.mask()}


class TestMasks:
    def test_they_travel_in_the_row(self):
        env = packed(Told(), "info")
        assert isinstance(env.observation_space, PackedObservations)
        observation, _ = env.reset(seed=0)
        assert observation.tolist() == [0, 0, 1, 0, 1, 1]
        assert env.step(np.array([1, 1]))[0].tolist() == [0, 1, 0, 1, 1, 0]

    def test_where_they_are_is_found_out(self):
        assert mask_of(packed(Told()), 0) == "info"
        assert mask_of(packed(Robot()), 0) == "none"
        assert mask_of(gym.make("CartPole-v1"), 0) == "none"
        assert mask_of(gym.make("Pendulum-v1"), 0) == "none"

    def test_without_a_choice_there_is_nothing_to_mask(self):
        with pytest.raises(UserError, match="hold no choice that could be masked"):
            packed(gym.make("Pendulum-v1"), "info")

    def test_the_last_observation_of_an_episode_needs_none(self):
        class Ends(Told):
            def mask(self):
                return super().mask() * (self.t < 9)

        envs = SerialEnvs(lambda: packed(Ends(), "info"), 1, 0)
        envs.reset()
        for t in range(9):
            envs.step(np.array([[1, 1]] if t % 2 == 0 else [[0, 0]]))

    def test_nor_does_one_that_is_cut(self):
        class Cut(Told):
            def step(self, action):
                observation, reward, over, _, info = super().step(action)
                return observation, reward, False, over, {} if over else info

        envs = SerialEnvs(lambda: packed(Cut(), "info"), 1, 0)
        envs.reset()
        for t in range(9):
            step = envs.step(np.array([[1, 1]] if t % 2 == 0 else [[0, 0]]))
        assert step.truncated[0]

    def test_checking_an_environment_keeps_to_what_is_possible(self):
        report = check_environment(Told, "Told", n_steps=100)
        assert not [problem for problem in report.problems if problem.severity == "error"]


def test_checking_an_environment_speaks_of_its_parts():
    report = check_environment(Robot, "Robot", n_steps=200)
    assert report.ok
    assert "['joints'][0]" in report.facts["observations seen"]
    broken = check_environment(lambda: Robot({"mode": 3}), "Robot", n_steps=200)
    assert not broken.ok
    assert "observation['mode'] is 3" in broken.problems[0].what


def test_a_space_that_cannot_be_learned_from_is_told_before_anything_is_played():
    class Talks(Robot):
        observation_space = spaces.Dict({"mission": spaces.Text(5)})

    report = check_environment(Talks, "Talks", n_steps=50)
    assert not report.ok
    assert "observation_space['mission'] is Text" in report.problems[0].what
    assert isinstance(packed(Robot()).action_space, PackedActions)
