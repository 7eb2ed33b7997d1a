"""What is wrong with an environment, in plain words, before training on it (`proximo check-env`).

`check_environment` plays random actions and looks at everything that training will rely on: the spaces, what
reset and step return, rewards, ends, seeds. `replay_record` plays an episode again in which training failed.
Every text about a kind of problem stands in `ADVICE`; the functions below it only find them.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
import multiprocessing
import signal
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces

from proximo.collect.envs import SpaceCheck, episode_seed
from proximo.errors import UserError, nearest
from proximo.models.control import ActorCritic, NetworkConfig

Severity = Literal["error", "warning"]

KEPT_STEPS = 300
"""So many of the first steps of random play are kept, to be played again and compared."""
KEPT_BYTES = 32_000_000
"""Fewer are kept where their observations are larger than this together."""
MANY_VALUES = 12
"""The ranges of so many observation values are listed one by one."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong (`error`: training fails or learns the wrong thing) or doubtful (`warning`)."""

    severity: Severity
    kind: str
    """A short fixed name, such as `observation-bounds`; the keys of `ADVICE`."""
    what: str
    """What was seen: value, key or index, bound, episode and step."""
    why: str
    """Why it matters."""
    mend: str
    """What to change, and where."""


@dataclass(frozen=True)
class CheckReport:
    """What `check_environment` found."""

    name: str
    problems: tuple[Problem, ...]
    """Errors first, each kind in the order it was found."""
    facts: dict[str, str]
    """What random play has shown, in words: spaces, lengths, returns, speed, ranges."""

    @property
    def ok(self) -> bool:
        """Whether there is no error; there may be warnings."""
        return not any(problem.severity == "error" for problem in self.problems)


class Advice(NamedTuple):
    """What is always the same about a kind of problem; {init}, {reset} and {step} become places in the code."""

    severity: Severity
    why: str
    mend: str


ADVICE: dict[str, Advice] = {
    # --- making it, and what it declares ---
    "make-raised": Advice("error", "Without the environment there is nothing to learn from.", "See the message."),
    "not-an-environment": Advice(
        "error",
        "Proximo calls reset(seed=...) and step(action) as gymnasium.Env defines them.",
        "Derive the class from gymnasium.Env (`import gymnasium as gym`; the old `gym` package is another one).",
    ),
    "second-raised": Advice(
        "error",
        "Training makes n_envs environments in one process, and resuming makes them again.",
        "Let every instance have its own ports, files and windows; or train with --n-envs 1.",
    ),
    "space-missing": Advice(
        "error",
        "The spaces tell how large the networks must be.",
        "Set self.observation_space and self.action_space in {init}, for example gymnasium.spaces.Box(...).",
    ),
    "space-unsupported": Advice("error", "Proximo has no networks for such a space.", ""),
    "action-sampling": Advice(
        "error", "A random action could not be drawn from the action space.", "Mend self.action_space in {init}."
    ),
    "action-unbounded": Advice(
        "warning",
        "The policy begins with actions around 0 with standard deviation 1; if useful ones are far larger or "
        "smaller it must find that out first, and nothing keeps it from extreme ones.",
        "Declare finite bounds in {init}, best spaces.Box(-1, 1, ...), and scale the action in {step}.",
    ),
    "action-wide": Advice(
        "warning",
        "Proximo maps -1 and 1 of the policy onto the bounds, so that nearly every action will be extreme.",
        "Declare the range in which actions are useful in {init}.",
    ),
    "action-empty": Advice(
        "warning",
        "There is nothing to choose, so nothing about it can be learned.",
        "Give self.action_space in {init} room, or leave this action out.",
    ),
    # --- the forms of reset and step ---
    "reset-signature": Advice(
        "error",
        "Every episode is begun with reset(seed=...), and wrappers such as a time limit pass options= on.",
        "Write `def reset(self, *, seed=None, options=None):` and begin with `super().reset(seed=seed)` in {reset}.",
    ),
    "reset-options": Advice(
        "warning",
        "Wrappers (a time limit, every gymnasium.make) call reset(seed=..., options=...) and would fail.",
        "Write `def reset(self, *, seed=None, options=None):` in {reset}.",
    ),
    "reset-raised": Advice("error", "Training stops at the first exception.", "Mend {reset} at the line shown."),
    "reset-not-a-pair": Advice(
        "error",
        "The first part is read as the observation, the second as the info.",
        "End {reset} with `return observation, {{}}`.",
    ),
    "info-not-a-dict": Advice(
        "warning",
        "Wrappers and vector environments read keys from it and fail.",
        "Return a dict as the last value in {reset} and {step}, an empty one if there is nothing to say.",
    ),
    "step-raised": Advice("error", "Training stops at the first exception.", "Mend {step} at the line shown."),
    "step-four-values": Advice(
        "error",
        "The old gym's `done` has become two values, since a time limit must not be learned as an end.",
        "End {step} with `return observation, reward, terminated, truncated, info`: terminated if the task ended "
        "by itself, truncated if it was cut from outside.",
    ),
    "step-values": Advice(
        "error",
        "Training unpacks five values.",
        "End {step} with `return observation, reward, terminated, truncated, info`.",
    ),
    "hangs": Advice(
        "error",
        "Training would wait for it for ever.",
        "The lines shown say where it was; give what it waits for a time limit.",
    ),
    "action-changed": Advice(
        "warning",
        "The array belongs to the caller, which keeps it: resuming plays the same actions again.",
        "Begin {step} with `action = action.copy()`, or write `action = action * 2` for `action *= 2`.",
    ),
    "close-raised": Advice("warning", "It leaves windows or processes open.", "Mend close()."),
    # --- observations ---
    "observation-type": Advice(
        "error", "It cannot be read as an array of numbers.", "Return a numpy array in {reset} and {step}."
    ),
    "observation-not-array": Advice(
        "warning",
        "Proximo reads it, more slowly; its number type is left open, and other tools refuse it.",
        "Return np.array(observation, dtype=self.observation_space.dtype) in {reset} and {step}.",
    ),
    "observation-structure": Advice(
        "error",
        "The networks are built for what the space declares.",
        "Make what {reset} and {step} return fit self.observation_space, or mend the space in {init}.",
    ),
    "observation-shape": Advice(
        "error",
        "The networks are built for the declared shape.",
        "Mend the shape in self.observation_space ({init}), or what {reset} and {step} return.",
    ),
    "observation-dtype": Advice(
        "warning",
        "Proximo converts it at every step; other tools refuse it, and space.contains() is False.",
        "Return observation.astype(self.observation_space.dtype) in {reset} and {step}, or declare the type you mean.",
    ),
    "observation-cut": Advice(
        "error",
        "Everything behind the decimal point is lost before the policy sees it.",
        "Declare self.observation_space with dtype=np.float32 in {init}.",
    ),
    "observation-not-finite": Advice(
        "error",
        "One such number makes every weight NaN; training stops at it.",
        "Look in {step} for a division by 0, a square root or logarithm of a negative number, or a value that grows "
        "without limit. The seed and step above lead there again.",
    ),
    "observation-bounds": Advice(
        "error",
        "A space that does not hold is mostly a mistake in units or in an index; training stops at it.",
        "Widen low/high of self.observation_space in {init}, or clip the observation in {step}; "
        "--on-space-violation warn lets training go on.",
    ),
    "observation-reused": Advice(
        "warning",
        "Proximo copies observations at once, but whoever keeps one (other tools, your own code) sees it change.",
        "Return self.state.copy() (whatever the array is called) in {reset} and {step}.",
    ),
    "observation-scale": Advice(
        "warning",
        "A network learns slowly from inputs that are far from 1, and overlooks the small ones beside the large.",
        "Train with --normalize-observations, or bring the values to about [-1, 1] in {reset} and {step}.",
    ),
    "observation-constant": Advice(
        "warning",
        "A value that never changes tells the policy nothing. (Random play may just not get to where it does.)",
        "If it should change, look at where it is written in {step}.",
    ),
    # --- rewards ---
    "reward-not-a-number": Advice("error", "The reward must be one number.", "Return float(reward) in {step}."),
    "reward-array": Advice(
        "warning", "It works by luck of its size; other tools refuse it.", "Return float(reward) in {step}."
    ),
    "reward-not-finite": Advice(
        "error",
        "One such number makes every weight NaN; training stops at it.",
        "Look in {step} for a division by 0 or a value that grows without limit.",
    ),
    "reward-constant": Advice(
        "warning",
        "Where no action earns more than another there is nothing to learn; if a rare reward exists, learning waits "
        "until chance finds it.",
        "Reward progress too in {step} (a little for coming nearer), or make the goal easier to find at first.",
    ),
    "reward-large": Advice(
        "warning",
        "The value function has to reach numbers of that size, and its loss drowns the policy's.",
        "Train with --normalize-rewards, or divide the reward in {step}.",
    ),
    "reward-small": Advice(
        "warning",
        "The value function's errors are as large as the rewards themselves.",
        "Train with --normalize-rewards, or multiply the reward in {step}.",
    ),
    # --- ends ---
    "end-not-a-boolean": Advice(
        "error",
        "Proximo asks whether it is true: any non-empty text and any number but 0 is, and None is not.",
        "Return bool(terminated), bool(truncated) in {step}.",
    ),
    "end-type": Advice(
        "warning", "Proximo converts it; other tools refuse it.", "Return bool(terminated), bool(truncated) in {step}."
    ),
    "end-both": Advice(
        "warning",
        "Such an end counts as terminated: what lies behind a time limit is then learned to be worth nothing.",
        "In {step} let `terminated` mean that the task itself ended, and `truncated` that time ran out.",
    ),
    "end-like-time-limit": Advice(
        "warning",
        "If that is a time limit, it must be `truncated`: a terminated state is learned to be worth nothing.",
        "In {step} return terminated=False, truncated=True where only time ran out; or leave the limit out and train "
        "with --max-episode-steps.",
    ),
    "endless": Advice(
        "warning",
        "Returns are counted per episode: none would be shown, and a stuck environment stays stuck.",
        "Train with --max-episode-steps 1000 (say), or let {step} end the episode.",
    ),
    # --- repeatability, seeds, actions ---
    "not-repeatable": Advice(
        "warning",
        "A resumed run cannot come back to the same step, a fault cannot be replayed, results cannot be compared.",
        "Draw every random number from self.np_random, and call super().reset(seed=seed) first in {reset}; "
        "no random, np.random, time or hash().",
    ),
    "survives-reset": Advice(
        "warning",
        "A resumed run, which begins with fresh environments, cannot come back to the same step.",
        "Set everything that an episode changes anew in {reset} (counters, lists, curricula).",
    ),
    "shared-state": Advice(
        "warning",
        "Training plays several environments side by side: they disturb each other.",
        "Move what the instances share (attributes of the class, module variables, np.random) into self in {init}.",
    ),
    "seed-ignored": Advice(
        "warning",
        "All environments play the same episode, so n_envs of them show no more than one. Harmless if the task is "
        "meant to be without chance.",
        "Otherwise draw the start from self.np_random after super().reset(seed=seed) in {reset}.",
    ),
    "action-ignored": Advice(
        "warning", "Nothing the policy does makes a difference.", "Look at what {step} does with `action`."
    ),
    "slow": Advice(
        "warning",
        "The environment, not learning, will take most of the time.",
        "Train with --vectorization workers, which spreads the environments over the cores.",
    ),
}


