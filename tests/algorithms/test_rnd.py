"""Random network distillation: advantages over the end of an episode by hand, and what the predictor learns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gymnasium import spaces
from torch import nn

from proximo.algorithms.adam import FlatAdam, NonFiniteUpdateError
from proximo.algorithms.ppo import PPO
from proximo.algorithms.rnd import (
    IntrinsicConfig,
    discounted_sums,
    distill,
    following_values,
    intrinsic_advantages,
)
from proximo.algorithms.update import estimated
from proximo.core.batch import Batch
from proximo.errors import UserError
from proximo.models.control import ActorCritic, NetworkConfig


def row(*numbers: float) -> torch.Tensor:
    return torch.tensor([numbers], dtype=torch.float32)


def flags(*where: int) -> torch.Tensor:
    return torch.tensor([where]) != 0


def three_steps(*, terminated: bool) -> Batch:
    """Three steps of one environment; an episode ends after the second one, where the critics say 10."""
    return Batch(
        observations=torch.zeros(1, 3, 1),
        actions=torch.zeros(1, 3, dtype=torch.int64),
        mask=flags(1, 1, 1),
        rewards=row(0.0, 1.0, 0.0),
        log_probs=row(0.0, 0.0, 0.0),
        values=row(0.0, 0.5, 0.0),
        next_values=row(0.5, 10.0, 0.0),
        terminated=flags(0, int(terminated), 0),
        done=flags(0, 1, 0),
        intrinsic_rewards=row(1.0, 0.0, 2.0),
        intrinsic_values=row(0.5, 0.5, 1.0),
        intrinsic_next_values=row(0.5, 1.0, 4.0),  # not episodic: of the next episode's first observation
    )


SETTINGS = IntrinsicConfig(exploration="rnd", intrinsic_gamma=0.5)


@pytest.mark.parametrize("terminated", [True, False])
def test_intrinsic_advantages_go_on_through_the_end_of_an_episode(terminated: bool):
    """delta = 0.75, 0, 3; gamma lambda = 0.25; A = 0.75 + 0.25 * 0.75, 0 + 0.25 * 3, 3."""
    advantages, targets = intrinsic_advantages(three_steps(terminated=terminated), SETTINGS, 0.5)
    torch.testing.assert_close(advantages, row(0.9375, 0.75, 3.0))
    torch.testing.assert_close(targets, row(1.4375, 1.25, 4.0))


@pytest.mark.parametrize(("terminated", "at_the_end"), [(True, -0.5), (False, 4.5)])
def test_episodic_ones_end_with_it(terminated: bool, at_the_end: float):
    """delta = 0.75, then 0 - 0.5 or 0 + 0.5 * 10 - 0.5, then 3; nothing of the last one comes before the end."""
    batch = replace(three_steps(terminated=terminated), intrinsic_next_values=row(0.5, 10.0, 4.0))
    advantages, targets = intrinsic_advantages(batch, replace(SETTINGS, intrinsic_episodic=True), 0.5)
    torch.testing.assert_close(advantages, row(0.75 + 0.25 * at_the_end, at_the_end, 3.0))
    torch.testing.assert_close(targets, advantages + batch.intrinsic_values)


def test_advantages_of_both_rewards_are_weighed_and_each_critic_has_its_own_target():
    policy = ActorCritic(spaces.Box(-1, 1, (1,)), spaces.Discrete(2), NetworkConfig(), has_intrinsic_critic=True)
    batch = three_steps(terminated=True)
    alone, _ = estimated(policy, batch, gamma=0.9, gae_lambda=0.5)
    settings = replace(SETTINGS, extrinsic_coef=2.0, intrinsic_coef=3.0)
    both, _ = estimated(policy, batch, gamma=0.9, gae_lambda=0.5, intrinsic=settings)
    assert alone.intrinsic_returns is None
    torch.testing.assert_close(both.returns, alone.returns)
    torch.testing.assert_close(both.intrinsic_returns, row(1.4375, 1.25, 4.0).T)
    torch.testing.assert_close(both.advantages, 2 * alone.advantages + 3 * row(0.9375, 0.75, 3.0).T)


def test_the_value_of_the_next_step_is_that_of_the_next_valid_one():
    values, mask = row(1.0, 2.0, 3.0, 4.0), flags(1, 0, 1, 0)
    torch.testing.assert_close(following_values(values, torch.tensor([9.0]), mask), row(3.0, 3.0, 9.0, 9.0))


def test_discounted_sums_go_on_from_batch_to_batch():
    whole, after = discounted_sums(row(1, 2, 9, 4), flags(1, 1, 0, 1), torch.tensor([8.0]), gamma=0.5)
    torch.testing.assert_close(whole, row(5.0, 4.5, 4.5, 6.25))
    torch.testing.assert_close(after, torch.tensor([6.25]))
    cut, after = discounted_sums(row(1, 2, 4), flags(1, 1, 1), torch.tensor([8.0]), gamma=0.5, cut=flags(0, 1, 1))
    torch.testing.assert_close(cut, row(5.0, 4.5, 4.0))
    torch.testing.assert_close(after, torch.tensor([0.0]))


def test_the_update_brings_the_second_critic_to_its_targets_and_the_first_to_its_own():
    seen = torch.eye(4).repeat(8, 1)
    policy = ActorCritic(
        spaces.Box(-1, 1, (4,)),
        spaces.Discrete(2),
        NetworkConfig(),
        torch.Generator().manual_seed(0),
        has_intrinsic_critic=True,
    )
    acted = policy.act(seen, torch.Generator().manual_seed(0))
    actions, log_probs = acted.actions.view(8, 4), acted.log_probs.view(8, 4)
    yes = torch.ones(8, 4, dtype=torch.bool)
    wanted, other = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([4.0, 2.0, 0.0, -2.0])
    zeros = torch.zeros(8, 4)
    batch = Batch(seen.view(8, 4, 4), actions, yes, other.expand(8, 4), log_probs, zeros, zeros, yes, yes)
    batch = replace(
        batch, intrinsic_rewards=wanted.expand(8, 4), intrinsic_values=zeros, intrinsic_next_values=zeros
    )  # one step each, so the targets are the rewards: gamma lambda = 0
    algorithm = PPO(n_epochs=150, batch_size=32, learning_rate=5e-3, gae_lambda=0.0)
    metrics = algorithm.update(
        policy, FlatAdam(policy, learning_rate=1.0), batch, torch.Generator().manual_seed(0), intrinsic=SETTINGS
    )
    torch.testing.assert_close(policy.intrinsic_values(torch.eye(4)), wanted, atol=0.05, rtol=0)
    torch.testing.assert_close(policy.scaled_values(torch.eye(4)), other, atol=0.05, rtol=0)
    assert metrics["intrinsic_value_loss"] < 0.01
    assert metrics["intrinsic_explained_variance"] == 0.0  # of the zeros that it said while collecting
    without = algorithm.update(policy, FlatAdam(policy, learning_rate=1.0), batch, torch.Generator().manual_seed(0))
    assert "intrinsic_value_loss" not in without


def test_a_policy_without_a_second_critic_is_a_mistake():
    policy = ActorCritic(spaces.Box(-1, 1, (1,)), spaces.Discrete(2), NetworkConfig())
    with pytest.raises(ValueError, match="need a policy with a critic of them"):
        PPO().update(
            policy,
            FlatAdam(policy, learning_rate=1.0),
            three_steps(terminated=True),
            torch.Generator(),
            intrinsic=SETTINGS,
        )


class Guess(nn.Module):
    """Learns one number for each of the observations, which are numbers of rows."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.said = nn.Parameter(torch.ones(n))
        self.asked: list[int] = []

    def error(self, rows: torch.Tensor) -> torch.Tensor:
        self.asked += rows.tolist()
        return self.said[rows].square()


