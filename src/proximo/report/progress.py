"""How the mean return of a run went, in a handful of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from proximo.report.records import Row, column

SETTLED_EPISODES = 20
"""A mean over fewer episodes says more about luck than about the policy, so it is neither start nor best."""
WINDOW_EPISODES = 100
"""`return_mean` is the mean of this many episodes."""
FEWEST_DIFFERENCES = 5
"""Fewer differences between means than this do not tell how much luck there is in them."""

_NORMAL_MEDIAN = 0.6745  # of the absolute value of a standard normal variable


@dataclass(frozen=True)
class Progress:
    """Mean returns, and the indices of the rows that they were seen in.

    `noise`: standard deviation of a mean return by luck alone; None if the run is too short to tell.
    """

    start: float
    best: float
    final: float
    start_row: int
    best_row: int
    final_row: int
    n_episodes: int
    noise: float | None

    @property
    def scale(self) -> float:
        """What a difference of returns is measured by."""
        return max(abs(self.start), abs(self.best), abs(self.final), 1e-12)

    @property
    def gain(self) -> float:
        """How far the best lies above the start, as a share of `scale`."""
        return (self.best - self.start) / self.scale

    @property
    def kept_gain(self) -> float:
        """How far the end lies above the start, as a share of `scale`."""
        return (self.final - self.start) / self.scale


def progress_of(rows: Sequence[Row]) -> Progress | None:
    """Sum up the returns of a run; None if no episode has finished yet."""
    returns = column(rows, "return_mean")
    known = np.flatnonzero(np.isfinite(returns))
    if len(known) == 0:
        return None
    episodes = column(rows, "n_episodes")
    settled = known[~(episodes[known] < SETTLED_EPISODES)]
    trusted = settled if len(settled) else known
    first, last = int(trusted[0]), int(known[-1])
    best = int(trusted[returns[trusted].argmax()])
    return Progress(
        start=float(returns[first]),
        best=float(returns[best]),
        final=float(returns[last]),
        start_row=first,
        best_row=best,
        final_row=last,
        n_episodes=int(np.nanmax(episodes)) if np.isfinite(episodes).any() else 0,
        noise=_noise(returns[trusted], episodes[trusted]),
    )


def _noise(returns: np.ndarray, episodes: np.ndarray) -> float | None:
    """Standard deviation of the mean over a full window, from the steps it takes.

    When d new episodes push out d old ones, the mean of W moves by sqrt(2 d) s / W, where s is the standard
    deviation of an episode's return. The median step tells s, for most steps are luck, not progress; where
    they are not, s comes out too large, which makes rules more careful.
    """
    full = episodes >= WINDOW_EPISODES
    returns, episodes = returns[full], episodes[full]
    new = np.diff(episodes)
    moved = new > 0
    if moved.sum() < FEWEST_DIFFERENCES:
        return None
    steps = np.abs(np.diff(returns)[moved]) / np.sqrt(2.0 * np.minimum(new[moved], WINDOW_EPISODES))
    per_episode = float(np.median(steps)) / _NORMAL_MEDIAN * WINDOW_EPISODES
    return per_episode / math.sqrt(WINDOW_EPISODES)