# --- the check ------------------------------------------------------------------------------------------------


def check_environment(
    make: Callable[[], gym.Env], name: str, *, n_steps: int = 2000, seed: int = 0, max_seconds: float = 20.0
) -> CheckReport:
    """Play random actions for `n_steps` and say what is wrong or doubtful about an environment.

    Stops after about `max_seconds`, and at a call that is not back after as long (where the platform has
    SIGALRM). What the environment raises becomes a problem of the report.

    Args:
        make: makes one environment, as training would make it; called up to twice.
        name: what it is called in the report.
        n_steps: steps of random play.
        seed: seeds the random actions and the episodes.
        max_seconds: wall time for everything.
    """
    began = time.monotonic()
    findings = _Findings()
    env = _made(make, findings, "make-raised", max_seconds)
    if env is not None:
        findings.places = _places(env)
        player = _Player(env, findings, _Budget(began, max_seconds))
        try:
            _run(make, player, n_steps, seed)
        except _Hung:
            findings.facts["stopped"] = "at a call that did not come back; later checks were left out"
        _close(player)
    findings.facts["this check took"] = f"{time.monotonic() - began:.1f} s"
    return findings.report(name)


def _run(make: Callable[[], gym.Env], player: _Player, n_steps: int, seed: int) -> None:
    """All checks of an environment that could be made, one after the other."""
    _check_spaces(player)
    facts = player.findings.facts
    limit = _time_limit_of(player.env)
    facts["time limit"] = "none" if limit is None else f"{limit:,} steps"
    if player.action_space is None:
        facts["random play"] = "none: without an action space no action can be chosen"
        return
    play = _play(player, n_steps, seed)
    try:
        _check_repeatability(make, player, play)
    except _OutOfTime:
        facts["repeatable"] = "not fully checked, for lack of time"
    _check_ends(player.findings, play, limit, n_steps)
    _check_rewards(player.findings, play)
    for path in sorted(player.box_paths & set(play.moments)):
        _check_values(player.findings, path, play.moments[path])
    _check_speed(player.findings, play)
    _state_facts(player, play, n_steps, seed)


class _Failed(Exception):  # noqa: N818
    """A call raised, and its problem is noted."""


class _Hung(Exception):  # noqa: N818
    """A call did not come back, and its problem is noted."""


class _WentBelow(Exception):  # noqa: N818
    """A wrapper could not read what the environment returned; the player has left the wrappers out."""


class _OutOfTime(Exception):  # noqa: N818
    """The time for the whole check is up."""


class _TookTooLong(BaseException):
    """Breaks into a call of the environment; no `except Exception` in there holds it up."""


class _Findings:
    """Problems and facts as they come; each kind is kept once, for the first time it was seen."""

    def __init__(self) -> None:
        self.facts: dict[str, str] = {}
        self.places: dict[str, str] = dict.fromkeys(("init", "reset", "step"), "the environment")
        self._problems: dict[tuple[str, str], Problem] = {}
        self._times: dict[tuple[str, str], int] = {}

    def add(self, kind: str, what: str, *, subject: str = "", mend: str = "") -> None:
        """Note a problem; one kind counts separately for each `subject`."""
        key = (kind, subject)
        self._times[key] = self._times.get(key, 0) + 1
        if key not in self._problems:
            advice = ADVICE[kind]
            mend = mend or advice.mend.format(**self.places)
            self._problems[key] = Problem(advice.severity, kind, what, advice.why, mend)

    def has(self, *kinds: str) -> bool:
        """Whether a problem of one of these kinds was noted."""
        return any(kind in kinds for kind, _ in self._problems)

    def report(self, name: str) -> CheckReport:
        """Sort the errors to the front, and say how often each was seen."""
        problems = []
        for key, problem in self._problems.items():
            times = self._times[key]
            first, newline, rest = problem.what.partition("\n")
            counted = f"{first} (the first of {times:,} times)" if times > 1 else first
            problems.append(replace(problem, what=counted + newline + rest))
        problems.sort(key=lambda problem: problem.severity != "error")
        return CheckReport(name, tuple(problems), dict(self.facts))


@dataclass(frozen=True)
class _Budget:
    """Wall time: random play may take its first 60 percent, the rest of the checks what is left."""

    began: float
    max_seconds: float

    def spent(self, share: float = 1.0) -> bool:
        return time.monotonic() - self.began >= share * self.max_seconds


# --- calling the environment ----------------------------------------------------------------------------------


class _Outcome(NamedTuple):
    """What one step led to: each part of the observation by its name, the reward, the ends."""

    parts: dict[str, np.ndarray]
    reward: float
    terminated: bool
    truncated: bool


