"""How a metric of an alignment run went, and by how much luck alone moves it.

Every mean here is over a window of a tenth of the run, and is held against the noise of such a mean. The noise is
read off the steps from one iteration to the next, which are mostly luck: each iteration answers other prompts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from proximo.report.evidence import FEWEST_ITERATIONS, Evidence

WINDOW_SHARE = 0.10
"""A mean over a tenth of the run has a third of an iteration's noise at 100 iterations, and still follows the curve."""
SMALLEST_WINDOW = 3
"""A single iteration says more about its prompts than about the policy."""
RISEN_NOISE = 3.0
"""Three standard deviations between two means are luck less than one time in three hundred."""


@dataclass(frozen=True)
class Course:
    """How a metric went: means over windows of `window` iterations, and the noise of such a mean."""

    early: float
    late: float
    peak: float
    peak_row: int
    first_row: int
    last_row: int
    window: int
    noise: float
    means: np.ndarray
    """The mean over each window, `[n]`."""
    rows: np.ndarray
    """The row in the middle of each window, `[n]`."""
    first: float
    """The very first value: what quick changes began at, with the noise of one iteration."""
    trend: float
    """The mean of the last third less that of the first one, in standard deviations of such a difference."""

    @property
    def chance(self) -> float:
        """A difference of two means that luck does not make."""
        return RISEN_NOISE * math.sqrt(2.0) * self.noise + 1e-9 * max(abs(self.early), abs(self.late))

    @property
    def has_risen(self) -> bool:
        """Whether the end lies above the beginning by more than chance, or the last third above the first one."""
        return self.late - self.early > self.chance or (self.trend > RISEN_NOISE and self.late > self.early)

    def at(self, row: int) -> float:
        """The mean of the window around a row."""
        return float(self.means[np.abs(self.rows - row).argmin()])


def course_of(evidence: Evidence, name: str, known: np.ndarray | None = None) -> Course | None:
    """How a metric went over the rows in which it is `known`; None where these are too few to say."""
    values = evidence.column(name)
    rows = np.flatnonzero(np.isfinite(values) if known is None else known)
    if len(rows) < FEWEST_ITERATIONS:
        return None
    window = max(SMALLEST_WINDOW, round(WINDOW_SHARE * len(rows)))
    means = np.convolve(values[rows], np.full(window, 1 / window), mode="valid")
    middles = rows[window // 2 : window // 2 + len(means)]
    # The median of the absolute difference of two draws is 0.6745 sqrt(2) standard deviations.
    luck = float(np.median(np.abs(np.diff(values[rows])))) / (0.6745 * math.sqrt(2.0))
    third = len(rows) // 3
    moved = float(values[rows[-third:]].mean() - values[rows[:third]].mean())
    noise = luck * math.sqrt(2.0 / third) + 1e-9 * float(np.abs(values[rows]).max())
    best = int(means.argmax())
    return Course(
        early=float(means[0]),
        late=float(means[-1]),
        peak=float(means[best]),
        peak_row=int(middles[best]),
        first_row=int(rows[0]),
        last_row=int(rows[-1]),
        window=window,
        noise=luck / math.sqrt(window),
        means=means,
        rows=middles,
        first=float(values[rows[0]]),
        trend=moved / noise if noise > 0 else 0.0,
    )
