"""Pictures of one run, or of several on top of each other, as PNG files."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from proximo.errors import UserError
from proximo.report.charts import CHARTS, Chart, Panel
from proximo.report.curves import SHORTEST_TREND, Limits, lonely, readable_limits, thinned, trend
from proximo.report.folder import png_bytes, prepare_folder, write_ours
from proximo.report.records import RunRecord, read_records
from proximo.runs.directory import RunDirectory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#4D4D4D")
"""Okabe and Ito's palette, which colour-blind people can tell apart, without its yellow, which nobody sees."""
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.5, 1.2, 1.5)))
"""Line styles, for the lines of a panel or for more runs than there are colours."""

Place = Literal["best", "center right"]

_GREY = "#6b6b6b"
_INK = "#222222"
# Inches: of a pair of axes, between and around them. Titles, labels and numbers have to fit in between.
_AXES_WIDE, _AXES_HIGH = 4.4, 2.7
_GAP_WIDE, _GAP_HIGH = 1.15, 1.15
_LEFT, _RIGHT, _TOP, _BOTTOM = 1.1, 0.3, 0.98, 0.6
_LEGEND_LINE = 0.2
_DOTS_PER_INCH = 120
_OVERVIEW_COLUMNS = 3
_RAW_UP_TO_RUNS = 4  # more than these, and the unsmoothed lines of one hide the others
_LOG_FROM_RATIO = 100.0
_MILLIONS_FROM = 10_000_000
_LONGEST_NAME = 44
_TICK_STEPS = [1, 2, 2.5, 5, 10]


@dataclass(frozen=True)
class Stroke:
    """How one line of one run is drawn."""

    colour: str
    dash: Any
    label: str


def draw_pictures(runs: list[RunDirectory], folder: Path) -> list[Path]:
    """Draw the pictures of one run, or of several overlaid, as PNG files in `folder`, which is made if need be.

    Pictures that Proximo drew there before are replaced. The overview comes first in the list.

    Raises:
        UserError: if there is nothing to draw yet, a run cannot be read, the folder cannot be written to, or
            a file of another origin has the name of a picture.
    """
    return draw_records(read_records(runs), folder)


def draw_records(records: Sequence[RunRecord], folder: Path) -> list[Path]:
    """Draw what `read_records` returned; see `draw_pictures`."""
    charts = charts_of(records)
    if not charts:
        raise UserError("There is nothing to draw: the runs have none of the metrics that there are pictures for.")
    figures = [("overview", overview_figure(records))]
    figures += [(chart.name, chart_figure(chart, records)) for chart in charts]
    paths = [folder / f"{name}.png" for name, _ in figures]
    prepare_folder(folder, paths)
    for path, (_, figure) in zip(paths, figures, strict=True):
        write_ours(path, png_bytes(figure))
    return paths


def charts_of(records: Sequence[RunRecord]) -> list[Chart]:
    """Return the charts that the runs have metrics for."""
    charts = [Chart(chart.name, _panels_of(chart.panels, records)) for chart in CHARTS]
    return [chart for chart in charts if chart.panels]


def chart_figure(chart: Chart, records: Sequence[RunRecord]) -> Figure:
    """Draw one chart, its panels side by side."""
    return _figure(chart.panels, records, n_columns=len(chart.panels), width=1.0 if len(chart.panels) > 1 else 1.5)


def overview_figure(records: Sequence[RunRecord]) -> Figure:
    """Draw the most telling panels of all charts as one grid."""
    panels = _panels_of([panel for chart in CHARTS for panel in chart.panels if panel.in_overview], records)
    return _figure(panels, records, n_columns=min(_OVERVIEW_COLUMNS, len(panels)))


def _panels_of(panels: Sequence[Panel], records: Sequence[RunRecord]) -> tuple[Panel, ...]:
    return tuple(panel for panel in panels if any(panel.is_in(record.rows) for record in records))


