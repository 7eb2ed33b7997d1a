"""Every kind of vector environment behind one contract (`VectorEnvs`), and the plain one: `SerialEnvs`."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from proximo.errors import UserError

SpacePolicy = Literal["raise", "warn"]


class Step(NamedTuple):
    """One step of N environments, after any automatic reset.

    | field              | shape   | what                                                                  |
    |--------------------|---------|-----------------------------------------------------------------------|
    | observations       | [N, *O] | what to act on next: of the next episode where one has ended          |
    | rewards            | [N]     | the environment's own, float64                                        |
    | terminated         | [N]     | the environment's own end                                             |
    | truncated          | [N]     | cut from outside (time limit); an episode that is both is terminated  |
    | final_observations | [N, *O] | the true next observation, also where an episode ended                |
    | valid              | [N]     | False for a step that only reset (NEXT_STEP autoreset): no experience |

    The arrays are overwritten by the next call.
    """

    observations: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    final_observations: np.ndarray
    valid: np.ndarray


class Snapshot(NamedTuple):
    """What it takes to come back to the present step: arrays and JSON-able values."""

    arrays: dict[str, np.ndarray]
    values: dict[str, Any]


class VectorEnvs(Protocol):
    """N environments that step together and reset by themselves."""

    n_envs: int
    observation_space: spaces.Space
    action_space: spaces.Space

    def reset(self) -> np.ndarray:
        """Begin the first episode of each environment; return observations `[N, *O]`."""
        ...

    def step(self, actions: np.ndarray) -> Step:
        """Step each environment with its row of `actions` (a fresh array, kept by the callee)."""
        ...

    def snapshot(self) -> Snapshot:
        """Describe the present moment."""
        ...

    def restore(self, snapshot: Snapshot) -> tuple[np.ndarray, list[int]]:
        """Return to a moment: its observations, and the environments that had to begin a fresh episode."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...


class EnvironmentFault(UserError):  # noqa: N818 (what went wrong is the environment's, not an error of ours)
    """An environment raised, or returned what it must not; `record` is enough to play the episode again."""

    def __init__(self, message: str, record: dict[str, Any]) -> None:
        """Keep the message for people and the record for `proximo check-env ENV --replay FILE`."""
        super().__init__(message)
        self.record = record

    def __reduce__(self) -> tuple[Any, ...]:
        """Survive the way from a worker process to the main one."""
        return type(self), (str(self), self.record)


def episode_seed(run_seed: int, env_index: int, episode: int) -> int:
    """The seed of one episode: different for every environment and every episode, the same on every machine."""
    return int(np.random.SeedSequence([run_seed, env_index, episode]).generate_state(1, np.uint32)[0])


EVALUATION_STREAM = 2**31
"""Mixed into the seeds so that evaluation never sees the episodes of training with the same seed."""

EVALUATION_ENVS = 10
"""Environments side by side in an evaluation of ten episodes or more."""


