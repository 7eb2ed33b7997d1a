"""Games of two that take turns (PettingZoo's `AECEnv`): side by side (`Games`), and to learn from (`SelfPlayEnvs`).

In self-play the opponent is part of the learner's environment. A step of `SelfPlayEnvs` is the learner's move and all
that follows until it is its turn again, or the game is over: the reward is what it got in between, and a game that the
opponent's move decides is terminated at the learner's last one. So one policy learns by the ordinary loop. The
opponents are snapshots of its past; they live with the environments, and are saved and restored with them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from gymnasium import spaces

from proximo.collect.envs import EnvironmentFault, Snapshot, Step, close_quietly, episode_seed
from proximo.collect.packed_env import ActionMask
from proximo.collect.several import (
    action_of,
    agents_of,
    blank_row,
    mask_in_info,
    policy_spaces,
    row_dtype,
    row_of,
    spaces_of,
)
from proximo.errors import UserError, with_traceback
from proximo.models.control import ActorCritic
from proximo.models.packing import PackedObservations

MOST_MOVES = 100_000
"""Moves after which a game is taken to have no end."""


class Turn(NamedTuple):
    """Whose turn it is in a game, and what that player sees and has got since its last one."""

    seat: int
    row: np.ndarray
    """[*O]"""
    reward: float
    terminated: bool
    truncated: bool


class Games:
    """N games, each at its own point; a player is its seat, 0 or 1, in the order of `possible_agents`."""

    def __init__(self, make: Callable[[], Any], n_games: int, *, name: str, action_mask: ActionMask = "auto") -> None:
        """Make the games.

        Raises:
            UserError: if they are not for two, or the two do not have equal spaces.
        """
        self.name, self.n_games = name, n_games
        self._envs = [make() for _ in range(n_games)]
        if len({id(env) for env in self._envs}) < n_games:
            raise UserError(f"{name}: the factory gave the same game twice; it must make a new one each time.")
        self.agents = agents_of(self._envs[0], name)
        if len(self.agents) != 2:
            raise UserError(
                f"{name} has {len(self.agents)} agents that take turns; self-play is for games of two. If they may act "
                "at once, have it pass through pettingzoo.utils.aec_to_parallel and train that."
            )
        first, second = (spaces_of(self._envs[0], name, agent) for agent in self.agents)
        if first != second:
            raise UserError(
                f"{name}: one policy is to play both seats, but their spaces are not equal: observations {first[0]} "
                f"and {second[0]}, actions {first[1]} and {second[1]}. Let the game pad them to one shape."
            )
        if action_mask == "auto":
            action_mask = _mask_of(self._envs[0], *first)
        self.action_mask: ActionMask = action_mask
        self.observation_space, self.action_space = policy_spaces(*first, action_mask, name)

    def begin(self, index: int, seed: int) -> None:
        """Begin a game anew."""
        try:
            self._envs[index].reset(seed=seed)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise UserError(f"{self.name}, game {index}: reset() raised {with_traceback(error)}") from error

    def turn(self, index: int) -> Turn:
        """Whose turn it is, who has been told of its own end included.

        Raises:
            UserError: if the game raises, or what it shows does not fit its space.
        """
        env = self._envs[index]
        try:
            seat = self.agents.index(env.agent_selection)
            observation, reward, terminated, truncated, info = env.last()
            terminated, truncated = bool(terminated), bool(truncated)
            row = row_of(self.observation_space, observation, info, is_over=terminated or truncated)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise UserError(f"{self.name}, game {index}: last() raised {with_traceback(error)}") from error
        numbers = row if not isinstance(self.observation_space, PackedObservations) else None
        seen = self.observation_space.numbers(row) if numbers is None else numbers  # type: ignore[union-attr]
        if not (np.isfinite(seen).all() and np.isfinite(reward)):
            raise UserError(f"{self.name}, game {index}: the observation or the reward is not finite.")
        return Turn(seat, row, float(reward), terminated, truncated)

    def move(self, index: int, row: np.ndarray | None) -> None:
        """Let the player whose turn it is do this; None for one that has been told that it is over."""
        action = None if row is None else action_of(self.action_space, row)
        try:
            self._envs[index].step(action)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise UserError(f"{self.name}, game {index}: step({action}) raised {with_traceback(error)}") from error

    def is_empty(self, index: int) -> bool:
        """Whether everybody has been told that a game is over."""
        return not self._envs[index].agents

    def close(self) -> None:
        """Close each game; one that fails to is told of on standard error."""
        close_quietly(self.name, self._envs)


def _mask_of(env: Any, observations: spaces.Space, actions: spaces.Space) -> ActionMask:
    try:
        env.reset(seed=0)
        info = env.last()[4]
    except Exception:  # whoever plays it will be told
        info = None
    return mask_in_info(observations, actions, info)


class Player(Protocol):
    """Chooses actions `[N, *A]` at rows `[N, *O]`."""

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Choose, one for each row."""
        ...


