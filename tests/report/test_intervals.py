import itertools

import numpy as np
import pytest

from proximo.report.intervals import bootstrap_interval, interquartile_mean


def test_interquartile_mean_leaves_out_a_quarter_at_both_ends() -> None:
    assert interquartile_mean(np.array([100.0, 1.0, 2.0, 3.0, -50.0])) == pytest.approx(2.0)  # 5 // 4 = 1 at each end
    assert interquartile_mean(np.array([9.0, 1.0, 2.0, 3.0, 0.0, 8.0, 7.0, 4.0])) == pytest.approx((2 + 3 + 4 + 7) / 4)
    assert interquartile_mean(np.array([4.0, 8.0])) == pytest.approx(6.0)
    np.testing.assert_allclose(interquartile_mean(np.array([[1.0, 2, 3, 4], [0, 0, 2, 9]])), [2.5, 1.0])


def test_interval_against_all_resamples() -> None:
    scores = np.array([1.0, 2.0, 4.0, 8.0])
    every = np.array([interquartile_mean(scores[list(drawn)]) for drawn in itertools.product(range(4), repeat=4)])
    low, high = bootstrap_interval(scores, confidence=0.8)
    assert np.mean(every < low - 1e-9) <= 0.1 + 0.01  # the means of resamples are few: an interval ends on one of them
    assert np.mean(every <= low + 1e-9) >= 0.1 - 0.01
    assert np.mean(every > high + 1e-9) <= 0.1 + 0.01
    assert np.mean(every >= high - 1e-9) >= 0.1 - 0.01


def test_runs_of_each_task_are_drawn_independently() -> None:
    # Drawn together, the two tasks' deviations would always cancel out and the interval would be a point.
    scores = np.array([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    low, high = bootstrap_interval(scores)
    assert low < 0.5 < high


def test_the_same_scores_have_no_spread() -> None:
    assert bootstrap_interval(np.full(5, 3.0)) == (3.0, 3.0)


def test_it_gives_what_rliable_gives() -> None:
    # rliable 1.2.0 with pandas 2 on this table, 20,000 resamples: [-0.661, 0.269] around -0.17555825.
    scores = np.random.default_rng(0).normal(size=(5, 3))
    assert interquartile_mean(scores.reshape(-1)) == pytest.approx(-0.17555825)
    assert bootstrap_interval(scores) == pytest.approx((-0.661, 0.269), abs=0.02)
