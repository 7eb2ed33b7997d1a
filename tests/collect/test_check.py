"""Broken environments, each with its one problem; healthy ones without."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from proximo.collect.advice import ADVICE
from proximo.collect.check import CheckReport, Problem, check_environment, format_report
from proximo.collect.make import find_factory, make_env
from proximo.errors import UserError


class Drift(gym.Env):
    """Healthy: three numbers drift at random and are pushed by the action; ends when the first goes too far."""

    def __init__(self) -> None:
        self.observation_space = spaces.Box(-2.0, 2.0, (3,), np.float32)
        self.action_space: spaces.Space = spaces.Discrete(3)
        self.state = np.zeros(3, np.float32)
        self.t = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-0.5, 0.5, 3).astype(np.float32)
        self.t = 0
        return self.observe(), {}

    def step(self, action: Any) -> Any:
        self.t += 1
        push = float(np.sum(action)) - 1.0
        noise = self.np_random.uniform(-0.3, 0.3, 3)
        self.state = np.clip(self.state + 0.1 * push + noise, -1.5, 1.5).astype(np.float32)
        return self.observe(), self.reward(), abs(float(self.state[0])) > 1.2, self.t >= 40, {}

    def observe(self) -> Any:
        return self.state.copy()

    def reward(self) -> Any:
        return 1.0 - abs(float(self.state[1]))


class Continuous(Drift):
    """Healthy, with continuous actions."""

    low: Any = -1.0
    high: Any = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.action_space = spaces.Box(self.low, self.high, (2,), np.float32)

    def step(self, action: Any) -> Any:
        return super().step(np.clip(action, -1, 1))


# --- what is declared ---


class NoObservationSpace(Drift):
    def __init__(self) -> None:
        super().__init__()
        del self.observation_space


class NoActionSpace(Drift):
    def __init__(self) -> None:
        super().__init__()
        del self.action_space


class SequenceActions(Drift):
    def __init__(self) -> None:
        super().__init__()
        self.action_space = spaces.Sequence(spaces.Discrete(2))


class WideActions(Continuous):
    low, high = -1e6, 1e6


class MakeRaises(Drift):
    def __init__(self) -> None:
        raise RuntimeError("no licence found")


class Once(Drift):
    """Holds something that there is only one of."""

    port_taken = False

    def __init__(self) -> None:
        super().__init__()
        if Once.port_taken:
            raise OSError("address already in use")
        Once.port_taken = True


# --- the forms of reset and step ---


class ResetWithoutSeed(Drift):
    def reset(self) -> Any:  # type: ignore[override]
        return super().reset(seed=random.randrange(10**6))


class ResetWithoutOptions(Drift):
    def reset(self, seed: int | None = None) -> Any:  # type: ignore[override]
        return super().reset(seed=seed)


class ResetRaises(Drift):
    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        raise ValueError("no map loaded")


class ResetReturnsObservation(Drift):
    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        return super().reset(seed=seed)[0]


class StepRaises(Drift):
    def step(self, action: Any) -> Any:
        if self.t == 7:
            return {}["missing key"]
        return super().step(action)


class FourValues(Drift):
    def step(self, action: Any) -> Any:
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, terminated or truncated, info


class ThreeValues(Drift):
    def step(self, action: Any) -> Any:
        return super().step(action)[:3]


# --- observations ---


class TextObservation(Drift):
    def observe(self) -> Any:
        return "left"


class ListObservation(Drift):
    def observe(self) -> Any:
        return self.state.tolist()


class WrongShape(Drift):
    def observe(self) -> Any:
        return self.state[None].copy()


class Float64(Drift):
    def observe(self) -> Any:
        return self.state.astype(np.float64)


class FloatsForIntegers(Drift):
    def __init__(self) -> None:
        super().__init__()
        self.observation_space = spaces.Box(-2, 2, (3,), np.int8)


class OutOfBounds(Drift):
    def observe(self) -> Any:
        observation = self.state.copy()
        if self.t == 5:
            observation[2] = 2.5
        return observation


class NotANumber(Drift):
    def observe(self) -> Any:
        observation = self.state.copy()
        if self.t == 5:
            observation[1] = np.nan
        return observation


class SameArray(Drift):
    def observe(self) -> Any:
        if not hasattr(self, "buffer"):
            self.buffer = np.zeros(3, np.float32)
        self.buffer[:] = self.state
        return self.buffer


class LargeObservation(Drift):
    def __init__(self) -> None:
        super().__init__()
        self.observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)

    def observe(self) -> Any:
        return self.state * np.array([1, 1, 500], np.float32)


class ConstantPart(Drift):
    def observe(self) -> Any:
        return self.state * np.array([1, 1, 0], np.float32)


# --- rewards and ends ---


class NoReward(Drift):
    def reward(self) -> Any:
        return None


class RewardNotANumber(Drift):
    def reward(self) -> Any:
        return float("nan") if self.t == 9 else 1.0


class NeverRewarded(Drift):
    def reward(self) -> Any:
        return 0.0


class LargeRewards(Drift):
    def reward(self) -> Any:
        return 1e4 * super().reward()


class SmallRewards(Drift):
    def reward(self) -> Any:
        return 1e-5 * super().reward()


class DoneIsText(Drift):
    def step(self, action: Any) -> Any:
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, terminated, "yes" if truncated else "", info


class DoneIsInteger(Drift):
    def step(self, action: Any) -> Any:
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, int(terminated), truncated, info


class EndsTwice(Drift):
    def step(self, action: Any) -> Any:
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, terminated or truncated, terminated or truncated, info


class TimeLimitAsEnd(Drift):
    def step(self, action: Any) -> Any:
        return (*super().step(action)[:2], self.t >= 40, False, {})


class NeverEnds(Drift):
    def step(self, action: Any) -> Any:
        return (*super().step(action)[:2], False, False, {})


# --- repeatability, seeds, actions, speed ---


class OwnChance(Drift):
    def step(self, action: Any) -> Any:
        observation, reward, *ends = super().step(action)
        return observation, reward + random.random(), *ends


class Curriculum(Drift):
    """Starts a little farther away with each episode."""

    episodes = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.episodes += 1
        self.state += np.float32(0.5 * (1 - 0.9**self.episodes))
        return self.observe(), {}


class SharedChance(Drift):
    """Seeds the numbers of the whole process, as environments of old did."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        np.random.seed(seed)
        return super().reset(seed=seed)

    def reward(self) -> Any:
        return np.random.uniform()