def _figure(panels: Sequence[Panel], records: Sequence[RunRecord], *, n_columns: int, width: float = 1.0) -> Figure:
    from matplotlib.figure import Figure

    drawn = [record for record in records if record.rows]
    n_rows = math.ceil(len(panels) / n_columns)
    inches_wide = _LEFT + n_columns * (_AXES_WIDE * width + _GAP_WIDE) - _GAP_WIDE + _RIGHT
    names = [_short(record.name) for record in drawn] if len(drawn) > 1 else []
    names_per_line = _names_per_line(names, inches_wide)
    bottom = _BOTTOM + _LEGEND_LINE * math.ceil(len(names) / names_per_line) + (0.1 if names else 0.0)
    inches_high = _TOP + n_rows * (_AXES_HIGH + _GAP_HIGH) - _GAP_HIGH + bottom
    figure = Figure(figsize=(inches_wide, inches_high), dpi=_DOTS_PER_INCH, facecolor="white")
    axes = figure.subplots(n_rows, n_columns, squeeze=False).flat
    # Margins in inches rather than a layout engine: it draws every picture once more to find the same ones.
    figure.subplots_adjust(
        left=_LEFT / inches_wide,
        right=1 - _RIGHT / inches_wide,
        bottom=bottom / inches_high,
        top=1 - _TOP / inches_high,
        wspace=_GAP_WIDE / (_AXES_WIDE * width),
        hspace=_GAP_HIGH / _AXES_HIGH,
    )
    for axis, panel in itertools.zip_longest(axes, panels):
        if panel is None:
            axis.set_axis_off()
        else:
            _draw_panel(axis, panel, drawn)
    _head(figure, panels, drawn)
    if names:
        _run_legend(figure, names, names_per_line)
    return figure


def _head(figure: Figure, panels: Sequence[Panel], records: Sequence[RunRecord]) -> None:
    """What the picture is of, and how to read its lines."""
    from matplotlib.transforms import ScaledTranslation

    def from_corner(x: float, y: float) -> Any:
        return figure.transFigure + ScaledTranslation(x, y, figure.dpi_scale_trans)

    words = ""
    has_trend = max(len(record.rows) for record in records) >= SHORTEST_TREND
    if has_trend and any(panel.is_noisy for panel in panels):
        few = len(records) <= _RAW_UP_TO_RUNS
        words = "thin: every iteration, thick: running median" if few else "running medians"
        figure.text(1, 1, words, transform=from_corner(-0.15, -0.14), ha="right", va="top", fontsize=8.5, color=_GREY)
    # A character of the words takes 0.06 inches; one of the heading 0.0095 for each point of its size.
    room = figure.get_figwidth() - 0.5 - 0.06 * len(words)
    heading = _short(_heading(records), int(room / (0.0095 * 9.0)))
    size = min(13.0, room / (0.0095 * len(heading)))
    corner = from_corner(0.15, -0.12)
    figure.text(0, 1, heading, transform=corner, va="top", fontsize=size, fontweight="bold", color=_INK)


def _heading(records: Sequence[RunRecord]) -> str:
    tasks = sorted({record.task for record in records})
    what = ", ".join(tasks) if len(tasks) <= 3 else f"{len(tasks)} tasks"
    return f"{what}: {records[0].name if len(records) == 1 else f'{len(records)} runs'}"


def _short(name: str, longest: int = _LONGEST_NAME) -> str:
    """Cut a long name in its middle: beginnings and ends are what tells names apart."""
    if len(name) <= longest:
        return name
    half = (longest - 1) // 2
    return f"{name[:half]}…{name[-half:]}"


# --- one panel ------------------------------------------------------------------------------------------------


def _draw_panel(axis: Axes, panel: Panel, records: Sequence[RunRecord]) -> None:
    curves = [
        (record_index, line_index, *record.steps, record.column(line.metric))
        for record_index, record in enumerate(records)
        for line_index, line in enumerate(panel.lines)
    ]
    values = np.concatenate([y for *_, y in curves])
    x_label = curves[0][3]
    last_x = max((float(np.nanmax(x)) for _, _, x, _, _ in curves if np.isfinite(x).any()), default=1.0)
    _dress(axis, panel, x_label, last_x)
    if not np.isfinite(values).any():
        _say_empty(axis, panel)
        return
    for record_index, line_index, x, _, y in curves:
        stroke = _stroke(panel, line_index, record_index, len(records))
        _draw_line(axis, x, y, stroke, panel, with_raw=len(records) <= _RAW_UP_TO_RUNS)
    if panel.level is not None:
        axis.axhline(panel.level, color=_GREY, linewidth=0.8, zorder=1)
    references = _draw_references(axis, panel, records)
    has_note = _set_y_axis(axis, panel, values, references)
    if len(panel.lines) > 1 or references:
        _line_legend(axis, panel, records, references, "center right" if has_note else "best")


