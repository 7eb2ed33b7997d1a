"""Pictures of language runs, in the same style as those of control runs, and the table of their samples."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from proximo.report import pictures
from proximo.report.charts import CHARTS, Chart, Line, Panel
from proximo.report.folder import png_bytes, prepare_folder, write_ours
from proximo.report.records import RunRecord, finite
from proximo.report.words import number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FRONTIER = "frontier"
OVERVIEW_COLUMNS = 3
MOST_LOOKS = 20
"""Lines for each prompt in the table of samples; where there were more looks, these are evenly spread."""
LONGEST_SAMPLE = 600
"""Characters of a response in the table of samples."""
_KL_LABEL = "KL to the reference (nats per response)"


def _shared(metric: str) -> Panel:
    """The panel that control runs have for a metric."""
    return next(panel for chart in CHARTS for panel in chart.panels if panel.lines[0].metric == metric)


_SHADED = "; shaded: one standard deviation of theirs"
_SPEED = Panel(
    "Speed",
    "collecting and updating together",
    "tokens per second",
    (Line("tokens_per_second"),),
    from_zero=True,
)

ALIGN_CHARTS = (
    Chart(
        "reward",
        (
            Panel(
                "Reward",
                f"mean over an iteration's responses{_SHADED}",
                "reward_mean",
                (Line("reward_mean"),),
                is_noisy=False,
                in_overview=True,
            ),
            Panel(
                "Gold score",
                "another judge's mean of the same responses; nothing learns from it",
                "gold_mean",
                (Line("gold_mean"),),
                is_noisy=False,
                in_overview=True,
            ),
        ),
    ),
    Chart(
        "kl_to_reference",
        (
            Panel(
                "How far the policy is from the reference",
                "sampled KL divergence, mean over responses",
                "kl_to_reference (nats per response)",
                (Line("kl_to_reference"),),
                is_noisy=False,
                reference="beta_target",
                from_zero=True,
                in_overview=True,
            ),
            Panel(
                "Beta",
                "weight of the KL; it moves so that the KL comes to its target",
                "beta",
                (Line("beta"),),
                is_noisy=False,
                from_zero=True,
            ),
        ),
    ),
    Chart(
        FRONTIER,
        (
            Panel(
                "Reward against KL",
                "running means; circle: beginning, large dot: end, small dots: iterations",
                "reward_mean",
                (Line("reward_mean"),),
                is_noisy=False,
            ),
            Panel(
                "Gold score against KL",
                "where this turns down and the reward does not, the reward is exploited",
                "gold_mean",
                (Line("gold_mean"),),
                is_noisy=False,
            ),
        ),
    ),
    Chart(
        "responses",
        (
            Panel(
                "Response length",
                "mean over responses, their end token included",
                "length (tokens)",
                (Line("response_length_mean"),),
                reference="max_new_tokens",
                from_zero=True,
                in_overview=True,
            ),
            Panel(
                "Responses that end by themselves",
                "the others are cut off by max_new_tokens",
                "eos_fraction",
                (Line("eos_fraction"),),
                ceiling=1.0,
                from_zero=True,
                in_percent=True,
                in_overview=True,
            ),
        ),
    ),
    Chart(
        "entropy",
        (
            replace(_shared("entropy"), hint="mean over tokens: 0 is certain of each next one", from_zero=True),
            replace(_shared("explained_variance"), hint="1: it foresees the scores; 0: no better than their mean"),
        ),
    ),
    Chart("losses", (replace(_shared("policy_loss"), in_overview=False), _shared("value_loss"))),
    Chart(
        "updates",
        (
            replace(_shared("approx_kl"), hint="KL divergence per token from the policy that sampled, last epoch"),
            replace(
                _shared("clip_fraction"),
                hint="share of tokens whose probability ratio has left the band",
                y_label="share of tokens",
            ),
        ),
    ),
    Chart("schedules", (_shared("learning_rate"),)),
    Chart(
        "speed", (_SPEED, replace(_shared("seconds_collecting"), hint="per iteration: sampling and scoring, updating"))
    ),
)
"""The pictures of an alignment run."""

LEARNING_CHARTS = (
    Chart(
        "loss",
        (
            Panel(
                "Loss",
                "what is minimized; held-out rows are never learned from",
                "loss",
                (Line("loss", "training"), Line("held_out_loss", "held out (dots)")),
                in_overview=True,
            ),
        ),
    ),
    Chart(
        "accuracy",
        (
            Panel(
                "Accuracy",
                "share of pairs in which the chosen answer is put first",
                "accuracy",
                (Line("accuracy", "training"), Line("held_out_accuracy", "held out (dots)")),
                in_percent=True,
                level=0.5,
                in_overview=True,
            ),
            Panel(
                "Margin",
                "by how much the chosen answer is put first, mean over pairs",
                "margin_mean",
                (Line("margin_mean"),),
                level=0.0,
                in_overview=True,
            ),
        ),
    ),
    Chart(
        "log_ratios",
        (
            Panel(
                "Log-probabilities against the reference's",
                "where both fall, the model unlearns the chosen answers, too",
                "nats per answer",
                (Line("chosen_log_ratio", "chosen"), Line("rejected_log_ratio", "rejected")),
                level=0.0,
                in_overview=True,
            ),
        ),
    ),
    Chart(
        "schedules",
        (
            replace(_shared("learning_rate"), in_overview=True),
            Panel(
                "Gradient norm",
                "before clipping, of all weights together",
                "grad_norm",
                (Line("grad_norm"),),
                reference="max_grad_norm",
                from_zero=True,
                in_overview=True,
            ),
        ),
    ),
    Chart("speed", (_SPEED,)),
)
"""The pictures of sft, reward and dpo, where they measure what is drawn."""


def draw_language_records(records: Sequence[RunRecord], folder: Path) -> list[Path]:
    """Draw one language run, or several of one stage overlaid, as PNG files in `folder`; see `pictures.draw_pictures`.

    The overview comes first in the list.

    Raises:
        UserError: if the folder cannot be written to, or a file of another origin has the name of a picture.
    """
    charts = language_charts(records)
    figures = [("overview", language_overview(records))]
    figures += [(chart.name, language_figure(chart, records)) for chart in charts]
    paths = [folder / f"{name}.png" for name, _ in figures]
    prepare_folder(folder, paths)
    for path, (_, figure) in zip(paths, figures, strict=True):
        write_ours(path, png_bytes(figure))
    return paths


def language_charts(records: Sequence[RunRecord]) -> list[Chart]:
    """Return the charts that the runs, which are of one stage, have numbers for."""
    charts = ALIGN_CHARTS if records[0].stage == "align" else LEARNING_CHARTS
    if not any(_path_of(record, smooth=False) for record in records):
        charts = tuple(chart for chart in charts if chart.name != FRONTIER)
    fitted = [Chart(chart.name, _fitted(chart.panels, records)) for chart in charts]
    return [chart for chart in fitted if chart.panels]


def language_figure(chart: Chart, records: Sequence[RunRecord]) -> Figure:
    """Draw one chart, its panels side by side."""
    if chart.name == FRONTIER:
        return _frontier(chart, records)
    figure = pictures.chart_figure(chart, records)
    _shade(figure, chart.panels, records)
    return figure


def language_overview(records: Sequence[RunRecord]) -> Figure:
    """Draw the most telling panels of all charts as one grid."""
    panels = [panel for chart in language_charts(records) for panel in chart.panels if panel.in_overview]
    figure = pictures._figure(panels, records, n_columns=min(OVERVIEW_COLUMNS, len(panels)))
    _shade(figure, panels, records)
    return figure


def _fitted(panels: Sequence[Panel], records: Sequence[RunRecord]) -> tuple[Panel, ...]:
    """The panels that have numbers, with the lines and the dashed settings that mean something in these runs."""
    fitted = []
    for panel in panels:
        lines = tuple(line for line in panel.lines if len(_known(line.metric, records)))
        if not lines or (lines[0].metric == "beta" and np.ptp(_known("beta", records)) == 0):
            continue
        reference = panel.reference
        if reference == "beta_target" and any(record.settings.get("beta_control") != "adaptive" for record in records):
            reference = None
        if reference == "max_new_tokens":
            # A limit that is far away would press the lengths to the floor.
            limits = [value for record in records if isinstance(value := record.settings.get(reference), int)]
            reference = reference if max(limits, default=0) <= 2 * _known(lines[0].metric, records).max() else None
        hint = panel.hint if len(records) == 1 else panel.hint.removesuffix(_SHADED)
        fitted.append(replace(panel, lines=lines, reference=reference, hint=hint))
    return tuple(fitted)


def _known(metric: str, records: Sequence[RunRecord]) -> np.ndarray:
    values = np.concatenate([record.column(metric) for record in records])
    return values[np.isfinite(values)]


def _shade(figure: Figure, panels: Sequence[Panel], records: Sequence[RunRecord]) -> None:
    """Shade one standard deviation of the scores around the mean reward of a run that stands alone."""
    if len(records) != 1:
        return
    (record,) = records
    mean, spread = record.column("reward_mean"), record.column("reward_std")
    for axis, panel in zip(figure.axes, panels, strict=False):
        if panel.lines[0].metric == "reward_mean":
            x, _ = record.steps
            axis.fill_between(x, mean - spread, mean + spread, color=pictures.COLOURS[0], alpha=0.15, linewidth=0)


# --- reward against KL ------------------------------------------------------------------------------------------


def _frontier(chart: Chart, records: Sequence[RunRecord]) -> Figure:
    """Draw rewards over distances: the path of each run, which begins at the reference."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    # A record whose steps are distances is drawn by the means that draw all others.
    paths, points = (
        [
            RunRecord(record.name, record.run, record.settings, rows)
            for record in records
            if (rows := _path_of(record, smooth=smooth))
        ]
        for smooth in (True, False)
    )
    figure = pictures.chart_figure(chart, paths)
    distances = _known("iteration", points)
    low, high = min(float(distances.min()), 0.0), float(distances.max())
    margin = 0.04 * (high - low) or 0.05
    for axis, panel in zip(figure.axes, chart.panels, strict=True):
        axis.set_xlabel(_KL_LABEL)
        axis.set_xlim(low - margin, high + margin)
        axis.xaxis.set_major_locator(MaxNLocator(6))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
        metric = panel.lines[0].metric
        for index, (path, raw) in enumerate(zip(paths, points, strict=True)):
            colour = pictures.COLOURS[index % len(pictures.COLOURS)]
            axis.scatter(
                raw.column("iteration"), raw.column(metric), s=5, color=colour, alpha=0.3, linewidth=0, zorder=2
            )
            x, y = path.column("iteration"), path.column(metric)
            known = np.flatnonzero(np.isfinite(y))
            for row, fill in [(known[0], "white"), (known[-1], colour)] if len(known) else []:
                axis.plot(x[row], y[row], "o", color=colour, markerfacecolor=fill, markersize=6, zorder=5)
    return figure


