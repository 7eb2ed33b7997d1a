"""Self-play: the ordinary control loop, in environments whose opponents are snapshots of the learner's own past.

Heinrich, Lanctot and Silver 2015 (fictitious self-play), Bansal et al. 2018 (opponents sampled from the past). All
that is new lives with the environments (`collect/games.py`), whose snapshot holds the pool.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import numpy as np
import torch

from proximo.collect.envs import EVALUATION_STREAM, VectorEnvs
from proximo.collect.games import Games, Player, SelfPlayEnvs, at_random, play_match, sampling, snapshots_of
from proximo.collect.make import EnvFactory
from proximo.collect.several import make_several
from proximo.core.ratings import bradley_terry
from proximo.errors import UserError, in_range
from proximo.models.control import ActorCritic
from proximo.runs.checkpoint import Checkpoint
from proximo.training import control
from proximo.training.agents_config import SelfPlayConfig

MOST_RATED = 8
"""Snapshots that are rated, evenly over the run; every pair of them meets."""

GAMES_AT_ONCE = 50


def make_games(config: SelfPlayConfig, factory: EnvFactory, n_games: int) -> Games:
    """So many games as the config has them.

    Raises:
        UserError: if they cannot be made, or are not for two players of equal spaces.
    """
    task = config.environment
    make = partial(make_several, factory, task.env_id, task.env_kwargs, "turns")
    return Games(make, n_games, name=task.env_id, action_mask=task.action_mask)


def make_self_play(config: SelfPlayConfig, factory: EnvFactory) -> SelfPlayEnvs:
    """The environments of a run; their pool begins with the weights that the learner begins with."""
    games = make_games(config, factory, config.environment.n_envs)
    return SelfPlayEnvs(
        games,
        config.seed,
        control.first_policy(config, games.observation_space, games.action_space),
        snapshot_every=config.snapshot_every * config.rollout_length,
        latest_share=config.latest_share,
        pool_size=config.pool_size,
    )


def start(config: SelfPlayConfig, envs: SelfPlayEnvs) -> control.ControlState:
    """The state before the first step.

    Raises:
        UserError: if a space is of a kind that is not supported, or a game cannot be begun.
    """
    state = control.start(config, cast(VectorEnvs, envs))
    envs.learner = state.policy
    return state


def restore(
    config: SelfPlayConfig, checkpoint: Checkpoint, envs: SelfPlayEnvs
) -> tuple[control.ControlState, list[int]]:
    """The state of a checkpoint, and the environments that had to begin another game (none: exact).

    Raises:
        UserError: if it does not fit this run.
    """
    state, fresh = control.restore(config, checkpoint, cast(VectorEnvs, envs))
    envs.learner = state.policy
    return state, fresh


iterate, save, finished = control.iterate, control.save, control.finished


def pool_of(checkpoint: Checkpoint, n_envs: int) -> dict[int, ActorCritic]:
    """The snapshots in the pool of a checkpoint, oldest first, by the environment steps that had been done.

    Raises:
        UserError: if there is none in it.
    """
    like = control.load_policy(checkpoint)
    prefix = "environments/"
    try:
        arrays = {
            name.removeprefix(prefix): tensor.numpy()
            for name, tensor in checkpoint.tensors["training"].items()
            if name.startswith(prefix)
        }
        snapshots = snapshots_of({name: array for name, array in arrays.items() if "/" in name}, like)
        return {number * n_envs: snapshots[number] for number in arrays["pool"].tolist()}
    except (KeyError, RuntimeError, ValueError, AttributeError) as error:
        raise UserError(f"{checkpoint.path} does not hold a pool of opponents ({error}).") from error


def rate(
    config: SelfPlayConfig, checkpoint: Checkpoint, factory: EnvFactory, *, n_games: int, seed: int
) -> dict[str, Any]:
    """Let past selves, the latest policy and a player that moves at random play each other; fit ratings to the results.

    Every pair plays `n_games`, in turn from either seat; policies sample their moves.

    Returns:
        `players`: for each its `name`, `step`, `rating` and `standard_error` (Elo; the random player has 0), and
        `score` against the random player; `results` `[P, P]`, the points of the row against the column (half of one
        for a draw); and of the latest policy against the random player `score_mean`, `score_standard_error`, `wins`,
        `draws`, `losses`.

    Raises:
        UserError: if `n_games` is below 2, or the game fails.
    """
    in_range("seed", seed, whole=True, at_least=0, usual="0")
    in_range("episodes", n_games, at_least=2, whole=True, usual="100")
    pool = pool_of(checkpoint, config.environment.n_envs)
    games = make_games(config, factory, min(GAMES_AT_ONCE, n_games))
    latest = control.load_policy(checkpoint)
    if (games.observation_space, games.action_space) != (latest.observation_space, latest.action_space):
        raise UserError(f"{config.environment.env_id} has other spaces than the policy was trained with.")
    steps = [step for step in pool if step < checkpoint.step]
    picked = sorted({steps[int(place)] for place in np.linspace(0, len(steps) - 1, MOST_RATED)}) if steps else []
    generator = torch.Generator().manual_seed(EVALUATION_STREAM + seed)
    players: list[Player] = [at_random(games.observation_space, games.action_space, seed)]
    players += [sampling(policy, generator) for policy in (*(pool[step] for step in picked), latest)]
    try:
        wins, draws = _tournament(games, players, n_games, seed)
    finally:
        games.close()
    points = wins + draws / 2
    ratings, errors = bradley_terry(points)
    names = ["random", *(f"step {step:,}" for step in picked), f"step {checkpoint.step:,} (latest)"]
    own = [{"step": None}, *({"step": step} for step in (*picked, checkpoint.step))]
    won, drawn = int(wins[-1, 0]), int(draws[-1, 0])
    score = float(points[-1, 0]) / n_games
    variance = (won + drawn / 4) / n_games - score**2
    return {
        "games_per_pair": n_games,
        "players": [
            about | {"name": name, "rating": rating, "standard_error": error, "score": float(point) / n_games}
            for about, name, rating, error, point in zip(
                own, names, ratings.tolist(), errors.tolist(), points[:, 0], strict=True
            )
        ],
        "results": points.tolist(),
        "score_mean": score,
        "score_standard_error": float(np.sqrt(max(variance, 0.0) / n_games)),
        "wins": won,
        "draws": drawn,
        "losses": n_games - won - drawn,
    }


class FilmedGame:
    """One game as `report.video` films it: the policy plays both seats."""

    def __init__(self, config: SelfPlayConfig, factory: EnvFactory, policy: ActorCritic) -> None:
        """Make a game that draws itself."""
        task = config.environment
        kwargs = task.env_kwargs | {"render_mode": "rgb_array"}
        self._env = make_several(factory, task.env_id, kwargs, "turns")
        self._games = Games(lambda: self._env, 1, name=task.env_id, action_mask=task.action_mask)
        if (self._games.observation_space, self._games.action_space) != (
            policy.observation_space,
            policy.action_space,
        ):
            raise UserError(f"{task.env_id} has other spaces than the policy was trained with: it is another game.")
        self.metadata = getattr(self._env, "metadata", {})
        self.render_mode = getattr(self._env, "render_mode", None)

    def reset(self, *, seed: int) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin a game."""
        self._games.begin(0, seed)
        return self._games.turn(0).row, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Let whoever's turn it is move."""
        self._games.move(0, action)
        turn = self._games.turn(0)
        return turn.row, 0.0, turn.terminated, turn.truncated, {}

    def render(self) -> Any:
        """What the game draws."""
        return self._env.render()

    def close(self) -> None:
        """Free everything."""
        self._games.close()


def _tournament(games: Games, players: list[Player], n_games: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Every pair plays; wins of the row over the column `[P, P]`, and draws of the two."""
    wins, draws = np.zeros((len(players), len(players))), np.zeros((len(players), len(players)))
    for first in range(len(players)):
        for second in range(first + 1, len(players)):
            match_seed = EVALUATION_STREAM + seed + first * len(players) + second
            won, drawn, lost = play_match(games, (players[first], players[second]), n_games, match_seed)
            wins[first, second], wins[second, first] = won, lost
            draws[first, second] = draws[second, first] = drawn
    return wins, draws
