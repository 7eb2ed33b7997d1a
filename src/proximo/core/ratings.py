"""Ratings of players from the results of their games."""

from __future__ import annotations

import math

import numpy as np

ELO = 400.0 / math.log(10.0)
"""Elo points per unit of log-odds."""


def bradley_terry(points: np.ndarray, *, virtual_draws: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Ratings of P players by maximum likelihood (Bradley and Terry 1952), in Elo points; the first one's is 0.

        P(i beats j) = 1 / (1 + 10^((rating_j - rating_i) / 400))

    A draw is half a point for either. Between any two who met, `virtual_draws` draws are added: without them a player
    who won every game would have no finite rating. They draw ratings a little together, the less the more was played.

    Args:
        points: `[P, P]`, what the row got against the column.
        virtual_draws: how many draws are added for each pair.

    Returns:
        Ratings `[P]`, and their standard errors `[P]`, from the inverse of the Fisher information; draws count as half
        a win and half a loss, which makes the errors a little too large where many games are drawn.

    Raises:
        ValueError: if `points` is not square, or not all players are connected by games.
    """
    n = len(points)
    if points.shape != (n, n) or n < 2:
        raise ValueError(f"points must be [P, P] of at least 2 players, not {points.shape}")
    met = (points + points.T) > 0
    points = points + virtual_draws / 2.0 * met
    n_games = points + points.T
    ratings = np.zeros(n)
    information = np.eye(n)
    for _ in range(100):
        chances = 1.0 / (1.0 + np.exp(ratings[None, :] - ratings[:, None]))
        slope = (points - n_games * chances).sum(1)
        weights = n_games * chances * (1.0 - chances)
        information = np.diag(weights.sum(1)) - weights
        # The first one's rating is fixed: only the others are free.
        if np.linalg.matrix_rank(information[1:, 1:]) < n - 1:
            raise ValueError("some players are not connected with the others by any game")
        step = np.linalg.solve(information[1:, 1:], slope[1:])
        ratings[1:] += np.clip(step, -2.0, 2.0)
        if np.abs(step).max() < 1e-10:
            break
    errors = np.concatenate([[0.0], np.sqrt(np.diag(np.linalg.inv(information[1:, 1:])))])
    return ratings * ELO, errors * ELO
