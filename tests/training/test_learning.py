"""It learns: small tasks, one seed each."""

from __future__ import annotations

import gymnasium as gym
import pytest

from proximo.presets import PRESETS
from proximo.training.evaluate import evaluate_policy
from tests.environments import BoxIdentity, Identity
from tests.training.running import config_with, train

SETTINGS = dict(
    n_envs=8, batch_size=64, hidden_sizes=[32], gamma=0.5, learning_rate=3e-3, total_steps=4096, debug=False
)


def score(policy, make) -> float:
    returns = evaluate_policy(policy, make, n_episodes=20, seed=0).returns
    return sum(returns) / len(returns)


@pytest.mark.parametrize(("objective", "path"), [("clip", "fused"), ("clip", "eager"), ("kl_penalty", "eager")])
class TestIdentity:
    """The best is 8 and 0; acting at random gains 2.7 and about -38."""

    def test_naming_what_is_seen(self, tmp_path, objective, path):
        config = config_with(**SETTINGS, rollout_length=32, n_epochs=4, objective=objective, update_path=path)
        run = train(config, Identity, tmp_path)
        assert run.rows[0]["return_mean"] < 4.0
        assert score(run.state.policy, Identity) > 7.9

    def test_going_where_the_target_is(self, tmp_path, objective, path):
        # the penalty keeps the std from shrinking faster than kl_target allows: give it room for a few thousand steps
        config = config_with(
            **SETTINGS, rollout_length=64, n_epochs=10, objective=objective, update_path=path, kl_target=0.05
        )
        run = train(config, BoxIdentity, tmp_path)
        assert run.rows[0]["return_mean"] < -10.0
        assert score(run.state.policy, BoxIdentity) > -0.5

    def test_with_normalizers_on(self, tmp_path, objective, path):
        config = config_with(
            **SETTINGS,
            rollout_length=32,
            n_epochs=4,
            objective=objective,
            update_path=path,
            normalize_observations=True,
            normalize_rewards=True,
        )
        assert score(train(config, Identity, tmp_path).state.policy, Identity) > 7.9


def test_cartpole_with_its_preset(tmp_path):
    """A random policy keeps the pole up for about 22 steps."""
    reached = []
    for seed in range(3):
        settings = PRESETS["CartPole-v1"].settings | dict(total_steps=20_480, seed=seed, env_id="CartPole-v1")
        config = config_with(**settings, hidden_sizes=[64, 64], debug=False)
        run = train(config, lambda: gym.make("CartPole-v1"), tmp_path / str(seed))
        assert run.rows[0]["return_mean"] < 40
        reached.append(run.rows[-1]["return_mean"])
    assert sum(reached) / len(reached) > 100, reached