class _Player:
    """Calls one environment, and notes whatever is not as Gymnasium and the spaces ask for."""

    def __init__(self, env: gym.Env, findings: _Findings, budget: _Budget) -> None:
        """One call may take as long as `budget` has for everything; no call is begun when it is spent."""
        self.env = env
        self.findings = findings
        self.budget = budget
        self.observation_space: spaces.Space | None = None
        self.action_space: spaces.Space | None = None
        self.step_seconds = 0.0
        self.is_below = False
        self._reset_accepts = _reset_keywords(env)
        self._given: dict[str, tuple[np.ndarray, bytes]] = {}
        self._bounds: dict[str, SpaceCheck] = {}

    def reset(self, seed: int, where: str) -> dict[str, np.ndarray]:
        """Begin an episode; return the parts of the first observation."""
        if self._reset_accepts != {"seed", "options"}:
            self._note_signature()
        kwargs = {key: value for key, value in (("seed", seed), ("options", None)) if key in self._reset_accepts}
        where = f"{where}, reset()"
        result = self._call("reset", where, kwargs=kwargs)
        observation = result
        if not (isinstance(result, tuple) and len(result) == 2):
            self.findings.add(
                "reset-not-a-pair", f"reset() returned {_shown(result)}, not the pair (observation, info); {where}."
            )
            if isinstance(result, tuple) and result:
                observation = result[0]
        else:
            observation = result[0]
            self._check_info(result[1], where)
        return self._parts(observation, where)

    def step(self, action: Any, where: str) -> _Outcome:
        """Take one action; `step_seconds` is then how long the environment took."""
        given = copy.deepcopy(action)
        result = self._call("step", where, given)
        if isinstance(action, np.ndarray) and action.tobytes() != np.asarray(given).tobytes():
            self.findings.add(
                "action-changed", f"step() changed the array it was given from {action} to {given}; {where}."
            )
        if isinstance(result, tuple) and len(result) == 4:
            self.findings.add(
                "step-four-values",
                f"step() returned 4 values, as the old gym did (observation, reward, done, info); {where}.",
            )
            result = (*result[:3], False, result[3])
        if not (isinstance(result, tuple) and len(result) == 5):
            count = f"{len(result)} values" if isinstance(result, tuple) else _shown(result)
            self.findings.add("step-values", f"step() returned {count}, not 5 values; {where}.")
            raise _Failed
        observation, reward, terminated, truncated, info = result
        parts = self._parts(observation, where)
        self._check_info(info, where)
        number = _check_reward(self.findings, reward, where)
        ends = [
            _check_end(self.findings, word, value, where)
            for word, value in (("terminated", terminated), ("truncated", truncated))
        ]
        return _Outcome(parts, number, *ends)

    def go_below(self) -> None:
        """Leave the wrappers out from now on."""
        self.env = _base(self.env)
        self.is_below = True

    @property
    def box_paths(self) -> set[str]:
        """The parts of the observation that are a Box."""
        return set(self._bounds)

    def _call(self, method: str, where: str, *args: Any, kwargs: dict[str, Any] | None = None) -> Any:
        """Call the environment, turning what it raises, and not coming back, into a problem."""
        if self.budget.spent():
            raise _OutOfTime
        try:
            with _limited(self.budget.max_seconds):
                began = time.perf_counter()
                result = getattr(self.env, method)(*args, **(kwargs or {}))
                self.step_seconds = time.perf_counter() - began
                return result
        except _TookTooLong as error:
            what = f"{method}() was not back after {self.budget.max_seconds:g} s; {where}{_given(args)}."
            self.findings.add("hangs", f"{what}\n{_own_traceback(error, message=False)}", subject=method)
            raise _Hung from error
        except (Exception, SystemExit) as error:
            if method == "step" and isinstance(self.env, gym.Wrapper) and "to unpack" in str(error):
                self.go_below()
                raise _WentBelow from error
            what = f"{method}() raised {type(error).__name__}: {error} ({where}{_given(args)})"
            self.findings.add(f"{method}-raised", f"{what}\n{_own_traceback(error)}")
            raise _Failed from error

    def _note_signature(self) -> None:
        """Say what reset() does not take, and go on below the wrappers, which need it."""
        if self.findings.has("reset-signature", "reset-options"):
            return
        missing = " and ".join(f"{key}=" for key in ("seed", "options") if key not in self._reset_accepts)
        wrapped = isinstance(self.env, gym.Wrapper)
        kind = "reset-signature" if wrapped or "seed" not in self._reset_accepts else "reset-options"
        self.findings.add(kind, f"reset() does not take {missing}.")
        self.go_below()

    def _check_info(self, info: Any, where: str) -> None:
        if not isinstance(info, dict):
            self.findings.add("info-not-a-dict", f"the info is {_shown(info)}, not a dict; {where}.")

    def _parts(self, observation: Any, where: str) -> dict[str, np.ndarray]:
        """Check an observation; return a copy of each of its parts by name."""
        for path, (array, before) in self._given.items():
            if array.tobytes() != before:
                self.findings.add(
                    "observation-reused",
                    f"{path} is the same array as at the step before, written over; {where}.",
                    subject=path,
                )
        self._given = {}
        parts = {}
        space = self.observation_space
        leaves = [("observation", None, observation)] if space is None else _leaves(space, observation, "observation")
        for path, part_space, value in leaves:
            if isinstance(value, np.ndarray):
                self._given[path] = (value, value.tobytes())
            if isinstance(part_space, spaces.Box):
                if path not in self._bounds:
                    self._bounds[path] = SpaceCheck.of(part_space)
                _check_box(self.findings, part_space, self._bounds[path], value, path, where)
            elif part_space is not None:
                _check_member(self.findings, part_space, value, path, where)
            parts[path] = _as_array(value)
        return parts


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Break into what runs inside after so many seconds; no limit outside the main thread or on Windows."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise _TookTooLong

    handler = signal.signal(signal.SIGALRM, stop)
    began = time.monotonic()
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if handler is None else handler)
        if left:  # somebody else's alarm (pytest-timeout's, for one) goes on where it was
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - began), 0.001), interval)


def _made(make: Callable[[], gym.Env], findings: _Findings, kind: str, seconds: float) -> gym.Env | None:
    """Make an environment, or note why it cannot be made."""
    try:
        with _limited(seconds):
            env = make()
    except _TookTooLong as error:
        what = f"making the environment was not done after {seconds:g} s."
        findings.add("hangs", f"{what}\n{_own_traceback(error, message=False)}", subject="make")
        return None
    except UserError as error:
        findings.add(kind, f"the environment could not be made: {error}")
        return None
    except (Exception, SystemExit) as error:
        what = f"making the environment raised {type(error).__name__}: {error}"
        findings.add(kind, f"{what}\n{_own_traceback(error)}")
        return None
    if isinstance(env, gym.Env):
        return env
    module = type(env).__module__.split(".")[0]
    old = " of the old gym package" if module == "gym" else ""
    findings.add("not-an-environment", f"what was made is a {type(env).__name__}{old}, not a gymnasium.Env.")
    return None


def _close(player: _Player) -> None:
    try:
        with _limited(5.0):
            player.env.close()
    except _TookTooLong as error:
        what = "close() was not back after 5 s."
        player.findings.add("hangs", f"{what}\n{_own_traceback(error, message=False)}", subject="close")
    except (Exception, SystemExit) as error:
        what = f"close() raised {type(error).__name__}: {error}"
        player.findings.add("close-raised", f"{what}\n{_own_traceback(error)}")


def _base(env: gym.Env) -> gym.Env:
    """The environment below all wrappers."""
    while isinstance(env, gym.Wrapper):
        env = env.env
    return env


def _time_limit_of(env: gym.Env) -> int | None:
    """After how many steps a wrapper (of gymnasium.make, or --max-episode-steps) truncates."""
    limits = []
    while isinstance(env, gym.Wrapper):
        if isinstance(env, gym.wrappers.TimeLimit):
            limits.append(int(env._max_episode_steps))
        env = env.env
    return min(limits, default=None)


