"""Gymnasium vector environments, in every autoreset mode, behind the `VectorEnvs` contract."""

from __future__ import annotations

import math
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

from proximo.collect.atari import is_atari, register_games, vector_arguments
from proximo.collect.envpool_envs import EnvPoolEnvs
from proximo.collect.envs import (
    EnvironmentFault,
    Snapshot,
    SpacePolicy,
    Step,
    close_quietly,
    episode_seed,
)
from proximo.collect.returned_values import SpaceCheck, shown
from proximo.errors import UserError, in_words, with_traceback


def make_native(
    env_id: str,
    n_envs: int,
    env_kwargs: dict[str, Any],
    *,
    max_episode_steps: int | None = None,
    episodic_life: bool = False,
) -> VectorEnv:
    """Make the environment's own vector version; with `episodic_life`, of an Atari game in which a life is an end.

    Raises:
        UserError: if it has none.
    """
    if is_atari(env_id):
        register_games(env_id)
    spec = gym.registry.get(env_id)
    if spec is None or spec.vector_entry_point is None:
        raise UserError(f"{env_id} has no vector version of its own. Use --vectorization serial or workers.")
    arguments = dict(env_kwargs)
    if is_atari(env_id):
        arguments = vector_arguments(
            n_envs, env_kwargs, max_episode_steps=max_episode_steps, episodic_life=episodic_life
        )
    elif max_episode_steps is not None:
        arguments["max_episode_steps"] = max_episode_steps
    try:
        return gym.make_vec(env_id, n_envs, vectorization_mode="vector_entry_point", **arguments)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise UserError(f"The vector version of {env_id} could not be made: {in_words(error)}") from error


_CARTPOLE = "gymnasium.envs.classic_control.cartpole"
_STATE = {(_CARTPOLE, "CartPoleVectorEnv"): ("state", "steps", "prev_done")}
"""Vector environments whose moment is known to be in these arrays and their random generator, and nowhere else."""
_SAME = {f"{_CARTPOLE}:CartPoleVectorEnv": f"{_CARTPOLE}:CartPoleEnv"}
"""The environment that each of them is the same task as."""


def comes_back_exactly(env_id: str) -> bool:
    """Whether an id has a vector version that is the same task, and can be brought back to a moment in an episode."""
    spec = gym.registry.get(env_id)
    if spec is None or spec.additional_wrappers or not isinstance(spec.vector_entry_point, str):
        return False
    return spec.entry_point is not None and _SAME.get(spec.vector_entry_point) == spec.entry_point


def _known_state(inner: Any) -> tuple[str, ...]:
    """The names of the arrays with the state of vector environments, none where that is not known."""
    kind = type(inner)
    return _STATE.get((kind.__module__, kind.__qualname__), ())


def _like(array: np.ndarray, name: str, own: np.ndarray) -> np.ndarray:
    if (array.shape, array.dtype) != (own.shape, own.dtype):
        raise ValueError(f"its {name} are {array.dtype} of shape {array.shape}, not {own.dtype} of {own.shape}")
    return array.copy()


