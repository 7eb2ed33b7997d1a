"""Findings about sizes: observations, rewards, gradients and advantages; and about a reward that says nothing."""

import numpy as np
import pytest

from proximo.report.diagnosis import diagnose
from tests.report.samples import SETTINGS, rows

SHARE = np.linspace(0, 1, 100)
CLIP = {"max_grad_norm": 0.5, "value_coef": 0.5}
STUCK = {"return_mean": 20.0 + 0.5 * np.sin(np.arange(100)), "length_mean": 20.0}


def names(metrics, **settings):
    return [finding.name for finding in diagnose(metrics, SETTINGS | settings)]


def only(name, metrics, **settings):
    """The finding of that name, which must be there once."""
    found = [finding for finding in diagnose(metrics, SETTINGS | settings) if finding.name == name]
    assert len(found) == 1, f"{name} is not among {names(metrics, **settings)}"
    return found[0]


class TestObservations:
    @pytest.mark.parametrize(("largest", "smallest"), [(2e4, 0.5), (2.0, 2e-4), (5e3, 4e3), (0.004, 0.002)], ids=str)
    def test_of_other_sizes_than_networks_take(self, largest, smallest):
        finding = only(
            "observations_out_of_scale", rows(observation_largest=largest, observation_smallest=smallest, **STUCK)
        )
        assert finding.severity == "problem"
        assert "iteration 100" in finding.seen
        assert finding.advice.startswith("Set normalize_observations to true")

    @pytest.mark.parametrize(("largest", "smallest"), [(99.0, 1.0), (8.0, 0.1), (1.2, 0.07), (0.0, 0.0)], ids=str)
    def test_of_usual_sizes(self, largest, smallest):
        assert "observations_out_of_scale" not in names(
            rows(observation_largest=largest, observation_smallest=smallest, **STUCK)
        )

    def test_are_a_note_where_the_policy_learned_all_the_same(self):
        metrics = rows(observation_largest=500.0, observation_smallest=0.1)
        assert names(metrics) == ["healthy", "observations_out_of_scale"]

    def test_are_measured_by_the_usual_rollout_and_not_by_one(self):
        once = np.where(np.arange(100) == 40, 1e6, 2.0)
        assert names(rows(observation_largest=once)) == ["healthy"]

    def test_are_not_looked_at_with_the_normalizer(self):
        metrics = rows(observation_largest=2e4, **STUCK)
        assert "observations_out_of_scale" not in names(metrics, normalize_observations=True)


class TestRewards:
    def test_of_which_a_return_is_thousands(self):
        large = {name: 1e4 * values if name == "return_mean" else values for name, values in STUCK.items()}
        finding = only("rewards_out_of_scale", rows(reward_largest=1e4, value_loss=1e9, **large), gamma=0.99)
        # 20 steps of 10,000 are all within the horizon of 100 steps.
        assert "The largest reward is 10,000" in finding.seen
        assert "about 200,0" in finding.seen
        assert finding.advice.startswith("Set normalize_rewards to true")

    def test_that_are_large_over_a_short_horizon_alone_are_usual(self):
        # 16 a step over 200 steps is 3,200; the critic of a gamma of 0.9 looks 10 steps ahead, which is 160.
        long = dict(return_mean=-3200.0 + np.sin(np.arange(100)), length_mean=200.0, reward_largest=16.0)
        assert "rewards_out_of_scale" not in names(rows(**long), gamma=0.9)
        assert "rewards_out_of_scale" in names(rows(**long), gamma=0.99)

    def test_that_no_critic_can_see(self):
        small = {"return_mean": 0.002 + 1e-4 * np.sin(np.arange(100)), "length_mean": 20.0}
        finding = only("rewards_out_of_scale", rows(reward_largest=1e-4, **small), gamma=0.99)
        assert "below 0.002" in finding.seen  # 20 steps of 0.0001
        assert "untrained critic" in finding.meaning

    def test_that_are_rare_are_not_small(self):
        rare = {"return_mean": 0.01 + 0.005 * np.sin(np.arange(100)), "length_mean": 20.0}
        paid = (np.arange(100) % 7 == 0) * 1.0
        assert "rewards_out_of_scale" not in names(rows(reward_largest=paid, **rare), gamma=0.99)

    def test_are_not_looked_at_with_the_normalizer_or_where_there_are_none(self):
        assert "rewards_out_of_scale" not in names(
            rows(reward_largest=1e9, **STUCK), normalize_rewards=True, gamma=0.99
        )
        assert "rewards_out_of_scale" not in names(rows(reward_largest=0.0, **STUCK), gamma=0.99)
        assert "rewards_out_of_scale" not in names(rows(reward_largest=None, **STUCK), gamma=0.99)

    def test_that_are_always_the_same_return(self):
        lengths = 20 + np.sin(np.arange(100))
        finding = only("rewards_constant", rows(return_mean=0.0, length_mean=lengths))
        assert finding.severity == "problem"
        assert "1,200 episodes up to iteration 100" in finding.seen
        assert only("rewards_constant", rows(return_mean=1.0, length_mean=20.0, terminated_share=1.0))
        cut = rows(return_mean=-200.0, length_mean=200.0, terminated_share=0.0)
        assert "rewards_constant" not in names(cut)
        assert "episodes_all_cut_off" in names(cut)

    def test_flat_returns_say_that_every_episode_was_cut_off(self):
        assert "time limit" in only("returns_flat", rows(**STUCK, terminated_share=0.0)).seen
        assert "time limit" not in only("returns_flat", rows(**STUCK, terminated_share=0.5)).seen