def sampling(policy: ActorCritic, generator: torch.Generator) -> Player:
    """A player that samples from a policy."""
    return lambda rows: policy.choose(torch.from_numpy(rows), deterministic=False, generator=generator)


def at_random(observation_space: spaces.Box, action_space: spaces.Space, seed: int) -> Player:
    """A player that does anything that is possible, each as likely."""
    rng = np.random.default_rng(seed)
    sampler = copy.deepcopy(action_space)
    sampler.seed(seed)

    def choose(rows: np.ndarray) -> np.ndarray:
        mask = observation_space.mask(rows) if isinstance(observation_space, PackedObservations) else None
        if mask is None or not isinstance(action_space, spaces.Discrete):
            return np.stack([np.asarray(sampler.sample()) for _ in rows])
        return np.array([int(action_space.start) + rng.choice(np.flatnonzero(possible)) for possible in mask])

    return choose


def play_match(games: Games, players: Sequence[Player], n_games: int, seed: int) -> tuple[int, int, int]:
    """Let two players play `n_games`, in turn from either seat; return wins, draws and losses of the first one.

    A game is won by whoever got more reward in it.

    Raises:
        UserError: if a game raises, or does not end.
    """
    wins = draws = 0
    for first in range(0, n_games, games.n_games):
        count = min(games.n_games, n_games - first)
        got = _play_to_the_end(games, players, count, seed, first)
        wins += int((got[:, 0] > got[:, 1]).sum())
        draws += int((got[:, 0] == got[:, 1]).sum())
    return wins, draws, n_games - wins - draws


def _play_to_the_end(games: Games, players: Sequence[Player], count: int, seed: int, first: int) -> np.ndarray:
    """Play `count` games at once, the first of number `first`; what both players got in each, `[count, 2]`."""
    got = np.zeros((count, 2))
    open_games = list(range(count))
    for index in open_games:
        games.begin(index, episode_seed(seed, 0, first + index))
    for _ in range(MOST_MOVES):
        asked: list[list[tuple[int, np.ndarray]]] = [[], []]
        for index in open_games:
            while not games.is_empty(index):
                turn = games.turn(index)
                player = (turn.seat + first + index) % 2  # the first player sits in seat 0 of every other game
                got[index, player] += turn.reward
                if not (turn.terminated or turn.truncated):
                    asked[player].append((index, turn.row))
                    break
                games.move(index, None)
        for player, questions in zip(players, asked, strict=True):
            if questions:
                actions = player(np.stack([row for _, row in questions]))
                for (index, _), action in zip(questions, actions, strict=True):
                    games.move(index, action)
        open_games = [index for question in asked for index, _ in question]
        if not open_games:
            return got
    raise UserError(f"{games.name}: a game has not ended after {MOST_MOVES:,} moves.")