def evaluation_episode_seed(seed: int, episode: int) -> int:
    """The seed of the given episode of `proximo evaluate --seed SEED`; `watch` shows the same ones."""
    return episode_seed(EVALUATION_STREAM + seed, episode % EVALUATION_ENVS, episode // EVALUATION_ENVS)


@dataclass(frozen=True)
class SpaceCheck:
    """Finds what is wrong with a batch of observations; a value may pass its bound by float rounding."""

    low: np.ndarray
    high: np.ndarray
    bounded: bool
    slack_low: np.ndarray
    slack_high: np.ndarray

    @staticmethod
    def of(space: spaces.Space) -> SpaceCheck:
        """Prepare the bounds of a Box; other spaces have none here."""
        if not isinstance(space, spaces.Box):
            nothing = np.zeros(())
            return SpaceCheck(nothing, nothing, False, nothing, nothing)
        low, high = space.low.astype(np.float64), space.high.astype(np.float64)
        bounded = bool(np.isfinite(low).any() or np.isfinite(high).any())
        return SpaceCheck(low, high, bounded, low - 1e-5 * (1 + np.abs(low)), high + 1e-5 * (1 + np.abs(high)))

    def fits(self, observations: np.ndarray) -> bool:
        """Whether all of them are finite and inside the bounds."""
        if not np.isfinite(observations).all():
            return False
        if not self.bounded:
            return True
        return bool(((observations >= self.slack_low) & (observations <= self.slack_high)).all())

    def first_problem(self, observation: np.ndarray) -> tuple[str, bool] | None:
        """What is wrong with one observation, in words, and whether it is a value out of bounds (not NaN)."""
        for place in np.argwhere(~np.isfinite(observation)):
            return f"{_element(place)} is {observation[tuple(place)]}", False
        if self.bounded:
            for place in np.argwhere((observation < self.slack_low) | (observation > self.slack_high)):
                where = tuple(place)
                return (
                    f"{_element(place)} is {observation[where]:.9g}, outside its space's bounds "
                    f"[{self.low[where]:.6g}, {self.high[where]:.6g}]",
                    True,
                )
        return None


def _element(place: np.ndarray) -> str:
    return f"observation[{', '.join(map(str, place))}]" if len(place) else "observation"


class SerialEnvs:
    """N environments in this process, stepped one after the other; no copies, nothing allocated per step.

    Episode e of environment i is seeded by `episode_seed(seed, i, e)`, and the actions since each reset are
    kept, so an open episode can be rebuilt by playing it again. Resets happen within the step that ended
    the episode, so every row is experience.
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
    ) -> None:
        """Make the environments; `first_index` is the number of the first one among all of the run's."""
        self.n_envs = n_envs
        self._seed = seed
        self._name = name
        self._first = first_index
        self._on_violation = on_space_violation
        self._warned = False
        self.warnings: list[str] = []
        self._envs = [make() for _ in range(n_envs)]
        if len({id(env) for env in self._envs}) < n_envs:
            raise UserError(f"{name}: the factory gave the same environment twice; it must make a new one each time.")
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
        self._episodes = np.zeros(n_envs, np.int64)
        self._history: list[np.ndarray] = []
        self._starts = np.zeros(n_envs, np.int64)
        self._reward_sums = np.zeros(n_envs)

    def reset(self) -> np.ndarray:
        """Begin episode 0 of each environment; return observations `[N, *O]`."""
        self._episodes[:] = 0
        self._history, self._starts = [], np.zeros(self.n_envs, np.int64)
        self._reward_sums[:] = 0.0
        for index in range(self.n_envs):
            self._begin_episode(index)
        return self._observations

    def step(self, actions: np.ndarray) -> Step:
        """Step each environment with its row of `actions`.

        Raises:
            EnvironmentFault: if one raises or returns what it must not.
        """
        self._history.append(actions)
        for index, env in enumerate(self._envs):
            try:
                observation, reward, terminated, truncated, _ = env.step(actions[index])
            except Exception as error:
                raise self._raised(index, "step", error) from error
            self._store(index, observation, self._final, "the observation")
            self._rewards[index] = self._number(index, reward)
            self._terminated[index] = terminated
            self._truncated[index] = truncated
        self._check_values()
        np.copyto(self._observations, self._final)
        self._reward_sums += self._rewards
        for index in np.flatnonzero(self._terminated | self._truncated):
            self._episodes[index] += 1
            self._starts[index] = len(self._history)
            self._reward_sums[index] = 0.0
            self._begin_episode(int(index))
        self._forget_closed_episodes()
        return Step(self._observations, self._rewards, self._terminated, self._truncated, self._final, self._valid)

    def snapshot(self) -> Snapshot:
        """Episode numbers, the open episodes' actions, and the observations and rewards they have led to."""
        opened = [np.stack(self._actions_of(i)) for i in range(self.n_envs) if self._length_of(i) > 0]
        arrays = {
            "observations": self._observations.copy(),
            "episodes": self._episodes.copy(),
            "reward_sums": self._reward_sums.copy(),
            "lengths": np.array([self._length_of(i) for i in range(self.n_envs)]),
        }
        if opened:
            arrays["open_actions"] = np.concatenate(opened)
        return Snapshot(arrays, {})

    def restore(self, snapshot: Snapshot) -> tuple[np.ndarray, list[int]]:
        """Play the open episodes again and compare where they lead, bit for bit.

        An environment that does not come back to the same observation and sum of rewards (it draws on
        something that its seed does not fix) begins its next episode instead; those are listed.
        """
        arrays = snapshot.arrays
        self._episodes[:] = arrays["episodes"]
        lengths = arrays["lengths"].tolist()
        longest = max(lengths)
        ends = np.cumsum(lengths)
        self._history = []
        if longest:
            open_actions = arrays["open_actions"]
            self._history = [
                np.zeros((self.n_envs, *open_actions.shape[1:]), open_actions.dtype) for _ in range(longest)
            ]
        self._starts[:] = [longest - length for length in lengths]
        fresh = []
        for index, length in enumerate(lengths):
            self._begin_episode(index)
            for offset, action in enumerate(
                arrays["open_actions"][ends[index] - length : ends[index]] if length else []
            ):
                self._history[longest - length + offset][index] = action
            self._reward_sums[index] = arrays["reward_sums"][index]
            if not self._replay(index, arrays["observations"][index]):
                self._reward_sums[index] = 0.0
                self._episodes[index] += 1
                self._starts[index] = longest
                self._begin_episode(index)
                fresh.append(self._first + index)
        return self._observations, fresh

    def close(self) -> None:
        """Close each environment."""
        for env in self._envs:
            env.close()

    def _replay(self, index: int, expected: np.ndarray) -> bool:
        """Step one environment through its open episode; whether it ends where it did, with the same rewards."""
        rewards = 0.0
        for action in self._actions_of(index):
            try:
                observation, reward, terminated, truncated, _ = self._envs[index].step(action)
            except Exception:  # an environment that cannot be replayed is reported by the caller
                return False
            if terminated or truncated or np.shape(observation) != self._shape:
                return False
            self._observations[index] = observation
            rewards += self._number(index, reward)
        return self._observations[index].tobytes() == expected.tobytes() and rewards == self._reward_sums[index]

    def _begin_episode(self, index: int) -> None:
        seed = episode_seed(self._seed, self._first + index, int(self._episodes[index]))
        try:
            result = self._envs[index].reset(seed=seed)
        except Exception as error:
            raise self._raised(index, "reset", error) from error
        if not (isinstance(result, tuple) and len(result) == 2):
            raise self._fault(index, "reset() must return (observation, info), the pair that Gymnasium asks for")
        self._store(index, result[0], self._observations, "the observation that reset() returned")
        problem = self._check.first_problem(self._observations[index])
        if problem:
            self._report(index, f"after reset(), {problem[0]}", problem[1])

    def _store(self, index: int, observation: Any, rows: np.ndarray, what: str) -> None:
        """Write an observation into its row, if it is one."""
        try:
            array = np.asarray(observation)
        except ValueError as error:
            raise self._fault(index, f"{what} is no array: {error}") from error
        if array.shape != self._shape:
            raise self._fault(index, f"{what} has shape {array.shape}, not {self._shape}")
        if array.dtype.kind not in "fiub":
            raise self._fault(index, f"{what} is not made of numbers but of {array.dtype}")
        if self._observations.dtype.kind != "f" and array.dtype != self._observations.dtype:
            problem = self._check.first_problem(array)  # before it wraps around in a narrower integer type
            if problem:
                self._report(index, *problem)
        rows[index] = array

    def _check_values(self) -> None:
        if not np.isfinite(self._rewards).all():
            index = int(np.flatnonzero(~np.isfinite(self._rewards))[0])
            raise self._fault(index, f"the reward is {self._rewards[index]}")
        if not self._check.fits(self._final):
            for index in range(self.n_envs):
                problem = self._check.first_problem(self._final[index])
                if problem:
                    self._report(index, *problem)

    def _report(self, index: int, problem: str, is_bound: bool) -> None:
        """Raise, or, for a value out of bounds where the user asked for it, note it once."""
        if not (is_bound and self._on_violation == "warn"):
            raise self._fault(index, problem)
        if not self._warned:
            self._warned = True
            self.warnings.append(f"{self._where(index)}: {problem} (said once; training goes on)")

    def _number(self, index: int, reward: Any) -> float:
        if type(reward) is float:
            return reward
        array = np.asarray(reward)
        if array.size != 1 or array.dtype.kind not in "fiub":
            raise self._fault(index, f"the reward must be one number, not {reward!r}")
        return float(array.reshape(()))

    def _length_of(self, index: int) -> int:
        return len(self._history) - int(self._starts[index])

    def _actions_of(self, index: int) -> Sequence[np.ndarray]:
        return [row[index] for row in self._history[int(self._starts[index]) :]]

    def _forget_closed_episodes(self) -> None:
        """Drop actions that no open episode holds, now and then, so that memory does not grow."""
        oldest = int(self._starts.min())
        if oldest >= 4096:
            del self._history[:oldest]
            self._starts -= oldest

    def _where(self, index: int) -> str:
        episode, step = int(self._episodes[index]), self._length_of(index)
        return f"{self._name}, environment {self._first + index}, episode {episode}, step {step}"

    def _raised(self, index: int, method: str, error: Exception) -> EnvironmentFault:
        lines = traceback.format_exception(error)
        own = "".join(lines[-4:]).rstrip()
        return self._fault(index, f"{method}() raised {type(error).__name__}: {error}\n{own}")

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
        record = {
            "env_index": self._first + index,
            "episode": int(self._episodes[index]),
            "step": len(actions),
            "seed": seed,
            "actions": [action.tolist() for action in actions],
            "problem": problem,
        }
        return EnvironmentFault(f"{self._where(index)} (seed {seed}): {problem}.{last}{hint}", record)