class ChangesAction(Continuous):
    def step(self, action: Any) -> Any:
        action *= 0.5
        return super().step(action)


class SeedIgnored(Drift):
    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        return super().reset(seed=5)


class ActionIgnored(Drift):
    def step(self, action: Any) -> Any:
        return super().step(1)


class Slow(Drift):
    def step(self, action: Any) -> Any:
        time.sleep(0.002)
        return super().step(action)


BROKEN = {
    MakeRaises: "make-raised",
    Once: "second-raised",
    NoObservationSpace: "space-unsupported",
    NoActionSpace: "space-unsupported",
    SequenceActions: "space-unsupported",
    WideActions: "action-bounds",
    ResetWithoutSeed: "reset-signature",
    ResetRaises: "raised",
    ResetReturnsObservation: "reset-values",
    StepRaises: "raised",
    FourValues: "step-values",
    ThreeValues: "step-values",
    TextObservation: "observation-shape",
    WrongShape: "observation-shape",
    ListObservation: "observation-dtype",
    Float64: "observation-dtype",
    FloatsForIntegers: "observation-cut",
    NotANumber: "not-finite",
    OutOfBounds: "observation-bounds",
    SameArray: "observation-reused",
    LargeObservation: "observation-scale",
    ConstantPart: "observation-constant",
    NoReward: "reward-not-a-number",
    RewardNotANumber: "not-finite",
    NeverRewarded: "reward-constant",
    LargeRewards: "reward-scale",
    SmallRewards: "reward-scale",
    DoneIsText: "end-value",
    DoneIsInteger: "end-type",
    EndsTwice: "end-both",
    TimeLimitAsEnd: "end-like-time-limit",
    NeverEnds: "endless",
    OwnChance: "not-repeatable",
    Curriculum: "not-repeatable",
    SharedChance: "not-repeatable",
    ChangesAction: "not-repeatable",
    SeedIgnored: "seed-ignored",
    ActionIgnored: "action-ignored",
}


def kinds(report: CheckReport) -> set[str]:
    return {problem.kind for problem in report.problems}


def only(report: CheckReport) -> Problem:
    assert len(report.problems) == 1, [problem.what for problem in report.problems]
    return report.problems[0]


@pytest.mark.parametrize("broken", BROKEN, ids=lambda c: c.__name__)
def test_a_broken_environment_has_its_one_problem_and_no_other(broken: type[gym.Env]) -> None:
    report = check_environment(broken, "Broken", n_steps=150)
    problem = only(report)
    assert problem.kind == BROKEN[broken]
    assert problem.severity == ADVICE[problem.kind].severity
    assert report.ok == (problem.severity == "warning")
    assert problem.why
    assert problem.mend
    text = format_report(report)
    assert problem.severity.upper() in text
    assert max(len(line) for line in text.splitlines() if "/" not in line) <= 100
    assert json.loads(json.dumps(report.facts)) == report.facts


