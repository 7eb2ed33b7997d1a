"""What is wrong with an environment, in plain words, before training on it (`proximo check-env`).

`check_environment` plays random actions, plays the first of them again, and looks at everything that training
relies on. What is always the same about a kind of problem stands in `advice.py`; here they are only found.
"""

from __future__ import annotations

import copy
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from proximo.collect.advice import ADVICE, Severity
from proximo.collect.envs import episode_seed
from proximo.collect.packed_env import PackedEnv, packed, packed_spaces
from proximo.collect.returned_values import SpaceCheck, end_of, reward_of, shown
from proximo.errors import UserError, in_range, in_words
from proximo.lines import page_width
from proximo.models.control import ActorCritic, NetworkConfig
from proximo.models.packing import MASK_KEY, PackedObservations, PackingError

KEPT_CALLS = 300
"""So many of the first calls of random play are kept, to be made again and compared."""
KEPT_NUMBERS = 5_000_000
"""Observations are kept, to be measured, until they hold so many numbers together."""
AT_AN_ERROR = "an error; later checks were left out"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong (`error`: training fails or learns the wrong thing) or doubtful (`warning`)."""

    severity: Severity
    kind: str
    """A short fixed name, such as `observation-bounds`; the keys of `ADVICE`."""
    what: str
    """What was seen: value, index, bound, episode and step."""
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


def check_environment(
    make: Callable[[], gym.Env], name: str, *, n_steps: int = 2000, seed: int = 0, max_seconds: float = 20.0
) -> CheckReport:
    """Play random actions for `n_steps` and say what is wrong or doubtful about an environment.

    What the environment raises becomes a problem of the report, and ends the check.

    Args:
        make: makes one environment, as training would make it; called up to twice.
        name: what it is called in the report.
        n_steps: steps of random play.
        seed: seeds the random actions and the episodes.
        max_seconds: no call is begun after so much wall time; random play gets its first 60 percent.

    Raises:
        UserError: if a number is out of range.
    """
    in_range("steps", n_steps, at_least=1, whole=True, usual="2000")
    in_range("seed", seed, at_least=0, whole=True, usual="0")
    in_range("max_seconds", max_seconds, above=0, usual="20")
    began = time.monotonic()
    findings = _Findings()
    env = _made(make, findings, "make-raised")
    if env is not None:
        if _check_spaces(findings, env):
            player = _Player(packed(env), findings, began + 0.6 * max_seconds)
            findings.facts["time limit"] = "none" if player.limit is None else f"{player.limit:,} steps"
            play = _random_play(player, n_steps, seed)
            player.deadline = began + max_seconds
            if play.rewards and findings.facts.get("random play stopped") != AT_AN_ERROR:
                _check_again(make, player, play)
                _check_ends(findings, play, player.limit, n_steps)
                _check_rewards(findings, play)
                _check_values(findings, play)
                if np.median(play.seconds) > 1e-3:
                    findings.add("slow", f"one step takes {1000 * np.median(play.seconds):.3g} ms.")
            _state_facts(findings, play, seed)
        with suppress(Exception, SystemExit):
            env.close()
    findings.facts["this check took"] = f"{time.monotonic() - began:.1f} s"
    return findings.report(name)


class _Stopped(Exception):  # noqa: N818
    """The time is up, or nothing can be done with what a call did and its problem is noted."""


class _Findings:
    """Problems and facts as they come; each kind is kept once, for the first time it was seen."""

    def __init__(self) -> None:
        self.facts: dict[str, str] = {}
        self._problems: dict[str, Problem] = {}

    def add(self, kind: str, what: str) -> None:
        severity, why, mend = ADVICE[kind]
        self._problems.setdefault(kind, Problem(severity, kind, what, why, mend))

    def report(self, name: str) -> CheckReport:
        problems = sorted(self._problems.values(), key=lambda problem: problem.severity != "error")
        return CheckReport(name, tuple(problems), self.facts)


def _made(make: Callable[[], gym.Env], findings: _Findings, kind: str) -> gym.Env | None:
    """Make an environment, or note why it cannot be made."""
    try:
        env = make()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        said = str(error) if isinstance(error, UserError) else _raised(error)
        findings.add(kind, f"the environment could not be made: {said}")
        return None
    if isinstance(env, gym.Env):
        return env
    findings.add("not-an-environment", f"what was made is a {type(env).__name__}, not a gymnasium.Env.")
    return None


def _raised(error: BaseException, where: str = "") -> str:
    """An exception with the last lines of the environment's part of its traceback."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    return f"{in_words(error)}{where}\n{''.join(traceback.format_list(frames[-3:])).rstrip()}"


