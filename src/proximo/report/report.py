"""The report on one run or several: pictures, and a text that says what they show."""

from __future__ import annotations

import datetime
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from proximo.report.charts import CHARTS
from proximo.report.folder import MARK, prepare_folder, write_ours
from proximo.report.pictures import draw_records
from proximo.report.records import RunRecord, read_records
from proximo.report.summary import RunSummary, finding_lines, summarize, summary_json, what_curves_show, what_happened
from proximo.report.words import duration, number
from proximo.runs.directory import RUNS_ROOT, RunDirectory

_TEXT_NAME = "report.md"
_NOT_COMPARED = frozenset({"seed", "env_id"})  # they have columns of their own


@dataclass(frozen=True)
class Report:
    """What was written where, and what it says."""

    folder: Path
    pictures: tuple[Path, ...]
    """The overview first."""
    runs: tuple[RunSummary, ...]
    """Results and findings of each run, in the order they were named."""
    text: str
    """The words of `report.md`, as Markdown without the pictures."""

    @property
    def path(self) -> Path:
        """The report itself, `report.md`."""
        return self.folder / _TEXT_NAME


def write_report(runs: list[RunDirectory], folder: Path | None = None) -> Report:
    """Write pictures and `report.md` about one run, or several compared, and return what they say.

    The folder is the run's own `report/`, or, for several runs, a new `report-<date and time>` beside them,
    unless `folder` names another. An older report there is replaced; a file that Proximo did not write never is.

    Raises:
        UserError: if there is nothing to report yet, a run cannot be read, the folder cannot be written to,
            or a file of another origin is in the way.
    """
    records = read_records(runs)
    if folder is None:
        folder = records[0].run.report if len(records) == 1 else _new_folder(records)
    summaries = tuple(summarize(record) for record in records)
    text = _text(records, summaries)
    path = folder / _TEXT_NAME
    prepare_folder(folder, [path])
    pictures = tuple(draw_records(records, folder))
    write_ours(path, f"{MARK}\n{text}\n{_gallery(pictures)}".encode())
    return Report(folder, pictures, summaries, text)


def report_json(report: Report) -> dict[str, Any]:
    """Return the report as values that JSON holds: paths, and for each run its results and findings."""
    return {
        "folder": str(report.folder),
        "report": str(report.path),
        "pictures": [str(picture) for picture in report.pictures],
        "runs": [summary_json(summary) for summary in report.runs],
    }


def settings_that_differ(records: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """Return each setting that is not the same in all runs, with its value in each; None where it is not set."""
    names = sorted({name for record in records for name in record.settings} - _NOT_COMPARED)
    columns = {name: [record.settings.get(name) for record in records] for name in names}
    return {name: values for name, values in columns.items() if any(value != values[0] for value in values)}


# --- text -----------------------------------------------------------------------------------------------------


def _text(records: Sequence[RunRecord], summaries: Sequence[RunSummary]) -> str:
    if len(records) == 1:
        lines = [f"# {summaries[0].task}: {summaries[0].name}", "", *_about(records[0], summaries[0])]
    else:
        tasks = ", ".join(sorted({summary.task for summary in summaries}))
        lines = [f"# {tasks}: {len(summaries)} runs", "", *_comparison(records, summaries)]
        for record, summary in zip(records, summaries, strict=True):
            lines += [f"## {summary.name}", "", *_about(record, summary)]
    return "\n".join(lines).rstrip() + "\n"


def _about(record: RunRecord, summary: RunSummary) -> list[str]:
    """What there is to say of one run."""
    lines = [what_happened(summary), ""]
    curves = what_curves_show(record.rows)
    if curves:
        lines += ["What the curves show:", "", *(f"- {sentence}" for sentence in curves), ""]
    lines += ["Diagnosis:", ""]
    for finding in summary.findings:
        first, *others = finding_lines(finding)
        lines += [f"- {first}", *(f"  {line}" for line in others)]
    return [*lines, ""]


def _comparison(records: Sequence[RunRecord], summaries: Sequence[RunSummary]) -> list[str]:
    several_tasks = len({summary.task for summary in summaries}) > 1
    header = ["run", *(["task"] if several_tasks else []), "seed", "final return", "best return", "at step", "steps"]
    table = [[*header, "time", "steps/s", "diagnosis"]]
    for summary in summaries:
        table.append(
            [
                summary.name,
                *([summary.task] if several_tasks else []),
                "-" if summary.seed is None else str(summary.seed),
                number(summary.final_return),
                number(summary.best_return),
                number(summary.best_return_step),
                number(summary.env_steps),
                duration(summary.seconds),
                number(summary.steps_per_second),
                ", ".join(finding.name for finding in summary.findings if finding.severity != "note")
                or "nothing to note",
            ]
        )
    lines = [*_table(table), ""]
    if several_tasks:
        lines += ["The runs learn different tasks, so their returns cannot be compared with each other.", ""]
    differing = settings_that_differ(records)
    if not differing:
        return [*lines, *_over_seeds(summaries, several_tasks)]
    rows = [[name, *(_value(value) for value in values)] for name, values in differing.items()]
    return [*lines, "Settings that differ:", "", *_table([["setting", *(s.name for s in summaries)], *rows]), ""]


def _over_seeds(summaries: Sequence[RunSummary], several_tasks: bool) -> list[str]:
    """What the runs have in common, where they are the same but for the seed."""
    returns = [summary.final_return for summary in summaries if summary.final_return is not None]
    if several_tasks or len(returns) < 2:
        return []
    return [
        f"The runs differ in their seeds alone. Over {len(returns)} runs the final return is "
        f"{number(float(np.mean(returns)))} on average, between {number(min(returns))} and {number(max(returns))}, "
        f"with a standard deviation of {number(float(np.std(returns, ddof=1)))}.",
        "",
    ]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Write a Markdown table that can be read as plain text, too; the first row is its head."""
    safe = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(len(row[index]) for row in safe) for index in range(len(safe[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in safe
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def _value(value: Any) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _gallery(pictures: Sequence[Path]) -> str:
    titles = {chart.name: " and ".join(panel.title.lower() for panel in chart.panels) for chart in CHARTS}
    lines = [f"![{titles.get(picture.stem, picture.stem)}]({picture.name})" for picture in pictures]
    return "\n\n".join(["## Pictures", *lines]) + "\n"


def _new_folder(records: Sequence[RunRecord]) -> Path:
    """Name a folder for a report on several runs: in the folder that holds them all, if they are close together."""
    parents = [record.run.path.resolve().parent for record in records]
    common = Path(os.path.commonpath(parents))
    is_close = all(len(parent.parts) - len(common.parts) <= 1 for parent in parents) and common != Path(common.root)
    parent = common if is_close else RUNS_ROOT
    name = f"report-{datetime.datetime.now():%Y-%m-%dT%H-%M-%S}"
    paths = (parent / (name if attempt == 1 else f"{name}-{attempt}") for attempt in itertools.count(1))
    return next(path for path in paths if not os.path.lexists(path))