def _reset_keywords(env: gym.Env) -> set[str]:
    """Which of `seed` and `options` the environment's own reset takes."""
    wanted = {"seed", "options"}
    try:
        parameters = inspect.signature(_base(env).reset).parameters.values()
    except (TypeError, ValueError):  # not written in Python: calling it will tell
        return wanted
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return wanted
    return wanted & {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}


def _places(env: gym.Env) -> dict[str, str]:
    """Where the methods that a person may have to change are written."""
    owner = type(_base(env))
    places = {}
    for key, method in (("init", "__init__"), ("reset", "reset"), ("step", "step")):
        code = getattr(getattr(owner, method, None), "__code__", None)
        line = f".{method} ({Path(code.co_filename).name}, line {code.co_firstlineno})" if code else ""
        places[key] = owner.__name__ + line
    return places


def _own_traceback(error: BaseException, *, message: bool = True) -> str:
    """The last lines of the environment's part of a traceback."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    lines = traceback.format_list(frames[-3:])
    lines += traceback.format_exception_only(error)[-1:] if message else []
    return "".join(lines).rstrip()


# --- what is declared -----------------------------------------------------------------------------------------


def _check_spaces(player: _Player) -> None:
    """Both spaces must be there, be spaces, and be of a kind that Proximo's networks know."""
    findings = player.findings
    usable: dict[str, spaces.Space] = {}
    for word in ("observation", "action"):
        try:
            space = getattr(player.env, f"{word}_space")
        except Exception:  # most often an AttributeError, but a property may raise anything
            space = None
        if isinstance(space, spaces.Space):
            usable[word] = space
            findings.facts[f"{word}s"] = describe_space(space)
        elif space is None:
            findings.add("space-missing", f"the environment has no {word}_space.", subject=word)
        else:
            kind = f"{type(space).__module__.split('.')[0]}.{type(space).__name__}"
            what = f"{word}_space is {_shown(space)} (a {kind}), not a gymnasium.spaces.Space."
            findings.add("space-missing", what, subject=word)
    player.observation_space = usable.get("observation")
    player.action_space = usable.get("action")
    harmless = {"observation": spaces.Box(-1, 1, (1,)), "action": spaces.Discrete(2)}
    for word, space in usable.items():
        both = {**harmless, word: space}
        config = NetworkConfig(hidden_sizes=(1,), orthogonal_init=False)
        try:
            ActorCritic(both["observation"], both["action"], config, torch.Generator().manual_seed(0))
        except Exception as error:
            what = f"the {word} space is {describe_space(space)}."
            findings.add("space-unsupported", what, subject=word, mend=str(error))
    if isinstance(player.action_space, (spaces.Discrete, spaces.Box)):
        _check_action_space(findings, player.action_space)


def _check_action_space(findings: _Findings, space: spaces.Discrete | spaces.Box) -> None:
    if isinstance(space, spaces.Discrete):
        if space.n == 1:
            findings.add("action-empty", "the action space has a single action.")
        return
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    bounded = np.isfinite(low) & np.isfinite(high)
    with np.errstate(all="ignore"):
        width = np.where(bounded, high - low, 0.0)
    shown = np.array([_index("action", int(i), space.shape) for i in range(low.size)])
    unbounded, wide, empty = (~bounded).ravel(), (width > 1e4).ravel(), (bounded & (high <= low)).ravel()
    if unbounded.any():
        findings.add("action-unbounded", f"without finite bounds: {_names(shown[unbounded], low.size)}.")
    if wide.any():
        i = int(np.argmax(width))
        bounds = f"[{low.ravel()[i]:.4g}, {high.ravel()[i]:.4g}]"
        findings.add("action-wide", f"with very wide bounds, such as {bounds}: {_names(shown[wide], low.size)}.")
    if empty.any():
        findings.add("action-empty", f"low and high are the same: {_names(shown[empty], low.size)}.")


def describe_space(space: spaces.Space) -> str:
    """A space in a few words."""
    if isinstance(space, spaces.Discrete):
        start = f", numbered from {int(space.start)}" if space.start else ""
        return f"one of {int(space.n)} choices (Discrete{start})"
    if isinstance(space, spaces.Box):
        size = int(np.prod(space.shape))
        kind = "values" if size != 1 else "value"
        shape = "x".join(map(str, space.shape)) if len(space.shape) > 1 else str(size)
        return f"{shape} {space.dtype} {kind} (Box), {_bounds_in_words(space)}"
    if isinstance(space, spaces.Dict):
        parts = "; ".join(f"{key!r}: {describe_space(part)}" for key, part in space.spaces.items())
        return f"a Dict of {parts}"
    if isinstance(space, spaces.Tuple):
        return "a Tuple of " + "; ".join(describe_space(part) for part in space.spaces)
    return str(space)


def _bounds_in_words(space: spaces.Box) -> str:
    low, high = space.low.ravel().astype(np.float64), space.high.ravel().astype(np.float64)
    if not low.size:
        return "empty"
    if not (np.isfinite(low).any() or np.isfinite(high).any()):
        return "without bounds"
    if (low == low[0]).all() and (high == high[0]).all():
        return f"each in [{low[0]:.4g}, {high[0]:.4g}]"
    if low.size <= MANY_VALUES:
        return "in " + ", ".join(f"[{a:.4g}, {b:.4g}]" for a, b in zip(low, high, strict=True))
    return f"with bounds between {low.min():.4g} and {high.max():.4g}"


# --- what a step gives ----------------------------------------------------------------------------------------


def _leaves(space: spaces.Space, value: Any, path: str) -> Iterator[tuple[str, spaces.Space, Any]]:
    """Each plain part of an observation with its space and a name such as `observation["camera"]`."""
    if isinstance(space, spaces.Dict) and isinstance(value, Mapping) and set(value) == set(space.spaces):
        for key, part in space.spaces.items():
            yield from _leaves(part, value[key], f'{path}["{key}"]')
    elif isinstance(space, spaces.Tuple) and isinstance(value, tuple) and len(value) == len(space.spaces):
        for index, part in enumerate(space.spaces):
            yield from _leaves(part, value[index], f"{path}[{index}]")
    else:
        yield path, space, value


def _check_member(findings: _Findings, space: spaces.Space, value: Any, path: str, where: str) -> None:
    """A part whose space is no Box."""
    if isinstance(space, spaces.Dict) and isinstance(value, Mapping):
        missing = sorted(map(str, set(space.spaces) - set(value)))
        extra = sorted(map(str, set(value) - set(space.spaces)))
        what = f"lacks {missing}" if missing else f"has {extra}, which its space has not"
        findings.add("observation-structure", f"{path} {what}; {where}.", subject=path)
        return
    try:
        fits = space.contains(value)
    except Exception:
        fits = False
    if not fits:
        what = f"{path} is {_shown(value)}, which is not in its space, {describe_space(space)}; {where}."
        findings.add("observation-structure", what, subject=path)


def _check_box(findings: _Findings, space: spaces.Box, bounds: SpaceCheck, value: Any, path: str, where: str) -> None:
    """A part whose space is a Box: type, shape, number type, finite, inside the bounds."""
    try:
        array = np.asarray(value)
    except Exception:
        array = np.array(None)
    if array.dtype.kind not in "fiub":
        findings.add("observation-type", f"{path} is {_shown(value)}; {where}.", subject=path)
        return
    if array.shape != space.shape:
        what = f"{path} has shape {array.shape}, its space {space.shape}; {where}."
        findings.add("observation-shape", what, subject=path)
        return
    space_type = np.dtype(space.dtype)
    with np.errstate(all="ignore"):
        cut = space_type.kind in "iub" and array.dtype.kind == "f" and bool((np.trunc(array) != array).any())
        trained = array.astype(np.float32) if space_type.kind == "f" else array
    if cut and np.isfinite(array).all():
        what = f"{path} holds {array.dtype} numbers such as {array[np.trunc(array) != array].flat[0]:.6g}"
        findings.add("observation-cut", f"{what}, but its space is {space_type}; {where}.", subject=path)
    elif not isinstance(value, (np.ndarray, np.generic)):
        findings.add("observation-not-array", f"{path} is a {type(value).__name__}; {where}.", subject=path)
    elif not np.can_cast(array.dtype, space_type):
        what = f"{path} is {array.dtype}, its space {space_type}; {where}."
        findings.add("observation-dtype", what, subject=path)
    if not np.isfinite(trained).all():
        index = int(np.flatnonzero(~np.isfinite(trained.ravel()))[0])
        spot = _index(path, index, array.shape)
        findings.add("observation-not-finite", f"{spot} is {trained.ravel()[index]}; {where}.", subject=path)
        return
    outside = np.flatnonzero((array < bounds.low).ravel() | (array > bounds.high).ravel()) if bounds.bounded else []
    if len(outside):
        index = int(outside[0])
        words = f"[{space.low.ravel()[index]:.6g}, {space.high.ravel()[index]:.6g}]"
        what = f"{_index(path, index, array.shape)} is {array.ravel()[index]:.6g}, outside its bounds {words}"
        findings.add("observation-bounds", f"{what}; {where}.", subject=path)


