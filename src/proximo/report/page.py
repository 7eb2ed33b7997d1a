"""The page of a run, or of several: one HTML file that needs no network, no server and nothing beside it.

Everything that a run says of itself may come from a stranger. In HTML it is escaped by Jinja; for the script it is JSON
in a block that browsers do not execute; and the page's policy lets no script run but ours, known by its hash.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from proximo.report.diagnosis import Finding
from proximo.report.folder import MARK
from proximo.report.intervals import FEWEST_SEEDS, bootstrap_interval, interquartile_mean
from proximo.report.page_data import (
    AXES,
    MOST_LIVE,
    MOST_SAMPLE_CHARACTERS,
    curves_of,
    curves_of_groups,
    groups_of,
    panels_of,
    references_of,
    samples_of,
)
from proximo.report.page_settings import Baseline, in_words, setting_rows
from proximo.report.ratings import read_ratings
from proximo.report.records import RunRecord, settings_that_differ
from proximo.report.summary import (
    ALIGN_METRICS,
    LEARNING_METRICS,
    LanguageSummary,
    RunSummary,
    what_happened,
    what_happened_in_language,
)
from proximo.report.words import duration, number, percent
from proximo.runs import names
from proximo.runs.directory import RunDirectory
from proximo.runs.manifest import read_manifest, versions

PAGE_NAME = "index.html"
LARGEST_VIDEO = 5_000_000
"""Bytes of a video that is put into the page; larger ones are linked."""
MOST_RUNS_IN_DETAIL = 24
"""Runs with a diagnosis and settings of their own on a page that compares several."""

_VIDEOS = {".mp4": "video/mp4", ".gif": "image/gif"}
_SETTING = re.compile(r"\b[a-z]+(?:_[a-z]+)+\b")

Summaries = Sequence[RunSummary | LanguageSummary]


def page_bytes(
    records: Sequence[RunRecord],
    summaries: Summaries,
    baselines: Mapping[Path, Baseline] | None = None,
    *,
    folder: Path | None = None,
) -> bytes:
    """The page about these runs, which are all of control or all of one stage.

    Args:
        records: what the runs have left behind.
        summaries: what is to be said of each.
        baselines: by the path of a run's folder, what its settings are held against.
        folder: where the page will be, for links to what it does not hold.
    """
    known = baselines or {}
    groups = groups_of(records)
    runs = [
        _run(record, summary, known.get(record.run.path), folder)
        for record, summary in zip(records[:MOST_RUNS_IN_DETAIL], summaries, strict=False)
    ]
    return _rendered(
        title=_title(records, summaries),
        data=_data(records, summaries, groups),
        summary=summary_html(records, summaries),
        runs=runs,
        n_left_out=max(len(records) - MOST_RUNS_IN_DETAIL, 0),
        differences=_differences(records, groups),
        is_live=False,
    )


def live_page_bytes(record: RunRecord, summary: RunSummary | LanguageSummary, baseline: Baseline | None) -> bytes:
    """The page about a run that goes on: its script asks the server that sent it for what is new."""
    return _rendered(
        title=_title([record], [summary]),
        data=_data([record], [summary], [[0]]) | {"live": True, "most": MOST_LIVE},
        summary=summary_html([record], [summary]),
        runs=[_run(record, summary, baseline, None)],
        n_left_out=0,
        differences=[],
        is_live=True,
    )


def summary_html(records: Sequence[RunRecord], summaries: Summaries) -> str:
    """What came out, and what it means: the part at the top, which a page of a running run fetches anew."""
    template = _environment().get_template("summary.html")
    if len(summaries) > 1:
        return template.render(cards=[], comparison=_comparison(summaries), groups=_group_rows(records, summaries))
    (summary,) = summaries
    return template.render(
        cards=_cards(summary), told=_told(summary), findings=summary.findings, groups=[], comparison=[]
    )


def policy_of(script: str, style: str, *, is_live: bool) -> str:
    """The Content-Security-Policy: our own script and style by their hashes, pictures and films in the page itself."""
    asks = "'self'" if is_live else "'none'"
    return (
        f"default-src 'none'; script-src 'sha256-{_digest(script)}'; style-src 'sha256-{_digest(style)}'; "
        f"img-src data:; media-src data:; connect-src {asks}; base-uri 'none'; form-action 'none'"
    )


def embedded(value: Any) -> str:
    """JSON for a script element: nothing in it can end the element, begin a comment or break a line of script.

    Raises:
        ValueError: for a number that JSON does not have.
    """
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))  # ASCII: U+2028 and its like are escaped
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


# --- rendering ------------------------------------------------------------------------------------------------------


@cache
def _environment() -> Any:
    import jinja2
    from markupsafe import Markup, escape

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(asset), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )

    def with_settings_marked(text: str) -> Markup:
        """Names of settings and metrics as code."""
        return Markup(_SETTING.sub(r"<code>\g<0></code>", str(escape(text))))  # it is escaped right here

    environment.filters["settings"] = with_settings_marked
    environment.filters["number"] = number
    return environment


@cache
def asset(name: str) -> str:
    """A file of the page: its template, style, script, or uPlot's."""
    return package_files("proximo.report").joinpath("assets", name).read_text(encoding="utf-8")


