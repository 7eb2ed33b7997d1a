"""Keeping what a run writes, on a disk that may be full: training goes on, and what was refused is tried again."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from proximo.errors import DiskError, UserError, tell
from proximo.runs.metrics import MetricValue, append_metrics

WAITS = (5.0, 10.0, 20.0, 40.0, 60.0, 60.0, 60.0)
"""Seconds from each refusal to the next try; a disk that refuses once more after the last one ends the run."""


REST, LONGEST_REST = 200.0, 600.0
"""A checkpoint that may rest waits for so many times as long as the last one took, at most for so many seconds."""


class Keeper:
    """Writes the metrics and checkpoints of one run; what the disk refuses stays in memory until it takes it.

    Nothing that training computes depends on the disk: a run that went on past a refusal ends where it would
    have ended without one.
    """

    def __init__(self, metrics_path: Path, *, may_rest: bool = False) -> None:
        """Nothing is kept back yet.

        `may_rest` is for runs that nobody has told how often to save, and whose numbers do not depend on it: saves that
        take less than 3 seconds then take less than a hundredth of their time, however short the runs are.
        """
        self._metrics_path = metrics_path
        self._owner = os.getpid()
        self._may_rest = may_rest
        self._rests_until = 0.0
        self._rows: list[dict[str, MetricValue]] = []
        self._save_is_due = False
        self._refusals = 0
        self._next_try = 0.0

    def keep(
        self,
        row: dict[str, MetricValue],
        save: Callable[[], object],
        *,
        is_due: bool,
        is_sound: bool = True,
        is_last: bool = False,
        is_urgent: bool = False,
    ) -> None:
        """Write a row of metrics and, if one is due, a checkpoint.

        Args:
            row: of this iteration.
            save: writes a checkpoint; called once the rows that it counts on are written.
            is_due: whether a checkpoint is wanted; it stays wanted until it is written.
            is_sound: False while updates are left out, which may be past mending: a checkpoint then waits, unless it is
                the last or urgent.
            is_last: whether there is no later iteration to try again in: then this waits.
            is_urgent: whether the process must end now: then nothing is tried again.

        Raises:
            UserError: if the disk has refused too often in a row, or once where it is urgent.
        """
        if os.getpid() != self._owner:  # a fork that an environment let come back: only one process may go on
            os._exit(0)
        self._rows.append(row)
        self._save_is_due |= is_due
        while is_last or is_urgent or time.monotonic() >= self._next_try:
            try:
                now = is_last or is_urgent or (is_sound and time.monotonic() >= self._rests_until)
                self._write(save if self._save_is_due and now else None)
            except DiskError as error:
                wait = self._refused(error, is_urgent=is_urgent)
            else:
                return
            if not is_last:
                return
            time.sleep(wait)

    def _write(self, save: Callable[[], object] | None) -> None:
        while self._rows:
            append_metrics(self._metrics_path, self._rows[0])
            del self._rows[0]
        if save is not None:
            began = time.monotonic()
            save()
            self._save_is_due = False
            if self._may_rest:
                ended = time.monotonic()
                self._rests_until = ended + min(REST * (ended - began), LONGEST_REST)
        if self._refusals:
            tell("proximo: the disk takes what is written again; nothing was lost")
        self._refusals = 0

    def _refused(self, error: DiskError, *, is_urgent: bool) -> float:
        """Say so, and return how many seconds to wait; raise UserError where it is the last time."""
        self._refusals += 1
        if is_urgent or self._refusals > len(WAITS):
            times = "" if self._refusals == 1 else f"\nIt was tried {self._refusals} times. The run stops here."
            raise UserError(f"{error}{times}") from error
        wait = WAITS[self._refusals - 1]
        tell(
            f"proximo: {error}\nproximo: training goes on, and it is tried again in {wait:g} s "
            f"({self._refusals} of {len(WAITS) + 1} tries so far)"
        )
        self._next_try = time.monotonic() + wait
        return wait
