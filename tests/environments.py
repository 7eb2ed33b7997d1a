"""Small environments whose every number is known, for tests."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Collection
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class Counting(gym.Env):
    """Tells its own number, the number of its episode and of the step; ends on a fixed pattern.

    The reward tells the same three numbers, so that no two steps of an environment look alike. Episodes of
    2 to 5 steps end in turn by termination, by truncation, and by both at once.
    """

    def __init__(self, index: int = 0, dtype: type = np.float32) -> None:
        self.observation_space = spaces.Box(0.0, 200.0, (3,), dtype)
        self.action_space = spaces.Discrete(2)
        self.index, self.episode, self.t = index, -1, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.episode += 1
        self.t = 0
        return self.observation(), {}

    def step(self, action):
        self.t += 1
        ended = self.t == self.length(self.index, self.episode)
        terminated, truncated = self.ends(self.index, self.episode)
        reward = 100.0 * self.index + 10.0 * self.episode + self.t
        return self.observation(), reward, ended and terminated, ended and truncated, {}

    def observation(self) -> np.ndarray:
        return np.array([self.index, self.episode, self.t], self.observation_space.dtype)

    @staticmethod
    def length(index: int, episode: int) -> int:
        return 2 + (3 * index + 2 * episode) % 4

    @staticmethod
    def ends(index: int, episode: int) -> tuple[bool, bool]:
        return [(True, False), (False, True), (True, True)][(index + episode) % 3]


class Recording(gym.Env):
    """Writes down each seed it is reset with and each action it is given; episodes of `length` steps."""

    def __init__(
        self, action_space: spaces.Space | None = None, length: int = 5, log: list[Recording] | None = None
    ) -> None:
        self.observation_space = spaces.Box(-10.0, 10.0, (2,), np.float32)
        self.action_space = action_space or spaces.Discrete(3)
        self.length = length
        self.seeds: list[int | None] = []
        self.actions: list[Any] = []
        if log is not None:
            log.append(self)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.seeds.append(seed)
        self.t = 0
        return self.np_random.normal(size=2).astype(np.float32), {}

    def step(self, action):
        self.actions.append(action)
        self.t += 1
        return self.np_random.normal(size=2).astype(np.float32), 1.0, False, self.t == self.length, {}


class Forever(gym.Env):
    """Reward 1 at every step, for ever; only a time limit ends it."""

    def __init__(self) -> None:
        self.observation_space = spaces.Box(0.0, 1.0, (1,), np.float32)
        self.action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        return np.ones(1, np.float32), {}

    def step(self, action):
        return np.ones(1, np.float32), 1.0, False, False, {}


class ValueJump(gym.Env):
    """Half of the episodes begin in a poor state: its one step gains nothing, leads to the rich state, and is cut.

    In the rich state each step gains 1, until the episode is cut after 10. The value of the poor state is
    gamma times that of the rich one, and can come only from the final observation.
    """

    POOR, RICH = np.array([1, 0], np.float32), np.array([0, 1], np.float32)

    def __init__(self) -> None:
        self.observation_space = spaces.Box(0.0, 1.0, (2,), np.float32)
        self.action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.t = 0
        self.rich = bool(self.np_random.integers(2))
        return self.RICH if self.rich else self.POOR, {}

    def step(self, action):
        self.t += 1
        reward = float(self.rich)
        cut = not self.rich or self.t == 10
        return self.RICH, reward, False, cut, {}


class Scripted(gym.Env):
    """Gives out a list of (reward, terminated, truncated), then begins the list anew; observes how far it is.

    `final`: what the observation after an end is; by default the step's number, as everywhere.
    """

    def __init__(self, script: list[tuple[float, bool, bool]], final: float | None = None) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
        self.action_space = spaces.Discrete(2)
        self.script, self.final, self.at = script, final, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        return self.observation(), {}

    def step(self, action):
        reward, terminated, truncated = self.script[self.at]
        self.at = (self.at + 1) % len(self.script)
        observation = self.observation()
        if (terminated or truncated) and self.final is not None:
            observation = np.array([self.final], np.float32)
        return observation, reward, terminated, truncated, {}

    def observation(self) -> np.ndarray:
        return np.array([self.at / len(self.script)], np.float32)


class Noisy(gym.Env):
    """A random walk that the seed fixes, unless `seeded` is False; cut after `length` steps, ends when it strays."""

    unseeded: ClassVar[np.random.Generator] = np.random.default_rng(987)

    def __init__(self, length: int = 11, seeded: bool = True) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float64)
        self.action_space = spaces.Box(-2.0, 2.0, (2,), np.float32)
        self.length, self.seeded = length, seeded

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.source = self.np_random if self.seeded else self.unseeded
        self.t = 0
        self.x = self.source.normal(size=3)
        return self.x.copy(), {}

    def step(self, action):
        self.t += 1
        self.x = self.x + 0.3 * self.source.normal(size=3)
        self.x[:2] += 0.1 * action
        far = bool(np.abs(self.x).max() > 4.0)
        return self.x.copy(), float(-np.square(self.x).sum() + self.source.normal()), far, self.t == self.length, {}


FAULTS_IN_A_STEP = (
    "raises",
    "leaves Python",
    "returns four values",
    "NaN reward",
    "infinite reward",
    "two rewards",
    "no reward",
    "NaN observation",
    "infinite observation",
    "another shape",
    "out of bounds",
    "a word for an observation",
    "no truth value for terminated",
)
FAULTS_IN_A_RESET = ("reset raises", "reset returns no pair", "reset returns another shape", "reset returns NaN")
FAULTS_OF_THE_PROCESS = ("hangs", "kills its process", "hangs in reset")


class Faulty(gym.Env):
    """A quiet environment that does one thing wrong, at step `at` of an episode, or in its reset.

    `fault` is one of those above, or none of them. It comes in episode `episode`, or, where there are `seeds`, in all
    episodes with one of these. A copy with `faulty` False behaves. Episodes have `length` steps.
    """

    def __init__(
        self,
        fault: str,
        at: int = 3,
        episode: int = 1,
        faulty: bool = True,
        *,
        seeds: Collection[int] = (),
        length: int = 6,
    ) -> None:
        self.observation_space = spaces.Box(-1.0, np.array([1.0, 2.0], np.float32), (2,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.fault, self.at, self.bad_episode, self.faulty = fault, at, episode, faulty
        self.seeds, self.length = seeds, length
        self.episode = -1

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.episode += 1
        self.t = 0
        self.bad = self.faulty and (seed in self.seeds if self.seeds else self.episode == self.bad_episode)
        start = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        match self.fault if self.bad else "":
            case "reset raises":
                raise RuntimeError("the arm is stuck")
            case "reset returns no pair":
                return start
            case "reset returns another shape":
                return np.zeros(3, np.float32), {}
            case "reset returns NaN":
                return np.array([np.nan, 0], np.float32), {}
            case "hangs in reset":
                signal.pause()
        return start, {}

    def step(self, action) -> Any:
        self.t += 1
        observation = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        answer = [observation, float(observation.sum()), False, self.t == self.length, {}]
        if self.bad and self.t == self.at:
            return self.misbehave(answer)
        return tuple(answer)

    def misbehave(self, answer: list[Any]) -> Any:
        x, y = answer[0]
        match self.fault:
            case "raises":
                raise ZeroDivisionError("the arm is stuck")
            case "leaves Python":
                sys.exit(3)
            case "returns four values":
                return answer[:4]
            case "hangs":
                signal.pause()
            case "kills its process":
                os.kill(os.getpid(), signal.SIGKILL)
        put = {
            "NaN reward": (1, float("nan")),
            "infinite reward": (1, -float("inf")),
            "two rewards": (1, np.array([1.0, 2.0])),
            "no reward": (1, None),
            "NaN observation": (0, np.array([x, np.nan], np.float32)),
            "infinite observation": (0, np.array([np.inf, y], np.float32)),
            "another shape": (0, np.zeros((1, 2), np.float32)),
            "out of bounds": (0, np.array([x, 2.5], np.float32)),
            "a word for an observation": (0, "nowhere"),
            "no truth value for terminated": (2, np.array([True, False])),
        }
        place, value = put.get(self.fault, (0, answer[0]))
        answer[place] = value
        return tuple(answer)


class Returning(gym.Env):
    """Always returns the same from `step`: what it is given, in the place of what is usual."""

    def __init__(self, space: spaces.Space | None = None, **given: Any) -> None:
        self.observation_space = space or spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = spaces.Discrete(2)
        usual = dict(observation=np.zeros(2, self.observation_space.dtype), reward=0.0, terminated=False)
        self.returned = tuple((usual | dict(truncated=False, info={}) | given).values())

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        return np.zeros(2, self.observation_space.dtype), {}

    def step(self, action):
        return self.returned


class Identity(gym.Env):
    """Shows a class as one of K ones; reward 1 for naming it. Episodes of 8 steps."""

    def __init__(self, n_classes: int = 3) -> None:
        self.observation_space = spaces.Box(0.0, 1.0, (n_classes,), np.float32)
        self.action_space = spaces.Discrete(n_classes)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.t = 0
        return self.drawn(), {}

    def step(self, action):
        reward = float(action == self.shown)
        self.t += 1
        return self.drawn(), reward, self.t == 8, False, {}

    def drawn(self) -> np.ndarray:
        self.shown = int(self.np_random.integers(self.action_space.n))
        return np.eye(self.action_space.n, dtype=np.float32)[self.shown]


class BoxIdentity(gym.Env):
    """Shows two targets; reward minus the squared distance of the action to them. Episodes of 8 steps."""

    def __init__(self) -> None:
        self.observation_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.action_space = spaces.Box(-2.0, 2.0, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.t = 0
        return self.drawn(), {}

    def step(self, action):
        reward = -float(np.square(action - self.shown).sum())
        self.t += 1
        return self.drawn(), reward, False, self.t == 8, {}

    def drawn(self) -> np.ndarray:
        self.shown = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return self.shown