def _path_of(record: RunRecord, *, smooth: bool) -> list[dict[str, Any]]:
    """Reward and gold score by distance, as rows whose `iteration` is the distance; running means where `smooth`."""
    names = {"iteration": "kl_to_reference", "reward_mean": "reward_mean", "gold_mean": "gold_mean"}
    columns = {name: record.column(metric) for name, metric in names.items()}
    if smooth:
        columns = {name: _running_mean(values) for name, values in columns.items()}
    known = np.flatnonzero(np.isfinite(columns["iteration"]) & np.isfinite(columns["reward_mean"]))
    plain = {name: [value if math.isfinite(value) else None for value in column] for name, column in columns.items()}
    return [{name: values[row] for name, values in plain.items()} for row in known]


def _running_mean(values: np.ndarray) -> np.ndarray:
    """The mean of the known values within a fortieth of the run to either side, `[n]`; NaN where a value is unknown."""
    window = np.ones(2 * max(1, len(values) // 40) + 1)
    if len(values) < len(window):
        return values
    known = np.isfinite(values)
    sums = np.convolve(np.where(known, values, 0.0), window, mode="same")
    counts = np.convolve(known.astype(float), window, mode="same")
    return np.where(known, sums / np.maximum(counts, 1.0), np.nan)


# --- samples ----------------------------------------------------------------------------------------------------


def samples_text(records: Sequence[RunRecord]) -> str:
    """What the fixed prompts were answered over the iterations, as Markdown tables; empty if no run kept samples."""
    lines = ["# Samples", "", "The same prompts with the same seed, at several iterations.", ""]
    beginning = len(lines)
    for record in records:
        told = _samples_of(record)
        lines += [f"## {record.name}", "", *told] if told else []
    return "\n".join(lines).rstrip() + "\n" if len(lines) > beginning else ""


def _samples_of(record: RunRecord) -> list[str]:
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for sample in _read_samples(record.run.path / "samples.jsonl"):
        by_prompt.setdefault(_prompt_text(sample.get("prompt")), []).append(sample)
    lines = []
    for index, (prompt, samples) in enumerate(by_prompt.items()):
        iterations = sorted({sample["iteration"] for sample in samples})
        shown = {iterations[round(place)] for place in np.linspace(0, len(iterations) - 1, MOST_LOOKS)}
        lines += [f"### Prompt {index + 1}", "", _code(prompt), ""]
        lines += ["| iteration | score | KL (nats) | response |", "|---|---|---|---|"]
        for sample in samples:
            if sample["iteration"] in shown:
                score, kl = (number(finite(sample.get(name))) for name in ("score", "kl"))
                lines.append(f"| {sample['iteration']} | {score} | {kl} | {_code(str(sample.get('response')))} |")
        lines.append("")
    return lines


def _read_samples(path: Path) -> list[dict[str, Any]]:
    """The samples of a run; a line that was torn by a kill is passed over, as in metrics."""
    try:
        lines = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            sample = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(sample, dict) and isinstance(sample.get("iteration"), int):
            found.append(sample)
    return found


def _prompt_text(prompt: object) -> str:
    """A text, or the messages of a conversation one after the other."""
    if isinstance(prompt, list):
        said = [message for message in prompt if isinstance(message, dict)]
        return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in said)
    return str(prompt)


def _code(text: str) -> str:
    """Write a text of any content as one line of code: nothing in it is Markdown, HTML or a terminal's command."""
    text = text if len(text) <= LONGEST_SAMPLE else f"{text[:LONGEST_SAMPLE]}..."
    text = text.replace("\r\n", "\n").replace("\n", " \N{DOWNWARDS ARROW WITH CORNER LEFTWARDS} ").replace("\t", " ")
    text = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence} {text.replace('|', chr(92) + '|')} {fence}" if text.strip() else "(empty)"
