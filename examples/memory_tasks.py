"""Tasks that cannot be done without remembering: a T-maze, repeating what was seen before, and hidden velocities.

    proximo train examples/memory_tasks.py:TMaze --memory gru
    proximo train examples/memory_tasks.py:CartPoleWithoutVelocities --memory lstm --shared-memory

docs/memory.md shows what is learned of them with and without memory.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class TMaze(gym.Env):
    """A corridor with a sign at its beginning and a fork at its end (Bakker 2002).

    The sign, seen in the first step alone, says which way to turn; the right turn is worth 1, the other one -1, and on
    the way there is nothing to decide. Without memory nothing is better than to guess: 0 on average.
    """

    def __init__(self, length: int = 10) -> None:
        """A corridor of `length` steps."""
        self.length = length
        self.observation_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Put up a sign."""
        super().reset(seed=seed)
        self._sign, self._place = int(self.np_random.integers(2)), 0
        return self._seen(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Go on, or turn at the end."""
        self._place += 1
        at_end = self._place > self.length
        reward = (1.0 if action == self._sign else -1.0) if at_end else 0.0
        return self._seen(), reward, at_end, False, {}

    def _seen(self) -> np.ndarray:
        """The sign where it stands, and whether this is the fork."""
        sign = 2.0 * self._sign - 1.0 if self._place == 0 else 0.0
        return np.array([sign, float(self._place == self.length)], np.float32)


class Repeat(gym.Env):
    """Say which of four numbers was shown some steps ago; 1 for each time that is right, over 32 steps."""

    def __init__(self, delay: int = 2) -> None:
        """How many steps ago."""
        self.delay = delay
        self.observation_space = spaces.Discrete(4)
        self.action_space = spaces.Discrete(4)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict]:
        """Show the first number."""
        super().reset(seed=seed)
        self._shown = [int(self.np_random.integers(4))]
        return self._shown[-1], {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict]:
        """Compare, and show the next one."""
        t = len(self._shown) - 1
        reward = float(t >= self.delay and action == self._shown[t - self.delay])
        self._shown.append(int(self.np_random.integers(4)))
        return self._shown[-1], reward, False, len(self._shown) > 32, {}


class _Seeing(gym.ObservationWrapper):
    """Some of the numbers of another environment's observations."""

    def __init__(self, env: gym.Env, kept: list[int]) -> None:
        super().__init__(env)
        self._kept = kept
        assert isinstance(env.observation_space, spaces.Box)
        self.observation_space = spaces.Box(env.observation_space.low[kept], env.observation_space.high[kept])

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return observation[self._kept]


def CartPoleWithoutVelocities(**kwargs: Any) -> gym.Env:  # noqa: N802 (it is named where an environment is)
    """CartPole-v1 of which only the places of cart and pole are seen."""
    return _Seeing(gym.make("CartPole-v1", **kwargs), [0, 2])


def PendulumWithoutVelocity(**kwargs: Any) -> gym.Env:  # noqa: N802
    """Pendulum-v1 of which only the angle is seen."""
    return _Seeing(gym.make("Pendulum-v1", **kwargs), [0, 1])
