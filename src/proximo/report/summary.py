"""One run in numbers and sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from proximo.report.diagnosis import diagnose
from proximo.report.finding import Finding
from proximo.report.language_diagnosis import diagnose_align
from proximo.report.progress import WINDOW_EPISODES, progress_of
from proximo.report.records import Row, RunRecord, column, finite
from proximo.report.words import duration, number, percent, plural


@dataclass(frozen=True)
class RunSummary:
    """A run's results and diagnosis; None for what it has not measured."""

    name: str
    path: Path
    task: str
    seed: int | None
    n_iterations: int
    env_steps: int | None
    total_steps: int | None
    """The steps that were planned."""
    n_episodes: int | None
    first_return: float | None
    """Mean return as soon as 20 episodes had finished."""
    final_return: float | None
    """Mean return of the last 100 episodes."""
    best_return: float | None
    best_return_step: int | None
    best_return_seconds: float | None
    seconds: float | None
    steps_per_second: float | None
    collecting_share: float | None
    """Share of the time that environments and acting took; the rest went to updates."""
    findings: tuple[Finding, ...]


def summarize(record: RunRecord) -> RunSummary:
    """Sum a run up; one without finished iterations has no numbers."""
    rows, settings = record.rows, record.settings
    progress = progress_of(rows)
    steps, seconds = _last(rows, "env_steps"), _last(rows, "seconds")
    collecting, updating = (float(np.nansum(column(rows, f"seconds_{phase}"))) for phase in ("collecting", "updating"))
    episodes = _last(rows, "n_episodes")
    return RunSummary(
        name=record.name,
        path=record.run.path,
        task=record.task,
        seed=_whole(settings.get("seed")),
        n_iterations=len(rows),
        env_steps=_whole(steps),
        total_steps=_whole(settings.get("total_steps")),
        n_episodes=_whole(episodes),
        first_return=progress.start if progress else None,
        final_return=progress.final if progress else None,
        best_return=progress.best if progress else None,
        best_return_step=_whole(rows[progress.best_row].get("env_steps")) if progress else None,
        best_return_seconds=finite(rows[progress.best_row].get("seconds")) if progress else None,
        seconds=seconds,
        steps_per_second=steps / seconds if steps is not None and seconds else None,
        collecting_share=collecting / (collecting + updating) if collecting + updating > 0 else None,
        findings=() if is_cloned(rows) else tuple(diagnose(rows, settings)),
    )


def is_cloned(rows: Sequence[Row]) -> bool:
    """Whether these are the metrics of a policy's cloning: epochs over data, and no steps of an environment."""
    return bool(rows) and "log_prob_learned" in rows[0]


LEARNING_METRICS = (
    "loss",
    "held_out_loss",
    "accuracy",
    "held_out_accuracy",
    "margin_mean",
    "chosen_log_ratio",
    "rejected_log_ratio",
)
ALIGN_METRICS = (
    "reward_mean",
    "gold_mean",
    "reward_std",
    "kl_to_reference",
    "beta",
    "response_length_mean",
    "eos_fraction",
    "entropy",
    "approx_kl",
    "clip_fraction",
    "explained_variance",
)
"""What is told of a language run, in this order, where it is measured."""
COMPARED_METRICS = (
    *LEARNING_METRICS,
    "reward_mean",
    "gold_mean",
    "kl_to_reference",
    "response_length_mean",
    "eos_fraction",
    "entropy",
)
"""What has a column where language runs are compared."""


@dataclass(frozen=True)
class LanguageSummary:
    """A language run's results and diagnosis."""

    name: str
    path: Path
    task: str
    """The stage, and the algorithm of align."""
    seed: int | None
    n_iterations: int
    planned_iterations: int | None
    n_responses: int | None
    """Responses that were scored; None for stages that sample none."""
    seconds: float | None
    first: dict[str, float]
    """Each metric's median over the first tenth of the run."""
    final: dict[str, float]
    """And over the last tenth."""
    findings: tuple[Finding, ...]
    """Of align alone."""


def summarize_language(record: RunRecord) -> LanguageSummary:
    """Sum a language run up; one without finished iterations has no numbers."""
    rows = record.rows
    is_align = record.stage == "align"
    ends = {name: _ends(rows, name, share=0.1) for name in (ALIGN_METRICS if is_align else LEARNING_METRICS)}
    return LanguageSummary(
        name=record.name,
        path=record.run.path,
        task=record.task,
        seed=_whole(record.settings.get("seed")),
        n_iterations=len(rows),
        planned_iterations=_whole(_last(rows, "n_iterations")),
        n_responses=_whole(_last(rows, "n_responses")),
        seconds=_last(rows, "seconds"),
        first={name: found[0] for name, found in ends.items() if found},
        final={name: found[1] for name, found in ends.items() if found},
        findings=tuple(diagnose_align(rows, record.settings)) if is_align else (),
    )


def what_happened_in_language(summary: LanguageSummary) -> str:
    """Tell in a sentence or two how much was done."""
    if summary.n_iterations == 0:
        return "No iteration has finished yet."
    told = f"It took {plural(summary.n_iterations, 'iteration')}"
    told += f", {plural(summary.n_responses, 'response')}" if summary.n_responses is not None else ""
    told += f" and {duration(summary.seconds)}." if summary.seconds is not None else "."
    planned = summary.planned_iterations
    return told + (f" {planned:,} iterations were planned." if planned and summary.n_iterations < planned else "")


