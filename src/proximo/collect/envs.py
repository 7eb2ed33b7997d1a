"""The contract that every kind of vector environment keeps (`VectorEnvs`), and what all kinds share."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from gymnasium import spaces

from proximo.errors import UserError, in_words

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

    A step that is truncated and not valid was lost to a fault: the environment was restarted, its episode is cut at the
    observation that was acted on, and `observations` has the first one of the next episode.

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


def check_snapshot(snapshot: Snapshot, n_envs: int) -> None:
    """Raise ValueError unless it is of so many environments and has every action of their open episodes."""
    arrays = snapshot.arrays
    for name in ("lengths", "episodes", "reward_sums"):
        if arrays[name].shape != (n_envs,) or arrays[name].dtype.kind not in "if":
            raise ValueError(f"its {name} are not one number for each of {n_envs} environments")
    n_actions = len(arrays["open_actions"]) if "open_actions" in arrays else 0
    if sum(max(0, int(length)) for length in arrays["lengths"]) != n_actions:
        raise ValueError("its open episodes are longer or shorter than the actions that it has for them")


class VectorEnvs(Protocol):
    """N environments that step together and reset by themselves."""

    n_envs: int
    observation_space: spaces.Space
    action_space: spaces.Space
    faults: list[EnvironmentFault]
    """What environments were restarted for, since somebody last emptied the list."""
    n_restarts: int
    """How often, in all."""
    goes_on: np.ndarray | None
    """`[N]`, of the last step: True where what terminated is not the episode but a life in it, so that learning ends
    there and the return does not; None where there is no such thing."""

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

LONGEST_REPLAY = 200_000
"""Steps of one episode whose actions are kept; a longer one cannot be played again, and would fill the memory."""

EVALUATION_ENVS = 10
"""Environments side by side in an evaluation of ten episodes or more."""


def evaluation_episode_seed(seed: int, episode: int) -> int:
    """The seed of the given episode of `proximo evaluate --seed SEED`; `watch` shows the same ones."""
    return episode_seed(EVALUATION_STREAM + seed, episode % EVALUATION_ENVS, episode // EVALUATION_ENVS)


def too_many_restarts(fault: EnvironmentFault, most: int) -> EnvironmentFault:
    """The fault that was one too many."""
    return EnvironmentFault(f"{fault}\nEnvironments have been restarted {most} times (max_restarts).", fault.record)


def close_quietly(name: str, envs: Sequence[Any]) -> None:
    """Close each environment, also where one before it fails to; say so once, on standard error."""
    failures = []
    for env in envs:
        try:
            env.close()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            failures.append(in_words(error))
    if failures:
        others = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        print(f"proximo: closing {name} failed: {failures[0]}{others}", file=sys.stderr)
