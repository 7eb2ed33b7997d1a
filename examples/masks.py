"""Action masks: a policy that never chooses what is not possible, because the environment says what is.

    python examples/masks.py

The game: from a heap of 21, the player and a clumsy opponent take 1, 2 or 3 in turn, but never as many as were taken
just before. Whoever takes the last one wins; whoever cannot move loses. The environment puts the moves that are
possible into info["action_mask"], which is found before the run.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

import proximo


class Heap(gymnasium.Env):
    """Sees the heap and the last move; action 0, 1 or 2 takes 1, 2 or 3."""

    observation_space = gymnasium.spaces.MultiDiscrete([22, 4])
    action_space = gymnasium.spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        """A heap of 21, and nothing taken yet."""
        super().reset(seed=seed)
        self.left, self.last = 21, 0
        return self._see()

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict]:
        """Take, and let the opponent take."""
        assert self.mask()[action], "a move that is not possible"
        for taken, reward in ((int(action) + 1, 1.0), (None, -1.0)):
            if taken is None:
                taken = 1 + int(self.np_random.choice(np.flatnonzero(self.mask())))
            self.left, self.last = self.left - taken, taken
            if not self.mask().any():
                return *self._see()[:1], reward, True, False, {"action_mask": np.ones(3, np.int8)}
        return *self._see()[:1], 0.0, False, False, self._see()[1]

    def mask(self) -> np.ndarray:
        """What may be taken now."""
        return np.array([take <= self.left and take != self.last for take in (1, 2, 3)], np.int8)

    def _see(self) -> tuple[np.ndarray, dict]:
        return np.array([self.left, self.last]), {"action_mask": self.mask()}


def main(total_steps: int = 20_000, games: int = 300) -> float:
    """Train; then play against the clumsy opponent, and return the share of games won."""
    run = proximo.train(Heap, total_steps=total_steps, n_envs=8, learning_rate=1e-3, seed=1)
    policy, env, won = run.policy, Heap(), 0
    for game in range(games):
        observation, info = env.reset(seed=10_000 + game)
        reward, done = 0.0, False
        while not done:
            action = policy(observation, action_mask=info["action_mask"])
            observation, reward, done, _, info = env.step(action)
        won += reward > 0
    print(f"won {won} of {games} games; every one of its moves was possible")
    return won / games


if __name__ == "__main__":
    main()