@pytest.mark.parametrize(("share", "per_epoch"), [(1.0, 64), (0.25, 16), (1e-9, 4)])
def test_the_predictor_learns_from_its_share_of_each_minibatch(share: float, per_epoch: int):
    guess = Guess(64)
    settings = dict(n_epochs=3, batch_size=16, share=share, max_grad_norm=1.0, generator=torch.Generator())
    loss = distill(guess.error, FlatAdam(guess, learning_rate=1e-3), torch.arange(64), **settings)
    assert len(guess.asked) == 3 * per_epoch
    assert len(set(guess.asked[:per_epoch])) == per_epoch  # none twice in an epoch
    assert 0.9 < loss <= 1.0
    assert bool((guess.said.detach()[guess.asked] < 1.0).all())


def test_a_predictor_that_overflows_is_left_as_it_is():
    guess = Guess(4)
    settings = dict(n_epochs=1, batch_size=4, share=1.0, max_grad_norm=1.0, generator=torch.Generator())
    with torch.no_grad():
        guess.said.fill_(1e30)
    with pytest.raises(NonFiniteUpdateError, match="predictor's loss is inf"):
        distill(guess.error, FlatAdam(guess, learning_rate=1e-3), torch.arange(4), **settings)
    assert bool((guess.said == 1e30).all())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"exploration": "rdn"}, r"exploration is 'rdn'; it must be one of 'none', 'rnd'. Did you mean 'rnd'\?"),
        ({"intrinsic_gamma": 1.0}, "intrinsic_gamma is 1.0; it must be a number >= 0 and < 1"),
        ({"predictor_share": 0.0}, "predictor_share is 0.0; it must be a number > 0 and <= 1"),
        ({"intrinsic_coef": -1.0}, "intrinsic_coef is -1.0"),
        ({"rnd_width": 0}, "rnd_width is 0"),
        ({"warmup_rollouts": -1}, "warmup_rollouts is -1"),
        ({"predictor_learning_rate": 0.0}, "predictor_learning_rate is 0.0"),
        ({"extrinsic_coef": float("nan")}, "extrinsic_coef is nan"),
    ],
)
def test_impossible_settings_are_refused(settings: dict, said: str):
    with pytest.raises(UserError, match=said):
        IntrinsicConfig(**settings)
