"""What a run has left behind, read once for pictures, diagnosis and text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from proximo.errors import UserError
from proximo.runs.directory import RunDirectory, read_config
from proximo.runs.metrics import MetricValue, read_metrics

Row = dict[str, MetricValue]

_NOT_COMPARED = frozenset({"seed", "env_id"})  # they have columns of their own

LANGUAGE_STAGES = ("sft", "reward", "align", "dpo")
"""The setting `stage` of a language run; a control run has none."""


@dataclass(frozen=True)
class RunRecord:
    """A run's name among those compared, its folder, its settings, and its metrics, one row per iteration."""

    name: str
    run: RunDirectory
    settings: dict[str, Any]
    rows: list[Row]
    _columns: dict[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    def column(self, name: str) -> np.ndarray:
        """One metric over all rows, as `column` gives it; made once."""
        if name not in self._columns:
            self._columns[name] = column(self.rows, name)
        return self._columns[name]

    @property
    def steps(self) -> tuple[np.ndarray, str]:
        """What lies on the x-axis, and what to call it: environment steps, or else iterations."""
        for name, label in (("env_steps", "environment steps"), ("iteration", "iterations")):
            if np.isfinite(self.column(name)).any():
                return self.column(name), label
        return np.arange(1.0, len(self.rows) + 1), "iterations"

    @property
    def task(self) -> str:
        """What was learned: the environment's id, or the stage of a language run with its algorithm."""
        if self.stage is None:
            return str(self.settings.get("env_id", "unknown task"))
        return f"{self.stage} ({self.settings['algorithm']})" if "algorithm" in self.settings else self.stage

    @property
    def stage(self) -> str | None:
        """The stage of a language run; None for a control run."""
        stage = self.settings.get("stage")
        return stage if stage in LANGUAGE_STAGES else None


def read_records(runs: Sequence[RunDirectory]) -> list[RunRecord]:
    """Read settings and metrics of each run; one that is named twice counts once.

    Raises:
        UserError: if there is no run, no run has a finished iteration yet, or a file cannot be read.
    """
    unique = list({run.path.resolve(): run for run in runs}.values())
    if not unique:
        raise UserError("There is no run to report on. Name one: proximo report RUN.")
    records = [
        RunRecord(name, run, read_config(run), read_metrics(run.metrics_path))
        for name, run in zip(run_names(unique), unique, strict=True)
    ]
    if not any(record.rows for record in records):
        raise UserError(
            f"There is nothing to draw yet: {' and '.join(str(run.path) for run in unique)} "
            f"{'has' if len(unique) == 1 else 'have'} not finished one iteration. Try again in a moment; "
            "if training was stopped before that, start it again."
        )
    return records


def run_names(runs: Sequence[RunDirectory]) -> list[str]:
    """Name each run by its folder, with as many parent folders as it takes to tell them apart."""
    paths = [run.path.resolve() for run in runs]
    names: list[str] = []
    for path in paths:
        others = [other for other in paths if other != path]
        depths = range(1, len(path.parts))
        enough = (d for d in depths if all(_tail(other, d) != _tail(path, d) for other in others))
        names.append(_tail(path, next(enough, len(path.parts))))
    return names


def settings_that_differ(records: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """Return each setting that is not the same in all runs, with its value in each; None where it is not set."""
    names = sorted({name for record in records for name in record.settings} - _NOT_COMPARED)
    columns = {name: [record.settings.get(name) for record in records] for name in names}
    return {name: values for name, values in columns.items() if any(value != values[0] for value in values)}


def column(rows: Sequence[Row], name: str) -> np.ndarray:
    """One metric over all rows as float64; NaN where it is missing, null, no number, or not finite."""
    values = [row.get(name) for row in rows]
    known = [value if isinstance(value, (int, float)) else math.nan for value in values]
    try:
        found = np.array(known, np.float64)
    except OverflowError:  # a whole number of hundreds of digits
        found = np.array([math.nan if finite(value) is None else value for value in known], np.float64)
    found[np.isinf(found)] = math.nan
    return found


def finite(value: object) -> float | None:
    """A value that was read as a float; None where it is no number, not finite, or too large for a float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def _tail(path: Path, depth: int) -> str:
    name = "/".join(path.parts[-depth:]) if path.parts else str(path)
    return name.encode(errors="replace").decode()  # a name that is no UTF-8 can be drawn by nobody
