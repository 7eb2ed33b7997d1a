"""`SerialEnvs`: environments in this process, one after the other; the plainest kind of `VectorEnvs`."""

from __future__ import annotations

import math
import os
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from proximo.collect.envs import (
    LONGEST_REPLAY,
    EnvironmentFault,
    Snapshot,
    SpacePolicy,
    Step,
    check_snapshot,
    close_quietly,
    episode_seed,
    too_many_restarts,
)
from proximo.collect.packed_env import PackedEnv
from proximo.collect.returned_values import (
    RESET_RETURNS,
    STEP_RETURNS,
    SpaceCheck,
    amount_of,
    element,
    end_of,
    reward_of,
    shown,
)
from proximo.errors import UserError, in_words, with_traceback
from proximo.models.packing import PackingError


def _is_gymnasiums(env: Any) -> bool:
    """Whether an environment and all its wrappers are Gymnasium's."""
    while isinstance(env, gym.Wrapper):
        if not isinstance(env, PackedEnv) and not type(env).__module__.startswith("gymnasium."):
            return False
        env = env.env
    return type(env).__module__.startswith("gymnasium.envs.")


class SerialEnvs:
    """N environments in this process, stepped one after the other; no copies but one of the actions.

    Episode e of environment i is seeded by `episode_seed(seed, i, e)`, and the actions since each reset are
    kept, so an open episode can be rebuilt by playing it again (unless it is longer than `LONGEST_REPLAY`).
    Resets happen within the step that ended the episode, so every row is experience.
    """

    def __init__(
        self,
        make: Callable[[], gym.Env],
        n_envs: int,
        seed: int,
        *,
        name: str = "the environment",
        first_index: int = 0,
        on_space_violation: SpacePolicy = "raise",
        max_restarts: int = 0,
        wrap: Callable[[gym.Env, int], gym.Env] = lambda env, index: env,
    ) -> None:
        """Make the environments.

        `first_index` is the number of the first one among all of the run's. With `max_restarts` above 0, an environment
        that raises or returns what it must not is made anew so many times in all, and its episode cut; the faults are
        left in `faults`. `wrap` puts something around each environment, which has that number.
        """
        self._process = os.getpid()
        self._make = make
        self._wrap = wrap
        self._max_restarts = max_restarts
        self.goes_on: np.ndarray | None = None
        self.n_restarts = 0
        self.faults: list[EnvironmentFault] = []
        self.n_envs = n_envs
        self._seed = seed
        self._name = name
        self._first = first_index
        self._on_violation = on_space_violation
        self._warned = False
        self.warnings: list[str] = []
        made = [make() for _ in range(n_envs)]
        if len({id(env) for env in made}) < n_envs:
            raise UserError(f"{name}: the factory gave the same environment twice; it must make a new one each time.")
        self._envs = [wrap(env, first_index + index) for index, env in enumerate(made)]
        self.observation_space = self._envs[0].observation_space
        self.action_space = self._envs[0].action_space
        self._shape = tuple(self.observation_space.shape or ())
        self._check = SpaceCheck.of(self.observation_space)
        dtype = self.observation_space.dtype
        dtype = np.float32 if dtype == np.float64 else dtype
        self._observations = np.zeros((n_envs, *self._shape), dtype)
        self._final = np.zeros_like(self._observations)
        self._rewards = np.zeros(n_envs)
        self._terminated = np.zeros(n_envs, bool)
        self._truncated = np.zeros(n_envs, bool)
        self._valid = np.ones(n_envs, bool)
        self._has_lost = False
        self._takes_ints = self._is_gymnasiums_own()
        self._usual_dtypes = (dtype, np.dtype(np.float64)) if dtype == np.float32 else (dtype,)
        self._episodes = np.zeros(n_envs, np.int64)
        self._history: list[np.ndarray] = []
        self._starts = np.zeros(n_envs, np.int64)
        self._forgotten = np.zeros(n_envs, np.int64)
        self._given: list[Any] = [None] * n_envs
        self._reward_sums = np.zeros(n_envs)

    def reset(self) -> np.ndarray:
        """Begin episode 0 of each environment, or the first one that can be begun; return observations `[N, *O]`."""
        return self.begin(np.zeros(self.n_envs, np.int64))

    def begin(self, episodes: np.ndarray) -> np.ndarray:
        """Begin the given episode `[N]` of each environment, or the first one after it that can be begun.

        Raises:
            EnvironmentFault: if one raises or returns what it must not, and may not be restarted (any more).
        """
        self._episodes[:] = episodes
        self._history = []
        for index in range(self.n_envs):
            self._begin_due_episode(index)
        return self._observations

    def step(self, actions: np.ndarray) -> Step:
        """Step each environment with its row of `actions`.

        Raises:
            EnvironmentFault: if one raises or returns what it must not, and may not be restarted (any more).
        """
        self._history.append(actions)
        # Environments may change their own (action *= 0.1), not what is played again.
        given = actions.tolist() if self._takes_ints else actions.copy()
        if self._has_lost:
            self._valid[:] = True
            self._has_lost = False
        first = 0
        while first < self.n_envs:
            try:
                first = self._step_from(first, given)
            except EnvironmentFault as fault:
                first = self._lose(fault)
        self._end_a_fork()
        self._check_values()
        np.copyto(self._observations, self._final)
        self._reward_sums += self._rewards
        ends = self._terminated | self._truncated
        if ends.any():
            for index in ends.nonzero()[0]:
                self._begin_next_episode(int(index))
        self._forget_closed_episodes()
        return Step(self._observations, self._rewards, self._terminated, self._truncated, self._final, self._valid)

    def _step_from(self, first: int, actions: np.ndarray | list[int]) -> int:
        """Step the environments from the given one on; return their number."""
        final, shape, dtypes = self._final, self._shape, self._usual_dtypes
        for index in range(first, self.n_envs):
            try:
                result = self._envs[index].step(actions[index])
            except KeyboardInterrupt:
                raise
            except PackingError as error:
                raise self._fault(index, str(error)) from error
            except BaseException as error:
                self._end_a_fork()
                raise self._raised(index, "step", error) from error
            try:
                observation, reward, terminated, truncated, _ = result
            except Exception as error:
                raise self._fault(index, f"{STEP_RETURNS}, and returned {amount_of(result)}") from error
            if type(observation) is np.ndarray and observation.dtype in dtypes and observation.shape == shape:
                self._given[index] = observation
                final[index] = observation
            else:
                self._store(index, observation, final, "the observation")
            self._rewards[index] = reward if type(reward) in (float, np.float64) else self._number(index, reward)
            self._terminated[index] = (
                terminated if type(terminated) is bool else self._end(index, "terminated", terminated)
            )
            self._truncated[index] = truncated if type(truncated) is bool else self._end(index, "truncated", truncated)

        return self.n_envs

    def _is_gymnasiums_own(self) -> bool:
        """Whether actions may be given as Python's integers: Gymnasium's own environments check NumPy's at length.

        Another's, or a wrapper of another's, may ask an action for what NumPy's integers alone have.
        """
        return isinstance(self.action_space, spaces.Discrete) and all(map(_is_gymnasiums, self._envs))

    def _end_a_fork(self) -> None:
        """End this process if it is a fork that an environment let come back: only one of the two may go on."""
        if os.getpid() != self._process:
            os._exit(0)

    def _lose(self, fault: EnvironmentFault) -> int:
        """Cut the episode of an environment that failed in a step, and return the number of the one after it.

        Raises:
            EnvironmentFault: the same, if no environment may be restarted (any more).
        """
        index = int(fault.record["env_index"]) - self._first
        self._restart(index, fault)
        self._final[index] = self._observations[index]
        self._rewards[index] = 0.0
        self._terminated[index], self._truncated[index], self._valid[index] = False, True, False
        self._has_lost = True
        return index + 1

    def _restart(self, index: int, fault: EnvironmentFault) -> None:
        if self.n_restarts >= self._max_restarts:
            raise fault if not self._max_restarts else too_many_restarts(fault, self._max_restarts)
        self.n_restarts += 1
        self.faults.append(fault)
        close_quietly(self._name, [self._envs[index]])
        try:
            self._envs[index] = self._wrap(self._make(), self._first + index)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            what = f"{fault}\nIt could not be made anew: {in_words(error)}"
            raise EnvironmentFault(what, fault.record) from error

    def _begin_next_episode(self, index: int) -> None:
        """Begin the next episode that can be begun."""
        self._episodes[index] += 1
        self._begin_due_episode(index)

    def _begin_due_episode(self, index: int) -> None:
        """Begin the episode that is due, or the first one after it that can be begun."""
        while True:
            self._starts[index] = len(self._history)
            self._reward_sums[index] = 0.0
            try:
                self._begin_episode(index)
            except EnvironmentFault as fault:
                self._restart(index, fault)
                self._episodes[index] += 1
            else:
                return

    @property
    def episodes(self) -> np.ndarray:
        """The number of the open episode of each environment."""
        return self._episodes.copy()

    def snapshot(self) -> Snapshot:
        """Episode numbers, the open episodes' actions, and the observations and rewards they have led to.

        `lengths` is how many actions each open episode has, or -1 where they have been forgotten: such an
        episode cannot be come back to.
        """
        opened = [
            np.stack(self._actions_of(i))
            for i in range(self.n_envs)
            if self._length_of(i) > 0 and not self._forgotten[i]
        ]
        arrays = {
            "observations": self._observations.copy(),
            "episodes": self._episodes.copy(),
            "reward_sums": self._reward_sums.copy(),
            "lengths": np.array([self._length_of(i) for i in range(self.n_envs)]),
        }
        arrays["lengths"][self._forgotten > 0] = -1
        if opened:
            arrays["open_actions"] = np.concatenate(opened)
        return Snapshot(arrays, {"n_restarts": self.n_restarts})

    def restore(self, snapshot: Snapshot) -> tuple[np.ndarray, list[int]]:
        """Play the open episodes again and compare where they lead, bit for bit.

        An environment that does not come back to the same observation and sum of rewards (it draws on
        something that its seed does not fix), whose actions were forgotten, or whose reset fails, begins its next
        episode instead; those are listed.

        Raises:
            EnvironmentFault: if one cannot be reset, and may not be restarted (any more).
        """
        arrays = snapshot.arrays
        check_snapshot(snapshot, self.n_envs)
        self.faults.clear()  # those of the moment that is left behind
        self.n_restarts = int(snapshot.values["n_restarts"])
        self._episodes[:] = arrays["episodes"]
        lengths = np.maximum(arrays["lengths"], 0).tolist()
        longest = max(lengths)
        ends = np.cumsum(lengths)
        self._history = []
        if longest:
            open_actions = arrays["open_actions"]
            self._history = [
                np.zeros((self.n_envs, *open_actions.shape[1:]), open_actions.dtype) for _ in range(longest)
            ]
        self._starts[:] = longest
        fresh = []
        for index, length in enumerate(lengths):
            episode = int(self._episodes[index])
            self._begin_due_episode(index)
            came_back = self._episodes[index] == episode
            if came_back:
                self._starts[index] = longest - length
                actions = arrays["open_actions"][ends[index] - length : ends[index]] if length else []
                for offset, action in enumerate(actions):
                    self._history[longest - length + offset][index] = action
                self._reward_sums[index] = arrays["reward_sums"][index]
                if arrays["lengths"][index] < 0 or not self._replay(index, arrays["observations"][index]):
                    self._begin_next_episode(index)
                    came_back = False
            if not came_back:
                fresh.append(self._first + index)
        return self._observations, fresh

    def close(self) -> None:
        """Close each environment; one that fails to is told of on standard error."""
        close_quietly(self._name, self._envs)

    def _replay(self, index: int, expected: np.ndarray) -> bool:
        """Step one environment through its open episode; whether it ends where it did, with the same rewards."""
        rewards = 0.0
        for action in self._actions_of(index):
            try:
                observation, reward, terminated, truncated, _ = self._envs[index].step(action.copy())
                if self._end(index, "terminated", terminated) or self._end(index, "truncated", truncated):
                    return False
                self._store(index, observation, self._observations, "the observation")
                rewards += self._number(index, reward)
            except KeyboardInterrupt:
                raise
            except BaseException:  # an environment that cannot be replayed is reported by the caller
                return False
        return self._observations[index].tobytes() == expected.tobytes() and rewards == self._reward_sums[index]

    def _begin_episode(self, index: int) -> None:
        self._forgotten[index] = 0
        seed = episode_seed(self._seed, self._first + index, int(self._episodes[index]))
        try:
            result = self._envs[index].reset(seed=seed)
        except KeyboardInterrupt:
            raise
        except PackingError as error:
            raise self._fault(index, f"after reset(), {error}") from error
        except BaseException as error:
            self._end_a_fork()
            raise self._raised(index, "reset", error) from error
        self._end_a_fork()
        if not (isinstance(result, tuple) and len(result) == 2):
            raise self._fault(index, f"{RESET_RETURNS}, and returned {amount_of(result)}")
        self._store(index, result[0], self._observations, "the observation that reset() returned")
        problem = self._check.first_problem(self._observations[index], np.asarray(result[0]))
        if problem:
            self._report(index, f"after reset(), {problem[0]}", problem[1])

    def _store(self, index: int, observation: Any, rows: np.ndarray, what: str) -> None:
        """Write an observation into its row, if it is one."""
        try:
            array = np.asarray(observation)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # what a value of any class raises while it is converted
            problem = f"{what} is a {type(observation).__name__} that cannot be made an array: {in_words(error)}"
            raise self._fault(index, problem) from error
        if array.dtype.kind not in "fiub":
            kind = f"{type(observation).__name__}{f' of {array.dtype}' if array.ndim else ''}"
            raise self._fault(index, f"{what} is a {kind}, not an array of numbers of shape {self._shape}")
        if array.shape != self._shape:
            raise self._fault(index, f"{what} has shape {array.shape}, not {self._shape}")
        if array.dtype != rows.dtype and rows.dtype.kind != "f":
            array = self._as_integers(index, array, rows.dtype)
        self._given[index] = observation
        rows[index] = array

    def _as_integers(self, index: int, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """An observation for a space of integers, so that none wraps around and nothing is cut off."""
        problem, is_bound = self._check.first_problem(array) or ("", True)
        if not is_bound:
            raise self._fault(index, problem)
        for place in np.argwhere(array % 1 != 0):
            what = f"{element(place)} is {array[tuple(place)]}, but its space holds whole numbers ({dtype})"
            raise self._fault(index, f"{what}: declare observation_space with dtype=np.float32")
        if problem:
            low, high = (False, True) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
            clipped = np.clip(array, dtype.type(low), dtype.type(high))
            if self._on_violation == "warn" and (clipped != array).any():
                problem += f"; it is clipped to what {dtype} holds, {low} to {high}"
            self._report(index, problem, is_bound=True)
            return clipped
        return array

    def _check_values(self) -> None:
        if not math.isfinite(self._rewards.sum()):  # or too large for their sum, which only costs time
            for index in np.flatnonzero(~np.isfinite(self._rewards)):
                self._lose(self._fault(int(index), f"the reward is {self._rewards[index]}"))
        if not self._check.fits(self._final):
            for index in np.flatnonzero(self._valid):
                problem = self._check.first_problem(self._final[index], np.asarray(self._given[index]))
                if problem:
                    try:
                        self._report(int(index), *problem)
                    except EnvironmentFault as fault:
                        self._lose(fault)

    def _report(self, index: int, problem: str, is_bound: bool) -> None:
        """Raise, or, for a value out of bounds where the user asked for it, note it once."""
        if not (is_bound and self._on_violation == "warn"):
            raise self._fault(index, problem)
        if not self._warned:
            self._warned = True
            self.warnings.append(f"{self._where(index)}: {problem} (said once; training goes on)")

    def _number(self, index: int, reward: Any) -> float:
        number = reward_of(reward)
        if number is None:
            raise self._fault(index, f"the reward must be one number, not {shown(reward)}")
        return number

    def _end(self, index: int, word: str, value: Any) -> bool:
        end = end_of(value)
        if end is None:
            raise self._fault(index, f"{word} must be True or False, not {shown(value)} ({type(value).__name__})")
        return end

    def _length_of(self, index: int) -> int:
        return len(self._history) - int(self._starts[index])

    def _actions_of(self, index: int) -> Sequence[np.ndarray]:
        return [row[index] for row in self._history[int(self._starts[index]) :]]

    def _forget_closed_episodes(self) -> None:
        """Drop actions that no open episode holds, now and then, so that memory does not grow."""
        if len(self._history) < 4096:
            return
        if len(self._history) >= LONGEST_REPLAY:
            lengths = len(self._history) - self._starts
            too_long = lengths >= LONGEST_REPLAY
            self._forgotten[too_long] += lengths[too_long]
            self._starts[too_long] = len(self._history)
        oldest = int(self._starts.min())
        if oldest >= 4096:
            del self._history[:oldest]
            self._starts -= oldest

    def _where(self, index: int) -> str:
        episode, step = int(self._episodes[index]), int(self._forgotten[index]) + self._length_of(index)
        return f"{self._name}, environment {self._first + index}, episode {episode}, step {step}"

    def _raised(self, index: int, method: str, error: BaseException) -> EnvironmentFault:
        frames = list(traceback.walk_tb(error.__traceback__))
        module = str(frames[-1][0].f_globals.get("__name__")) if frames else ""
        if module.startswith("gymnasium.") and "unpack" in in_words(error):  # a wrapper has failed to
            return self._fault(index, f"{STEP_RETURNS if method == 'step' else RESET_RETURNS} ({error})")
        return self._fault(index, f"{method}() raised {with_traceback(error)}")

    def _fault(self, index: int, problem: str) -> EnvironmentFault:
        """Say what went wrong where, with a record that replays it."""
        seed = episode_seed(self._seed, self._first + index, int(self._episodes[index]))
        actions = self._actions_of(index)
        last = f" The action was {actions[-1].tolist()}." if actions else ""
        hint = ""
        if "outside its space" in problem:
            hint = (
                "\nWiden the bounds of observation_space, or clip the observation, in the environment; "
                "--on-space-violation warn lets training go on."
            )
        if self._forgotten[index]:
            hint += f"\nThe first {self._forgotten[index]:,} actions are not kept: this episode cannot be replayed."
        record = {
            "env_index": self._first + index,
            "episode": int(self._episodes[index]),
            "step": int(self._forgotten[index]) + len(actions),
            "seed": None if self._forgotten[index] else seed,  # None: it cannot be played again
            "actions": [action.tolist() for action in actions],
            "problem": problem,
        }
        return EnvironmentFault(f"{self._where(index)} (seed {seed}): {problem}.{last}{hint}", record)