def _check_reward(findings: _Findings, reward: Any, where: str) -> float:
    """Note a reward that is not one finite number; return it as a float."""
    if not isinstance(reward, (bool, int, float)):
        array = np.asarray(reward) if _is_rectangular(reward) else np.array(None)
        if array.size != 1 or array.dtype.kind not in "fiub":
            findings.add("reward-not-a-number", f"the reward is {_shown(reward)}; {where}.")
            return math.nan
        if not isinstance(reward, np.generic):
            findings.add("reward-array", f"the reward is {_shown(reward)}, not a plain number; {where}.")
        reward = float(array.reshape(()))
    if not math.isfinite(reward):
        findings.add("reward-not-finite", f"the reward is {float(reward)}; {where}.")
    return float(reward)


def _check_end(findings: _Findings, word: str, value: Any, where: str) -> bool:
    """Note a `terminated` or `truncated` that is no boolean; return it as training reads it."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    array = np.asarray(value) if _is_rectangular(value) else np.array(None)
    plain = array.size == 1 and array.dtype.kind in "fiub" and bool(np.isin(array, (0, 1)).all())
    kind = "end-type" if plain else "end-not-a-boolean"
    findings.add(kind, f"{word} is {_shown(value)}, not True or False; {where}.", subject=word)
    return bool(array.reshape(-1)[0]) if array.size else False


def _is_rectangular(value: Any) -> bool:
    try:
        np.asarray(value)
    except Exception:
        return False
    return True


# --- random play ----------------------------------------------------------------------------------------------


class _Trace(NamedTuple):
    """The beginning of one episode, kept to be played again."""

    seed: int
    first: dict[str, np.ndarray]
    actions: list[Any]
    outcomes: list[_Outcome]


class _Moments:
    """Range, mean and spread of each number of one part of the observation."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        size = int(np.prod(shape))
        self.shape = shape
        self.count = 0
        self.low, self.high = np.full(size, np.inf), np.full(size, -np.inf)
        self.mean, self._squares = np.zeros(size), np.zeros(size)

    def note(self, array: np.ndarray) -> None:
        """Merge one observation (Welford's recurrence)."""
        values = array.ravel().astype(np.float64)
        self.count += 1
        self.low, self.high = np.minimum(self.low, values), np.maximum(self.high, values)
        change = values - self.mean
        self.mean += change / self.count
        self._squares += change * (values - self.mean)

    @property
    def std(self) -> np.ndarray:
        """Standard deviation of each number."""
        return np.sqrt(self._squares / max(self.count, 1))

    @property
    def rms(self) -> np.ndarray:
        """Root of the mean square of each number: how far from 0 it usually is."""
        return np.sqrt(self.std**2 + self.mean**2)

    @property
    def constant(self) -> np.ndarray:
        """Which numbers have never changed, but for rounding."""
        return self.high - self.low <= 1e-8 * (1 + np.abs(self.mean))


@dataclass
class _Play:
    """Everything that random play has seen."""

    lengths: list[int] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)
    ends: list[tuple[bool, bool]] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    discounted: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    moments: dict[str, _Moments] = field(default_factory=dict)
    session: list[_Trace] = field(default_factory=list)
    """The first episodes, without a gap from the moment the environment was made."""
    keeping: bool = True
    kept_bytes: int = 0
    failures: int = 0

    @property
    def n_steps(self) -> int:
        return len(self.rewards)

    def saw(self, parts: dict[str, np.ndarray]) -> None:
        """Count an observation into the ranges."""
        for path, array in parts.items():
            if path not in self.moments:
                self.moments[path] = _Moments(array.shape)
            moments = self.moments[path]
            if array.dtype.kind in "fiub" and array.shape == moments.shape and np.isfinite(array).all():
                moments.note(array)

    def keep(self, parts: dict[str, np.ndarray]) -> None:
        """Whether to go on keeping, after one more observation."""
        self.kept_bytes += sum(array.nbytes for array in parts.values())
        self.keeping = self.keeping and self.n_steps < KEPT_STEPS and self.kept_bytes < KEPT_BYTES


def _play(player: _Player, n_steps: int, seed: int) -> _Play:
    """Random episodes, seeded as training seeds them, for `n_steps` or until the time is up."""
    play = _Play()
    assert player.action_space is not None  # the caller has looked
    actions = _seeded(player.action_space, seed)
    episode = 0
    # The third exception says no more than the first; an environment that cannot even be reset stops at once.
    while play.n_steps < n_steps and play.failures < 3 and not player.budget.spent(0.6):
        try:
            _play_episode(player, play, actions, episode, episode_seed(seed, 0, episode), n_steps)
        except _OutOfTime:
            break
        except _WentBelow:
            play.session.clear()
            continue
        except _Failed:
            play.failures += 1
            play.keeping = False
        if player.findings.has("action-sampling", "step-values"):
            break
        episode += 1
    return play


def _play_episode(player: _Player, play: _Play, actions: spaces.Space, episode: int, seed: int, n_steps: int) -> None:
    """One episode of random actions, to its end or the end of random play."""
    where = f"episode {episode} (seed {seed})"
    first = player.reset(seed, where)
    play.saw(first)
    trace = _Trace(seed, first, [], [])
    if play.keeping:
        play.session.append(trace)
    total = running = 0.0
    for step in range(1, n_steps - play.n_steps + 1):
        if player.budget.spent(0.6):
            return
        action = _sample(player.findings, actions)
        outcome = player.step(action, f"{where}, step {step}")
        if play.keeping:
            trace.actions.append(action)
            trace.outcomes.append(outcome)
        total, running = total + outcome.reward, 0.99 * running + outcome.reward
        play.seconds.append(player.step_seconds)
        play.rewards.append(outcome.reward)
        play.discounted.append(running)
        play.saw(outcome.parts)
        play.keep(outcome.parts)
        if outcome.terminated or outcome.truncated:
            play.lengths.append(step)
            play.returns.append(total)
            play.ends.append((outcome.terminated, outcome.truncated))
            return


def _seeded(space: spaces.Space, seed: int) -> spaces.Space:
    """A copy of a space that draws its own numbers, so that the environment's stays as it is."""
    with suppress(Exception):
        space = copy.deepcopy(space)
        space.seed(seed)
    return space


def _sample(findings: _Findings, space: spaces.Space) -> Any:
    try:
        return space.sample()
    except Exception as error:
        findings.add("action-sampling", f"action_space.sample() raised {type(error).__name__}: {error}")
        raise _Failed from error


# --- played again ---------------------------------------------------------------------------------------------