def _check_spaces(findings: _Findings, env: gym.Env) -> bool:
    """Whether both spaces are there and of a kind that Proximo's networks know."""
    wrong = []
    both: dict[str, Any] = {"observation": spaces.Box(-1, 1, (1,)), "action": spaces.Discrete(2)}
    for word in both:
        space = getattr(env, f"{word}_space", None)
        if not isinstance(space, spaces.Space):
            wrong.append(f"{word}_space is {shown(space)}, not a gymnasium.spaces.Space.")
            continue
        findings.facts[f"{word}s"] = shown(space)
        given = {**both, word: space}
        try:
            known = packed_spaces(given["observation"], given["action"], "none")
            ActorCritic(*known, NetworkConfig(hidden_sizes=(1,), orthogonal_init=False))
        except UserError as error:
            wrong.append(str(error))
    if wrong:
        findings.add("space-unsupported", " ".join(wrong))
        return False
    space = env.action_space
    with np.errstate(all="ignore"):
        width = space.high - space.low if isinstance(space, spaces.Box) else np.zeros(1)
    if width.max(initial=0.0) > 1e4:
        findings.add("action-bounds", f"actions have very wide bounds or none: {shown(space)}.")
    return True


class _Outcome(NamedTuple):
    """What one reset or step led to."""

    observation: np.ndarray
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False


