"""`evaluate_policy`: the episodes that were asked for, in the environment's own rewards."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

from proximo.collect.envs import EnvironmentFault, episode_seed
from proximo.errors import UserError
from proximo.models.control import ActorCritic, NetworkConfig
from proximo.training.evaluate import EVALUATION_STREAM, evaluate_policy
from tests.environments import Faulty, Noisy, Recording


class Uneven(gym.Env):
    """The seed decides how long an episode is, and each of its steps gains ten times its number."""

    def __init__(self) -> None:
        self.observation_space = spaces.Box(0.0, 100.0, (1,), np.float32)
        self.action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.length, self.t = length_of(seed), 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.array([self.t], np.float32), 10.0 * self.t, self.t == self.length, False, {}


def length_of(seed: int | None) -> int:
    assert seed is not None
    return 1 + seed % 23


def policy_for(env: gym.Env) -> ActorCritic:
    config = NetworkConfig(hidden_sizes=(8,), log_std_init=-1.0)
    return ActorCritic(env.observation_space, env.action_space, config, torch.Generator().manual_seed(0))


class TestEpisodes:
    @pytest.mark.parametrize("n_episodes", [1, 3, 10, 11, 25, 100])
    def test_short_ones_are_not_favoured(self, n_episodes):
        """Fixed by their seeds beforehand: environment after environment, round after round."""
        scores = evaluate_policy(policy_for(Uneven()), Uneven, n_episodes=n_episodes, seed=4)
        n_envs = min(10, n_episodes)
        seeds = [episode_seed(EVALUATION_STREAM + 4, k % n_envs, k // n_envs) for k in range(n_episodes)]
        lengths = [length_of(seed) for seed in seeds]
        assert scores.lengths == lengths
        assert scores.returns == [sum(10.0 * t for t in range(1, length + 1)) for length in lengths]

    def test_none_is_played_twice(self):
        made: list[Recording] = []
        evaluate_policy(policy_for(Recording()), lambda: Recording(length=3, log=made), n_episodes=50, seed=0)
        seeds = [seed for env in made for seed in env.seeds]
        assert len(set(seeds)) == len(seeds) >= 50

    def test_the_seed_decides(self):
        one, two, other = (evaluate_policy(policy_for(Noisy()), Noisy, n_episodes=5, seed=seed) for seed in (1, 1, 2))
        assert one == two
        assert one != other

    def test_none_at_all_is_refused(self):
        with pytest.raises(UserError, match="episodes is 0"):
            evaluate_policy(policy_for(Noisy()), Noisy, n_episodes=0, seed=0)


class TestActions:
    def test_deterministic_ones_are_the_most_likely(self):
        made: list[Recording] = []
        space = spaces.Box(-3.0, 3.0, (2,), np.float32)
        policy = policy_for(Recording(space))
        evaluate_policy(policy, lambda: Recording(space, log=made), n_episodes=1, seed=0)
        # Small first weights: every action is close to the middle.
        assert np.abs(made[0].actions).max() < 0.1

    def test_sampled_ones_are_sampled_and_repeatable(self):
        made: list[Recording] = []
        space = spaces.Box(-3.0, 3.0, (2,), np.float32)
        policy = policy_for(Recording(space))
        for seed in (0, 0, 1):
            evaluate_policy(policy, lambda: Recording(space, log=made), n_episodes=1, seed=seed, deterministic=False)
        one, two, other = (np.array(env.actions) for env in made)
        assert np.abs(one).max() > 0.3
        assert np.array_equal(one, two)
        assert not (one == other).any()
        assert len({row.tobytes() for row in one}) == len(one)

    def test_the_noise_of_one_seed_is_not_that_of_the_next_one_step_later(self):
        made: list[Recording] = []
        space = spaces.Box(-3.0, 3.0, (2,), np.float32)
        policy = policy_for(Recording(space))
        with torch.no_grad():
            policy.actor[-1].weight.zero_()  # nothing but noise
        for seed in (0, 1):
            evaluate_policy(policy, lambda: Recording(space, log=made), n_episodes=1, seed=seed, deterministic=False)
        first, second = (np.array(env.actions) for env in made)
        assert not np.allclose(first[1:], second[:-1])

    def test_they_are_of_the_spaces_own_kind(self):
        made: list[Recording] = []
        space = spaces.Discrete(3, start=4)
        evaluate_policy(policy_for(Recording(space)), lambda: Recording(space, log=made), n_episodes=1, seed=0)
        assert all(space.contains(action) for action in made[0].actions)


class TestFaults:
    def test_a_fault_is_told_with_its_place(self):
        with pytest.raises(
            EnvironmentFault, match=r"Arm-v0, environment 0, episode 0, step 3 \(seed \d+\): the reward is nan"
        ):
            evaluate_policy(
                policy_for(Faulty("")), lambda: Faulty("NaN reward", episode=0), n_episodes=2, seed=0, name="Arm-v0"
            )

    def test_a_value_out_of_bounds_does_not_stop_it(self):
        scores = evaluate_policy(policy_for(Faulty("")), lambda: Faulty("out of bounds"), n_episodes=4, seed=0)
        assert len(scores.returns) == 4

    @pytest.mark.parametrize("fault", ["", "NaN reward"])
    def test_environments_are_closed(self, fault):
        opened, closed = [], []

        class Closing(Faulty):
            def __init__(self) -> None:
                super().__init__(fault, episode=0)
                opened.append(self)

            def close(self) -> None:
                closed.append(self)

        try:
            evaluate_policy(policy_for(Faulty("")), Closing, n_episodes=3, seed=0)
        except EnvironmentFault:
            assert fault
        assert len(closed) == len(opened) == 3
