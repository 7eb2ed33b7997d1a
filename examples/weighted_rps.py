"""Rock, paper, scissors in which rock that beats scissors counts twice: a game whose equilibrium is known.

proximo train examples/weighted_rps.py:WeightedRPS

Both choose at once: the second one does not see what the first has chosen. Nobody can be beaten who plays rock, paper
and scissors with probabilities 1/4, 1/2 and 1/4 (each of the three then gets 0 against it), and by nothing else.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pettingzoo

PAYOFF = np.array([[0.0, -1.0, 2.0], [1.0, 0.0, -1.0], [-2.0, 1.0, 0.0]])
"""What the one who chose the row gets from the one who chose the column: rock, paper, scissors."""

EQUILIBRIUM = np.array([0.25, 0.5, 0.25])


class WeightedRPS(pettingzoo.AECEnv):
    """One round; the only thing to see is a number that is always 0."""

    metadata = {"name": "weighted_rps"}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None) -> None:
        """Set up two players."""
        self.render_mode = render_mode
        self.possible_agents = ["first", "second"]
        self._seen, self._acts = gymnasium.spaces.Box(0.0, 1.0, (1,), np.float32), gymnasium.spaces.Discrete(3)

    def observation_space(self, agent: str) -> gymnasium.Space:
        """Nothing to see."""
        return self._seen

    def action_space(self, agent: str) -> gymnasium.Space:
        """Rock, paper, scissors."""
        return self._acts

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> None:
        """Begin a round."""
        self.agents = list(self.possible_agents)
        self.agent_selection = "first"
        self.rewards = dict.fromkeys(self.agents, 0.0)
        self._cumulative_rewards = dict.fromkeys(self.agents, 0.0)
        self.terminations = dict.fromkeys(self.agents, False)
        self.truncations = dict.fromkeys(self.agents, False)
        self.infos = {agent: {} for agent in self.agents}

    def observe(self, agent: str) -> np.ndarray:
        """Nothing."""
        return np.zeros(1, np.float32)

    def step(self, action: int | None) -> None:
        """The first one's choice is kept hidden; the second one's decides."""
        agent = self.agent_selection
        if self.terminations[agent]:
            self._was_dead_step(action)
            return
        if agent == "first":
            self.hidden, self.agent_selection = action, "second"
            return
        gain = float(PAYOFF[self.hidden, action])
        self.rewards = {"first": gain, "second": -gain}
        self.terminations = dict.fromkeys(self.possible_agents, True)
        self._accumulate_rewards()
        self.agent_selection = "first"