class TestGradients:
    def test_of_which_clipping_leaves_nothing(self):
        finding = only("value_loss_dwarfs", rows(grad_norm=4e3, value_loss=2e4, **STUCK), **CLIP)
        assert finding.severity == "warning"
        assert "norm of 4,000, and max_grad_norm cuts it to 0.5" in finding.seen
        assert "value loss is 10,000" in finding.seen
        assert "value_coef" not in finding.advice
        heavy = only("value_loss_dwarfs", rows(grad_norm=4e3, **STUCK), max_grad_norm=0.5, value_coef=1e4)
        assert "lower value_coef (now 10000; 0.5 is usual)" in heavy.advice

    def test_that_are_clipped_as_usual(self):
        assert "value_loss_dwarfs" not in names(rows(grad_norm=60.0, **STUCK), **CLIP)
        assert "value_loss_dwarfs" not in names(rows(grad_norm=4e3, **STUCK), value_coef=0.5)
        assert "value_loss_dwarfs" not in names(rows(8, grad_norm=4e3), **CLIP)


class TestAdvantages:
    def test_that_are_the_critics_error_alone(self):
        finding = only("advantages_degenerate", rows(advantage_std=0.1 * np.exp(-9 * SHARE), **STUCK))
        assert finding.severity == "problem"
        assert "iteration 51 on" in finding.seen
        assert "0.1" in finding.seen

    def test_of_a_solved_task_may_be_small(self):
        assert names(rows(advantage_std=10 * np.exp(-9 * SHARE))) == ["healthy"]

    def test_that_only_become_smaller_or_are_not_normalized(self):
        assert "advantages_degenerate" not in names(rows(advantage_std=10 - 9 * SHARE, **STUCK))
        gone = rows(advantage_std=0.1 * np.exp(-9 * SHARE), **STUCK)
        assert "advantages_degenerate" not in names(gone, normalize_advantages=False)


class TestEntropyBonus:
    def test_that_keeps_the_policy_from_choosing(self):
        finding = only("entropy_held_up", rows(entropy=0.69, **STUCK), entropy_coef=1.0)
        assert finding.severity == "problem"
        assert "entropy_coef of 1" in finding.seen
        assert "entropy_held_up" in names(rows(entropy=1.4 + 3 * SHARE, **STUCK), entropy_coef=0.1)

    def test_that_is_usual_or_whose_policy_chooses_all_the_same(self):
        assert "entropy_held_up" not in names(rows(entropy=0.69, **STUCK), entropy_coef=0.01)
        assert "entropy_held_up" not in names(rows(entropy=0.69 * (1 - 0.3 * SHARE), **STUCK), entropy_coef=0.1)
        assert names(rows(entropy=0.68), entropy_coef=0.1) == ["healthy", "entropy_held_up"]


def test_an_update_that_was_left_out_is_named():
    metrics = rows()
    metrics[29] = {name: metrics[29][name] for name in ("iteration", "env_steps", "return_mean", "n_episodes")}
    metrics[29]["update_skipped"] = True
    finding = only("not_finite", metrics)
    assert "1 of 100 iterations, first in iteration 30." in finding.seen


def test_where_the_time_goes_tells_the_environment_from_acting():
    slow = rows(seconds_collecting=9.0, seconds_updating=0.1, seconds_environment=4.5)
    assert "50 % of that is the environment's own" in only("environment_dominates", slow).seen
