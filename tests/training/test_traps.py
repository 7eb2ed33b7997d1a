"""The traps that PPO implementations have fallen into, each with a test that fails when it is sprung.

The traps of a single batch (reset rows, ends, the true final observation, advantages over a truncation) are
in tests/collect/test_rollout.py; here are those that show only once something is learned, or between the parts.
"""

from __future__ import annotations

from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

from proximo.algorithms.adam import FlatAdam
from proximo.algorithms.ppo import PPO
from proximo.collect.rollout import Carry, rollout
from proximo.collect.serial_envs import SerialEnvs
from proximo.core.batch import Batch, minibatch_indices
from proximo.models.control import ActorCritic, NetworkConfig
from proximo.training import control
from proximo.training.control import iterate
from proximo.training.evaluate import evaluate_policy
from tests.environments import Forever, Identity, Noisy, Recording, Scripted, ValueJump
from tests.training.running import begin, config_with, train

CRITIC = dict(
    n_envs=4,
    rollout_length=64,
    batch_size=64,
    n_epochs=10,
    hidden_sizes=[16],
    gamma=0.9,
    learning_rate=3e-3,
    debug=False,
)


class TestTimeLimits:
    @pytest.mark.parametrize(("limit", "scaled"), [(100, False), (10, True)])
    def test_reward_one_for_ever_is_worth_one_over_one_minus_gamma(self, tmp_path, limit, scaled):
        """As termination, a cut at 100 would make it 9.1, and one at 10 would make it 4.1."""
        config = config_with(**CRITIC, total_steps=6400, normalize_rewards=scaled, max_episode_steps=limit)
        policy = train(config, Forever, tmp_path).state.policy
        assert policy.value(np.ones(1, np.float32)) == pytest.approx(10.0, abs=0.2)

    def test_the_value_behind_the_last_step_is_that_of_the_final_observation(self, tmp_path):
        """With V(s_t) for V(s_T), the poor state would be worth gamma times itself: nothing."""
        config = config_with(**CRITIC, total_steps=9600)
        policy = train(config, ValueJump, tmp_path).state.policy
        assert policy.value(ValueJump.RICH) == pytest.approx(10.0, abs=0.3)
        assert policy.value(ValueJump.POOR) == pytest.approx(9.0, abs=0.3)

    def test_an_episode_that_is_both_is_terminated(self, tmp_path):
        """Two steps of reward 1, the second of which ends in both ways: worth 1.9 and 1."""
        script = [(1.0, False, False), (1.0, True, True)]
        policy = train(config_with(**CRITIC, total_steps=6400), lambda: Scripted(script), tmp_path).state.policy
        values = policy.value(np.array([[0.0], [0.5]], np.float32))
        assert values == pytest.approx([1.9, 1.0], abs=0.1)