class _Player:
    """Calls one environment, and notes whatever is not as Gymnasium and the spaces ask for."""

    def __init__(self, env: gym.Env, findings: _Findings, deadline: float) -> None:
        self.findings = findings
        self.deadline = deadline
        self.step_seconds = 0.0
        self.limit: int | None = None
        # Wrappers that unpack what the environment returns would fail before it can be looked at.
        self._options = {"options": None} if isinstance(env, gym.Wrapper) else {}
        outer = env if isinstance(env, PackedEnv) else None
        env = env if outer is None else outer.env
        while isinstance(env, (gym.wrappers.TimeLimit, gym.wrappers.OrderEnforcing)):
            if isinstance(env, gym.wrappers.TimeLimit):
                self.limit = min(env._max_episode_steps, self.limit or env._max_episode_steps)
            env = env.env
        env = env if outer is None else outer.around(env)
        self.env = env
        self._check = SpaceCheck.of(env.observation_space)
        self._seed = self._length = 0
        self._given: tuple[np.ndarray, bytes] | None = None
        self.mask: Any = None
        """Which actions are possible now, as `sample` of their space wants it; None where nothing is known."""

    def reset(self, seed: int) -> _Outcome:
        """Begin an episode."""
        self._seed, self._length = seed, 0
        result = self._call("reset", seed=seed, **self._options)
        if not (isinstance(result, tuple) and len(result) == 2):
            self._fail("reset-values", f"reset() returned {shown(result)}, not the pair (observation, info)")
        observation = self._observation(result[0])
        self.mask = self._possible(observation, result[1])
        return _Outcome(observation)

    def _possible(self, observation: np.ndarray, info: Any) -> Any:
        seen, actions = self.env.observation_space, self.env.action_space
        mask = info.get(MASK_KEY) if isinstance(info, dict) else None
        if isinstance(seen, PackedObservations) and seen.options:
            mask = seen.mask(observation)
        if mask is None or not isinstance(actions, (spaces.Discrete, spaces.MultiDiscrete)):
            return None
        flat = (
            np.concatenate([np.ravel(piece) for piece in mask]) if isinstance(mask, (tuple, list)) else np.ravel(mask)
        )
        flat = flat.astype(np.int8)
        if isinstance(actions, spaces.Discrete):
            return flat if flat.size == actions.n else None
        return tuple(np.split(flat, np.cumsum(actions.nvec.ravel())[:-1])) if actions.nvec.ndim == 1 else None

    def step(self, action: Any) -> _Outcome:
        """Take one action; `step_seconds` is then how long the environment took."""
        self._length += 1
        result = self._call("step", action)
        if not (isinstance(result, tuple) and len(result) == 5):
            values = f"{len(result)} values" if isinstance(result, tuple) else shown(result)
            self._fail("step-values", f"step() returned {values}, not 5 values")
        observation, reward = self._observation(result[0]), reward_of(result[1])
        if reward is None:
            self._fail("reward-not-a-number", f"the reward is {shown(result[1])}")
        if not np.isfinite(reward):
            self._note("not-finite", f"the reward is {reward}")
        for word, value in zip(("terminated", "truncated"), result[2:4], strict=True):
            if not isinstance(value, (bool, np.bool_)):
                kind = "end-value" if end_of(value) is None else "end-type"
                self._note(kind, f"{word} is {shown(value)}, not True or False")
        terminated, truncated = (bool(end_of(value)) for value in result[2:4])
        self.mask = self._possible(observation, result[4])
        return _Outcome(observation, reward, terminated, truncated or self._length == self.limit)

    @property
    def where(self) -> str:
        """How to come to the present call."""
        return f"step {self._length} after reset(seed={self._seed})"

    def _note(self, kind: str, what: str) -> None:
        self.findings.add(kind, f"{what}; {self.where}.")

    def _fail(self, kind: str, what: str) -> NoReturn:
        self._note(kind, what)
        raise _Stopped(AT_AN_ERROR)

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        if time.monotonic() >= self.deadline:
            raise _Stopped("the time was up")
        try:
            began = time.perf_counter()
            result = getattr(self.env, method)(*args, **kwargs)
            self.step_seconds = time.perf_counter() - began
            return result
        except KeyboardInterrupt:
            raise
        except PackingError as error:
            self._fail("observation-shape", str(error))
        except BaseException as error:
            is_signature = isinstance(error, TypeError) and "reset() got an unexpected keyword" in in_words(error)
            kind = "reset-signature" if is_signature else "raised"
            where = f" ({self.where})" if method == "reset" else f" ({self.where}; the action was {shown(args[0])})"
            self.findings.add(kind, f"{method}() raised {_raised(error, where)}")
            raise _Stopped(AT_AN_ERROR) from error

    def _observation(self, value: Any) -> np.ndarray:
        """Check an observation; return a copy of it."""
        space, is_array = self.env.observation_space, isinstance(value, (np.ndarray, np.generic))
        if self._given is not None and self._given[0].tobytes() != self._given[1]:
            self._note("observation-reused", "the observation of the call before was written over")
        self._given = (value, value.tobytes()) if isinstance(value, np.ndarray) else None
        array = _numbers(value)
        if array is None or array.shape != space.shape:
            form = shown(value) if array is None else f"of shape {array.shape}"
            self._fail("observation-shape", f"the observation is {form}, its space has shape {space.shape}")
        wanted = np.dtype(space.dtype)
        with np.errstate(all="ignore"):  # what is too large for float32 is infinite to training
            fractions = array[np.isfinite(array) & (array % 1 != 0)]
            found = self._check.first_problem(array.astype(np.float32) if array.dtype == np.float64 else array, array)
        if fractions.size and wanted.kind in "iub":
            self._note("observation-cut", f"the observation holds {fractions[0]:.6g}, but its space is {wanted}")
        elif not is_array or not np.can_cast(array.dtype, wanted):
            form = array.dtype if is_array else f"a {type(value).__name__}"
            self._note("observation-dtype", f"the observation is {form}, its space {wanted}")
        if found is not None:
            self._note("observation-bounds" if found[1] else "not-finite", found[0])
        return array


