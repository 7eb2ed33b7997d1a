"""The report on one run or several: a page to look at, pictures, and a text that says what they show."""

from __future__ import annotations

import datetime
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from proximo.errors import UserError
from proximo.report.charts import CHARTS, Chart
from proximo.report.finding import Finding
from proximo.report.folder import MARK, prepare_folder, write_ours
from proximo.report.language_pictures import draw_language_records, language_charts, samples_text
from proximo.report.page import PAGE_NAME, page_bytes
from proximo.report.page_settings import Baseline
from proximo.report.pictures import draw_records
from proximo.report.records import RunRecord, read_records, settings_that_differ
from proximo.report.summary import (
    COMPARED_METRICS,
    LanguageSummary,
    RunSummary,
    finding_lines,
    summarize,
    summarize_language,
    summary_json,
    what_curves_show,
    what_happened,
    what_happened_in_language,
)
from proximo.report.words import duration, number
from proximo.runs.directory import RUNS_ROOT, RunDirectory

_TEXT_NAME = "report.md"
_SAMPLES_NAME = "samples.md"


@dataclass(frozen=True)
class Report:
    """What was written where, and what it says."""

    folder: Path
    pictures: tuple[Path, ...]
    """The overview first."""
    runs: tuple[RunSummary, ...] | tuple[LanguageSummary, ...]
    """Results and findings of each run, in the order they were named."""
    text: str
    """The words of `report.md`, as Markdown without the pictures."""
    samples: Path | None = None
    """`samples.md`, where language runs have kept samples."""

    @property
    def page(self) -> Path:
        """What to open in a browser: `index.html`, which holds everything."""
        return self.folder / PAGE_NAME

    @property
    def path(self) -> Path:
        """The report itself, `report.md`."""
        return self.folder / _TEXT_NAME


def write_report(
    runs: list[RunDirectory],
    folder: Path | None = None,
    *,
    with_pictures: bool = True,
    baselines: Mapping[Path, Baseline] | None = None,
) -> Report:
    """Write `index.html`, pictures and `report.md` about one run, or several compared, and return what they say.

    Language runs are compared within a stage; those that have kept samples get a `samples.md` besides.

    The folder is the run's own `report/`, or, for several runs, a new `report-<date and time>` beside them,
    unless `folder` names another. An older report there is replaced; a file that Proximo did not write never is.
    Without pictures it takes a fraction of a second, as at the end of training. `baselines` says by the path of a run
    what its settings are held against.

    Raises:
        UserError: if there is nothing to report yet, a run cannot be read, runs of different stages are named, the
            folder cannot be written to, or a file of another origin is in the way.
    """
    records = read_records(runs)
    _check_comparable(records)
    if folder is None:
        folder = records[0].run.report if len(records) == 1 else _new_folder(records)
    if records[0].stage is not None:
        return _write_language(records, folder, baselines, with_pictures=with_pictures)
    summaries = tuple(summarize(record) for record in records)
    text = _text(records, summaries)
    path = folder / _TEXT_NAME
    prepare_folder(folder, [path, folder / PAGE_NAME])
    pictures = tuple(draw_records(records, folder)) if with_pictures else ()
    write_ours(folder / PAGE_NAME, page_bytes(records, summaries, baselines, folder=folder))
    write_ours(path, f"{MARK}\n{text}\n{_gallery(pictures, CHARTS)}".encode())
    return Report(folder, pictures, summaries, text)


def write_language_report(run_path: Path | str) -> tuple[Finding, ...]:
    """Write the report of one language run into its `report/`, and return the findings, worst first.

    Raises:
        UserError: as `write_report` does.
    """
    return write_report([RunDirectory(Path(run_path))]).runs[0].findings


def _check_comparable(records: Sequence[RunRecord]) -> None:
    kinds = {record.stage or "control": record.name for record in reversed(records)}
    if len(kinds) > 1:
        listed = ", ".join(f"{name} ({kind})" for kind, name in reversed(kinds.items()))
        raise UserError(
            f"These runs cannot be compared, for they have been trained for different ends: {listed}. Name runs of one "
            "stage at a time."
        )


def _write_language(
    records: Sequence[RunRecord], folder: Path, baselines: Mapping[Path, Baseline] | None, *, with_pictures: bool
) -> Report:
    summaries = tuple(summarize_language(record) for record in records)
    text, told = _text(records, summaries), samples_text(records)
    path, samples = folder / _TEXT_NAME, folder / _SAMPLES_NAME
    page = folder / PAGE_NAME
    prepare_folder(folder, [path, page, samples] if told else [path, page])
    pictures = tuple(draw_language_records(records, folder)) if with_pictures else ()
    write_ours(page, page_bytes(records, summaries, baselines, folder=folder))
    if told:
        write_ours(samples, f"{MARK}\n{told}".encode())
        text += f"\nWhat the fixed prompts were answered, over the iterations, is in {_SAMPLES_NAME}.\n"
    write_ours(path, f"{MARK}\n{text}\n{_gallery(pictures, language_charts(records))}".encode())
    return Report(folder, pictures, summaries, text, samples if told else None)


def report_json(report: Report) -> dict[str, Any]:
    """Return the report as values that JSON holds: paths, and for each run its results and findings."""
    return {
        "folder": str(report.folder),
        "page": str(report.page),
        "report": str(report.path),
        **({"samples": str(report.samples)} if report.samples else {}),
        "pictures": [str(picture) for picture in report.pictures],
        "runs": [summary_json(summary) for summary in report.runs],
    }


