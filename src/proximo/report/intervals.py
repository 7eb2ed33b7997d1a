"""Interquartile means and their bootstrap intervals, as Agarwal et al. 2021 (arXiv 2108.13264) recommend them.

The estimators are those of `rliable` 1.2.0, which cannot be imported beside pandas 3 (it needs arch < 8): the mean
without the lowest and the highest quarter, and percentiles over resamples that draw the runs of each task anew.
"""

from __future__ import annotations

import numpy as np

N_RESAMPLES = 20_000
FEWEST_SEEDS = 5
"""An interval needs as many: of fewer normal draws, percentiles of resamples cover far less than they promise."""
MOST_DRAWN = 4_000_000
"""Numbers that a band has in memory at a time."""


def interquartile_mean(scores: np.ndarray) -> np.ndarray:
    """Mean over the last axis without its lowest and highest quarter, each rounded down to whole values."""
    n = scores.shape[-1]
    cut = n // 4
    return np.sort(scores, axis=-1)[..., cut : n - cut].mean(axis=-1)


def bootstrap_interval(
    scores: np.ndarray, *, confidence: float = 0.95, n_resamples: int = N_RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """The percentile interval of the interquartile mean over all scores.

    Args:
        scores: one per run, `[runs]`, or `[runs, tasks]`, where each task's runs are drawn independently.
        confidence: share of the resamples within the interval.
        n_resamples: how often the runs are drawn anew.
        seed: of the draws.
    """
    table = scores.reshape(len(scores), -1)
    n_runs, n_tasks = table.shape
    drawn = np.random.default_rng(seed).integers(n_runs, size=(n_resamples, n_runs, n_tasks))
    means = interquartile_mean(table[drawn, np.arange(n_tasks)].reshape(n_resamples, -1))
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def bootstrap_band(
    curves: np.ndarray, *, confidence: float = 0.95, n_resamples: int = 300, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """`bootstrap_interval` at every point of curves `[runs, points]`, with the same draws of runs at all of them.

    Returns:
        Low and high ends, `[points]` each.
    """
    n_runs, n_points = curves.shape
    drawn = np.random.default_rng(seed).integers(n_runs, size=(n_resamples, n_runs))
    size = max(1, MOST_DRAWN // drawn.size)
    shares = [(1 - confidence) / 2, (1 + confidence) / 2]
    ends = np.empty((2, n_points))
    for first in range(0, n_points, size):
        means = interquartile_mean(curves.T[first : first + size, drawn])
        ends[:, first : first + size] = np.quantile(means, shares, axis=1)
    return ends[0], ends[1]