def _stroke(panel: Panel, line_index: int, record_index: int, n_records: int) -> Stroke:
    """Colours are lines where there is one run, and runs where there are several."""
    if n_records == 1:
        return Stroke(COLOURS[line_index % len(COLOURS)], "-", panel.lines[line_index].label)
    dash = line_index if len(panel.lines) > 1 else record_index // len(COLOURS)
    return Stroke(COLOURS[record_index % len(COLOURS)], DASHES[dash % len(DASHES)], panel.lines[line_index].label)


def _draw_line(axis: Axes, x: np.ndarray, y: np.ndarray, stroke: Stroke, panel: Panel, *, with_raw: bool) -> None:
    smooth = trend(x, y) if panel.is_noisy else None
    raw = thinned(x, y)
    if smooth is None:
        axis.plot(raw.x, raw.y, color=stroke.colour, linestyle=stroke.dash, linewidth=1.7, zorder=3)
    else:
        if with_raw:
            axis.plot(raw.x, raw.y, color=stroke.colour, linewidth=0.7, alpha=0.35, zorder=2)
        axis.plot(smooth.x, smooth.y, color=stroke.colour, linestyle=stroke.dash, linewidth=1.9, zorder=3)
    alone = lonely(raw.y)
    if alone.any():
        axis.plot(raw.x[alone], raw.y[alone], "o", color=stroke.colour, markersize=4, zorder=3)


def _draw_references(axis: Axes, panel: Panel, records: Sequence[RunRecord]) -> list[float]:
    """Dashed lines at the values that the runs have for the panel's reference setting."""
    if panel.reference is None:
        return []
    values = {record.settings.get(panel.reference) for record in records}
    found = sorted(float(value) for value in values if isinstance(value, (int, float)))
    for value in found:
        axis.axhline(value, color=_INK, linewidth=1.0, linestyle=(0, (2, 2)), zorder=4)
    return found


def _say_empty(axis: Axes, panel: Panel) -> None:
    of_episodes = all(line.metric in ("return_mean", "length_mean") for line in panel.lines)
    words = "no episode has finished yet" if of_episodes else "nothing measured yet"
    axis.text(0.5, 0.5, words, transform=axis.transAxes, ha="center", va="center", color=_GREY, fontsize=11)
    axis.set_yticks([])


# --- axes, limits, labels -------------------------------------------------------------------------------------