def first_ratio_errors(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Look at the ratios where each update begins, whatever happened since the rollout."""
    errors: list[float] = []
    update = PPO.update

    def looking(self: PPO, policy: ActorCritic, optimizer: FlatAdam, batch: Batch, generator: torch.Generator):
        with torch.no_grad():
            ratios = (policy.evaluate(batch).log_probs - batch.log_probs).exp()
        errors.append(float((ratios - 1).abs()[batch.mask].max()))
        return update(self, policy, optimizer, batch, generator)

    monkeypatch.setattr(PPO, "update", looking)
    return errors


class Drifting(Noisy):
    """Observations of which each rollout moves the mean and spread, or the normalizer would hardly change."""

    def step(self, action):
        observation, *rest = super().step(action)
        return observation * 1e3 + 1e4, *rest


class TestFirstRatio:
    @pytest.mark.parametrize("make", [Drifting, Identity])
    def test_it_is_one_in_every_iteration_with_normalizers_on(self, tmp_path, monkeypatch, make):
        errors = first_ratio_errors(monkeypatch)
        config = config_with(normalize_observations=True, normalize_rewards=True, n_epochs=4, total_steps=320)
        run = train(config, make, tmp_path)
        assert len(errors) == 10
        assert max(errors) < 1e-5
        assert max(row["first_ratio_error"] for row in run.rows) < 1e-5
        assert float(run.state.policy.observation_count) == 320

    def test_debug_notices_a_normalizer_that_moves_in_between(self, tmp_path, monkeypatch):
        def moving(policy: ActorCritic, *rest, **settings):
            batch, episodes = rollout(policy, *rest, **settings)
            policy.update_observation_moments(batch.observations[batch.mask] * 3 + 1)
            return batch, episodes

        monkeypatch.setattr(control, "rollout", moving)
        config = config_with(normalize_observations=True, learning_rate=0.03)
        with pytest.raises(AssertionError, match="a probability ratio is"):
            train(config, Drifting, tmp_path)

    def test_without_debug_nothing_is_checked(self, tmp_path):
        assert "first_ratio_error" not in train(config_with(debug=False), Identity, tmp_path).rows[0]

    def test_the_normalizer_takes_in_each_rollout_once_and_only_experience(self, tmp_path):
        config = config_with(normalize_observations=True, total_steps=96)
        run = begin(config, Noisy, tmp_path)
        counts = [float(run.state.policy.observation_count) for _ in iterate(config, run.run, run.state, run.envs)]
        assert counts == [32, 64, 96]


def snapshot(policy: ActorCritic) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in policy.state_dict().items()}


class TestEvaluation:
    def test_it_changes_nothing_of_the_run(self, tmp_path):
        config = config_with(normalize_observations=True, normalize_rewards=True, total_steps=320)
        left_alone = train(config, Noisy, tmp_path / "left alone")
        run = begin(config, Noisy, tmp_path / "evaluated")
        for _ in iterate(config, run.run, run.state, run.envs):
            before, generators = snapshot(run.state.policy), (torch.get_rng_state(), np.random.get_state()[1].tolist())
            evaluate_policy(run.state.policy, Noisy, n_episodes=3, seed=0)
            evaluate_policy(run.state.policy, Noisy, n_episodes=3, seed=0, deterministic=False)
            assert all(torch.equal(tensor, before[name]) for name, tensor in run.state.policy.state_dict().items())
            assert torch.equal(torch.get_rng_state(), generators[0])
            assert np.random.get_state()[1].tolist() == generators[1]
        after = snapshot(run.state.policy)
        assert all(torch.equal(tensor, after[name]) for name, tensor in left_alone.state.policy.state_dict().items())

    def test_it_tells_the_environments_own_rewards(self, tmp_path):
        def make() -> Scripted:
            return Scripted([(500.0, False, False), (-40.0, True, False)])

        config = config_with(normalize_observations=True, normalize_rewards=True)
        policy = train(config, make, tmp_path).state.policy
        assert policy.reward_scale > 10
        assert evaluate_policy(policy, make, n_episodes=4, seed=0).returns == [460.0] * 4

    def test_it_never_sees_an_episode_of_training(self, tmp_path):
        made: list[Recording] = []
        config = config_with(total_steps=640, seed=3)
        policy = train(config, lambda: Recording(length=2, log=made), tmp_path).state.policy
        trained = [seed for env in made for seed in env.seeds]
        made.clear()
        evaluate_policy(policy, lambda: Recording(length=2, log=made), n_episodes=60, seed=3)
        evaluated = [seed for env in made for seed in env.seeds]
        # Training begins again at episode 0 for nobody but itself.
        assert len(set(trained)) == len(trained) > 300
        assert len(set(evaluated)) == len(evaluated) >= 60
        assert not set(trained) & set(evaluated)


class TestActions:
    def test_what_was_sampled_is_learned_from_and_what_was_clipped_acts(self, tmp_path, monkeypatch):
        batches: list[Batch] = []
        update = PPO.update

        def looking(self: PPO, policy: ActorCritic, optimizer: FlatAdam, batch: Batch, generator: torch.Generator):
            batches.append(batch)
            return update(self, policy, optimizer, batch, generator)

        monkeypatch.setattr(PPO, "update", looking)
        made: list[Recording] = []
        space = spaces.Box(-0.25, 0.25, (2,), np.float32)
        config = config_with(n_envs=1, rollout_length=32, total_steps=96, log_std_init=1.0)
        train(config, lambda: Recording(space, log=made), tmp_path)
        sampled = torch.cat([batch.actions[0] for batch in batches])
        received = torch.from_numpy(np.array(made[0].actions))
        assert all(space.contains(action) for action in made[0].actions)
        assert torch.allclose(received, (sampled / 4).clamp(-0.25, 0.25), atol=1e-6)
        assert (sampled.abs() > 1).float().mean() > 0.5


class TestSeeds:
    @pytest.mark.parametrize("run_seed", [0, 1, 2])
    def test_each_environment_and_each_episode_has_its_own(self, tmp_path, run_seed):
        made: list[Recording] = []
        config = config_with(n_envs=4, total_steps=640, seed=run_seed)
        train(config, lambda: Recording(length=3, log=made), tmp_path)
        seeds = [seed for env in made for seed in env.seeds]
        assert len(made) == 4
        assert None not in seeds
        assert len(set(seeds)) == len(seeds) > 200

    def test_environments_see_different_things(self, tmp_path):
        envs = SerialEnvs(Noisy, 6, seed=0)
        policy = ActorCritic(envs.observation_space, envs.action_space, NetworkConfig(hidden_sizes=(8,)))
        carry = Carry.start(envs.reset())
        batch, _ = rollout(policy, envs, carry, 20, torch.Generator().manual_seed(0), gamma=0.9)
        rows = {row.numpy().tobytes() for row in batch.observations.flatten(0, 1)}
        assert len(rows) == 120


class TestSmallMinibatches:
    @pytest.mark.parametrize("path", ["eager", "fused"])
    @pytest.mark.parametrize("batch_size", [1, 31])
    def test_a_minibatch_of_one_step_makes_no_nan(self, tmp_path, batch_size, path):
        """In the code of old, 32 steps in minibatches of 31 left one of a single step."""
        config = config_with(batch_size=batch_size, total_steps=64, update_path=path)
        run = train(config, Noisy, tmp_path)
        assert all(torch.isfinite(tensor).all() for tensor in run.state.policy.state_dict().values())
        losses = [row[name] for row in run.rows for name in ("policy_loss", "value_loss", "approx_kl", "grad_norm")]
        assert np.isfinite(losses).all()

    def test_a_rollout_of_one_step_does_not_either(self, tmp_path):
        config = config_with(n_envs=1, rollout_length=1, batch_size=1, total_steps=8, normalize_observations=True)
        run = train(config, Noisy, tmp_path)
        assert len(run.rows) == 8
        assert all(torch.isfinite(tensor).all() for tensor in run.state.policy.state_dict().values())


@pytest.mark.parametrize("path", ["eager", "fused"])
class TestTargetKL:
    @staticmethod
    def one_update(folder: Path, **settings) -> tuple[dict[str, float], ActorCritic, int]:
        """Ten epochs of two minibatches, if nothing stops them; also how many orders of steps were drawn."""
        config = config_with(n_epochs=10, **settings)
        run = begin(config, Identity, folder)
        policy, shuffles = run.state.policy, run.state.shuffle_generator
        batch, _ = rollout(policy, run.envs, run.state.carry, 16, run.state.action_generator, gamma=0.99)
        replayed = torch.Generator()
        replayed.set_state(shuffles.get_state())
        metrics = config.algorithm.update(policy, run.state.optimizer, batch, shuffles)
        n_orders = 0
        while not torch.equal(replayed.get_state(), shuffles.get_state()):
            minibatch_indices(32, 16, replayed)
            n_orders += 1
        return metrics, policy, n_orders

    def test_it_ends_the_whole_update_and_not_only_the_epoch(self, tmp_path, path):
        # The first step goes far; the second minibatch sees it.
        metrics, _, n_orders = self.one_update(tmp_path, target_kl=1e-6, learning_rate=0.05, update_path=path)
        assert (metrics["n_updates"], metrics["kl_stopped"], n_orders) == (1, 1.0, 1)
        assert metrics["approx_kl_max"] > 1.5e-6

    def test_the_step_that_would_go_further_is_not_taken(self, tmp_path, path):
        settings = dict(learning_rate=0.05, update_path=path)
        _, stopped, _ = self.one_update(tmp_path / "a", target_kl=1e-6, **settings)
        _, whole, _ = self.one_update(tmp_path / "b", **settings)
        assert (stopped.critic[0].weight - whole.critic[0].weight).abs().max() > 0.1

    def test_without_it_every_step_is_taken(self, tmp_path, path):
        metrics, _, n_orders = self.one_update(tmp_path, learning_rate=0.05, update_path=path)
        assert (metrics["n_updates"], metrics["kl_stopped"], n_orders) == (20, 0.0, 10)

    def test_it_is_in_force_in_a_run(self, tmp_path, path):
        config = config_with(n_epochs=10, target_kl=1e-6, learning_rate=0.05, update_path=path)
        rows = train(config, Identity, tmp_path).rows
        assert all(row["kl_stopped"] == 1.0 and row["n_updates"] <= 2 for row in rows)


class TestRewardScale:
    def test_it_uses_the_runs_gamma(self, tmp_path):
        """Rewards 1, 2, 3, end, at gamma 1/2: discounted returns 1, 2.5 and 4.25, of variance 127/72."""
        script = [(1.0, False, False), (2.0, False, False), (3.0, True, False)]
        config = config_with(n_envs=1, rollout_length=24, total_steps=72, gamma=0.5, normalize_rewards=True)
        policy = train(config, lambda: Scripted(script), tmp_path).state.policy
        assert policy.reward_scale == pytest.approx((127 / 72) ** 0.5, rel=1e-6)
        assert float(policy.return_count) == 72

    def test_it_forgets_at_a_time_limit(self, tmp_path):
        """Reward 1, cut after two steps, at gamma 1: discounted returns 1 and 2 for ever, of variance 1/4."""
        config = config_with(gamma=1.0, normalize_rewards=True, max_episode_steps=2)
        policy = train(config, Forever, tmp_path).state.policy
        assert policy.reward_scale == pytest.approx(0.5, rel=1e-6)


def test_gymnasiums_own_time_limit_is_a_truncation(tmp_path):
    made = train(config_with(env_id="Pendulum-v1", total_steps=448), lambda: gym.make("Pendulum-v1"), tmp_path)
    assert made.rows[-1]["n_episodes"] == 2
    assert made.rows[-1]["length_mean"] == 200
