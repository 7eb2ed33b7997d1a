"""The picture of a search for settings: parallel coordinates, coloured by the score, and the best score as it went."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from proximo.report.words import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _GREY, _PALE, _RED = "#222222", "#6b6b6b", "#c9c9c9", "#D55E00"
_COLOURS = "viridis"
_DOTS_PER_INCH = 120
# Inches: between two axes, around all of them, and the height of the two panels.
_APART, _LEFT, _RIGHT, _TOP, _BOTTOM = 1.0, 0.75, 0.6, 1.35, 0.65
_HIGH, _GAP, _HISTORY_HIGH = 4.0, 0.75, 2.3
_FEWEST_INCHES = 9.0
_LOWEST_SHARE = 0.1
"""Of the finished trials, the worst tenth has one colour: they may be worse without limit."""


class Coordinate(NamedTuple):
    """One setting's axis: its name, and what is written at which height (0 to 1)."""

    name: str
    ticks: list[tuple[float, str]]


class Outcome(NamedTuple):
    """One trial: its number and end (`finished`, `pruned` or `failed`), its score, and its height on each axis."""

    number: int
    state: str
    score: float | None
    heights: tuple[float, ...]


def tuning_figure(coordinates: Sequence[Coordinate], outcomes: Sequence[Outcome], title: str) -> Figure:
    """Draw all trials; at least one of them must be finished."""
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    scores = np.array([outcome.score for outcome in outcomes if outcome.score is not None])
    lowest = float(np.quantile(scores, _LOWEST_SHARE))
    highest = float(scores.max())
    norm = Normalize(lowest, highest if highest > lowest else lowest + 1.0, clip=True)
    inches_wide = max(_FEWEST_INCHES, _LEFT + len(coordinates) * _APART + _RIGHT)
    inches_high = _TOP + _HIGH + _GAP + _HISTORY_HIGH + _BOTTOM
    figure = Figure(figsize=(inches_wide, inches_high), dpi=_DOTS_PER_INCH, facecolor="white")
    share_wide = 1 - (_LEFT + _RIGHT) / inches_wide
    left = _LEFT / inches_wide
    upper = figure.add_axes((left, (_BOTTOM + _HISTORY_HIGH + _GAP) / inches_high, share_wide, _HIGH / inches_high))
    lower = figure.add_axes((left, _BOTTOM / inches_high, share_wide, _HISTORY_HIGH / inches_high))
    _draw_coordinates(upper, coordinates, outcomes, norm)
    _draw_history(lower, outcomes, norm)
    edge = 0.25 / inches_wide
    figure.text(edge, 1 - 0.32 / inches_high, title, fontsize=13, fontweight="bold", color=_INK)
    figure.text(edge, 1 - 0.56 / inches_high, _how_to_read(outcomes), fontsize=9, color=_GREY)
    return figure


def _how_to_read(outcomes: Sequence[Outcome]) -> str:
    words = "Each line is a trial: yellow is the highest score, dark blue the lowest tenth; the best in front, thick."
    if any(outcome.state != "finished" for outcome in outcomes):
        words += " Pale: given up or failed."
    return words


def _draw_coordinates(axis: Axes, coordinates: Sequence[Coordinate], outcomes: Sequence[Outcome], norm: Any) -> None:
    """An upright axis per setting, one more for the score, and a line through all of them per finished trial."""
    from matplotlib import colormaps

    colours = colormaps[_COLOURS]
    last = len(coordinates)
    scores = [outcome.score for outcome in outcomes if outcome.score is not None]
    low, high = min(scores), max(scores)
    finished = [outcome for outcome in outcomes if outcome.score is not None]
    for outcome in outcomes:
        if outcome.score is None:
            axis.plot(range(last), outcome.heights, color=_PALE, linewidth=0.8, zorder=1)
    ranked = sorted(finished, key=lambda outcome: (outcome.score or 0.0, -outcome.number))
    for rank, outcome in enumerate(ranked):
        assert outcome.score is not None
        height = (outcome.score - low) / (high - low) if high > low else 0.5
        y, x = [*outcome.heights, height], range(last + 1)
        is_best = rank == len(ranked) - 1
        if is_best:  # an edge, to be seen on every colour
            axis.plot(x, y, color=_INK, linewidth=4.6, zorder=3 + rank, solid_joinstyle="round")
        colour = colours(norm(outcome.score))
        axis.plot(
            x,
            y,
            color=colour,
            linewidth=2.8 if is_best else 1.5,
            alpha=0.95,
            zorder=3 + rank,
            label=str(outcome.number),
        )
    _dress_coordinates(axis, coordinates, low, high, front=4 + len(ranked))