def _numbers(value: Any) -> np.ndarray | None:
    """A copy as an array of numbers, None if it is none."""
    try:
        array = np.array(value)
    except Exception:
        return None
    return array if array.dtype.kind in "fiub" else None


class _Call(NamedTuple):
    """A reset (with a seed) or a step (with an action), and what it led to."""

    seed: int | None
    action: Any
    outcome: _Outcome


@dataclass
class _Play:
    """What random play has seen, step by step."""

    calls: list[_Call] = field(default_factory=list)
    """The first calls since the environment was made, without a gap."""
    observations: list[np.ndarray] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    ends: list[tuple[bool, bool]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    rows: PackedObservations | None = None
    """What the observations are rows of, if they are."""

    def name_of(self, index: int) -> str:
        """What a number of `_kept_values` is called."""
        return f"observation[{index}]" if self.rows is None else self.rows.element(int(self.rows.measured[index]))

    def saw(self, call: _Call) -> None:
        """Keep an observation, and one of the first calls."""
        observation = call.outcome.observation
        if len(self.observations) * observation.size < KEPT_NUMBERS:
            self.observations.append(observation)
            if len(self.calls) < KEPT_CALLS:
                self.calls.append(call)

    def episodes(self) -> list[np.ndarray]:
        """The rewards of each whole episode."""
        ends = np.array(self.ends, bool).reshape(-1, 2).any(axis=1)
        return np.split(np.array(self.rewards), np.flatnonzero(ends) + 1)[:-1]


def _random_play(player: _Player, n_steps: int, seed: int) -> _Play:
    """Random episodes, seeded as training seeds them, for `n_steps` or until the time is up."""
    play, actions = _Play(), _seeded(player.env.action_space, seed)
    seen = player.env.observation_space
    play.rows = seen if isinstance(seen, PackedObservations) else None
    episode, ended = 0, True
    try:
        while len(play.rewards) < n_steps:
            if ended:
                seed_of_episode = episode_seed(seed, 0, episode)
                play.saw(_Call(seed_of_episode, None, player.reset(seed_of_episode)))
                episode += 1
            action = actions.sample(player.mask)
            outcome = player.step(action)
            play.saw(_Call(None, action, outcome))
            play.rewards.append(outcome.reward)
            play.ends.append((outcome.terminated, outcome.truncated))
            play.seconds.append(player.step_seconds)
            ended = outcome.terminated or outcome.truncated
    except _Stopped as stopped:
        player.findings.facts["random play stopped"] = str(stopped)
    return play


def _seeded(space: spaces.Space, seed: int) -> spaces.Space:
    """A copy of a space that draws its own numbers, so that the environment's stays as it is."""
    space = copy.deepcopy(space)
    space.seed(seed)
    return space


def _check_again(make: Callable[[], gym.Env], player: _Player, play: _Play) -> None:
    """Make the first calls again: they must lead to the same, with other seeds and actions to something else."""
    findings, facts = player.findings, player.findings.facts
    made = _made(make, findings, "second-raised")
    if made is None:
        return
    fresh = _Player(packed(made), findings, player.deadline)
    try:
        # By turns, so that a second environment beside the first would disturb it.
        for in_fresh, in_used in zip(_replay(fresh, play.calls), _replay(player, play.calls), strict=True):
            if in_fresh or in_used:
                which = "a second environment" if in_fresh else "the same environment, after other episodes,"
                what = f"with the same seed and actions {which} led elsewhere: {in_fresh or in_used}."
                findings.add("not-repeatable", what)
                facts["repeatable"] = "no"
                return
        facts["repeatable"] = f"yes: the first {len(play.calls)} calls led to the same again"
        if not any(any(_replay(fresh, play.calls, seed_offset=offset)) for offset in (1, 2, 3)):
            findings.add("seed-ignored", f"with other seeds the first {len(play.calls)} calls led to the same.")
        others = [_seeded(fresh.env.action_space, seed) for seed in (101, 102, 103)]
        if not any(any(_replay(fresh, play.calls, actions=actions)) for actions in others):
            findings.add("action-ignored", f"with other actions the first {len(play.calls)} calls led to the same.")
    except _Stopped as stopped:
        facts["playing again stopped"] = str(stopped)
    finally:
        with suppress(Exception, SystemExit):
            made.close()


def _replay(
    player: _Player, calls: list[_Call], *, seed_offset: int = 0, actions: spaces.Space | None = None
) -> Iterator[str]:
    """Make calls again, with the same or with other seeds and actions; yield where each leads elsewhere, or ""."""
    for seed, action, outcome in calls:
        if seed is not None:
            again = player.reset((seed + seed_offset) % 2**32)
        else:
            again = player.step(action if actions is None else actions.sample(player.mask))
        difference = _difference(outcome, again)
        yield f"{difference}; {player.where}" if difference else ""


def _difference(first: _Outcome, second: _Outcome) -> str:
    """Where two outcomes differ, in words."""
    for word, before, after in zip(_Outcome._fields, first, second, strict=True):
        one, two = np.ravel(before), np.ravel(after)
        unequal = np.flatnonzero((one != two) & (one == one))  # NaN has been told of
        if unequal.size:
            index = int(unequal[0])
            name = f"{word}[{index}]" if one.size > 1 else word
            return f"{name} is {two[index]}, the first time {one[index]}"
    return ""


def _check_ends(findings: _Findings, play: _Play, limit: int | None, n_steps: int) -> None:
    """Episodes must end, and for the right reason."""
    ends = [end for end in play.ends if any(end)]
    lengths = [len(rewards) for rewards in play.episodes()]
    if not ends and limit is None and len(play.rewards) >= n_steps:
        findings.add("endless", f"no episode ended within {n_steps:,} steps, and there is no time limit.")
    if ends and all(terminated and truncated for terminated, truncated in ends):
        findings.add("end-both", f"terminated and truncated were both True at each of {len(ends)} ends.")
    elif len(ends) >= 3 and all(terminated for terminated, _ in ends) and len(set(lengths)) == 1 and lengths[0] >= 10:
        what = f"all {len(ends)} episodes ended as terminated after exactly {lengths[0]} steps."
        findings.add("end-like-time-limit", what)


def _check_rewards(findings: _Findings, play: _Play) -> None:
    """There must be something to learn, at a size that a network can learn."""
    rewards = np.array(play.rewards)
    if len(rewards) < 10 or not np.isfinite(rewards).all():
        return
    running, discounted = 0.0, []
    for reward, end in zip(play.rewards, play.ends, strict=True):
        running = 0.99 * running + reward
        discounted.append(running)
        running = 0.0 if any(end) else running
    largest, size = float(np.abs(rewards).max()), float(np.sqrt(np.mean(np.square(discounted))))
    seen = f"rewards from {rewards.min():.4g} to {rewards.max():.4g}, discounted returns around {size:.3g}"
    is_constant = bool((rewards == rewards[0]).all())
    # A constant reward teaches through the length of an episode, if the task can end one.
    if is_constant and (largest == 0 or not any(terminated for terminated, _ in play.ends)):
        findings.add("reward-constant", f"the reward was {rewards[0]:g} at each of {len(rewards):,} steps.")
    elif not is_constant and largest < 0.01:
        findings.add("reward-scale", f"the rewards are very small: {seen}.")
    if size > 200 or largest > 1000:
        findings.add("reward-scale", f"the rewards are very large: {seen}.")


def _check_values(findings: _Findings, play: _Play) -> None:
    """Each number of the observation should change, and be about as large as the others."""
    values = _kept_values(play)
    if len(values) < 20 or not values.size:
        return
    constant = np.ptp(values, axis=0) <= 1e-8 * (1 + np.abs(values[0]))
    if constant.any() and play.observations[0].ndim != 3:  # an image has its borders
        indices = np.flatnonzero(constant).tolist()
        names = indices if play.rows is None else [play.name_of(index) for index in indices]
        listed = ", ".join(map(str, names[:5])) + (", ..." if len(indices) > 5 else "")
        what = f"{len(indices)} of {len(constant)} values never changed in {len(values):,} observations: {listed}."
        findings.add("observation-constant", what)
    if constant.all():
        return
    size, spread = np.sqrt(np.mean(np.square(values), axis=0)), np.where(constant, np.nan, values.std(axis=0))
    farthest, most, least = int(np.argmax(size)), int(np.nanargmax(spread)), int(np.nanargmin(spread))
    if size[farthest] > 20:
        findings.add("observation-scale", f"{play.name_of(farthest)} is usually around {size[farthest]:.3g}.")
    elif size[farthest] < 0.01:
        findings.add("observation-scale", f"all values are very small: at most around {size[farthest]:.3g}.")
    elif spread[most] > 100 * spread[least]:
        what = f"{play.name_of(most)} varies by {spread[most]:.3g}, {play.name_of(least)} by {spread[least]:.3g}"
        findings.add("observation-scale", f"the values differ in size: {what}.")


def _state_facts(findings: _Findings, play: _Play, seed: int) -> None:
    """Put what random play has shown into words."""
    facts, episodes = findings.facts, play.episodes()
    facts["random play"] = f"{len(play.rewards):,} steps, {len(episodes):,} whole episodes, seed {seed}"
    if not play.rewards:
        return
    if episodes:
        facts["episode length"] = _range([len(rewards) for rewards in episodes])
        facts["return"] = _range([rewards.sum() for rewards in episodes])
        terminated = sum(terminated for terminated, _ in play.ends)
        facts["ends"] = f"{terminated} terminated, {len(episodes) - terminated} truncated"
    facts["reward"] = _range(play.rewards)
    facts["speed"] = f"{len(play.seconds) / max(sum(play.seconds), 1e-9):,.0f} steps/s in one environment"
    values = _kept_values(play)
    if values.size:
        low, high = values.min(axis=0), values.max(axis=0)
        names = [play.name_of(i).removeprefix("observation") for i in range(min(len(low), 12))]
        ranges = ", ".join(f"{name} {low[i]:.4g} to {high[i]:.4g}" for i, name in enumerate(names))
        facts["observations seen"] = ranges + (", ..." if len(low) > 12 else "")


def _kept_values(play: _Play) -> np.ndarray:
    """The finite ones of the kept observations, one in a row; without choices, and without images beside numbers."""
    kept = np.stack(play.observations)
    if play.rows is not None:
        kept = play.rows.numbers(kept)[:, play.rows.measured]
    rows = kept.reshape(len(kept), -1).astype(np.float64)
    return rows[np.isfinite(rows).all(axis=1)]


def _range(values: Any) -> str:
    return f"{np.mean(values):.4g} on average, {np.min(values):.4g} to {np.max(values):.4g}"


def format_report(report: CheckReport) -> str:
    """The report as plain text for a terminal."""
    errors = sum(problem.severity == "error" for problem in report.problems)
    lines = [f"{report.name}: errors {errors}, warnings {len(report.problems) - errors}", ""]
    for problem in report.problems:
        texts = ((problem.severity.upper(), problem.what), ("  why", problem.why), ("  mend", problem.mend))
        lines += [*(_paragraph(label, text) for label, text in texts), ""]
    width = max((len(key) for key in report.facts), default=0) + 2
    lines += ["What was seen:"]
    lines += [_paragraph(f"  {key}", value, indent=width + 2) for key, value in report.facts.items()]
    verdict = "It can be trained on; look at the warnings first." if report.ok else "Mend the errors first."
    return "\n".join([*lines, "", verdict if report.problems else "Nothing wrong was found."])


def _paragraph(label: str, text: str, indent: int = 9) -> str:
    """A label and a text beside it, wrapped to a page; lines of a traceback stay as they are."""
    first, _, rest = text.partition("\n")
    room = page_width() - indent
    lines = textwrap.wrap(first, room, break_long_words=False, break_on_hyphens=False) or [""]
    lines += rest.split("\n") if rest else []
    return "\n".join((label.ljust(indent) if i == 0 else " " * indent) + line for i, line in enumerate(lines)).rstrip()