class NativeEnvs:
    """One `gymnasium.vector.VectorEnv`, or EnvPool's environments, in any autoreset mode.

    NEXT_STEP: the step after an episode's end only resets; it is marked as not valid. SAME_STEP: the true
    final observation comes from `info["final_obs"]`. DISABLED: the ended environments are reset here.
    `atari` is for ale-py's: an end after which the frames of the game count on is that of a life, and resets nothing.
    One whose state is known (`comes_back_exactly`) is brought back to a moment within an episode. Any other cannot be:
    a resumed run begins fresh episodes in all of them, seeded by the run's seed and the step at which it went on.
    """

    def __init__(
        self,
        envs: VectorEnv | EnvPoolEnvs,
        seed: int,
        *,
        name: str = "the environment",
        on_space_violation: SpacePolicy = "raise",
        atari: bool = False,
    ) -> None:
        """Wrap `envs`; reads the autoreset mode from its metadata (NEXT_STEP if it does not say)."""
        self.warnings: list[str] = []
        self.faults: list[EnvironmentFault] = []
        self.n_restarts = 0
        self.goes_on: np.ndarray | None = None
        self._on_violation = on_space_violation
        self._envs = envs
        self._seed = seed
        self._name = name
        self._mode = AutoresetMode(envs.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP))
        self.resets_take_steps = self._mode is AutoresetMode.NEXT_STEP
        """Whether the step after an episode's end is none of the next one."""
        self.n_envs = envs.num_envs
        self.observation_space = envs.single_observation_space
        self.action_space = envs.single_action_space
        self._check = SpaceCheck.of(self.observation_space)
        self._reset_due = np.zeros(self.n_envs, bool)
        self._observations = np.zeros(0)
        self._n_steps = 0
        self._frames = np.zeros(self.n_envs, np.int64) if atari else None

    def reset(self) -> np.ndarray:
        """Begin the first episode of each environment; return observations `[N, *O]`."""
        return self._reset_all(fresh_start=0)

    def step(self, actions: np.ndarray) -> Step:
        """Step each environment with its row of `actions`.

        Raises:
            EnvironmentFault: if it raises, if a reward or observation is not finite, or, unless that is only
                to be told, if an observation is outside its space.
        """
        self._n_steps += 1
        try:
            raw, rewards, terminated, truncated, info = self._envs.step(actions)
            observations, rewards = self._typed(raw), np.asarray(rewards, np.float64)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise self._raised("step", actions, error) from error
        terminated, truncated = (
            self._ends("terminated", terminated, actions),
            self._ends("truncated", truncated, actions),
        )
        valid = ~self._reset_due
        done = (terminated | truncated) & valid
        self.goes_on = self._lives_lost(terminated, info)
        over = done if self.goes_on is None else done & ~self.goes_on
        final = observations
        if self._mode is AutoresetMode.NEXT_STEP:
            self._reset_due = over
        elif over.any() and self._mode is AutoresetMode.SAME_STEP:
            final = observations.copy()
            for index in np.flatnonzero(over):
                final[index] = self._final_observation(info, int(index), actions)
        elif over.any():
            final = observations.copy()
            try:
                after, _ = self._envs.reset(options={"reset_mask": over})
                observations = self._typed(after)
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                raise self._raised("reset", actions, error) from error
        self._refuse_bad_values(final, rewards, valid, actions)
        if observations is not final:
            self._refuse_bad_values(observations, rewards, valid, actions)
        self._observations = observations
        return Step(observations, rewards, terminated, truncated, final, valid)

    def snapshot(self) -> Snapshot:
        """How far it got, and what is inside where that is known."""
        values: dict[str, Any] = {"n_steps": self._n_steps}
        inner: Any = self._envs.unwrapped
        if not _known_state(inner):
            return Snapshot({}, values)
        arrays = {name: np.array(getattr(inner, name)) for name in _known_state(inner)}
        arrays["reset_due"] = self._reset_due.copy()
        arrays["observations"] = self._observations.copy()
        values["random"] = inner.np_random.bit_generator.state
        return Snapshot(arrays, values)

    def restore(self, snapshot: Snapshot) -> tuple[np.ndarray, list[int]]:
        """Come back to the moment, or begin fresh episodes everywhere, other ones than at the start."""
        self._n_steps = int(snapshot.values["n_steps"])
        observations = self._reset_all(fresh_start=self._n_steps)
        if "random" not in snapshot.values:
            return observations, list(range(self.n_envs))
        inner: Any = self._envs.unwrapped
        own = {name: getattr(inner, name) for name in _known_state(inner)}
        own |= {"reset_due": self._reset_due, "observations": self._observations}
        kept = {name: _like(snapshot.arrays[name], name, array) for name, array in own.items()}
        for name in _known_state(inner):
            setattr(inner, name, kept[name])
        inner.np_random.bit_generator.state = snapshot.values["random"]
        self._reset_due, self._observations = kept["reset_due"], kept["observations"]
        return self._observations, []

    def close(self) -> None:
        """Close the vector environment; if it fails to, that is told on standard error."""
        close_quietly(self._name, [self._envs])

    def _reset_all(self, fresh_start: int) -> np.ndarray:
        self._reset_due[:] = False
        try:
            seed = episode_seed(self._seed, 0, fresh_start)
            raw, info = self._envs.reset(seed=seed if self._frames is None else seed % 2**30)  # ale-py's are of 31 bits
            observations = self._typed(raw)
            if self._frames is not None:
                self._frames = np.array(info["episode_frame_number"], np.int64)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise self._raised("reset", None, error) from error
        self._refuse_bad_values(observations, np.zeros(self.n_envs), ~self._reset_due, None)
        self._observations = observations
        return observations

    def _final_observation(self, info: dict[str, Any], index: int, actions: np.ndarray) -> Any:
        try:
            return info["final_obs"][index]
        except Exception as error:
            problem = "its autoreset mode is SAME_STEP, and info has no final_obs where an episode ended"
            raise self._fault(index, problem, actions) from error

    def _lives_lost(self, terminated: np.ndarray, info: dict[str, Any]) -> np.ndarray | None:
        """Where an end is only that of a life. A new game has counted fewer frames than the last one had."""
        if self._frames is None:
            return None
        frames = np.asarray(info["episode_frame_number"], np.int64)
        goes_on = terminated & (frames > self._frames) & (np.asarray(info["lives"]) > 0)
        self._frames = frames.copy()
        return goes_on

    def _typed(self, observations: Any) -> np.ndarray:
        """A fresh array; float64 becomes float32, as everywhere here."""
        array = np.array(observations)
        return array.astype(np.float32) if array.dtype == np.float64 else array

    def _ends(self, word: str, given: Any, actions: np.ndarray) -> np.ndarray:
        """A copy of `terminated` or `truncated`, which must be `[N]` bools, or integers 0 and 1."""
        if type(given) is np.ndarray and given.dtype == bool and given.shape == (self.n_envs,):
            return given.copy()
        ends = np.array(given)
        is_bool = ends.dtype == bool or (ends.dtype.kind in "iu" and bool(np.isin(ends, (0, 1)).all()))
        if ends.shape != (self.n_envs,) or not is_bool:
            raise self._fault(0, f"{word} must be {self.n_envs} of True or False, not {shown(given)}", actions)
        return ends.astype(bool)

    def _raised(self, method: str, actions: np.ndarray | None, error: BaseException) -> EnvironmentFault:
        return self._fault(0, f"{method}() raised {with_traceback(error)}", actions)

    def _refuse_bad_values(
        self, observations: np.ndarray, rewards: np.ndarray, valid: np.ndarray, actions: np.ndarray | None
    ) -> None:
        if not math.isfinite(np.dot(rewards, rewards)):  # or huge
            for index in np.flatnonzero(~np.isfinite(rewards) & valid):
                raise self._fault(int(index), f"the reward is {rewards[index]}", actions)
        if self._check.fits(observations):
            return
        for index in range(self.n_envs):
            problem, is_bound = self._check.first_problem(observations[index]) or ("", True)
            if problem and not (is_bound and self._on_violation == "warn"):
                raise self._fault(index, problem, actions)
            if problem and not self.warnings:
                self.warnings.append(f"{self._name}, environment {index}: {problem} (said once; training goes on)")

    def _fault(self, index: int, problem: str, actions: np.ndarray | None) -> EnvironmentFault:
        last = [] if actions is None else [actions[index].tolist()]
        record = {
            "env_index": index,
            "episode": -1,
            "step": self._n_steps,
            "seed": None,
            "actions": last,
            "problem": problem,
        }
        said = f" The action was {last[0]}." if last else ""
        return EnvironmentFault(
            f"{self._name}, environment {index}, step {self._n_steps} of the run: {problem}.{said}", record
        )