def what_happened(summary: RunSummary) -> str:
    """Tell in a few sentences how much was done and what came out."""
    if summary.n_iterations == 0:
        return "No iteration has finished yet."
    done = plural(summary.n_iterations, "iteration")
    if summary.env_steps is not None:
        done = f"{summary.env_steps:,} environment steps in {done}"
    told = [f"It took {done}" + (f" and {duration(summary.seconds)}." if summary.seconds is not None else ".")]
    if summary.steps_per_second is not None:
        shares = ""
        if summary.collecting_share is not None:
            shares = (
                f", {percent(summary.collecting_share)} of the time for collecting and "
                f"{percent(1 - summary.collecting_share)} for updating"
            )
        told.append(f"That is {number(summary.steps_per_second)} steps per second{shares}.")
    if summary.env_steps is None:
        told.append("It was cloned from data, so there are no episodes.")
    elif summary.final_return is None:
        told.append("No episode has finished yet.")
    else:
        count = summary.n_episodes or 0
        episodes = f"Of {plural(count, 'episode')}, the last {WINDOW_EPISODES} have"
        if count < WINDOW_EPISODES:
            episodes = f"Only {plural(count, 'episode')} ended, with" if count else "The last episodes have"
        told.append(
            f"{episodes} a mean return of **{number(summary.final_return)}**; it began at "
            f"{number(summary.first_return)}, and its best was **{number(summary.best_return)}**{_when(summary)}."
        )
    if summary.env_steps is not None and summary.total_steps and summary.env_steps < 0.95 * summary.total_steps:
        told.append(f"{summary.total_steps:,} steps were planned.")
    return " ".join(told)


def what_curves_show(rows: Sequence[Row]) -> list[str]:
    """Say in a sentence each what the curves of the policy, the updates and the critic show."""
    told = []
    lengths, entropy = _ends(rows, "length_mean"), _ends(rows, "entropy")
    if lengths:
        first, last = lengths
        told.append(
            f"Episodes are {number(last)} steps long at the end"
            + (
                ", as they were at first."
                if number(first) == number(last)
                else f"; at first they were {number(first)}."
            )
        )
    if entropy:
        first, last = entropy
        change = "hardly changed" if abs(last - first) < 0.02 * abs(first) else "fell" if last < first else "rose"
        means = {"fell": "more certain", "rose": "more random"}
        told.append(
            f"The entropy {change}, from {number(first)} to {number(last)} nats"
            + (f": the policy became {means[change]}." if change in means else ".")
        )
    told += [sentence for sentence in (_updates(rows), _critic(rows)) if sentence]
    return told


def finding_lines(finding: Finding) -> list[str]:
    """Write a finding as lines of Markdown."""
    label = {"problem": "Problem", "warning": "Warning", "note": "Note", "good": "Good"}[finding.severity]
    title = finding.name.replace("_", " ")
    lines = [f"**{label}: {title}.** {finding.seen}", f"{finding.meaning}"]
    return [*lines, f"*What to do:* {finding.advice}"] if finding.advice else lines


def summary_json(summary: RunSummary | LanguageSummary) -> dict[str, Any]:
    """Return the summary as values that JSON holds."""
    values = dict(vars(summary))
    values["path"] = str(summary.path)
    values["findings"] = [dict(vars(finding)) for finding in summary.findings]
    return values


def _updates(rows: Sequence[Row]) -> str:
    kl, clipped = column(rows, "approx_kl"), column(rows, "clip_fraction")
    if not np.isfinite(kl).any():
        return ""
    peak = int(np.nanargmax(kl))
    iteration = _whole(rows[peak].get("iteration")) or peak + 1
    told = (
        f"Half of the updates move the policy by a KL of less than {number(float(np.nanmedian(kl)))} nats; "
        f"the largest by {number(float(kl[peak]))}, in iteration {iteration:,}"
    )
    if np.isfinite(clipped).any():
        told += f". They clip {percent(float(np.nanmedian(clipped)))} of the steps (median)"
    return f"{told}."


def _critic(rows: Sequence[Row]) -> str:
    explained, losses = _ends(rows, "explained_variance", share=0.1), _ends(rows, "value_loss", share=0.1)
    if not explained:
        return ""
    told = (
        f"Between the first and the last tenth of the run, the critic's explained variance went from "
        f"{number(explained[0])} to {number(explained[1])} (1 is perfect)"
    )
    if losses:
        told += f", its loss from {number(losses[0])} to {number(losses[1])}"
    return f"{told}."


def _when(summary: RunSummary) -> str:
    if summary.best_return_step is None:
        return ""
    after = f" and {duration(summary.best_return_seconds)}" if summary.best_return_seconds is not None else ""
    return f", reached after {summary.best_return_step:,} steps{after}"


def _ends(rows: Sequence[Row], name: str, *, share: float = 0.0) -> tuple[float, float] | None:
    """First and last known value, or medians over this share of them at either end; None if there are none."""
    values = column(rows, name)
    known = values[np.isfinite(values)]
    if len(known) == 0:
        return None
    count = max(int(share * len(known)), 1)
    return float(np.median(known[:count])), float(np.median(known[-count:]))


def _last(rows: Sequence[Row], name: str) -> float | None:
    values = column(rows, name)
    known = values[np.isfinite(values)]
    return float(known[-1]) if len(known) else None


def _whole(value: object) -> int | None:
    known = finite(value)
    return None if known is None else int(known)