class SelfPlayEnvs:
    """N games of a learner against snapshots of its own past, as one vector environment: see `VectorEnvs`.

    In game e of environment i the learner sits in seat (i + e) modulo 2. Its opponent is drawn when the game begins:
    with probability `latest_share` the newest snapshot, else one of the pool, each as likely.
    """

    def __init__(
        self,
        games: Games,
        seed: int,
        first: ActorCritic,
        *,
        snapshot_every: int,
        latest_share: float,
        pool_size: int,
    ) -> None:
        """Take the games; the pool begins with `first`, and every `snapshot_every` steps `learner` is added to it."""
        self.n_envs = games.n_games
        self.observation_space, self.action_space = games.observation_space, games.action_space
        self.faults: list[EnvironmentFault] = []
        self.n_restarts = 0
        self.goes_on: np.ndarray | None = None
        self.learner: ActorCritic | None = None
        self.pool: list[int] = [0]
        """The snapshots that opponents are drawn from, by the step that they were taken at; the newest is the last."""
        self.snapshots = {0: first.eval().requires_grad_(False)}
        """The pool's, and those that somebody still plays against."""
        self._games, self._seed = games, seed
        self._every, self._latest_share, self._pool_size = snapshot_every, latest_share, pool_size
        self._n_steps = 0
        self._generator = torch.Generator().manual_seed(episode_seed(seed, 0, 0))
        n, blank = self.n_envs, blank_row(games.observation_space)
        self._observations = np.repeat(blank[None].astype(row_dtype(games.observation_space)), n, 0)
        self._final = self._observations.copy()
        self._rewards, self._valid = np.zeros(n), np.ones(n, bool)
        self._terminated, self._truncated = np.zeros(n, bool), np.zeros(n, bool)
        self._episodes, self._opponents = np.zeros(n, np.int64), np.zeros(n, np.int64)
        self._history: list[list[np.ndarray]] = [[] for _ in range(n)]

    def reset(self) -> np.ndarray:
        """Begin the first game of each environment; return observations `[N, *O]` at the learner's first turn.

        Raises:
            UserError: if a game raises.
        """
        self._episodes[:] = 0
        self._begin(list(range(self.n_envs)))
        return self._observations

    def step(self, actions: np.ndarray) -> Step:
        """Let the learner move in each game, and the opponents until it is the learner's turn again.

        Raises:
            UserError: if a game raises.
        """
        if self._n_steps and self._n_steps % self._every == 0:
            self._take_snapshot()
        self._n_steps += 1
        for index in range(self.n_envs):
            self._move(index, actions[index])
        for index, turn in self._until_the_learners_turn(list(range(self.n_envs))).items():
            self._final[index], self._rewards[index] = turn.row, turn.reward
            self._terminated[index], self._truncated[index] = turn.terminated, turn.truncated
        np.copyto(self._observations, self._final)
        over = np.flatnonzero(self._terminated | self._truncated).tolist()
        self._episodes[over] += 1
        self._begin(over)
        return Step(self._observations, self._rewards, self._terminated, self._truncated, self._final, self._valid)

    def snapshot(self) -> Snapshot:
        """The moves of the open games, who plays in them, the pool, and what the opponents' draws come from."""
        lengths = np.array([len(moves) for moves in self._history])
        arrays = {
            "observations": self._observations.copy(),
            "episodes": self._episodes.copy(),
            "opponents": self._opponents.copy(),
            "lengths": lengths,
            "pool": np.array(self.pool),
            "generator": self._generator.get_state().numpy().copy(),
        }
        if lengths.sum():
            arrays["moves"] = np.stack([move for moves in self._history for move in moves])
        for number, policy in self.snapshots.items():
            for name, tensor in policy.state_dict().items():
                arrays[f"snapshot {number}/{name}"] = tensor.numpy().copy()
        return Snapshot(arrays, {"every": self._every, "n_steps": self._n_steps})

    def restore(self, snapshot: Snapshot) -> tuple[np.ndarray, list[int]]:
        """Bring back the pool, play the open games again, and compare where they lead, bit for bit.

        Returns:
            The observations, and the environments that had to begin another game.

        Raises:
            ValueError: if it is of another number of games.
            UserError: if a game cannot be begun.
        """
        arrays = snapshot.arrays
        if arrays["lengths"].shape != (self.n_envs,):
            raise ValueError(f"it is of {len(arrays['lengths'])} games, not {self.n_envs}")
        self._every, self._n_steps = int(snapshot.values["every"]), int(snapshot.values["n_steps"])
        self.pool, self.snapshots = arrays["pool"].tolist(), snapshots_of(arrays, self.snapshots[0])
        self._episodes[:] = arrays["episodes"]
        fresh, ends = [], np.cumsum(arrays["lengths"])
        for index, (length, end) in enumerate(zip(arrays["lengths"], ends, strict=True)):
            moves = list(arrays["moves"][end - length : end]) if length else []
            self._opponents[index] = arrays["opponents"][index]
            if not self._came_back(index, moves, arrays["observations"][index]):
                self._episodes[index] += 1
                fresh.append(index)
        self._begin(fresh)
        self._generator.set_state(torch.from_numpy(arrays["generator"].copy()))
        return self._observations, fresh

    def close(self) -> None:
        """Close the games."""
        self._games.close()

    # --- inside -------------------------------------------------------------------------------------------

    def _begin(self, indices: list[int]) -> None:
        """Begin the due game of these environments, up to the learner's first turn.

        A game that is over before the learner has moved is nothing to learn from: the next one is begun.
        """
        for _ in range(MOST_MOVES):
            for index in indices:
                episode = int(self._episodes[index])
                rng = np.random.default_rng(np.random.SeedSequence([self._seed, index, episode, 1]))
                is_latest = rng.random() < self._latest_share
                self._opponents[index] = self.pool[-1] if is_latest else rng.choice(self.pool)
                self._history[index] = []
                self._games.begin(index, episode_seed(self._seed, index, episode))
            again = []
            for index, turn in self._until_the_learners_turn(indices).items():
                self._observations[index] = turn.row
                if turn.terminated or turn.truncated:
                    self._episodes[index] += 1
                    again.append(index)
            if not again:
                return
            indices = again
        raise UserError(f"{self._games.name}: game after game is over before the learner has moved.")

    def _until_the_learners_turn(self, indices: list[int]) -> dict[int, Turn]:
        """Let the opponents move, all of one snapshot at once, until the learner is to move in each game."""
        found: dict[int, Turn] = {}
        for _ in range(MOST_MOVES):
            asked: dict[int, list[tuple[int, np.ndarray]]] = {}
            for index in indices:
                turn = self._next_turn(index)
                if turn.seat == self._seat(index):
                    found[index] = turn
                else:
                    asked.setdefault(int(self._opponents[index]), []).append((index, turn.row))
            if not asked:
                return found
            indices = []
            for number in sorted(asked):
                rows = np.stack([row for _, row in asked[number]])
                actions = sampling(self.snapshots[number], self._generator)(rows)
                for (index, _), action in zip(asked[number], actions, strict=True):
                    self._move(index, action)
                    indices.append(index)
        raise UserError(f"{self._games.name}: the opponent has moved {MOST_MOVES:,} times in a row.")

    def _next_turn(self, index: int) -> Turn:
        """Whose turn it is: of an opponent only while it may move."""
        while True:
            turn = self._games.turn(index)
            if turn.seat == self._seat(index) or not (turn.terminated or turn.truncated):
                return turn
            self._games.move(index, None)
            if self._games.is_empty(index):
                raise UserError(
                    f"{self._games.name}, game {index}: it is over, and the learner was never told how it ended."
                )

    def _seat(self, index: int) -> int:
        return (index + int(self._episodes[index])) % 2

    def _move(self, index: int, action: np.ndarray) -> None:
        self._history[index].append(np.array(action))
        self._games.move(index, action)

    def _take_snapshot(self) -> None:
        """Add the learner as it is; a full pool is thinned out evenly first, so that it goes on to span the run."""
        assert self.learner is not None
        taken = copy.deepcopy(self.snapshots[self.pool[0]])
        taken.load_state_dict(self.learner.state_dict())
        if len(self.pool) >= self._pool_size:
            self.pool = self.pool[::2]
            self._every *= 2
        self.pool.append(self._n_steps)
        self.snapshots[self._n_steps] = taken
        held = {*self.pool, *self._opponents.tolist()}
        self.snapshots = {number: policy for number, policy in self.snapshots.items() if number in held}

    def _came_back(self, index: int, moves: Sequence[np.ndarray], expected: np.ndarray) -> bool:
        """Play one open game again; whether it leads to the learner's turn at the same observation."""
        self._games.begin(index, episode_seed(self._seed, index, int(self._episodes[index])))
        self._history[index] = []
        try:
            for move in moves:
                self._next_turn(index)
                self._move(index, move)
            turn = self._next_turn(index)
        except UserError:  # a game that cannot be played again is reported by the caller
            return False
        self._observations[index] = turn.row
        is_open = turn.seat == self._seat(index) and not (turn.terminated or turn.truncated)
        return is_open and self._observations[index].tobytes() == expected.tobytes()


def snapshots_of(arrays: dict[str, np.ndarray], like: ActorCritic) -> dict[int, ActorCritic]:
    """The snapshots among the arrays of `SelfPlayEnvs.snapshot`, by their numbers.

    Raises:
        RuntimeError: if they are of another network.
    """
    states: dict[int, dict[str, torch.Tensor]] = {}
    for key, array in arrays.items():
        place, slash, name = key.partition("/")
        if slash:
            states.setdefault(int(place.removeprefix("snapshot ")), {})[name] = torch.from_numpy(np.array(array))
    found = {}
    for number in sorted(states):
        found[number] = copy.deepcopy(like)
        found[number].load_state_dict(states[number])
    return found
