"""Games of two: whose turn it is, what a step of the learner's is worth, and the way back."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

pettingzoo = pytest.importorskip("pettingzoo")
from pettingzoo.test import api_test  # noqa: E402

from examples.connect_four import ConnectFour, is_won  # noqa: E402
from examples.weighted_rps import WeightedRPS  # noqa: E402
from proximo.collect.games import Games, SelfPlayEnvs, at_random, play_match  # noqa: E402
from proximo.errors import UserError  # noqa: E402
from proximo.models.control import ActorCritic, NetworkConfig  # noqa: E402


class Race(pettingzoo.AECEnv):
    """Both add 1 or 2 to a number; whoever brings it to 5 gets 3 and the other -3. A move of 2 costs a tenth.

    What is seen: the number, and the seat.
    """

    metadata = {"name": "race"}  # noqa: RUF012
    wins_at = 5

    def __init__(self, render_mode: str | None = None) -> None:
        self.possible_agents = ["p", "q"]

    @cache  # noqa: B019
    def observation_space(self, agent):
        return spaces.Box(0.0, 100.0, (2,), np.float32)

    @cache  # noqa: B019
    def action_space(self, agent):
        return spaces.Discrete(2)

    def reset(self, seed=None, options=None):
        self.agents, self.agent_selection, self.number = ["p", "q"], "p", 0
        self.rewards, self._cumulative_rewards = dict.fromkeys("pq", 0.0), dict.fromkeys("pq", 0.0)
        self.terminations, self.truncations = dict.fromkeys("pq", False), dict.fromkeys("pq", False)
        self.infos: dict[str, Any] = {"p": {}, "q": {}}

    def observe(self, agent):
        return np.array([self.number, "pq".index(agent)], np.float32)

    def step(self, action):
        agent = self.agent_selection
        if self.terminations[agent]:
            self._was_dead_step(action)
            return
        other = "q" if agent == "p" else "p"
        self._cumulative_rewards[agent] = 0.0
        self.rewards = {agent: -0.1 * action, other: 0.0}
        self.number += 1 + action
        if self.number >= self.wins_at:
            self.rewards = {agent: 3.0 - 0.1 * action, other: -3.0}
            self.terminations = dict.fromkeys("pq", True)
        self._accumulate_rewards()
        self.agent_selection = other


def adds_one(games: Games) -> ActorCritic:
    """A policy that always adds 1."""
    policy = ActorCritic(games.observation_space, games.action_space, NetworkConfig(hidden_sizes=(4,)))
    with torch.no_grad():
        policy.actor[-1].weight.zero_()
        policy.actor[-1].bias.copy_(torch.tensor([50.0, -50.0]))
    return policy


def self_play(n: int = 1, env: Any = Race, **settings: Any) -> SelfPlayEnvs:
    games = Games(env, n, name="race")
    return SelfPlayEnvs(games, 0, adds_one(games), **dict(snapshot_every=3, latest_share=0.5, pool_size=4) | settings)


@pytest.mark.parametrize("env", [Race, ConnectFour, WeightedRPS])
def test_these_games_are_as_pettingzoo_has_them(env, capsys):
    api_test(env(), num_cycles=50)


class TestSelfPlay:
    def test_a_step_is_a_move_and_the_answer_to_it(self):
        envs = self_play()
        assert envs.reset().tolist() == [[0, 0]]
        step = envs.step(np.array([1]))  # 0 + 2, and the opponent's 1
        assert step.final_observations.tolist() == [[3, 0]]
        assert step.rewards.tolist() == pytest.approx([-0.1])
        assert not step.terminated[0]

    def test_winning_is_the_learners_own_end(self):
        envs = self_play()
        envs.reset()
        envs.step(np.array([1]))
        step = envs.step(np.array([1]))
        assert (step.rewards.tolist(), step.terminated.tolist()) == ([2.9], [True])
        assert step.final_observations.tolist() == [[5, 0]]

    def test_a_game_that_the_opponent_wins_ends_at_the_learners_last_move(self):
        envs = self_play()
        envs.reset()
        envs.step(np.array([1]))  # 3
        step = envs.step(np.array([0]))  # 4, and 5 is the opponent's
        assert (step.rewards.tolist(), step.terminated.tolist()) == ([-3.0], [True])
        assert step.valid.all()

    def test_seats_alternate_and_the_opponent_begins_every_other_game(self):
        envs = self_play(2)
        assert envs.reset().tolist() == [[0, 0], [1, 1]]
        for _ in range(2):
            step = envs.step(np.array([1, 1]))  # 0 2 3 5 in the first, 1 3 4 6 in the second
        assert step.terminated.tolist() == [True, True]
        assert step.observations.tolist() == [[1, 1], [0, 0]]

    def test_the_pool_grows_with_the_learner_and_is_thinned_out_when_it_is_full(self):
        envs = self_play(pool_size=3)
        learner = adds_one(Games(Race, 1, name="race"))
        envs.learner = learner
        envs.reset()
        pools = []
        for step in range(20):
            with torch.no_grad():
                learner.critic[-1].bias.fill_(float(step))
            envs.step(np.array([0]))
            pools.append(list(envs.pool))
        # Every 3 steps; at 9 it is full: every other one goes, and they come every 6; full again at 12, every 12.
        assert (pools[3], pools[6], pools[9]) == ([0, 3], [0, 3, 6], [0, 6, 9])
        assert (pools[11], pools[12], pools[18]) == ([0, 6, 9], [0, 9, 12], [0, 9, 12])
        taken = {number: float(policy.critic[-1].bias) for number, policy in envs.snapshots.items() if number}
        assert all(value == number for number, value in taken.items())

    def test_a_share_of_the_games_is_against_the_newest(self):
        for share, expected in ((0.0, 1 / 3), (0.5, 2 / 3), (1.0, 1.0)):
            envs = self_play(300, latest_share=share)
            envs.pool = [0, 3, 6]
            envs.snapshots = dict.fromkeys(envs.pool, envs.snapshots[0])
            envs.reset()
            assert abs(float((envs._opponents == 6).mean()) - expected) < 0.09

    def test_masks_are_kept_to_by_the_opponent(self):
        games = Games(ConnectFour, 4, name="four")
        policy = ActorCritic(games.observation_space, games.action_space, NetworkConfig(hidden_sizes=(4,)))
        with torch.no_grad():  # it wants the first column, also where that is full
            policy.actor[-1].bias.copy_(torch.tensor([50.0, 0, 0, 0, 0, 0, 0]))
        envs = SelfPlayEnvs(games, 0, policy, snapshot_every=10**9, latest_share=0.5, pool_size=4)
        rows = envs.reset().copy()
        rng, over = np.random.default_rng(0), 0
        for _ in range(60):
            possible = games.observation_space.mask(rows)
            step = envs.step(np.array([rng.choice(np.flatnonzero(own)) for own in possible]))
            over += int(step.terminated.sum())
            rows = step.observations.copy()
        assert over > 5

    def test_open_games_and_the_pool_come_back(self):
        def play(envs: SelfPlayEnvs, n: int, seed: int) -> list[np.ndarray]:
            rng, found = np.random.default_rng(seed), []
            for _ in range(n):
                step = envs.step(rng.integers(0, 2, 4))
                found.append(np.concatenate([step.observations.ravel(), step.rewards, step.final_observations.ravel()]))
            return found

        class Long(Race):
            wins_at = 12

        first = self_play(4, Long)
        first.learner = adds_one(Games(Race, 1, name="race"))
        with torch.no_grad():  # so that draws matter
            first.learner.actor[-1].bias.zero_()
        first.reset()
        play(first, 10, seed=1)
        snapshot = first.snapshot()
        assert snapshot.arrays["lengths"].max() > 1
        second = self_play(4, Long)
        second.learner = first.learner
        observations, fresh = second.restore(snapshot)
        assert fresh == []
        assert observations.tobytes() == snapshot.arrays["observations"].tobytes()
        assert second.pool == first.pool
        for one, other in zip(play(first, 20, seed=2), play(second, 20, seed=2), strict=True):
            assert one.tobytes() == other.tobytes()


class TestMatches:
    def test_who_adds_two_wins_every_game_that_it_begins(self):
        games = Games(Race, 3, name="race")
        ones, twos = (lambda rows: np.zeros(len(rows), int)), (lambda rows: np.ones(len(rows), int))
        # 2 3 5 where twos begin; 1 3 4 6 where ones do: twos win all.
        assert play_match(games, (twos, ones), 8, seed=0) == (8, 0, 0)
        assert play_match(games, (ones, twos), 7, seed=0) == (0, 0, 7)
        # 1 2 3 4 5: who begins wins, and they begin in turn.
        assert play_match(games, (ones, ones), 7, seed=0) == (4, 0, 3)

    def test_random_moves_are_possible_ones_and_even(self):
        games = Games(ConnectFour, 20, name="four")
        players = [at_random(games.observation_space, games.action_space, seed) for seed in (1, 2)]
        wins, draws, losses = play_match(games, players, 200, seed=0)
        assert wins + draws + losses == 200
        assert abs(wins - losses) < 60  # four standard errors


class TestFaults:
    def test_three_players(self):
        class Three(Race):
            def __init__(self):
                self.possible_agents = ["p", "q", "r"]

        with pytest.raises(UserError, match=r"has 3 agents that take turns.*aec_to_parallel"):
            Games(Three, 1, name="race")

    def test_other_spaces(self):
        class Other(Race):
            def action_space(self, agent):
                return spaces.Discrete(2 + (agent == "q"))

        with pytest.raises(UserError, match="their spaces are not equal"):
            Games(Other, 1, name="race")

    def test_what_it_raises_is_told(self):
        class Broken(Race):
            def step(self, action):
                raise RuntimeError("the board has fallen")

        envs = self_play(1, Broken)
        envs.reset()
        with pytest.raises(UserError, match=r"race, game 0: step\(1\) raised .*the board has fallen"):
            envs.step(np.array([1]))

    def test_a_learner_that_is_never_told(self):
        class Silent(Race):
            def step(self, action):
                super().step(action)
                if self.number >= 5:
                    self.agents, self.agent_selection = [], "q"

        envs = self_play(1, Silent)
        envs.reset()
        envs.step(np.array([1]))
        with pytest.raises(UserError, match=r"race"):
            envs.step(np.array([1]))


@pytest.mark.parametrize(
    ("places", "last", "won"),
    [
        ([(0, 0), (0, 1), (0, 2), (0, 3)], (0, 1), True),
        ([(0, 6), (1, 6), (2, 6), (3, 6)], (3, 6), True),
        ([(0, 0), (1, 1), (2, 2), (3, 3)], (2, 2), True),
        ([(3, 0), (2, 1), (1, 2), (0, 3)], (0, 3), True),
        ([(0, 0), (0, 1), (0, 2), (0, 4)], (0, 2), False),
    ],
)
def test_four_in_a_line(places, last, won):
    pieces = np.zeros((6, 7))
    for place in places:
        pieces[place] = 1
    assert is_won(pieces, *last) is won