def _dress(axis: Axes, panel: Panel, x_label: str, last_x: float) -> None:
    """Everything on a panel that does not depend on its values."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    # A fixed y spares matplotlib the search for one, a quarter of the time of a picture.
    axis.set_title(panel.title, loc="left", y=1.0, fontsize=11.5, fontweight="bold", color=_INK, pad=19)
    axis.annotate(
        panel.hint,
        (0, 1),
        xytext=(0, 6),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=8.5,
        color=_GREY,
    )
    in_millions = last_x >= _MILLIONS_FROM
    axis.set_xlabel(f"{x_label} (millions)" if in_millions else x_label, fontsize=9.5, color=_INK)
    axis.set_ylabel(panel.y_label, fontsize=9.5, color=_INK)
    axis.set_xlim(0, last_x * 1.02 or 1.0)
    axis.xaxis.set_major_locator(MaxNLocator(5, steps=_TICK_STEPS, integer=not in_millions))
    axis.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value / 1e6:,g}" if in_millions else f"{value:,.0f}")
    )
    axis.tick_params(labelsize=9, colors=_INK, length=3, width=0.7)
    axis.grid(visible=True, linewidth=0.5, color="#dddddd")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set(linewidth=0.7, color=_GREY)


def _set_y_axis(axis: Axes, panel: Panel, values: np.ndarray, references: Sequence[float]) -> bool:
    """Choose scale, limits and numbers; whether a note tells of values outside of the limits."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    finite = values[np.isfinite(values)]
    if panel.may_be_log and (finite > 0).all() and finite.max() / finite.min() >= _LOG_FROM_RATIO:
        axis.set_yscale("log")
        axis.set_ylabel(f"{panel.y_label}, log scale", fontsize=9.5, color=_INK)
        return False
    has_note = False
    shown = np.concatenate([finite, np.asarray(references)])
    if panel.is_noisy:
        limits = readable_limits(shown, floor=panel.floor, ceiling=panel.ceiling)
        axis.set_ylim(limits.low, limits.high)
        has_note = _note_outside(axis, limits)
    elif finite.min() == finite.max():
        only = float(finite[0])
        axis.set_ylim(only - (0.1 * abs(only) or 1.0), only + (0.1 * abs(only) or 1.0))
    if panel.from_zero and finite.min() >= 0:
        axis.set_ylim(bottom=0)
    axis.yaxis.set_major_locator(MaxNLocator(6, steps=_TICK_STEPS))
    axis.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{100 * value:.3g}%" if panel.in_percent else _tick(value))
    )
    return has_note


def _note_outside(axis: Axes, limits: Limits) -> bool:
    """Say which values the limits leave out, if any: nothing is hidden in silence."""
    if limits.furthest is None:
        return False
    at_top = limits.furthest > limits.high
    values = "value" if limits.n_outside == 1 else "values"
    words = f"{limits.n_outside:,} {values} outside, {'up' if at_top else 'down'} to {_tick(limits.furthest, digits=3)}"
    axis.annotate(
        f"{'▲' if at_top else '▼'} {words}",
        (1, 1 if at_top else 0),
        xytext=(-2, -3 if at_top else 3),
        xycoords="axes fraction",
        textcoords="offset points",
        ha="right",
        va="top" if at_top else "bottom",
        fontsize=8,
        color=_GREY,
        zorder=5,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.0},
    )
    return True


def _tick(value: float, *, digits: int = 5) -> str:
    if abs(value) >= 1e6:
        text = f"{value / 1e6:,.{digits}g}M" if abs(value) < 1e12 else f"{value:.{digits}g}"
    else:
        text = f"{value:,.{digits}g}" if abs(value) < 10**digits else f"{value:,.0f}"
    return text.replace("-", "−") if "e" not in text else text


def _line_legend(
    axis: Axes, panel: Panel, records: Sequence[RunRecord], references: Sequence[float], place: Place
) -> None:
    from matplotlib.lines import Line2D

    handles = []
    if len(panel.lines) > 1:
        for index in range(len(panel.lines)):
            stroke = _stroke(panel, index, 0, len(records))
            colour = stroke.colour if len(records) == 1 else _INK
            handles.append(Line2D([], [], color=colour, linestyle=stroke.dash, linewidth=1.8, label=stroke.label))
    if references:
        label = f"{panel.reference} {', '.join(f'{value:g}' for value in references)}"
        handles.append(Line2D([], [], color=_INK, linewidth=1.0, linestyle=(0, (2, 2)), label=label))
    axis.legend(handles=handles, fontsize=8.5, loc=place, frameon=True, framealpha=0.85, edgecolor="none")


def _names_per_line(names: Sequence[str], inches: float) -> int:
    # A character of the legend is about a fourteenth of an inch wide; its line and the spaces take 0.75.
    widest = max((len(name) for name in names), default=0)
    return max(1, min(len(names), int((inches - 0.3) / (widest / 14 + 0.75))))


def _run_legend(figure: Figure, names: Sequence[str], names_per_line: int) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [],
            [],
            color=COLOURS[index % len(COLOURS)],
            linewidth=2.2,
            linestyle=DASHES[index // len(COLOURS) % len(DASHES)],
            label=name,
        )
        for index, name in enumerate(names)
    ]
    figure.legend(handles=handles, loc="lower left", ncols=names_per_line, fontsize=9, frameon=False, borderaxespad=0.6)
