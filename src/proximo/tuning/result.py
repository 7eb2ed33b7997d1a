"""What a study comes to: the best settings as a file for `train`, all trials as lines and as a table."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from proximo.errors import UserError
from proximo.report.folder import png_bytes, prepare_folder, write_ours
from proximo.report.tuning_picture import Coordinate, Outcome, tuning_figure
from proximo.report.words import number, plural
from proximo.runs import files
from proximo.training.config import ControlConfig, settings_of
from proximo.tuning.space import Searched, in_short
from proximo.tuning.study import TrialRecord

BEST_NAME, TRIALS_NAME, PICTURE_NAME = "best.toml", "trials.jsonl", "tuning.png"

_OF_THE_RUN = ("seed", "checkpoint_every", "keep_checkpoints", "keep_every", "debug")
"""Settings that are a run's own business, and not in best.toml."""


@dataclass(frozen=True)
class Tuning:
    """A study, finished or interrupted."""

    path: Path
    """Its folder: study.journal, best.toml, trials.jsonl, tuning.png, and the runs in trials/."""
    config: ControlConfig
    """The settings of the best trial, for `proximo.train(config=...)`."""
    best: TrialRecord
    """The best trial."""
    trials: tuple[TrialRecord, ...]
    """All of them, in their order."""
    seconds: float
    """How long this session took."""
    interrupted_by: int | None = None
    """The signal that ended it early; None if it came to its end."""

    @property
    def score(self) -> float:
        """Mean return of the best trial's policies; the best of many, so higher than another seed will have."""
        assert self.best.score is not None
        return self.best.score


def best_of(records: list[TrialRecord]) -> TrialRecord | None:
    """The trial of the highest score, the first of equals; None if none is finished."""
    finished = [record for record in records if record.score is not None]
    return max(finished, key=lambda record: (record.score, -record.number), default=None)


def write_best(path: Path, record: TrialRecord, config: ControlConfig, *, n_seeds: int, episodes: int) -> None:
    """Write best.toml, which `proximo train --config` takes: all settings but those that are a run's own business.

    Raises:
        UserError: if the disk refuses.
    """
    settings = {name: value for name, value in settings_of(config).items() if name not in _OF_THE_RUN}
    if not config.environment.can_be_named:
        del settings["env_id"]
    seeds = f"{n_seeds} seeds" if n_seeds > 1 else "1 seed"
    first = config.seed
    text = (
        f"# Written by proximo tune: trial {record.number}, score {number(record.score)}.\n"
        f"# The score is the mean return of {episodes} deterministic episodes of the final policy, over {seeds} from "
        f"{first} on. The best\n# of many trials is lucky as well as good: train with other seeds to know.\n"
        f"# Searched: {', '.join(record.settings)}.\n\n"
    )
    text += tomli_w.dumps({name: value for name, value in settings.items() if value is not None})
    _write(path / BEST_NAME, text)


def write_trials(path: Path, records: list[TrialRecord]) -> None:
    """Write trials.jsonl anew: a line per trial, for programs.

    Raises:
        UserError: if the disk refuses.
    """
    _write(path / TRIALS_NAME, "".join(json.dumps(dataclasses.asdict(record)) + "\n" for record in records))


def draw(path: Path, records: list[TrialRecord], space: dict[str, Searched], title: str) -> Path:
    """Draw tuning.png.

    Raises:
        UserError: if the disk refuses, or a file of another origin has its name.
    """
    coordinates = [Coordinate(name, searched.ticks()) for name, searched in space.items()]
    outcomes = [
        Outcome(
            record.number,
            record.state,
            record.score,
            tuple(searched.position(_value(record, name)) for name, searched in space.items()),
        )
        for record in records
        if record.counts and record.settings
    ]
    target = path / PICTURE_NAME
    prepare_folder(path, [target])
    write_ours(target, png_bytes(tuning_figure(coordinates, outcomes, title)))
    return target


def _value(record: TrialRecord, name: str) -> Any:
    value = record.settings[name]
    return tuple(value) if isinstance(value, list) else value


def _write(path: Path, text: str) -> None:
    try:
        files.replace_file(path, text.encode())
    except OSError as error:
        raise UserError(f"{path} could not be written: {files.reason(error)}. Free some space there.") from error


def table(records: list[TrialRecord], most: int = 6) -> str:
    """How the trials ended, and below it the best ones side by side, with the one that the study began with."""
    counted = [record for record in records if record.counts]
    ranked = sorted((r for r in counted if r.score is not None), key=lambda r: (-(r.score or 0.0), r.number))
    shown = ranked[:most] + [record for record in ranked[most:] if record.number == counted[0].number]
    names = list(shown[0].settings)
    rows = [
        ["trial", *(str(record.number) for record in shown)],
        ["score", *(number(record.score) for record in shown)],
        ["seconds", *(f"{record.seconds:.0f}" for record in shown)],
        *([name, *(in_short(record.settings[name]) for record in shown)] for name in names),
    ]
    widths = [max(len(row[index]) for row in rows) for index in range(len(shown) + 1)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    states = [(state, sum(record.state == state for record in counted)) for state in ("finished", "pruned", "failed")]
    said = ", ".join(f"{count} {state}" for state, count in states if count)
    best = (
        f"the best {len(ranked[:most])} of the finished ones, trial 0 is what it began with" if len(ranked) > 1 else ""
    )
    failures = [f"trial {r.number} failed: {r.reason.splitlines()[0]}" for r in counted if r.state == "failed"]
    more = [f"... and {len(failures) - 3} more in {TRIALS_NAME}"] if len(failures) > 3 else []
    head = f"{plural(len(counted), 'trial')}: {said}"
    return "\n".join([f"{head}; {best}" if best else head, "", *lines, *failures[:3], *more])