def _dress_coordinates(axis: Axes, coordinates: Sequence[Coordinate], low: float, high: float, *, front: int) -> None:
    ticks = [(share, number(low + share * (high - low))) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    score = Coordinate("score", ticks if high > low else [(0.5, number(low))])
    for x, coordinate in enumerate([*coordinates, score]):
        axis.plot([x, x], [0, 1], color=_INK, linewidth=1.1, zorder=front)
        name = coordinate.name.replace("_", "\n")
        weight = "bold" if coordinate is score else "normal"
        axis.annotate(
            name,
            (x, 1.0),
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=9.5,
            fontweight=weight,
            color=_INK,
            annotation_clip=False,
        )
        for height, label in coordinate.ticks:
            axis.plot([x - 0.03, x + 0.03], [height, height], color=_INK, linewidth=1.1, zorder=front)
            axis.annotate(
                label,
                (x, height),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=_INK,
                zorder=front + 1,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.6},
                annotation_clip=False,
            )
    axis.set_xlim(-0.15, len(coordinates) + 0.15)
    axis.set_ylim(-0.03, 1.03)
    axis.set_axis_off()


def _draw_history(axis: Axes, outcomes: Sequence[Outcome], norm: Any) -> None:
    """The score of each trial, and the best one so far."""
    from matplotlib.ticker import MaxNLocator

    finished = [outcome for outcome in outcomes if outcome.score is not None]
    numbers = np.array([outcome.number for outcome in finished])
    scores = np.array([outcome.score for outcome in finished])
    last = max(outcome.number for outcome in outcomes)
    best = np.maximum.accumulate(scores)
    axis.step(
        np.append(numbers, last + 0.5),
        np.append(best, best[-1]),
        where="post",
        color=_INK,
        linewidth=1.4,
        label="best so far",
    )
    axis.scatter(
        numbers,
        scores,
        c=scores,
        cmap=_COLOURS,
        norm=norm,
        s=34,
        edgecolor=_INK,
        linewidth=0.5,
        zorder=3,
        label="score",
    )
    low, high = float(scores.min()), float(scores.max())
    room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    axis.set_ylim(low - 1.6 * room, high + room)
    for state, marker, colour, words in (("pruned", "v", _GREY, "given up"), ("failed", "x", _RED, "failed")):
        places = [outcome.number for outcome in outcomes if outcome.state == state]
        if places:
            axis.scatter(places, [low - 0.9 * room] * len(places), marker=marker, color=colour, s=26, label=words)
    axis.set_xlim(-0.5, last + 0.5)
    axis.set_xlabel("trial", fontsize=9.5, color=_INK)
    axis.set_ylabel("score", fontsize=9.5, color=_INK)
    axis.set_title("Score of each trial", loc="left", fontsize=11.5, fontweight="bold", color=_INK)
    axis.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    axis.tick_params(labelsize=9, colors=_INK, length=3, width=0.7)
    axis.grid(visible=True, linewidth=0.5, color="#dddddd")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set(linewidth=0.7, color=_GREY)
    axis.legend(
        fontsize=8.5, loc="lower right", frameon=True, framealpha=0.85, edgecolor="none", ncols=4, bbox_to_anchor=(1, 1)
    )
