"""Connect Four as PettingZoo has games: two players take turns, and see which columns are not full.

proximo train examples/connect_four.py:ConnectFour
proximo evaluate RUN --allow-import        the ratings of the policy's past selves
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pettingzoo

ROWS, COLUMNS = 6, 7


class ConnectFour(pettingzoo.AECEnv):
    """Whoever first has four in a line gets 1, and the other one -1."""

    metadata = {"name": "connect_four", "render_modes": ["rgb_array"], "render_fps": 2}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None) -> None:
        """Set up two players."""
        self.render_mode = render_mode
        self.possible_agents = ["first", "second"]
        self._seen = gymnasium.spaces.Dict(
            {
                "observation": gymnasium.spaces.Box(0.0, 1.0, (2, ROWS, COLUMNS), np.float32),
                "action_mask": gymnasium.spaces.MultiBinary(COLUMNS),
            }
        )
        self._acts = gymnasium.spaces.Discrete(COLUMNS)

    def observation_space(self, agent: str) -> gymnasium.Space:
        """The player's own pieces, the other's, and the columns that are not full."""
        return self._seen

    def action_space(self, agent: str) -> gymnasium.Space:
        """The column to drop a piece into."""
        return self._acts

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> None:
        """Begin with an empty board; nothing is random."""
        self.agents = list(self.possible_agents)
        self.agent_selection = "first"
        self.board = np.zeros((2, ROWS, COLUMNS), np.float32)  # row 0 is at the bottom
        self.heights = np.zeros(COLUMNS, int)
        self.rewards = dict.fromkeys(self.agents, 0.0)
        self._cumulative_rewards = dict.fromkeys(self.agents, 0.0)
        self.terminations = dict.fromkeys(self.agents, False)
        self.truncations = dict.fromkeys(self.agents, False)
        self.infos = {agent: {} for agent in self.agents}

    def observe(self, agent: str) -> dict[str, np.ndarray]:
        """The board from this player's side."""
        own = self.possible_agents.index(agent)
        return {"observation": self.board[[own, 1 - own]], "action_mask": (self.heights < ROWS).astype(np.int8)}

    def step(self, action: int | None) -> None:
        """Drop a piece into a column."""
        agent = self.agent_selection
        if self.terminations[agent]:
            self._was_dead_step(action)
            return
        own = self.possible_agents.index(agent)
        other = self.possible_agents[1 - own]
        row = int(self.heights[action])
        self.board[own, row, action] = 1.0
        self.heights[action] += 1
        self._cumulative_rewards[agent] = 0.0
        self.rewards = dict.fromkeys(self.possible_agents, 0.0)
        if is_won(self.board[own], row, int(action)):
            self.rewards = {agent: 1.0, other: -1.0}
            self.terminations = dict.fromkeys(self.possible_agents, True)
        elif (self.heights == ROWS).all():
            self.terminations = dict.fromkeys(self.possible_agents, True)
        self._accumulate_rewards()
        self.agent_selection = other

    def render(self) -> np.ndarray:
        """The board as a picture of 224 x 192 pixels."""
        picture = np.full((ROWS, COLUMNS, 3), (30, 60, 160), np.uint8)
        picture[self.board[0, ::-1] > 0] = (230, 60, 50)
        picture[self.board[1, ::-1] > 0] = (240, 210, 60)
        return picture.repeat(32, 0).repeat(32, 1)

    def close(self) -> None:
        """Nothing to free."""


def is_won(pieces: np.ndarray, row: int, column: int) -> bool:
    """Whether the piece at this place makes four in a line of `pieces` `[ROWS, COLUMNS]`."""
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
        length = 1
        for sign in (-1, 1):
            r, c = row + sign * down, column + sign * right
            while 0 <= r < ROWS and 0 <= c < COLUMNS and pieces[r, c]:
                length, r, c = length + 1, r + sign * down, c + sign * right
        if length >= 4:
            return True
    return False
