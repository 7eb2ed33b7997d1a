"""Broken environments, each with its one problem; healthy ones without; replays of recorded faults."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from proximo.collect.check import (
    ADVICE,
    CheckReport,
    Problem,
    check_environment,
    describe_space,
    format_report,
    load_record,
    replay_record,
)
from proximo.collect.envs import EnvironmentFault, SerialEnvs
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


class TupleForSpace(Drift):
    def __init__(self) -> None:
        super().__init__()
        self.observation_space = (3,)  # type: ignore[assignment]


class SequenceActions(Drift):
    def __init__(self) -> None:
        super().__init__()
        self.action_space = spaces.Sequence(spaces.Discrete(2))


class UnboundedActions(Continuous):
    low, high = -np.inf, np.inf


class WideActions(Continuous):
    low, high = -1e6, 1e6


class FixedAction(Continuous):
    low, high = np.array([-1.0, 0.5], np.float32), np.array([1.0, 0.5], np.float32)


class OneAction(Drift):
    def __init__(self) -> None:
        super().__init__()
        self.action_space = spaces.Discrete(1)


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


class InfoIsNone(Drift):
    def step(self, action: Any) -> Any:
        return (*super().step(action)[:4], None)


class StepRaises(Drift):
    def step(self, action: Any) -> Any:
        if self.t == 7:
            return {}["missing key"]
        return super().step(action)


class StepExits(Drift):
    def step(self, action: Any) -> Any:
        raise SystemExit(3)


class FourValues(Drift):
    def step(self, action: Any) -> Any:
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, terminated or truncated, info


class ThreeValues(Drift):
    def step(self, action: Any) -> Any:
        return super().step(action)[:3]


class Hangs(Drift):
    def step(self, action: Any) -> Any:
        if self.t == 3:
            time.sleep(60)
        return super().step(action)


class ChangesAction(Continuous):
    def step(self, action: Any) -> Any:
        action *= 0.5
        return super().step(action)


class CloseRaises(Drift):
    def close(self) -> None:
        raise RuntimeError("window already gone")


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


class MixedObservation(LargeObservation):
    def observe(self) -> Any:
        return self.state * np.array([1, 1, 0.002], np.float32)


class TinyObservation(LargeObservation):
    def observe(self) -> Any:
        return self.state * np.float32(1e-4)


class ConstantPart(Drift):
    def observe(self) -> Any:
        return self.state * np.array([1, 1, 0], np.float32)


# --- rewards and ends ---


class NoReward(Drift):
    def reward(self) -> Any:
        return None


class RewardPerJoint(Drift):
    def reward(self) -> Any:
        return self.state.copy()


class RewardArray(Drift):
    def reward(self) -> Any:
        return self.state[:1].copy()


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
        return observation, reward, "yes" if terminated else "", truncated, info


class DoneIsNumber(Drift):
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
    NoObservationSpace: "space-missing",
    NoActionSpace: "space-missing",
    TupleForSpace: "space-missing",
    SequenceActions: "space-unsupported",
    UnboundedActions: "action-unbounded",
    WideActions: "action-wide",
    FixedAction: "action-empty",
    OneAction: "action-empty",
    MakeRaises: "make-raised",
    Once: "second-raised",
    ResetWithoutSeed: "reset-signature",
    ResetWithoutOptions: "reset-options",
    ResetRaises: "reset-raised",
    ResetReturnsObservation: "reset-not-a-pair",
    InfoIsNone: "info-not-a-dict",
    StepRaises: "step-raised",
    StepExits: "step-raised",
    FourValues: "step-four-values",
    ThreeValues: "step-values",
    ChangesAction: "action-changed",
    CloseRaises: "close-raised",
    TextObservation: "observation-type",
    ListObservation: "observation-not-array",
    WrongShape: "observation-shape",
    Float64: "observation-dtype",
    FloatsForIntegers: "observation-cut",
    OutOfBounds: "observation-bounds",
    NotANumber: "observation-not-finite",
    SameArray: "observation-reused",
    LargeObservation: "observation-scale",
    MixedObservation: "observation-scale",
    TinyObservation: "observation-scale",
    ConstantPart: "observation-constant",
    NoReward: "reward-not-a-number",
    RewardPerJoint: "reward-not-a-number",
    RewardArray: "reward-array",
    RewardNotANumber: "reward-not-finite",
    NeverRewarded: "reward-constant",
    LargeRewards: "reward-large",
    SmallRewards: "reward-small",
    DoneIsText: "end-not-a-boolean",
    DoneIsNumber: "end-type",
    EndsTwice: "end-both",
    TimeLimitAsEnd: "end-like-time-limit",
    NeverEnds: "endless",
    OwnChance: "not-repeatable",
    Curriculum: "survives-reset",
    SharedChance: "shared-state",
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
    assert "Nothing wrong was found" in format_report(report)


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1", "Acrobot-v1"])
def test_known_environments_have_no_errors(env_id: str) -> None:
    factory = find_factory(env_id)
    report = check_environment(lambda: make_env(factory, env_id, {}), env_id, n_steps=400)
    assert report.ok
    # Both are so: Pendulum's returns are around -1000, and random play never swings the Acrobot up.
    expected = {"CartPole-v1": set(), "Pendulum-v1": {"reward-large"}, "Acrobot-v1": {"reward-constant"}}
    assert kinds(report) == expected[env_id]


def test_a_hang_is_found_and_ends_the_check() -> None:
    began = time.monotonic()
    report = check_environment(Hangs, "Hangs", max_seconds=0.5)
    assert time.monotonic() - began < 5
    problem = only(report)
    assert (problem.kind, problem.severity) == ("hangs", "error")
    assert "time.sleep(60)" in problem.what
    assert "stopped" in report.facts


def test_somebody_elses_alarm_goes_on_after_a_check() -> None:
    handler = signal.getsignal(signal.SIGALRM)
    before, _ = signal.getitimer(signal.ITIMER_REAL)  # pytest-timeout's own, where it uses one
    check_environment(Drift, "Drift", n_steps=50)
    assert signal.getsignal(signal.SIGALRM) == handler
    after, _ = signal.getitimer(signal.ITIMER_REAL)
    assert (after > 0) == (before > 0)
    assert after <= before


def test_slow_steps_are_advised_workers_and_the_time_is_kept() -> None:
    report = check_environment(Slow, "Slow", n_steps=10**6, max_seconds=1.0)
    problem = only(report)
    assert problem.kind == "slow"
    assert "--vectorization workers" in problem.mend
    assert "time was up" in report.facts["random play"]


def test_the_place_of_a_violation_is_told() -> None:
    problem = only(check_environment(OutOfBounds, "env", n_steps=100))
    assert "observation[2] is 2.5, outside its bounds [-2, 2]; episode 0 (seed " in problem.what
    assert ", step 5." in problem.what
    assert "times)" in problem.what
    assert "OutOfBounds.__init__ (test_check.py, line " in problem.mend


def test_an_exception_is_told_with_the_environments_own_lines() -> None:
    problem = only(check_environment(StepRaises, "env", n_steps=100))
    assert "step() raised KeyError: 'missing key'" in problem.what
    assert "step 8" in problem.what
    assert 'return {}["missing key"]' in problem.what
    assert "check.py" not in problem.what.replace("test_check.py", "")


@pytest.mark.parametrize(
    ("broken", "kind"),
    [(FourValues, "step-four-values"), (ResetWithoutSeed, "reset-signature"), (ResetWithoutOptions, "reset-signature")],
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


class DictObservation(Drift):
    """A Dict space with a camera; `lose` leaves a key out, `shift` moves one number out of bounds."""

    lose = ""
    shift = 0.0

    def __init__(self) -> None:
        super().__init__()
        parts = {"joints": spaces.Box(-2, 2, (3,), np.float32), "mode": spaces.Discrete(2)}
        self.observation_space = spaces.Dict(parts)  # type: ignore[assignment]

    def observe(self) -> Any:
        observation = {"joints": self.state + np.float32(self.shift), "mode": int(self.state[0] > 0)}
        observation.pop(self.lose, None)
        return observation


class LostKey(DictObservation):
    lose = "mode"


class ShiftedJoint(DictObservation):
    shift = 2.0


def test_parts_of_a_dict_are_named() -> None:
    assert kinds(check_environment(DictObservation, "env", n_steps=120)) <= {"space-unsupported"}
    lost = [p for p in check_environment(LostKey, "env", n_steps=120).problems if p.kind != "space-unsupported"]
    assert "lacks ['mode']" in lost[0].what
    shifted = check_environment(ShiftedJoint, "env", n_steps=120)
    assert any('observation["joints"][' in p.what for p in shifted.problems if p.kind == "observation-bounds")


def test_a_rare_end_that_is_both_is_no_problem() -> None:
    class SometimesBoth(Drift):
        def step(self, action: Any) -> Any:
            observation, reward, terminated, truncated, info = super().step(action)
            return observation, reward, terminated, truncated or (terminated and self.state[0] > 0), info

    assert check_environment(SometimesBoth, "env", n_steps=120).problems == ()


def test_the_same_check_twice_says_the_same() -> None:
    one, two = (check_environment(OutOfBounds, "env", n_steps=120, seed=4) for _ in range(2))
    assert one.problems == two.problems
    assert one.facts["return"] == two.facts["return"]


def test_spaces_in_words() -> None:
    assert describe_space(spaces.Discrete(4, start=1)) == "one of 4 choices (Discrete, numbered from 1)"
    assert describe_space(spaces.Box(-1, 1, (2, 3))) == "2x3 float32 values (Box), each in [-1, 1]"
    assert describe_space(spaces.Box(-np.inf, np.inf, (1,))) == "1 float32 value (Box), without bounds"


# --- replaying a fault ---


def fault_of(broken: type[gym.Env]) -> dict[str, Any]:
    """Train-like stepping until the environment fails; its record as it would come back from a file."""
    envs = SerialEnvs(broken, 2, seed=3, first_index=4)
    try:
        envs.reset()
        for i in range(100):
            envs.step(np.array([i % 3, 1]))
    except EnvironmentFault as fault:
        return json.loads(json.dumps({"env_id": "my.py:Env", **fault.record}))
    raise AssertionError("nothing failed")


@pytest.mark.parametrize("broken", [NotANumber, OutOfBounds, StepRaises, RewardNotANumber, WrongShape, ResetRaises])
def test_a_recorded_fault_appears_again(broken: type[gym.Env]) -> None:
    record = fault_of(broken)
    text = replay_record(broken, record)
    assert "the same problem appears again" in text
    assert f"step {record['step']}" in text
    assert record["problem"].splitlines()[0] in text


@pytest.mark.parametrize("broken", [FourValues, NoReward])
def test_a_recorded_fault_of_form_appears_again(broken: type[gym.Env]) -> None:
    assert "the same problem appears again" in replay_record(broken, fault_of(broken))


def test_a_mended_environment_shows_the_problem_no_more() -> None:
    text = replay_record(Drift, fault_of(NotANumber))
    assert "does not appear again" in text
    assert "observation" in text


def test_another_problem_at_the_step_is_told_as_another() -> None:
    assert "another problem appears at that step" in replay_record(NotANumber, fault_of(OutOfBounds))


def test_an_episode_that_ends_before_is_told() -> None:
    class Short(Drift):
        def step(self, action: Any) -> Any:
            return (*super().step(action)[:2], self.t >= 2, False, {})

    assert "ended before, at step 2" in replay_record(Short, fault_of(NotANumber))


class Dies(Drift):
    def step(self, action: Any) -> Any:
        if self.t == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)


LOST = {"seed": 5, "actions": [0, 1, 2], "step": 3, "problem": "step() did not return: worker 0 was killed"}


def test_an_environment_that_took_its_process_with_it_is_replayed_apart() -> None:
    text = replay_record(Dies, LOST)
    assert "the same problem appears again" in text
    assert "SIGKILL" in text
    assert "step() with action 2" in text


def test_a_hang_appears_again_and_is_cut() -> None:
    text = replay_record(Hangs, {**LOST, "actions": [0, 1, 2, 1], "step": 4}, call_seconds=0.3)
    assert "the same problem appears again" in text
    assert "time.sleep(60)" in text


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("not json", "not JSON"),
        ("[1]", "holds a list"),
        ('{"seed": 1, "actions": []}', "lacks 'step', 'problem'"),
        ('{"seed": null, "actions": [1], "step": 1, "problem": "p"}', "cannot be replayed"),
        ('{"seed": -1, "actions": [1], "step": 1, "problem": "p"}', "'seed' is -1"),
        ('{"seed": 1, "actions": 4, "step": 1, "problem": "p"}', "'actions' is 4"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Any, content: str, says: str) -> None:
    path = tmp_path / "replay-env0-episode1.json"
    path.write_text(content)
    with pytest.raises(UserError, match=says):
        load_record(path)


def test_a_missing_file_gets_the_nearest_name(tmp_path: Any) -> None:
    (tmp_path / "replay-env0-episode1.json").write_text(json.dumps(LOST))
    with pytest.raises(UserError, match=r"Did you mean .*replay-env0-episode1\.json"):
        load_record(tmp_path / "replay-env0-episode2.json")
    assert load_record(tmp_path / "replay-env0-episode1.json") == LOST


def test_a_record_of_another_environment_is_refused() -> None:
    with pytest.raises(UserError, match="does not fit the environment's actions"):
        replay_record(Continuous, {**LOST, "problem": "the reward is nan"})
