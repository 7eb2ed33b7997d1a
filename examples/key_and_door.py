"""A task that chance hardly ever solves: fetch a key, open a door, walk to the goal; nothing is paid before that.

proximo train examples/key_and_door.py:KeyAndDoor --total-steps 150000                      # learns nothing
proximo train examples/key_and_door.py:KeyAndDoor --total-steps 150000 --exploration rnd    # finds it
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium

MAP = (
    "###################",
    "#K......#.....#..G#",
    "#.......#.....#...#",
    "#.......#.........#",
    "###.#####.....#...#",
    "#.......D.....#...#",
    "#.......#.....#...#",
    "#......S#.....#...#",
    "###################",
)
"""# wall, S start, K key, D door, which is wall without the key, G goal."""

MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1))


class KeyAndDoor(gymnasium.Env):
    """The agent sees in which cell it is and whether it has the key, and steps up, down, left or right."""

    action_space = gymnasium.spaces.Discrete(4)

    def __init__(self, layout: Sequence[str] = MAP, time_limit: int = 90) -> None:
        """`layout`: rows of letters as in `MAP`; `time_limit`: steps after which an episode is truncated."""
        self.layout, self.time_limit = layout, time_limit
        self.cells = [(y, x) for y, row in enumerate(layout) for x, letter in enumerate(row) if letter != "#"]
        self.numbers = {cell: number for number, cell in enumerate(self.cells)}
        self.observation_space = gymnasium.spaces.MultiDiscrete([len(self.cells), 2])

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        """Begin at S, without the key."""
        super().reset(seed=seed)
        self.place = next(cell for cell in self.cells if self.layout[cell[0]][cell[1]] == "S")
        self.has_key, self.steps = False, 0
        return self._see(), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict]:
        """Go up (0), down (1), left (2) or right (3); a wall, or the door without the key, stops it."""
        self.steps += 1
        y, x = self.place[0] + MOVES[action][0], self.place[1] + MOVES[action][1]
        letter = self.layout[y][x]
        if letter != "#" and (letter != "D" or self.has_key):
            self.place = (y, x)
            self.has_key = self.has_key or letter == "K"
        arrived = self.place == (y, x) and letter == "G"
        return self._see(), float(arrived), arrived, not arrived and self.steps >= self.time_limit, {}

    def _see(self) -> list[int]:
        return [self.numbers[self.place], int(self.has_key)]