def _check_repeatability(make: Callable[[], gym.Env], player: _Player, play: _Play) -> None:
    """Play the first episodes again: in a fresh environment, in the used one, and in both at once.

    Each of the three can fail for another reason, so the first that does names it. Then with other seeds and
    with other actions, which must make a difference.
    """
    findings, facts = player.findings, player.findings.facts
    if findings.has("reset-signature"):  # without a seed nothing can be repeated, and that has been said
        return
    if play.failures or not play.session or not play.session[0].outcomes or player.budget.spent():
        return
    fresh_env = _made(make, findings, "second-raised", player.budget.max_seconds)
    if fresh_env is None:
        return
    fresh = _Player(fresh_env, findings, player.budget)
    fresh.observation_space, fresh.action_space = player.observation_space, player.action_space
    if player.is_below:
        fresh.go_below()
    same = "the same seed and actions"
    rounds = (
        ("not-repeatable", f"{same} in a second environment", fresh, None, "no"),
        ("survives-reset", f"{same} after other episodes", player, None, "in a fresh environment only"),
        ("shared-state", f"{same} beside a second environment", fresh, player, "alone only, not beside others"),
    )
    try:
        for kind, condition, one, other, fact in rounds:
            difference = _replay_session(one, play.session, other)
            if difference:
                findings.add(kind, f"{condition} led elsewhere: {difference}.")
                facts["repeatable"] = fact
                return
        steps = sum(len(trace.actions) for trace in play.session)
        facts["repeatable"] = f"yes: {same} gave the same {steps:,} steps, bit for bit"
        _check_seeds(fresh, play)
        _check_actions_matter(fresh, play.session[0])
    except _Failed:
        facts["repeatable"] = "unknown: playing the same actions again raised an exception"
    finally:
        _close(fresh)


def _replay_session(player: _Player, session: list[_Trace], other: _Player | None) -> str | None:
    """Play episodes again; say in words where they first differ, None if nowhere.

    With `other`, that environment plays an episode of its own between the steps.
    """
    for episode, trace in enumerate(session):
        where = f"replay of episode {episode} (seed {trace.seed})"
        if other is not None:
            other.reset((trace.seed + 1) % 2**31, "an episode beside the replay")
        first = player.reset(trace.seed, where)
        difference = _parts_difference(trace.first, first)
        if difference:
            return f"after reset(seed={trace.seed}), {difference}"
        running = True
        for step, (action, expected) in enumerate(zip(trace.actions, trace.outcomes, strict=True), start=1):
            if other is not None and running:
                beside = other.step(action, "an episode beside the replay")
                running = not (beside.terminated or beside.truncated)
            outcome = player.step(action, f"{where}, step {step}")
            difference = _difference(expected, outcome)
            if difference:
                return f"after reset(seed={trace.seed}) and {step} steps, {difference}"
    return None


def _check_seeds(player: _Player, play: _Play) -> None:
    """Other seeds must not all give the same episode."""
    trace = play.session[0]
    for offset in range(1, 5):
        seed = (trace.seed + offset) % 2**31
        first = player.reset(seed, f"a trial of seed {seed}")
        play.saw(first)
        if _parts_difference(trace.first, first):
            return
        for step, (action, expected) in enumerate(zip(trace.actions, trace.outcomes, strict=True), start=1):
            outcome = player.step(action, f"a trial of seed {seed}, step {step}")
            if _difference(expected, outcome):
                return
    player.findings.add("seed-ignored", f"5 different seeds gave the same episode ({len(trace.actions)} steps).")


def _check_actions_matter(player: _Player, trace: _Trace) -> None:
    """The same seed with other actions must lead elsewhere, in at least one of several ways."""
    space = player.action_space
    if player.findings.has("action-empty") or space is None:
        return
    fixed: list[Any] = []
    if isinstance(space, spaces.Discrete):
        fixed = [np.int64(int(space.start) + i) for i in range(min(int(space.n), 4))]
    elif isinstance(space, spaces.Box) and np.isfinite(space.low).all() and np.isfinite(space.high).all():
        fixed = [space.low, space.high]
    tries = [lambda action=action: copy.deepcopy(action) for action in fixed]
    tries += [_seeded(space, seed).sample for seed in (101, 102, 103)]
    for choose in tries:
        player.reset(trace.seed, "a trial of other actions")
        for step, expected in enumerate(trace.outcomes, start=1):
            outcome = player.step(choose(), f"a trial of other actions, step {step}")
            if _difference(expected, outcome):
                return
            if outcome.terminated or outcome.truncated:
                break
    what = f"{len(tries)} other sequences of actions led to the same {len(trace.outcomes)} observations and rewards."
    player.findings.add("action-ignored", what)


def _difference(first: _Outcome, second: _Outcome) -> str | None:
    """Where two steps differ, in words."""
    difference = _parts_difference(first.parts, second.parts)
    if difference:
        return difference
    for word in ("reward", "terminated", "truncated"):
        one, two = getattr(first, word), getattr(second, word)
        if one != two and not (one != one and two != two):  # NaN is like NaN here
            return f"{word} is {two!r}, the first time {one!r}"
    return None


