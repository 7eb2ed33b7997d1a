"""A whole environment in 40 lines: walk to the end of a corridor before the time is over.

python examples/corridor.py

proximo check-env examples/corridor.py:Corridor
proximo train examples/corridor.py:Corridor --total-steps 20000
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

import proximo


class Corridor(gymnasium.Env):
    """The agent sees where it is and how long the corridor is, walks left or right, and is paid at the end."""

    observation_space = gymnasium.spaces.Box(0.0, 12.0, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Begin at the left end of a corridor of random length; `seed` decides it."""
        super().reset(seed=seed)
        self.length = int(self.np_random.integers(4, 12))
        self.place = 0
        self.steps = 0
        return self._see(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Go left (0) or right (1). Arriving terminates the episode; running out of time truncates it."""
        self.steps += 1
        self.place = max(0, self.place + (1 if action == 1 else -1))
        terminated = self.place >= self.length
        truncated = self.steps >= 50
        return self._see(), 1.0 if terminated else -0.01, terminated, truncated, {}

    def _see(self) -> np.ndarray:
        return np.array([self.place, self.length], np.float32)


def main(total_steps: int = 20_000) -> int:
    """Train, and walk one corridor; return the steps that were taken beyond those that it is long."""
    run = proximo.train(Corridor, total_steps=total_steps, seed=1)
    policy, env, done = run.policy, Corridor(), False
    observation, _ = env.reset(seed=7)
    while not done:
        place, length = observation.astype(int)
        print("." * place + "@" + "." * (length - place - 1) + "|")
        observation, _, terminated, truncated, _ = env.step(policy(observation))
        done = terminated or truncated
    print(f"{'there' if terminated else 'not there'} after {env.steps} steps; the corridor is {env.length} long")
    return env.steps - env.length


if __name__ == "__main__":
    main()
