"""Ratings from results: known odds, and what must be refused."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from proximo.core.ratings import ELO, bradley_terry


def test_two_players_by_hand():
    """75 of 100 are odds of 3 to 1: 400 log10(3) points; the information is 100 * 3/4 * 1/4."""
    ratings, errors = bradley_terry(np.array([[0.0, 25.0], [75.0, 0.0]]), virtual_draws=0.0)
    assert ratings.tolist() == pytest.approx([0.0, 400 * np.log10(3)])
    assert errors.tolist() == pytest.approx([0.0, ELO / np.sqrt(100 * 3 / 16)])


def test_results_as_expected_give_back_the_ratings():
    true = np.array([0.0, 120.0, -60.0, 400.0])
    chances = 1 / (1 + 10 ** ((true[None, :] - true[:, None]) / 400))
    points = 50 * chances * (1 - np.eye(4))
    assert bradley_terry(points, virtual_draws=0.0)[0].tolist() == pytest.approx(true.tolist(), abs=1e-6)


def test_it_is_the_maximum_of_the_likelihood():
    rng = np.random.default_rng(0)
    points = rng.integers(0, 20, (5, 5)) * (1.0 - np.eye(5))

    def loss(free: np.ndarray) -> float:
        r = np.concatenate([[0.0], free])
        with_draws = points + 0.5 * (1 - np.eye(5))
        return float((with_draws * np.log1p(np.exp(r[None, :] - r[:, None]))).sum())

    best = minimize(loss, np.zeros(4), tol=1e-12).x * ELO
    assert bradley_terry(points)[0][1:].tolist() == pytest.approx(best.tolist(), abs=1e-2)


def test_who_wins_every_game_still_has_a_rating():
    ratings, errors = bradley_terry(np.array([[0.0, 0.0], [50.0, 0.0]]))
    assert ratings[1] == pytest.approx(400 * np.log10(50.5 / 0.5))
    assert np.isfinite(errors).all()


def test_more_games_less_error():
    few = bradley_terry(np.array([[0.0, 4.0], [6.0, 0.0]]))[1][1]
    assert bradley_terry(np.array([[0.0, 400.0], [600.0, 0.0]]))[1][1] < few / 5


def test_players_who_never_met():
    with pytest.raises(ValueError, match="not connected"):
        bradley_terry(np.diag([0.0, 0.0, 0.0]))
    with pytest.raises(ValueError, match="must be"):
        bradley_terry(np.zeros((2, 3)))