def _parts_difference(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> str | None:
    for path, one in first.items():
        two = second.get(path)
        if two is None or one.shape != two.shape or one.dtype != two.dtype:
            return f"{path} is of another form"
        if one.tobytes() != two.tobytes():
            unequal = np.flatnonzero((one != two).ravel())
            index = int(unequal[0]) if unequal.size else 0
            spot = _index(path, index, one.shape)
            return f"{spot} is {two.ravel()[index]!s}, the first time {one.ravel()[index]!s}"
    return None


# --- what random play shows -----------------------------------------------------------------------------------


def _check_ends(findings: _Findings, play: _Play, limit: int | None, n_steps: int) -> None:
    """Episodes must end, and for the right reason."""
    if not play.ends and limit is None and play.n_steps >= n_steps:
        findings.add("endless", f"no episode ended within {play.n_steps:,} steps, and there is no time limit.")
    if play.ends and all(terminated and truncated for terminated, truncated in play.ends):
        findings.add("end-both", f"terminated and truncated were both True at each of {len(play.ends)} ends.")
    lengths = set(play.lengths)
    only_terminated = all(terminated and not truncated for terminated, truncated in play.ends)
    if len(play.lengths) >= 3 and only_terminated and len(lengths) == 1 and min(lengths) >= 10:
        what = f"all {len(play.lengths)} episodes ended as terminated after exactly {min(lengths)} steps."
        findings.add("end-like-time-limit", what)


def _check_rewards(findings: _Findings, play: _Play) -> None:
    """There must be something to learn, at a size that a network can learn."""
    rewards = np.array(play.rewards)
    if len(rewards) < 10 or not np.isfinite(rewards).all():
        return
    size = float(np.sqrt(np.mean(np.square(play.discounted))))
    shown = f"rewards from {rewards.min():.4g} to {rewards.max():.4g}, discounted returns around {size:.3g}"
    if (rewards == rewards[0]).all():
        # A constant reward teaches through the length of an episode, if the task can end one.
        if rewards[0] == 0 or not any(terminated for terminated, _ in play.ends):
            what = f"the reward was {rewards[0]:g} at each of {len(rewards):,} steps"
            findings.add("reward-constant", what + ("." if rewards[0] == 0 else ", and no episode ended by itself."))
    elif np.abs(rewards).max() < 0.01:
        findings.add("reward-small", f"the rewards are very small: {shown}.")
    if size > 200 or np.abs(rewards).max() > 1000:
        findings.add("reward-large", f"the rewards are very large: {shown}.")


def _check_values(findings: _Findings, path: str, moments: _Moments) -> None:
    """Each number of the observation should change, and be about as large as the others."""
    if moments.count < 20 or not moments.low.size:
        return
    constant = moments.constant
    is_image = len(moments.shape) == 3
    if constant.any() and not is_image:
        names = np.array([_index(path, int(i), moments.shape) for i in np.flatnonzero(constant)])
        what = f"never changed in {moments.count:,} observations: {_names(names, len(constant))}."
        findings.add("observation-constant", what, subject=path)
    if constant.all():
        return
    rms, std = moments.rms, np.where(constant, np.nan, moments.std)
    largest, smallest = int(np.nanargmax(std)), int(np.nanargmin(std))
    farthest = int(np.argmax(rms))
    what = ""
    if rms[farthest] > 20:
        what = f"{_index(path, farthest, moments.shape)} is usually around {rms[farthest]:.3g}"
    elif rms[farthest] < 0.01:
        what = f"all values are very small: the largest, {_index(path, farthest, moments.shape)}, is usually "
        what += f"around {rms[farthest]:.3g}"
    elif std[largest] > 100 * std[smallest]:
        what = f"the values differ in size: {_index(path, largest, moments.shape)} varies by {std[largest]:.3g}, "
        what += f"{_index(path, smallest, moments.shape)} by {std[smallest]:.3g}"
    if what:
        findings.add("observation-scale", f"{what}.", subject=path)


def _check_speed(findings: _Findings, play: _Play) -> None:
    if play.seconds:
        usual = float(np.median(play.seconds))
        if usual > 1e-3:
            findings.add("slow", f"one step takes {1000 * usual:.3g} ms.")


def _state_facts(player: _Player, play: _Play, n_steps: int, seed: int) -> None:
    """Put what random play has shown into words."""
    facts, budget = player.findings.facts, player.budget
    cut = ""
    if play.n_steps < n_steps:
        cut = " (stopped by an exception)" if play.failures or not play.n_steps else " (stopped: time was up)"
    if budget.spent(0.6) and play.n_steps < n_steps:
        facts["stopped"] = f"the check is held to about {budget.max_seconds:g} s"
    facts["random play"] = f"{play.n_steps:,} steps, {len(play.lengths):,} whole episodes, seed {seed}{cut}"
    if play.lengths:
        lengths, returns = np.array(play.lengths), np.array(play.returns)
        facts["episode length"] = f"{lengths.mean():.1f} on average, {lengths.min()} to {lengths.max()}"
        facts["return"] = f"{returns.mean():.4g} on average, {returns.min():.4g} to {returns.max():.4g}"
        both = sum(a and b for a, b in play.ends)
        terminated = sum(a for a, _ in play.ends) - both
        truncated = len(play.ends) - both - terminated
        facts["ends"] = f"{terminated} terminated, {truncated} truncated" + (f", {both} both" if both else "")
    if play.n_steps:
        rewards = np.array(play.rewards)
        facts["reward"] = f"{rewards.mean():.4g} on average, {rewards.min():.4g} to {rewards.max():.4g}"
        facts["speed"] = f"{len(play.seconds) / max(sum(play.seconds), 1e-9):,.0f} steps/s in one environment"
    for path, moments in play.moments.items():
        if moments.count:
            facts[f"{path} seen"] = _ranges_in_words(moments)


def _ranges_in_words(moments: _Moments) -> str:
    if moments.low.size == 1:
        return f"{moments.low[0]:.4g} to {moments.high[0]:.4g}"
    ranges = [
        f"[{i}] {low:.4g} to {high:.4g}" for i, (low, high) in enumerate(zip(moments.low, moments.high, strict=True))
    ]
    if len(ranges) <= MANY_VALUES:
        return ", ".join(ranges)
    widest = sorted(np.argsort(moments.low - moments.high)[:3].tolist())
    overall = f"{moments.low.min():.4g} to {moments.high.max():.4g} in all {len(ranges)} values"
    return f"{overall}; widest " + ", ".join(ranges[i] for i in widest)


# --- words ----------------------------------------------------------------------------------------------------


def _as_array(value: Any) -> np.ndarray:
    """A copy to compare with; what is no array of numbers is compared by its looks."""
    with suppress(Exception):
        array = np.array(value)
        if array.dtype.kind in "fiub":
            return array
    return np.array(repr(value))


def _index(path: str, flat: int, shape: tuple[int, ...]) -> str:
    """The name of one number of an array, such as `observation[3]` or `observation[0, 2]`."""
    if not shape:
        return path
    return f"{path}[{', '.join(str(int(i)) for i in np.unravel_index(flat, shape))}]"


def _names(names: np.ndarray, n_all: int) -> str:
    """`3 of 17 values (a, b, c)`."""
    listed = ", ".join(names[:5].tolist()) + (", ..." if len(names) > 5 else "")
    return f"{len(names)} of {n_all} values ({listed})"


def _given(args: tuple[Any, ...]) -> str:
    if not args:
        return ""
    action = args[0].tolist() if isinstance(args[0], (np.ndarray, np.generic)) else args[0]
    return f"; the action was {_shown(action)}"


def _shown(value: Any) -> str:
    """A value, short enough for a sentence."""
    try:
        text = " ".join(repr(value).split())
    except Exception:
        text = f"a {type(value).__name__}"
    return text if len(text) <= 120 else f"{text[:117]}..."


def format_report(report: CheckReport) -> str:
    """The report as plain text for a terminal."""
    errors = sum(problem.severity == "error" for problem in report.problems)
    warnings = len(report.problems) - errors
    lines = [f"{report.name}: {_count(errors, 'error')}, {_count(warnings, 'warning')}", ""]
    for problem in report.problems:
        lines += [
            _paragraph(problem.severity.upper(), problem.what),
            _paragraph("  why", problem.why),
            _paragraph("  mend", problem.mend),
            "",
        ]
    width = max((len(key) for key in report.facts), default=0) + 2
    lines += ["What was seen:"]
    lines += [_paragraph(f"  {key}", value, indent=width + 2) for key, value in report.facts.items()]
    verdict = {
        (True, True): "Nothing wrong was found.",
        (True, False): "It can be trained on; look at the warnings first.",
        (False, False): "Mend the errors before training on it.",
    }[report.ok, not report.problems]
    return "\n".join([*lines, "", verdict])


def _count(number: int, word: str) -> str:
    return f"{number or 'no'} {word}{'' if number == 1 else 's'}"


def _paragraph(label: str, text: str, indent: int = 9) -> str:
    """A label and a text beside it, wrapped at 100 columns; lines of a traceback stay as they are."""
    first, _, rest = text.partition("\n")
    lines = textwrap.wrap(first, 100 - indent, break_long_words=False, break_on_hyphens=False) or [""]
    lines += rest.split("\n") if rest else []
    return "\n".join((label.ljust(indent) if i == 0 else " " * indent) + line for i, line in enumerate(lines)).rstrip()


# --- replaying a fault ----------------------------------------------------------------------------------------


def load_record(path: str | Path) -> dict[str, Any]:
    """Read a file that training wrote when an environment failed.

    Raises:
        UserError: if it cannot be read, is no such file, or holds an episode that cannot be played again.
    """
    path = Path(path).expanduser()
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        siblings = [p.name for p in path.parent.glob("*.json")] if path.parent.is_dir() else []
        close = nearest(path.name, siblings)
        hint = f" Did you mean {' or '.join(str(path.parent / name) for name in close)}?" if close else ""
        raise UserError(f"There is no file {path}.{hint}") from error
    except OSError as error:
        raise UserError(f"{path} could not be read: {error.strerror or error}.") from error
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(
            f"{path} is no replay file: it is not JSON ({error}). Training writes such a file, named "
            "replay-env...-episode....json, into the run's folder when an environment fails."
        ) from error
    _check_record(record, str(path))
    return record


def replay_record(make: Callable[[], gym.Env], record: dict[str, Any], *, call_seconds: float = 60.0) -> str:
    """Play a recorded episode again, and say whether its problem appears again at the recorded step.

    An episode that took its worker process with it is played in a process of its own, where there is `fork`.

    Args:
        make: makes the environment as the run made it.
        record: `EnvironmentFault.record`, or what `load_record` returned.
        call_seconds: so long may one reset or step take.

    Raises:
        UserError: if the record is none, has no seed, or does not fit the environment.
    """
    _check_record(record, "the record")
    if "did not return" in record["problem"] and "fork" in multiprocessing.get_all_start_methods():
        return _replay_apart(make, record, call_seconds)
    return _replay(make, record, call_seconds, lambda step: None)


def _check_record(record: Any, name: str) -> None:
    if not isinstance(record, dict):
        raise UserError(f"{name} is no replay file: it holds a {type(record).__name__}, not an object.")
    missing = [key for key in ("seed", "actions", "step", "problem") if key not in record]
    if missing:
        raise UserError(f"{name} is no replay file: it lacks {', '.join(map(repr, missing))}.")
    if record["seed"] is None:
        raise UserError(
            f"{name} cannot be replayed: the environments of a native vector environment (--vectorization native) "
            "cannot be seeded one by one. Train with --vectorization serial to get a record that can be."
        )
    wanted = {"seed": int, "actions": list, "step": int, "problem": str}
    for key, kind in wanted.items():
        value = record[key]
        if not isinstance(value, kind) or isinstance(value, bool) or (kind is int and value < 0):
            raise UserError(f"{name} is no replay file: {key!r} is {_shown(value)}, not {_KIND_IN_WORDS[kind]}.")


_KIND_IN_WORDS = {int: "a whole number from 0 on", list: "a list", str: "text"}


class _Seen(NamedTuple):
    """What came of one call of a replay."""

    step: int
    text: str
    problem: str | None
    ended: bool


def _replay(
    make: Callable[[], gym.Env], record: dict[str, Any], seconds: float, progress: Callable[[int], None]
) -> str:
    """Replay in this process; `progress` hears the number of each call before it is made."""
    env = make()
    seen: list[_Seen] = []
    try:
        for call in _replayed(env, record, seconds, progress):
            seen = [*[s for s in seen if s.problem][:1], call]
            if call.ended and call.step < record["step"]:
                break
    finally:
        with suppress(Exception, _TookTooLong), _limited(5.0):
            env.close()
    return "\n".join([*_recorded(record), *_verdict(record, seen), f"At step {seen[-1].step}:", seen[-1].text])


def _replayed(env: gym.Env, record: dict[str, Any], seconds: float, progress: Callable[[int], None]) -> Iterator[_Seen]:
    """Each call of the recorded episode; ends after one that raised."""
    check = SpaceCheck.of(env.observation_space)
    shape = tuple(env.observation_space.shape or ())
    actions = [_action_of(env.action_space, i, value, record) for i, value in enumerate(record["actions"])]
    player: Any = env  # what it returns is not yet what its annotations say
    for step in range(len(actions) + 1):
        progress(step)
        method = "step" if step else "reset"
        try:
            with _limited(seconds):
                result = player.step(actions[step - 1]) if step else player.reset(seed=record["seed"])
        except _TookTooLong as error:
            text = textwrap.indent(_own_traceback(error, message=False), "  ")
            yield _Seen(step, text, f"{method}() did not return: was not back after {seconds:g} s", ended=True)
            return
        except (Exception, SystemExit) as error:
            text = textwrap.indent(_own_traceback(error), "  ")
            yield _Seen(step, text, f"{method}() raised {type(error).__name__}: {error}", ended=True)
            return
        problem = _problem_of(result, step, shape, check)
        words = ("observation", "info") if step == 0 else ("observation", "reward", "terminated", "truncated", "info")
        lines = [("action", record["actions"][step - 1])] if step else [("seed", record["seed"])]
        if isinstance(result, tuple) and len(result) == len(words):
            lines += list(zip(words, result, strict=True))
            ended = step > 0 and bool(np.any(result[2]) or np.any(result[3]))
        else:
            lines, ended = [*lines, ("returned", result)], True
        yield _Seen(step, "\n".join(f"  {key:<12} {_long(value)}" for key, value in lines), problem, ended)


def _problem_of(result: Any, step: int, shape: tuple[int, ...], check: SpaceCheck) -> str | None:
    """What training would say about this call, in the words that it uses."""
    if step == 0:
        if not (isinstance(result, tuple) and len(result) == 2):
            return "reset() must return (observation, info), the pair that Gymnasium asks for"
    else:
        try:
            _, _, _, _, _ = result
        except Exception as error:
            return f"step() raised {type(error).__name__}: {error}"
    observation = result[0]
    if np.shape(observation) != shape:
        what = "observation has shape" if step else "reset() returned shape"
        return f"{what} {np.shape(observation)}, not {shape}"
    if step:
        reward = np.asarray(result[1])
        if reward.size != 1 or reward.dtype.kind not in "fiub":
            return f"the reward must be one number, not {result[1]!r}"
        if not np.isfinite(reward).all():
            return f"the reward is {float(reward.reshape(()))}"
    try:
        array = np.asarray(observation)
        array = array.astype(np.float32) if array.dtype == np.float64 else array
        found = check.first_problem(array)
    except Exception as error:
        return f"the observation could not be read: {error}"
    return None if found is None else found[0] if step else f"after reset(), {found[0]}"


def _action_of(space: spaces.Space, index: int, value: Any, record: dict[str, Any]) -> Any:
    """A recorded action as training gave it to the environment."""
    shape = tuple(space.shape or ())
    try:
        array = np.array(value, dtype=np.int64 if isinstance(space, spaces.Discrete) else space.dtype)
    except (TypeError, ValueError, OverflowError):
        array = np.array(None)
    if array.dtype.kind == "O" or array.shape != shape:
        of = f" The record is of {record['env_id']}." if "env_id" in record else ""
        raise UserError(
            f"Action {index} of the record is {_shown(value)}, which does not fit the environment's actions, "
            f"{describe_space(space)}.{of}"
        )
    return array[()] if shape == () else array


def _recorded(record: dict[str, Any]) -> list[str]:
    facts = [
        f"{key.replace('_', ' ')} {record[key]}" for key in ("env_id", "env_index", "episode", "seed") if key in record
    ]
    return [f"Recorded: {', '.join(facts)}, step {record['step']}:", f"  {record['problem'].splitlines()[0]}"]


def _verdict(record: dict[str, Any], seen: list[_Seen]) -> list[str]:
    """Whether it is the same problem at the same step."""
    last, first_problem = seen[-1], next((s for s in seen if s.problem), None)
    if last.step == record["step"] and last.problem:
        if _same(last.problem, record["problem"]):
            return ["Replayed: the same problem appears again."]
        return [f"Replayed: another problem appears at that step: {last.problem}"]
    if first_problem is not None:
        return [f"Replayed: a problem appears at another step, {first_problem.step}: {first_problem.problem}"]
    cause = (
        "Either the code has been changed since, or the environment draws on something that its seed does not fix; "
        "check-env without --replay looks for that."
    )
    if last.step < record["step"]:
        if last.ended:
            return [f"Replayed: the episode ended before, at step {last.step}. {cause}"]
        return [f"Replayed: the record has only {last.step} of its {record['step']} actions, and no problem in them."]
    return [f"Replayed: the problem does not appear again. {cause}"]


def _same(problem: str, recorded: str) -> bool:
    """Compared by the first line; of a call that did not return, by that alone."""
    if "did not return" in problem and "did not return" in recorded:
        return True
    return problem.splitlines()[0] == recorded.splitlines()[0]


def _long(value: Any) -> str:
    """A value in full up to a few lines."""
    text = np.array2string(value, threshold=200, max_line_width=10**6) if isinstance(value, np.ndarray) else str(value)
    text = " ".join(text.split())
    return text if len(text) <= 2000 else f"{text[:1997]}..."


def _replay_apart(make: Callable[[], gym.Env], record: dict[str, Any], seconds: float) -> str:
    """Replay in a process of its own, so that this one lives to tell what became of it."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_replay_and_send, args=(make, record, seconds, sender), daemon=True)
    process.start()
    sender.close()
    step = 0
    try:
        while receiver.poll(seconds + 30.0):
            message = receiver.recv()
            if isinstance(message, str):
                return message
            if isinstance(message, UserError):
                raise message
            step = message
        end = f"was not back after {seconds + 30.0:g} s"
    except (EOFError, ConnectionError):
        process.join(5.0)
        code = process.exitcode or 0
        name = signal.Signals(-code).name if code < 0 else ""
        end = f"ended its process with {f'signal {name}' if name else f'exit code {code}'}"
    finally:
        process.kill()
        process.join()
        receiver.close()
    method = f"step() with action {_shown(record['actions'][step - 1])}" if step else "reset()"
    again = "the same problem appears again" if step == record["step"] else f"a problem appears at another step, {step}"
    return "\n".join([*_recorded(record), f"Replayed: {again}.", f"At step {step}:", f"  {method} {end}"])


def _replay_and_send(make: Callable[[], gym.Env], record: dict[str, Any], seconds: float, sender: Connection) -> None:
    """The child's side of `_replay_apart`."""
    try:
        sender.send(_replay(make, record, seconds, sender.send))
    except UserError as error:
        sender.send(UserError(str(error)))
    sender.close()
