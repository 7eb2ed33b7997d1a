"""The numbers of a run's page: which panels there are, and every curve, thinned to what a browser can show."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from proximo.report.charts import CHARTS, Chart, Line, Panel
from proximo.report.intervals import FEWEST_SEEDS, bootstrap_band, interquartile_mean
from proximo.report.language_pictures import (
    ALIGN_CHARTS,
    FRONTIER,
    LEARNING_CHARTS,
    LONGEST_SAMPLE,
    _prompt_text,
    _read_samples,
)
from proximo.report.records import RunRecord, finite

MOST_NUMBERS = 100_000
"""Numbers of all runs' curves on a page; at about nine characters each they are half of what the file may have."""
MOST_GROUP_NUMBERS = 60_000
"""Numbers of the curves of all groups of a page, beside those of its runs."""
MOST_ROWS = 4000
"""Points of a curve; a screen is about as wide."""
FEWEST_ROWS = 24
"""However many runs are compared."""
GROUP_POINTS = 120
"""Points at which the runs of a group are summed up."""
FEWEST_GROUP_POINTS = 16
"""However many groups are compared."""
MOST_METRICS = 120
"""Metrics of a run; more come from no loop of ours."""
MOST_SAMPLE_CHARACTERS = 400_000
"""Of all samples on a page, as the page holds them."""
MOST_PROMPTS = 12
_MOST_CHARACTERS = 4 * LONGEST_SAMPLE
"""Of a prompt, of a response, and of all tokens of one."""
MOST_LIVE = {
    "rows": MOST_ROWS,
    "numbers": MOST_NUMBERS,
    "prompts": MOST_PROMPTS,
    "tokens": LONGEST_SAMPLE,
    "characters": _MOST_CHARACTERS,
}
"""What the script of a live page keeps to."""
LOOKS = (24, 16, 10, 6, 3, 2)
"""Looks at a prompt: the first of these that fits."""

AXES = {"steps": "environment steps", "seconds": "seconds", "iterations": "iterations"}
"""What may lie on the x-axis, and what to call it; `x` has them under these names."""
X_METRICS = {"steps": "env_steps", "seconds": "seconds", "iterations": "iteration"}

_SECTIONS = {
    **dict.fromkeys(("returns", "cloning", "reward", "kl_to_reference", "responses", "loss", "accuracy"), "Result"),
    **dict.fromkeys(("losses", "kl", "clip_fraction", "entropy", "explained_variance", "updates"), "Updates"),
    "log_ratios": "Result",
    "exploration": "Exploration",
    **dict.fromkeys(("schedules", "speed"), "Schedules and speed"),
}
_PHASES = Panel(
    "Where the time goes",
    "per iteration, one phase on top of the other",
    "seconds",
    (
        Line("seconds_acting", "acting"),
        Line("seconds_environment", "environments"),
        Line("seconds_collecting", "the rest of collecting"),
        Line("seconds_updating", "updating"),
        Line("seconds_overhead", "saving and showing"),
    ),
    from_zero=True,
)
_LANGUAGE_PHASES = replace(
    _PHASES, lines=(Line("seconds_collecting", "sampling and scoring"), Line("seconds_updating", "updating"))
)
_LARGEST_MOVE = next(panel for chart in CHARTS for panel in chart.panels if panel.lines[0].metric == "approx_kl_max")
_GRAD_NORM = Panel(
    "Gradient norm", "before clipping, mean of an update", "grad_norm", (Line("grad_norm"),), may_be_log=True
)
_PARTS = {"seconds_collecting": ("seconds_acting", "seconds_environment")}
"""Phases that lie within another one: what is stacked of it is the rest."""


def panels_of(stage: str | None) -> list[dict[str, Any]]:
    """Every panel that runs of this stage may have, as the page's script reads them; those without numbers are hidden.

    Args:
        stage: the stage of a language run, None for a control run.
    """
    charts: Sequence[Chart] = CHARTS
    if stage is not None:
        charts = ALIGN_CHARTS if stage == "align" else LEARNING_CHARTS
    panels = []
    for chart in charts:
        if chart.name == FRONTIER:
            continue
        for panel in chart.panels:
            if panel.title == _PHASES.title:
                panel = _PHASES if stage is None else _LANGUAGE_PHASES
            panels.append(_panel(panel, _SECTIONS[chart.name]))
        extra = {"clip_fraction": [_GRAD_NORM], "updates": [_LARGEST_MOVE, _GRAD_NORM]}.get(chart.name, [])
        panels += [_panel(panel, "Updates") for panel in extra]
    return panels