def _rendered(*, data: dict[str, Any], is_live: bool, **context: Any) -> bytes:
    script = asset("uPlot.iife.min.js") + "\n" + asset("page.js")
    style = asset("uPlot.min.css") + "\n" + asset("page.css")
    page = (
        _environment()
        .get_template("page.html")
        .render(
            **context,
            data=embedded(data),
            script=script,
            style=style,
            policy=policy_of(script, style, is_live=is_live),
            is_live=is_live,
            version=versions()["proximo"],
            written=f"{datetime.datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        )
    )
    return f"{MARK}\n{page}\n".encode(errors="replace")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _title(records: Sequence[RunRecord], summaries: Summaries) -> dict[str, str]:
    """What stands at the very top."""
    tasks = ", ".join(sorted({summary.task for summary in summaries}))
    if len(records) > 1:
        return {"task": tasks, "name": f"{len(records)} runs", "page": f"{tasks}: {len(records)} runs"}
    name = records[0].name
    algorithm = records[0].settings.get("algorithm")
    is_control = records[0].stage is None and isinstance(algorithm, str)
    told = f"{str(algorithm).upper()}, run {name}" if is_control else f"run {name}"
    return {"task": tasks, "name": told, "page": f"{tasks}: {name}"}


# --- the data of the script -----------------------------------------------------------------------------------------


def _data(records: Sequence[RunRecord], summaries: Summaries, groups: Sequence[Sequence[int]]) -> dict[str, Any]:
    """All that the script draws."""
    runs = [
        curves | {"label": summary.name, "references": references_of(record)}
        for record, summary, curves in zip(records, summaries, curves_of(records), strict=True)
    ]
    summed = curves_of_groups(records, groups)
    of_groups = [
        (curves or {"run": members[0]})
        | {"label": _group_label(records, groups, group), "references": references_of(records[members[0]])}
        for group, (members, curves) in enumerate(zip(groups, summed, strict=True))
        if curves or len(members) == 1
    ]
    most_characters = MOST_SAMPLE_CHARACTERS // min(len(records), 4)
    return {
        "live": False,
        "control": records[0].stage is None,
        "axes": AXES if records[0].stage is None else {name: AXES[name] for name in ("iterations", "seconds")},
        "panels": panels_of(records[0].stage),
        "runs": runs,
        "groups": of_groups if any(summed) else [],
        "ratings": [
            {"label": record.name, "players": players}
            for record in records[:7]
            if (players := read_ratings(record.run))
        ],
        "samples": [
            {"label": record.name, "samples": samples}
            for record in records[:4]
            if (samples := samples_of(record, most_characters))
        ],
    }


def _group_label(records: Sequence[RunRecord], groups: Sequence[Sequence[int]], group: int) -> str:
    """A group by the settings that tell it from the others, and by how many seeds it has."""
    firsts = [records[members[0]] for members in groups]
    count = f"{len(groups[group])} seed{'s' * (len(groups[group]) != 1)}"
    if len(groups) == 1:
        return count
    columns = settings_that_differ(firsts)
    said = [f"{name} {in_words(values[group])}" for name, values in list(columns.items())[:3]]
    tasks = {record.settings.get("env_id") for record in firsts}
    said = [firsts[group].task, *said] if len(tasks) > 1 else said
    return f"{', '.join(said) or f'group {group + 1}'} ({count})"


# --- what is written in words ---------------------------------------------------------------------------------------


def _cards(summary: RunSummary | LanguageSummary) -> list[tuple[str, str, str]]:
    """The numbers worth a large print: name, value, and what belongs to it."""
    if isinstance(summary, LanguageSummary):
        return _language_cards(summary)
    best = "" if summary.best_return_step is None else f"at step {summary.best_return_step:,}"
    planned = "" if summary.total_steps is None else f"of {summary.total_steps:,}"
    return [
        ("final return", number(summary.final_return), "mean of the last 100 episodes"),
        ("best return", number(summary.best_return), best),
        ("steps", number(summary.env_steps), planned),
        ("time", duration(summary.seconds), ""),
        ("steps per second", number(summary.steps_per_second), ""),
    ]


def _language_cards(summary: LanguageSummary) -> list[tuple[str, str, str]]:
    labels = {
        "reward_mean": "reward",
        "gold_mean": "gold score",
        "kl_to_reference": "KL to the reference",
        "response_length_mean": "tokens per response",
        "eos_fraction": "end by themselves",
    }
    wanted = list(labels) if "reward_mean" in summary.final else [*LEARNING_METRICS[:5]]
    shown = {name: percent if name == "eos_fraction" else number for name in wanted}
    cards = [
        (
            labels.get(name, name.replace("_", " ")),
            shown[name](summary.final[name]),
            f"at first {shown[name](summary.first[name])}",
        )
        for name in wanted
        if name in summary.final and name in {*ALIGN_METRICS, *LEARNING_METRICS}
    ]
    planned = "" if summary.planned_iterations is None else f"of {summary.planned_iterations:,}"
    return [*cards, ("iterations", number(summary.n_iterations), planned), ("time", duration(summary.seconds), "")]


def _told(summary: RunSummary | LanguageSummary) -> str:
    told = what_happened_in_language(summary) if isinstance(summary, LanguageSummary) else what_happened(summary)
    return told.replace("**", "")


def _run(
    record: RunRecord, summary: RunSummary | LanguageSummary, baseline: Baseline | None, folder: Path | None
) -> dict[str, Any]:
    """What the page says of one run in words."""
    return {
        "name": record.name,
        "told": _told(summary),
        "findings": summary.findings,
        "worst": _worst(summary.findings),
        "settings": setting_rows(record.settings, baseline),
        "source": baseline.source if baseline else "",
        "has_preset": bool(baseline and baseline.preset is not None),
        "has_defaults": baseline is not None,
        "facts": facts_of(record.run, record.settings),
        "video": _video(record.run, folder),
    }


def _worst(findings: Sequence[Finding]) -> str:
    """The severity of the first finding, which is the worst."""
    return findings[0].severity if findings else ""


def facts_of(run: RunDirectory, settings: Mapping[str, Any]) -> dict[str, str]:
    """Seed, and the versions and machine that wrote the newest checkpoint, as far as they are known."""
    found = {"seed": in_words(settings.get("seed"))}
    try:
        saved = names.all_in(run.checkpoints)
        found |= read_manifest(run.checkpoints / saved[0]).versions if saved else {}
    except Exception:  # a damaged or foreign checkpoint: nothing else on the page hangs on it
        found["versions"] = "unknown: the newest checkpoint cannot be read"
    return {name: str(value)[:200] for name, value in found.items()}


def _video(run: RunDirectory, folder: Path | None) -> dict[str, str] | None:
    """The newest film of the policy: in the page where it is small, else as a link; links to other places are not."""
    try:
        films = [path for path in run.videos.iterdir() if path.suffix in _VIDEOS and _is_plain(path)]
        if not films:
            return None
        path = max(films, key=lambda each: (each.stat().st_mtime, each.name))
        kind, size = _VIDEOS[path.suffix], path.stat().st_size
        told = {"name": path.name, "kind": kind, "size": f"{size / 1e6:.1f} MB", "url": "", "link": ""}
        if size <= LARGEST_VIDEO:
            return told | {"url": f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"}
        return told | {"link": _relative(path, folder)}
    except OSError:
        return None


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _relative(path: Path, folder: Path | None) -> str:
    if folder is None:
        return ""
    return quote(Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix())


# --- several runs ---------------------------------------------------------------------------------------------------


def _comparison(summaries: Summaries) -> list[list[str]]:
    """A line for each run, below a line of names."""
    if isinstance(summaries[0], LanguageSummary):
        own = [summary for summary in summaries if isinstance(summary, LanguageSummary)]
        measured = [name for name in (*LEARNING_METRICS, *ALIGN_METRICS) if any(name in each.final for each in own)]
        shown = measured[:6]
        rows = [["run", "seed", *(name.replace("_", " ") for name in shown), "iterations", "time", "diagnosis"]]
        for each in own:
            values = [number(each.final.get(name)) for name in shown]
            ends = [number(each.n_iterations), duration(each.seconds), _verdict(each.findings)]
            rows.append([each.name, in_words(each.seed), *values, *ends])
        return rows
    rows = [["run", "seed", "final return", "best return", "steps", "time", "steps/s", "diagnosis"]]
    for summary in summaries:
        assert isinstance(summary, RunSummary)
        numbers = (summary.final_return, summary.best_return, summary.env_steps)
        ends = [duration(summary.seconds), number(summary.steps_per_second), _verdict(summary.findings)]
        rows.append([summary.name, in_words(summary.seed), *map(number, numbers), *ends])
    return rows


def _verdict(findings: Sequence[Finding]) -> str:
    told = [finding.name.replace("_", " ") for finding in findings if finding.severity != "note"]
    return ", ".join(told) or "nothing to note"


def _group_rows(records: Sequence[RunRecord], summaries: Summaries) -> list[list[str]]:
    """The result of each group of seeds: what the runs ended with, summed up as the curves are."""
    groups = groups_of(records)
    if not any(len(members) > 1 for members in groups):
        return []
    is_control = isinstance(summaries[0], RunSummary)
    result = "final return" if is_control else "reward or loss"
    rows = [["group", "seeds", result, "which is", "95 % interval", "lowest", "highest"]]
    for group, members in enumerate(groups):
        ends = np.array([end for number_ in members if (end := _end(summaries[number_])) is not None])
        if not len(ends):
            continue
        middle, what, between = float(ends.mean()), "the mean" if len(ends) > 1 else "the only one", "-"
        if len(ends) >= FEWEST_SEEDS:
            middle, what = float(interquartile_mean(ends)), "the interquartile mean"
            between = " to ".join(map(number, bootstrap_interval(ends, n_resamples=5000)))
        label = _group_label(records, groups, group)
        lowest, highest = number(float(ends.min())), number(float(ends.max()))
        rows.append([label, str(len(ends)), number(middle), what, between, lowest, highest])
    return rows


def _end(summary: RunSummary | LanguageSummary) -> float | None:
    if isinstance(summary, RunSummary):
        return summary.final_return
    return summary.final.get("reward_mean", summary.final.get("loss"))


def _differences(records: Sequence[RunRecord], groups: Sequence[Sequence[int]]) -> list[list[str]]:
    """The settings that are not the same in all groups of runs, with their values; below a line of names."""
    firsts = [records[members[0]] for members in groups]
    rows = [[name, *map(in_words, values)] for name, values in settings_that_differ(firsts).items()]
    heads = [
        f"{first.name}{f' and {len(members) - 1} more' if len(members) > 1 else ''}"
        for first, members in zip(firsts, groups, strict=True)
    ]
    return [["setting", *heads], *rows] if rows else []
