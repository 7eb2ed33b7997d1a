"""`SerialEnvs`: what an environment may return in the place of the usual, and how it is told what it may not."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

from proximo.collect.envs import EnvironmentFault, SpacePolicy
from proximo.collect.serial_envs import SerialEnvs
from tests.environments import Returning


def zeros(envs: SerialEnvs) -> np.ndarray:
    return np.zeros(envs.n_envs, np.int64)


def returning(space: spaces.Space | None = None, *, policy: SpacePolicy = "raise", **given) -> SerialEnvs:
    """After its reset, an environment that returns what is given."""
    envs = SerialEnvs(lambda: Returning(space, **given), 1, seed=5, name="Arm-v0", on_space_violation=policy)
    envs.reset()
    return envs


@pytest.mark.parametrize("true", [True, np.True_, 1, np.int64(1), np.uint8(1)])
@pytest.mark.parametrize("word", ["terminated", "truncated"])
def test_an_end_is_a_bool_or_an_integer_0_or_1(word, true):
    envs = returning(**{word: true})
    step = envs.step(zeros(envs))
    assert (step.terminated[0], step.truncated[0]) == (word == "terminated", word == "truncated")
    envs = returning(**{word: type(true)(0)})
    step = envs.step(zeros(envs))
    assert not (step.terminated | step.truncated).any()


@pytest.mark.parametrize(
    ("end", "words"),
    [
        ("False", "'False' (str)"),
        (float("nan"), "nan (float)"),
        (1.0, "1.0 (float)"),
        (None, "None (NoneType)"),
        (2, "2 (int)"),
        (np.array([False]), "array([False]) (ndarray)"),
        (np.array([True, False]), "(ndarray)"),
        ([], "[] (list)"),
    ],
)
@pytest.mark.parametrize("word", ["terminated", "truncated"])
def test_another_end_is_a_fault(word, end, words):
    envs = returning(**{word: end})
    with pytest.raises(EnvironmentFault) as caught:
        envs.step(zeros(envs))
    assert f"{word} must be True or False, not " in str(caught.value)
    assert words in str(caught.value)
    assert caught.value.record["actions"] == [0]


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        ([1, [2]], "the reward must be one number, not [1, [2]]"),
        (torch.ones((), requires_grad=True), "the reward must be one number, not tensor"),
        ("1", "the reward must be one number, not '1'"),
        (list(range(1000)), "..."),
        (10**400, "the reward is inf"),
    ],
    ids=str,
)
def test_a_reward_that_is_none(reward, words):
    envs = returning(reward=reward)
    with pytest.raises(EnvironmentFault) as caught:
        envs.step(zeros(envs))
    assert words in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_whole_reward_may_be_larger_than_64_bits():
    envs = returning(reward=10**30)
    assert envs.step(zeros(envs)).rewards.tolist() == [1e30]


@pytest.mark.parametrize(
    ("observation", "words"),
    [
        (None, "the observation is a NoneType, not an array of numbers of shape (2,)"),
        ({"x": 1.0}, "the observation is a dict, not an array of numbers"),
        (["a", "b"], "the observation is a list of <U1, not an array of numbers"),
        (torch.ones(2, requires_grad=True), "the observation is a Tensor that cannot be made an array: "),
        ([1.0, [2.0]], "the observation is a list that cannot be made an array: "),
        (np.array([0.0, -1e39]), "observation[1] is -1e+39, too large for float32"),
    ],
    ids=["None", "dict", "text", "gradient", "ragged", "overflow"],
)
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_an_observation_that_is_none(observation, words):
    envs = returning(observation=observation)
    with pytest.raises(EnvironmentFault) as caught:
        envs.step(zeros(envs))
    assert words in str(caught.value)
    assert caught.value.record["actions"] == [0]


@pytest.mark.parametrize(("returned", "words"), [((1, 2, 3, 4), "got 4"), (None, "NoneType")])
def test_what_a_wrapper_cannot_unpack_is_told_as_the_environments_fault(returned, words):
    def make() -> gym.Env:
        env = Returning()
        env.returned = returned
        return gym.wrappers.TimeLimit(env, 10)

    envs = SerialEnvs(make, 1, seed=5)
    envs.reset()
    with pytest.raises(EnvironmentFault, match=r"step\(\) must return \(observation, reward") as caught:
        envs.step(zeros(envs))
    assert words in str(caught.value)


@pytest.mark.parametrize("policy", ["raise", "warn"])
def test_fractions_in_a_space_of_integers_are_a_fault(policy):
    space = spaces.Box(0, 10, (2,), np.int64)
    envs = returning(space, policy=policy, observation=np.array([1.0, 1.9]))
    with pytest.raises(EnvironmentFault, match=r"observation\[1\] is 1.9, but its space holds whole numbers"):
        envs.step(zeros(envs))


def test_whole_floats_in_a_space_of_integers_are_integers():
    envs = returning(spaces.Box(0, 10, (2,), np.int64), observation=np.array([1.0, 9.0]))
    observations = envs.step(zeros(envs)).observations
    assert observations.dtype == np.int64
    assert observations.tolist() == [[1, 9]]


@pytest.mark.parametrize("given", [np.array([300, -4]), np.array([300.0, -4.0]), np.array([300, -4], np.int16)])
def test_integers_that_their_type_does_not_hold_are_clipped_where_training_goes_on(given):
    envs = returning(spaces.Box(0, 255, (2,), np.uint8), policy="warn", observation=given)
    assert envs.step(zeros(envs)).observations.tolist() == [[255, 0]]
    [warning] = envs.warnings
    assert "observation[0] is 300" in warning
    assert "clipped to what uint8 holds, 0 to 255" in warning
    envs = returning(spaces.Box(0, 255, (2,), np.uint8), observation=given)
    with pytest.raises(EnvironmentFault) as caught:
        envs.step(zeros(envs))
    assert "clipped" not in str(caught.value)


def test_what_was_clipped_is_come_back_to():
    space = spaces.Box(0, 255, (2,), np.uint8)
    envs = returning(space, policy="warn", observation=np.array([300, 5]))
    envs.step(zeros(envs))
    assert returning(space, policy="warn", observation=np.array([300, 5])).restore(envs.snapshot())[1] == []


class UnspeakableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class Unshowable:
    def __repr__(self) -> str:
        raise RuntimeError("no words")


@pytest.mark.parametrize(
    ("error", "words"),
    [(UnspeakableError(), "UnspeakableError: (its message"), (ValueError("x" * 3_000_000), "ValueError: xxx")],
)
def test_what_an_exception_says_is_cut_and_may_be_unspeakable(error, words):
    envs = SerialEnvs(lambda: Raising(error), 1, seed=5)
    envs.reset()
    with pytest.raises(EnvironmentFault) as caught:
        envs.step(zeros(envs))
    assert f"step() raised {words}" in str(caught.value)
    assert "in step" in str(caught.value)
    assert len(str(caught.value)) < 6000


class Raising(Returning):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def step(self, action):
        raise self.error


def test_a_value_that_cannot_be_shown_is_named_by_its_type():
    envs = returning(reward=Unshowable())
    with pytest.raises(EnvironmentFault, match="must be one number, not Unshowable that cannot be shown"):
        envs.step(zeros(envs))