def _panel(panel: Panel, section: str) -> dict[str, Any]:
    metric = panel.lines[0].metric
    return {
        "title": panel.title,
        "section": section,
        "hint": panel.hint,
        "unit": panel.y_label,
        "lines": [{"metric": line.metric, "label": line.label.removesuffix(" (dots)")} for line in panel.lines],
        "noisy": panel.is_noisy,
        "log": panel.may_be_log,
        "floor": panel.floor,
        "ceiling": panel.ceiling,
        "reference": panel.reference,
        "level": panel.level,
        "fromZero": panel.from_zero,
        "percent": panel.in_percent,
        "stacked": panel.title == _PHASES.title,
        "parts": _PARTS if panel is _PHASES else {},
        "varies": metric == "beta",
        "band": {"return_mean": "return_std", "reward_mean": "reward_std"}.get(metric),
    }


def curves_of(records: Sequence[RunRecord]) -> list[dict[str, Any]]:
    """The curves of each run: `x` and `columns`, and where they were thinned `means`, of as many rows as it says."""
    metrics = metrics_of(records, MOST_NUMBERS // (max(len(records), 1) * FEWEST_ROWS))
    most_rows = min(MOST_ROWS, max(FEWEST_ROWS, MOST_NUMBERS // (max(len(records), 1) * max(len(metrics), 1))))
    return [_curves(record, metrics, most_rows) for record in records]


def metrics_of(records: Sequence[RunRecord], most: int) -> list[str]:
    """The names that have a number in any of the runs; where they are too many, those of a panel of their own first."""
    names = dict.fromkeys(name for record in records for name in _metrics(record))
    if len(names) <= most:
        return list(names)
    stage = records[0].stage
    first = [*X_METRICS.values(), *(line["metric"] for panel in panels_of(stage) for line in panel["lines"])]
    return [name for name in dict.fromkeys([*first, *names]) if name in names][: max(most, 6)]


def _metrics(record: RunRecord) -> list[str]:
    names = dict.fromkeys(name for row in record.rows for name in row)
    return [name for name in names if np.isfinite(record.column(name)).any()][:MOST_METRICS]


def _curves(record: RunRecord, wanted: Sequence[str], most_rows: int) -> dict[str, Any]:
    n = len(record.rows)
    x = {name: rising(record.column(metric)) for name, metric in X_METRICS.items()}
    if not np.isfinite(record.column("iteration")).any():
        x["iterations"] = np.arange(1.0, n + 1)
    own = set(_metrics(record)) - set(X_METRICS.values())
    metrics = [name for name in wanted if name in own]
    size = 1 if n <= most_rows else -(-3 * n // most_rows)  # three numbers for each group: two extremes and a mean
    curves: dict[str, Any] = {"size": size, "last": {}}
    columns = {name: record.column(name) for name in metrics}
    if size == 1:
        curves |= {"x": x, "columns": columns}
    else:
        extremes = {name: grouped(values, size) for name, values in columns.items()}
        curves["x"] = {name: _ends(values, size) for name, values in x.items()}
        curves["columns"] = {name: found[0] for name, found in extremes.items()}
        curves["means"] = {name: plain(found[1]) for name, found in extremes.items()}
        known = {name: values[np.isfinite(values)] for name, values in columns.items()}
        curves["last"] = {name: plain(values[-1:])[0] for name, values in known.items()}
    curves["x"] = {name: plain(values) for name, values in curves["x"].items() if np.isfinite(values).any()}
    curves["columns"] = {name: plain(values) for name, values in curves["columns"].items()}
    return curves


def rising(values: np.ndarray) -> np.ndarray:
    """Values that never go down: what is unknown or lower than one before is as high as the last; NaN before the first.

    An x-axis needs that, and clocks and damaged files do not promise it.
    """
    known = np.where(np.isfinite(values), values, -np.inf)
    highest = np.maximum.accumulate(known) if len(known) else known
    return np.where(np.isfinite(highest), highest, np.nan)


def grouped(values: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest value of each group of `size`, in the order they came in, and the groups' means.

    Returns:
        Extremes, two for each group, and means, one for each; NaN for a group without a value.
    """
    groups = np.pad(values, (0, -len(values) % size), constant_values=np.nan).reshape(-1, size)
    known = np.isfinite(groups)
    lowest = np.where(known, groups, np.inf).argmin(axis=1)
    highest = np.where(known, groups, -np.inf).argmax(axis=1)
    first, second = np.minimum(lowest, highest), np.maximum(lowest, highest)
    rows = np.arange(len(groups))
    extremes = np.stack([groups[rows, first], groups[rows, second]], 1).reshape(-1)
    sums, counts = np.where(known, groups, 0.0).sum(axis=1), known.sum(axis=1)
    return extremes, np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _ends(values: np.ndarray, size: int) -> np.ndarray:
    """The first and the last value of each group of `size`."""
    firsts = np.arange(0, len(values), size)
    lasts = np.minimum(firsts + size - 1, len(values) - 1)
    return values[np.stack([firsts, lasts], 1).reshape(-1)]


def plain(values: np.ndarray) -> list[float | int | None]:
    """Numbers as JSON holds them, six digits each and whole ones whole; None for what is no number."""
    return [_short(value) if math.isfinite(value) else None for value in values.tolist()]


def _short(value: float) -> float | int:
    short = value if value.is_integer() and abs(value) < 1e15 else float(f"{value:.6g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short


def references_of(record: RunRecord) -> dict[str, float]:
    """The settings that are drawn as dashed lines, where they are in force."""
    found = {}
    for name in ("target_kl", "beta_target", "max_new_tokens", "max_grad_norm"):
        value = finite(record.settings.get(name))
        if value is not None and (name != "beta_target" or record.settings.get("beta_control") == "adaptive"):
            found[name] = value
    return found


# --- several runs ---------------------------------------------------------------------------------------------------


def groups_of(records: Sequence[RunRecord]) -> list[list[int]]:
    """The numbers of the runs whose settings are the same but for the seed, in the order of their first ones."""
    groups: dict[str, list[int]] = {}
    for number, record in enumerate(records):
        settings = {name: value for name, value in record.settings.items() if name != "seed"}
        groups.setdefault(json.dumps(settings, sort_keys=True, default=str), []).append(number)
    return list(groups.values())


def curves_of_groups(records: Sequence[RunRecord], groups: Sequence[Sequence[int]]) -> list[dict[str, Any] | None]:
    """`group_curves` of each group, of as many points and metrics as there is room for on one page."""
    n_groups = max(sum(len(members) > 1 for members in groups), 1)
    metrics = metrics_of(records, MOST_GROUP_NUMBERS // (3 * n_groups * FEWEST_GROUP_POINTS))
    room = MOST_GROUP_NUMBERS // (3 * n_groups * max(len(metrics), 1))
    n_points = min(GROUP_POINTS, max(FEWEST_GROUP_POINTS, room))
    return [group_curves([records[number] for number in members], metrics, n_points) for members in groups]


def group_curves(
    records: Sequence[RunRecord], wanted: Sequence[str] | None = None, n_points: int = GROUP_POINTS
) -> dict[str, Any] | None:
    """The interquartile mean over runs that differ in their seeds alone, with 95 % bootstrap intervals.

    Of fewer than `FEWEST_SEEDS` runs it is their mean, with the lowest and the highest of them. Runs are read off at
    the same steps (iterations, where there are none), as far as the shortest one came; `seconds` are their mean at that
    step. A metric counts where every run has it, from the point on where all have a value to where the first ends.

    Args:
        records: the runs.
        wanted: metrics to sum up; None for all.
        n_points: at how many steps.

    Returns:
        `x`, `columns`, `bands` with the low and high ends, and `few`, which is true for fewer runs; None where two of
        the runs have nothing in common.
    """
    learned = [record for record in records if record.rows]
    if len(learned) < 2:
        return None
    has_steps = all(np.isfinite(record.column("env_steps")).any() for record in learned)
    positions = [rising(record.column("env_steps" if has_steps else "iteration")) for record in learned]
    if not all(np.isfinite(position).any() for position in positions):
        return None
    low, high = (
        max(float(np.nanmin(each)) for each in positions),
        min(float(np.nanmax(each)) for each in positions),
    )
    if high < low:
        return None
    n_points = min(n_points, *(len(each) for each in positions))
    grid = np.linspace(low, high, n_points) if n_points > 1 else np.array([high])
    shared = set(_metrics(learned[0])).intersection(*(_metrics(record) for record in learned[1:]))
    names = [name for name in wanted or _metrics(learned[0]) if name in shared - set(X_METRICS.values())]
    x = {
        name: plain(rising(_read_off(learned, positions, metric, grid).mean(axis=0)))
        for name, metric in X_METRICS.items()
        if metric in shared
    }
    if not x:
        return None
    tables = [_read_off(learned, positions, name, grid) for name in names]
    middle, ends = _summed_up(np.concatenate(tables, axis=1) if tables else np.empty((len(learned), 0)))
    curves: dict[str, Any] = {"x": x, "columns": {}, "bands": {}, "size": 1, "last": {}}
    for place, name in enumerate(names):
        part = slice(place * n_points, (place + 1) * n_points)
        curves["columns"][name] = plain(middle[part])
        curves["bands"][name] = [plain(end[part]) for end in ends]
    return curves | {"few": len(learned) < FEWEST_SEEDS}


def _summed_up(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The middle `[points]` and both ends of the band of runs `[runs, points]`; NaN where any run has it."""
    known = np.isfinite(table).all(axis=0)
    middle, ends = np.full(table.shape[1], np.nan), np.full((2, table.shape[1]), np.nan)
    found = table[:, known]
    if len(table) < FEWEST_SEEDS:
        middle[known], ends[:, known] = found.mean(axis=0), (found.min(axis=0), found.max(axis=0))
    else:
        middle[known], ends[:, known] = interquartile_mean(found.T), bootstrap_band(found)
    return middle, ends


def _read_off(
    records: Sequence[RunRecord], positions: Sequence[np.ndarray], metric: str, grid: np.ndarray
) -> np.ndarray:
    """A metric of each run at the points of a grid, `[runs, points]`, on straight lines between its values.

    NaN lies before the first value of a run and beyond its last.
    """
    table = np.empty((len(records), len(grid)))
    for row, (record, position) in enumerate(zip(records, positions, strict=True)):
        values = record.column(metric)
        known = np.isfinite(values) & np.isfinite(position)
        outside = {"left": np.nan, "right": np.nan}
        table[row] = np.interp(grid, position[known], values[known], **outside) if known.any() else np.nan
    return table


# --- samples --------------------------------------------------------------------------------------------------------


def samples_of(record: RunRecord, most_characters: int = MOST_SAMPLE_CHARACTERS) -> list[dict[str, Any]]:
    """The answers to the same prompts over the iterations, as plain values.

    Where they are more than there is room for there are fewer looks, evenly spread, then no colours, then fewer
    prompts. Each has `iteration`, `prompt`, `response`, `score`, `kl`, and, where the run has kept them, `tokens` and
    `log_ratios`, one for each token, with `cut` where these are not all.
    """
    coloured = [_sample(sample) for sample in _read_samples(record.run.path / "samples.jsonl")]
    plain_ones = [{name: sample[name] for name in sample if name not in _COLOURS} for sample in coloured]
    sizes = {True: [_size(sample) for sample in coloured], False: [_size(sample) for sample in plain_ones]}
    prompts = list(dict.fromkeys(sample["prompt"] for sample in coloured))
    tries = [(MOST_PROMPTS, looks, True) for looks in LOOKS] + [(MOST_PROMPTS, looks, False) for looks in LOOKS]
    for n_prompts, n_looks, with_colours in [*tries, (4, LOOKS[-1], False), (1, LOOKS[-1], False)]:
        asked = set(prompts[:n_prompts])
        found = [place for place, sample in enumerate(coloured) if sample["prompt"] in asked]
        iterations = sorted({coloured[place]["iteration"] for place in found})
        looks = np.linspace(0, len(iterations) - 1, n_looks) if iterations else []
        shown = {iterations[round(look)] for look in looks}
        kept = [place for place in found if coloured[place]["iteration"] in shown]
        if sum(sizes[with_colours][place] for place in kept) <= most_characters:
            return [(coloured if with_colours else plain_ones)[place] for place in kept]
    return []


_COLOURS = frozenset({"tokens", "log_ratios", "cut"})


def _size(sample: dict[str, Any]) -> int:
    """Characters of a sample in the page, where letters that mean something to HTML take six."""
    text = json.dumps(sample)
    return len(text) + 5 * sum(map(text.count, "&<>")) + 2


def _sample(sample: dict[str, Any]) -> dict[str, Any]:
    told = {
        "iteration": sample["iteration"],
        "prompt": _cut(_prompt_text(sample.get("prompt"))),
        "response": _cut(str(sample.get("response"))),
        "score": finite(sample.get("score")),
        "kl": finite(sample.get("kl")),
    }
    tokens, ratios = sample.get("tokens"), sample.get("log_ratios")
    if not (isinstance(tokens, list) and isinstance(ratios, list) and len(tokens) == len(ratios)):
        return told
    numbers = [finite(ratio) for ratio in ratios]
    if None in numbers or not all(isinstance(token, str) for token in tokens):
        return told
    ends = np.cumsum([len(token) for token in tokens[:LONGEST_SAMPLE]])
    n = int((ends <= _MOST_CHARACTERS).sum())
    if n == 0:
        return told
    told |= {"tokens": tokens[:n], "log_ratios": numbers[:n]}
    return told | {"cut": True} if n < len(tokens) else told


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}..."