# --- text -----------------------------------------------------------------------------------------------------


def _text(records: Sequence[RunRecord], summaries: Sequence[RunSummary] | Sequence[LanguageSummary]) -> str:
    if len(records) == 1:
        lines = [f"# {summaries[0].task}: {summaries[0].name}", "", *_about(records[0], summaries[0])]
    else:
        tasks = ", ".join(sorted({summary.task for summary in summaries}))
        lines = [f"# {tasks}: {len(summaries)} runs", "", *_comparison(summaries), *_differences(records)]
        lines += [] if settings_that_differ(records) else _over_seeds(summaries)
        for record, summary in zip(records, summaries, strict=True):
            lines += [f"## {summary.name}", "", *_about(record, summary)]
    return "\n".join(lines).rstrip() + "\n"


def _about(record: RunRecord, summary: RunSummary | LanguageSummary) -> list[str]:
    """What there is to say of one run."""
    if isinstance(summary, LanguageSummary):
        lines = [what_happened_in_language(summary), ""]
        ends = [[name, number(summary.first[name]), number(value)] for name, value in summary.final.items()]
        if ends:
            lines += [*_table([["median over", "first tenth", "last tenth"], *ends]), ""]
    else:
        lines = [what_happened(summary), ""]
        curves = what_curves_show(record.rows)
        if curves:
            lines += ["What the curves show:", "", *(f"- {sentence}" for sentence in curves), ""]
    lines += ["Diagnosis:", ""] if summary.findings else []
    for finding in summary.findings:
        first, *others = finding_lines(finding)
        lines += [f"- {first}", *(f"  {line}" for line in others)]
    return [*lines, ""]


def _comparison(summaries: Sequence[RunSummary] | Sequence[LanguageSummary]) -> list[str]:
    """A line for each run."""
    own = [summary for summary in summaries if isinstance(summary, RunSummary)]
    return _control_comparison(own) if own else _language_comparison(summaries)  # type: ignore[arg-type]


def _language_comparison(summaries: Sequence[LanguageSummary]) -> list[str]:
    names = [name for name in COMPARED_METRICS if any(name in summary.final for summary in summaries)]
    table = [["run", "task", "seed", *names, "iterations", "time", "diagnosis"]]
    for summary in summaries:
        values = [number(summary.final.get(name)) for name in names]
        seed = "-" if summary.seed is None else str(summary.seed)
        done = [number(summary.n_iterations), duration(summary.seconds), _names(summary.findings)]
        table.append([summary.name, summary.task, seed, *values, *done])
    return [*_table(table), "", "Metrics are medians over the last tenth of each run.", ""]


def _names(findings: Sequence[Finding]) -> str:
    return ", ".join(finding.name for finding in findings if finding.severity != "note") or "nothing to note"


def _control_comparison(summaries: Sequence[RunSummary]) -> list[str]:
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
                _names(summary.findings),
            ]
        )
    lines = [*_table(table), ""]
    if several_tasks:
        lines += ["The runs learn different tasks, so their returns cannot be compared with each other.", ""]
    return lines


def _differences(records: Sequence[RunRecord]) -> list[str]:
    rows = [[name, *map(_value, values)] for name, values in settings_that_differ(records).items()]
    head = ["setting", *(record.name for record in records)]
    return ["Settings that differ:", "", *_table([head, *rows]), ""] if rows else []


def _over_seeds(summaries: Sequence[RunSummary] | Sequence[LanguageSummary]) -> list[str]:
    """What the runs have in common, where they are the same but for the seed."""
    if isinstance(summaries[0], LanguageSummary):
        what, found = "reward", [s.final.get("reward_mean") for s in summaries if isinstance(s, LanguageSummary)]
    else:
        what, found = "return", [s.final_return for s in summaries if isinstance(s, RunSummary)]
    returns = [value for value in found if value is not None]
    if len({summary.task for summary in summaries}) > 1 or len(returns) < 2:
        return []
    return [
        f"The runs differ in their seeds alone. Over {len(returns)} runs the final {what} is "
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


def _gallery(pictures: Sequence[Path], charts: Sequence[Chart]) -> str:
    titles = {chart.name: " and ".join(panel.title.lower() for panel in chart.panels) for chart in charts}
    lines = [f"![{titles.get(picture.stem, picture.stem)}]({picture.name})" for picture in pictures]
    page = f"The curves, to look at closely, are on the page [{PAGE_NAME}]({PAGE_NAME}), which any browser opens."
    return "\n\n".join([page, *(["## Pictures", *lines] if lines else [])]) + "\n"


def _new_folder(records: Sequence[RunRecord]) -> Path:
    """Name a folder for a report on several runs: in the folder that holds them all, if they are close together."""
    parents = [record.run.path.resolve().parent for record in records]
    common = Path(os.path.commonpath(parents))
    is_close = all(len(parent.parts) - len(common.parts) <= 1 for parent in parents) and common != Path(common.root)
    parent = common if is_close else RUNS_ROOT
    name = f"report-{datetime.datetime.now():%Y-%m-%dT%H-%M-%S}"
    paths = (parent / (name if attempt == 1 else f"{name}-{attempt}") for attempt in itertools.count(1))
    return next(path for path in paths if not os.path.lexists(path))
