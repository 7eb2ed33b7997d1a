"""A run's metrics and settings as the rules of the diagnosis see them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeGuard

import numpy as np

from proximo.report.progress import Progress, progress_of
from proximo.report.records import Row, column

FEWEST_ITERATIONS = 10
"""Trends over fewer iterations than this are guesses."""
FEWEST_EPISODES = 100
"""Until the mean return covers its full window once, it moves by itself."""
FLAT_AFTER_SHARE = 0.25
"""Many tasks show nothing in the first quarter of their budget, so flat returns are no fault before it."""
FLAT_GAIN = 0.10
"""An end less than a tenth above the start, by their own size, is what chance does to a policy that stands still."""
FLAT_BEST_GAIN = 0.20
"""A best is the luckiest of many means, so twice of that is still chance."""
FLAT_NOISE = 2.0
"""Two means of the same policy lie further apart than two of their standard deviations one time in six."""
LEARNED_GAIN = 0.20
"""From a fifth above the start, chance no longer explains the end."""
LEARNED_NOISE = 3.0
"""Three standard deviations between start and end are luck one time in thirty."""
COLLAPSE_LOSS = 0.40
"""Policies waver; one that loses two fifths of all it had gained does not come back by wavering."""
ACTIVE_RATE = 0.25
"""Where a schedule has brought the learning rate under a quarter, small updates are what was asked for."""


@dataclass(frozen=True)
class Evidence:
    """A run's metrics and settings, as the rules see them."""

    rows: Sequence[Row]
    settings: dict[str, Any]
    _columns: dict[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def progress(self) -> Progress | None:
        """How the returns went; None if no episode has finished."""
        return progress_of(self.rows)

    @cached_property
    def iterations(self) -> np.ndarray:
        """Numbers of the iterations, `[n]`."""
        numbers = self.column("iteration")
        return np.where(np.isfinite(numbers), numbers, np.arange(1.0, len(self.rows) + 1))

    @cached_property
    def is_active(self) -> np.ndarray:
        """Where the learning rate is not yet decayed, `[n]`."""
        rates = self.column("learning_rate")
        if not np.isfinite(rates).any():
            return np.ones(len(self.rows), bool)
        return ~(rates < ACTIVE_RATE * np.nanmax(rates))

    @cached_property
    def share_done(self) -> np.ndarray:
        """Share of the planned steps at each row, `[n]`; of the steps so far where no plan is known."""
        steps = self.column("env_steps")
        if not np.isfinite(steps).any():
            return np.arange(1.0, len(self.rows) + 1) / max(len(self.rows), 1)
        planned = self.settings.get("total_steps")
        return steps / (planned if isinstance(planned, int) and planned > 0 else np.nanmax(steps))

    @cached_property
    def is_judged(self) -> bool:
        """Whether enough was tried to say how the returns went."""
        progress = self.progress
        if progress is None or len(self.rows) < FEWEST_ITERATIONS or progress.n_episodes < FEWEST_EPISODES:
            return False
        return bool(self.share_done[-1] >= FLAT_AFTER_SHARE)

    @cached_property
    def is_flat(self) -> bool:
        """Whether enough was tried, and the returns are no better than at the start."""
        progress = self.progress
        if progress is None or not self.is_judged:
            return False
        if abs(progress.kept_gain) < FLAT_GAIN and progress.gain < FLAT_BEST_GAIN:
            return True
        # Returns around 0 have no size to measure by: there, luck is the measure.
        chance = FLAT_NOISE * (progress.noise or 0.0)
        return abs(progress.final - progress.start) < chance and progress.best - progress.start < 2 * chance

    @cached_property
    def has_learned(self) -> bool:
        """Whether the returns end clearly above their start, with most of the gain kept."""
        progress = self.progress
        if progress is None or progress.kept_gain < LEARNED_GAIN:
            return False
        if progress.final - progress.start < LEARNED_NOISE * (progress.noise or 0.0):
            return False
        return progress.final - progress.start >= (1 - COLLAPSE_LOSS) * (progress.best - progress.start)

    def column(self, name: str) -> np.ndarray:
        """One metric, `[n]`; NaN where it is unknown."""
        if name not in self._columns:
            self._columns[name] = column(self.rows, name)
        return self._columns[name]

    def median(self, name: str, where: np.ndarray | None = None) -> float | None:
        """Median of the known values, None if there are none."""
        values = self.column(name) if where is None else self.column(name)[where]
        finite = values[np.isfinite(values)]
        return float(np.median(finite)) if len(finite) else None

    @property
    def rollout_size(self) -> int | None:
        """Steps per iteration, None if unknown."""
        n_envs, length = self.settings.get("n_envs"), self.settings.get("rollout_length")
        return n_envs * length if isinstance(n_envs, int) and isinstance(length, int) else None

    @property
    def planned_updates(self) -> float | None:
        """Gradient steps per iteration that the settings ask for, None if unknown."""
        size, batch, epochs = self.rollout_size, *map(self.settings.get, ("batch_size", "n_epochs"))
        if size is None or not isinstance(batch, int) or not isinstance(epochs, int) or batch < 1:
            return None
        return float(epochs * math.ceil(size / batch))

    def setting(self, name: str, usual: str = "") -> str:
        """Name a setting with its value, for a sentence."""
        value = self.settings.get(name)
        said = [f"now {value:g}"] if is_number(value) else []
        said += [f"{usual} is usual"] if usual else []
        return f"{name} ({'; '.join(said)})" if said else name

    def switch_on(self, name: str, why: str = "") -> str:
        """Advise to set a setting to true; nothing if it is."""
        return "" if self.settings.get(name) is True else f"set {name} to true{why}"

    def limit_kl(self) -> str:
        """Advise to set a KL stop, or a lower one."""
        if is_number(self.settings.get("target_kl")):
            return f"lower {self.setting('target_kl')}"
        return "set target_kl to 0.02, which ends an update that goes too far"

    def at(self, row: int) -> str:
        """Name an iteration."""
        return f"iteration {self.iterations[row]:,.0f}"


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a setting or a metric has a number for its value; True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