@pytest.mark.parametrize("healthy", [Drift, Continuous], ids=lambda c: c.__name__)
def test_a_healthy_environment_has_no_problem(healthy: type[gym.Env]) -> None:
    report = check_environment(healthy, "Healthy", n_steps=400)
    assert report.problems == ()
    assert report.facts["random play"].startswith("400 steps")
    assert report.facts["repeatable"].startswith("yes")
    assert {"observations", "actions", "episode length", "return", "reward", "speed"} <= set(report.facts)
    assert "Nothing wrong was found" in format_report(report)


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1", "Acrobot-v1"])
def test_known_environments_have_no_errors(env_id: str) -> None:
    factory = find_factory(env_id)
    report = check_environment(lambda: make_env(factory, env_id, {}), env_id, n_steps=400)
    assert report.ok
    # Both are so: Pendulum's returns are around -1000, and random play never swings the Acrobot up.
    expected = {"CartPole-v1": set(), "Pendulum-v1": {"reward-scale"}, "Acrobot-v1": {"reward-constant"}}
    assert kinds(report) == expected[env_id]


def test_slow_steps_are_advised_workers_and_the_time_is_kept() -> None:
    report = check_environment(Slow, "Slow", n_steps=10**6, max_seconds=1.0)
    problem = only(report)
    assert problem.kind == "slow"
    assert "--vectorization workers" in problem.mend
    assert "time was up" in report.facts["random play stopped"]


def test_the_place_of_a_violation_is_told() -> None:
    problem = only(check_environment(OutOfBounds, "env", n_steps=100))
    assert "observation[2] is 2.5, outside its space's bounds" in problem.what
    assert "; step 5 after reset(seed=" in problem.what


def test_an_exception_is_told_with_the_environments_own_lines() -> None:
    problem = only(check_environment(StepRaises, "env", n_steps=100))
    assert "step() raised KeyError: 'missing key'" in problem.what
    assert "step 8" in problem.what
    assert 'return {}["missing key"]' in problem.what
    assert "check.py" not in problem.what.replace("test_check.py", "")


@pytest.mark.parametrize(
    ("broken", "kind"),
    [(FourValues, "step-values"), (ResetWithoutSeed, "reset-signature"), (ResetWithoutOptions, "reset-signature")],
)
def test_old_forms_are_named_also_below_wrappers(broken: type[gym.Env], kind: str) -> None:
    report = check_environment(lambda: gym.wrappers.TimeLimit(broken(), 30), "Wrapped", n_steps=300)
    assert only(report).kind == kind


def test_a_time_limit_makes_an_endless_environment_fit() -> None:
    report = check_environment(lambda: gym.wrappers.TimeLimit(NeverEnds(), 50), "Limited", n_steps=300)
    assert report.problems == ()
    assert report.facts["time limit"] == "50 steps"
    assert "6 truncated" in report.facts["ends"]


def test_what_is_no_environment_is_refused() -> None:
    assert only(check_environment(lambda: 3, "three")).kind == "not-an-environment"  # type: ignore[arg-type, return-value]


def test_what_make_env_says_is_kept() -> None:
    def make() -> gym.Env:
        raise UserError("box2d is not installed")

    assert "box2d is not installed" in only(check_environment(make, "env")).what


def test_every_advice_is_given_to_somebody() -> None:
    assert set(BROKEN.values()) | {"not-an-environment", "slow"} == set(ADVICE)


def test_the_same_check_twice_says_the_same() -> None:
    one, two = (check_environment(OutOfBounds, "env", n_steps=120, seed=4) for _ in range(2))
    assert one.problems == two.problems
    assert one.facts["return"] == two.facts["return"]


@pytest.mark.parametrize(
    ("settings", "word"), [({"seed": -1}, "seed"), ({"n_steps": -5}, "steps"), ({"n_steps": 0}, "steps")]
)
def test_impossible_numbers_are_refused(settings: dict[str, int], word: str) -> None:
    with pytest.raises(UserError, match=f"^{word} is .* it must be a whole number"):
        check_environment(Drift, "env", **settings)


def test_a_value_too_large_for_float32_is_told_as_it_is() -> None:
    class Huge(Drift):
        def observe(self) -> Any:
            return np.array([0, 0, 1e39]) if self.t == 5 else self.state.astype(np.float64)

    report = check_environment(Huge, "env", n_steps=100)
    [problem] = [problem for problem in report.problems if problem.kind == "not-finite"]
    assert "observation[2] is 1e+39, too large for float32" in problem.what


def test_an_empty_space_is_an_error() -> None:
    class Blind(Drift):
        def __init__(self) -> None:
            super().__init__()
            self.observation_space = spaces.Box(-1, 1, (0,), np.float32)

    problem = only(check_environment(Blind, "env", n_steps=100))
    assert problem.kind == "space-unsupported"
    assert "holds no numbers" in problem.what
