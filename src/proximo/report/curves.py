"""Curves made fit to be drawn: thinned without losing a spike, smoothed without hiding a gap."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

MOST_POINTS = 4000
"""A picture is about 1,000 pixels wide: more points than this cost time and cannot be seen."""
TREND_WINDOWS = 40
"""The trend is a median over this fraction of the curve."""
SHORTEST_TREND = 80
"""A curve with fewer points needs no trend line: the eye follows it as it is."""
SMOOTH_SHARE = 0.03
"""A curve that nearly everywhere lies within this share of its trend's range from it is smooth as it is."""


class Curve(NamedTuple):
    """Points of a line, `x` and `y` `[n]`; NaN in `y` is a gap."""

    x: np.ndarray
    y: np.ndarray


class Limits(NamedTuple):
    """The range of an axis, how many values lie outside of it, and the one that lies furthest outside."""

    low: float
    high: float
    n_outside: int
    furthest: float | None


def thinned(x: np.ndarray, y: np.ndarray, most_points: int = MOST_POINTS) -> Curve:
    """Keep the lowest and the highest point of each of `most_points / 2` groups, so that no spike is lost."""
    if len(x) <= most_points:
        return Curve(x, y)
    size = -(-len(x) // (most_points // 2))
    groups = np.pad(y, (0, -len(y) % size), constant_values=np.nan).reshape(-1, size)
    known = np.isfinite(groups)
    # A group without a value has both at its first point, which is a gap.
    inside = [np.where(known, groups, np.inf).argmin(axis=1), np.where(known, groups, -np.inf).argmax(axis=1)]
    kept = np.unique(np.stack(inside) + size * np.arange(len(groups)))
    return Curve(x[kept], y[kept])


def trend(x: np.ndarray, y: np.ndarray) -> Curve | None:
    """Running median, which one wild value does not move, its steps smoothed away.

    None for a curve that needs none, being short or smooth itself. Where `y` has a gap, so has the trend.
    """
    if len(x) < SHORTEST_TREND:
        return None
    n_bins = min(len(x), MOST_POINTS)
    size = -(-len(x) // n_bins)
    x, y = _median_of_bins(x, size), _median_of_bins(y, size)
    window = len(x) // TREND_WINDOWS // 2 * 2 + 1
    medians = _without_warnings(np.nanmedian, _windows(y, window))
    means = _without_warnings(np.nanmean, _windows(medians, window // 2 * 2 + 1))
    means = np.where(np.isfinite(y), means, np.nan)
    known = np.isfinite(means)
    if not known.any():
        return None
    low, high, distance = *np.percentile(means[known], (5, 95)), np.percentile(np.abs(y - means)[known], 90)
    return None if distance <= SMOOTH_SHARE * (high - low) else Curve(x, means)


def readable_limits(values: np.ndarray, *, floor: float | None = None, ceiling: float | None = None) -> Limits:
    """Limits within which the bulk of the values can be told apart: wild ones are left outside, and counted.

    A value is wild if it lies further outside the middle 90 % than twice their spread; where all values
    together take less than half as much room again, none is left outside. With a `floor` or a `ceiling`,
    these alone decide.

    Raises:
        ValueError: if no value is finite.
    """
    finite = values[np.isfinite(values)]
    if len(finite) == 0:
        raise ValueError("there is no finite value")
    low, high = float(finite.min()), float(finite.max())
    bulk_low, bulk_high = (float(each) for each in np.percentile(finite, (5, 95)))
    reach = 2.0 * (bulk_high - bulk_low)
    inner = max(low, bulk_low - reach), min(high, bulk_high + reach)
    # A constant with one exception has no spread to measure by.
    if floor is not None or ceiling is not None:
        low = low if floor is None else min(max(low, floor), high)
        high = high if ceiling is None else max(min(high, ceiling), low)
    elif reach > 0 and high - low > 1.5 * (inner[1] - inner[0]):
        low, high = inner
    outside = finite[(finite < low) | (finite > high)]
    distances = np.maximum(low - outside, outside - high)
    furthest = float(outside[distances.argmax()]) if len(outside) else None
    margin = 0.04 * (high - low) or 0.05 * abs(high) or 0.05
    return Limits(low - margin, high + margin, len(outside), furthest)


def lonely(y: np.ndarray) -> np.ndarray:
    """Which points have a gap on both sides, `[n]`: no line shows them."""
    known = np.isfinite(y)
    before, after = np.roll(known, 1), np.roll(known, -1)
    if len(y):
        before[0], after[-1] = False, False
    return known & ~before & ~after


def _median_of_bins(values: np.ndarray, size: int) -> np.ndarray:
    if size == 1:
        return values
    padded = np.pad(values, (0, -len(values) % size), constant_values=np.nan)
    return _without_warnings(np.nanmedian, padded.reshape(-1, size))


def _windows(values: np.ndarray, width: int) -> np.ndarray:
    """The neighbourhood of each value, `[n, width]`, with NaN beyond both ends."""
    padded = np.pad(values, width // 2, constant_values=np.nan)
    return np.lib.stride_tricks.sliding_window_view(padded, width)


def _without_warnings(reduce: Callable[..., np.ndarray], rows: np.ndarray) -> np.ndarray:
    """Reduce each row without its NaNs; a row of nothing else is NaN, and nothing to warn about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return reduce(rows, axis=1)
