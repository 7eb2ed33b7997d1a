from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from gymnasium import spaces

from proximo.algorithms.adam import FlatAdam, NonFiniteUpdateError
from proximo.algorithms.cloning import (
    fit_values,
    imitate,
    most_likely_log_std,
    negative_log_likelihood,
    returns_to_go,
)
from proximo.core.batch import Batch
from proximo.models.control import ActorCritic, NetworkConfig


def batch_of(observations: torch.Tensor, actions: torch.Tensor) -> Batch:
    nothing = torch.zeros(len(actions), 1)
    return Batch(
        observations=observations.unsqueeze(1),
        actions=actions.unsqueeze(1),
        mask=torch.ones(len(actions), 1, dtype=torch.bool),
        rewards=nothing,
        log_probs=nothing,
        values=None,
        next_values=None,
        terminated=nothing.bool(),
        done=nothing.bool(),
    )


def linear_policy(actions: spaces.Space) -> ActorCritic:
    """No hidden layers, on one-hot observations of two states: a table."""
    return ActorCritic(spaces.Box(0, 1, (2,)), actions, NetworkConfig(hidden_sizes=()))


def test_likelihood_of_choices_by_hand() -> None:
    policy = linear_policy(spaces.Discrete(2))
    weight, bias = policy.layers(policy.actor)[0]
    with torch.no_grad():
        bias.zero_()
        weight.copy_(torch.tensor([[math.log(3.0), 0.0], [0.0, math.log(4.0)]]))
    # State 0: odds 3 to 1; state 1: odds 1 to 4.
    batch = batch_of(torch.eye(2)[[0, 0, 1]], torch.tensor([0, 1, 1]))
    expected = -(math.log(3 / 4) + math.log(1 / 4) + math.log(4 / 5)) / 3
    assert negative_log_likelihood(policy, batch).item() == pytest.approx(expected, abs=1e-6)


def test_likelihood_of_numbers_by_hand() -> None:
    policy = linear_policy(spaces.Box(-1, 1, (1,)))
    weight, bias = policy.layers(policy.actor)[0]
    assert policy.log_std is not None
    with torch.no_grad():
        bias.zero_()
        weight.copy_(torch.tensor([[0.5, -0.5]]))
        policy.log_std.fill_(math.log(0.5))
    batch = batch_of(torch.eye(2), torch.tensor([[1.0], [-0.5]]))
    # Distances 0.5 and 0, that is 1 and 0 standard deviations.
    expected = 0.5 * (0.5 * 1.0 + 0.0) + math.log(0.5) + 0.5 * math.log(2 * math.pi)
    assert negative_log_likelihood(policy, batch).item() == pytest.approx(expected, abs=1e-6)


def test_masked_steps_count_for_nothing() -> None:
    policy = linear_policy(spaces.Discrete(2))
    batch = batch_of(torch.eye(2), torch.tensor([0, 1]))
    batch.mask[1] = False
    assert negative_log_likelihood(policy, batch).item() == pytest.approx(
        negative_log_likelihood(policy, batch[torch.tensor([0])]).item()
    )


def test_cloning_finds_the_table_that_is_most_likely() -> None:
    """The maximum-likelihood policy of two states and three actions is the table of relative frequencies."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])
    states = torch.randint(2, (600,), generator=generator)
    actions = torch.multinomial(truth[states], 1, generator=generator).squeeze(1)
    table = torch.stack([(actions[states == s] == torch.arange(3)[:, None]).double().mean(1) for s in range(2)])
    policy = linear_policy(spaces.Discrete(3))
    policy.critic.requires_grad_(False)
    optimizer = FlatAdam(policy, learning_rate=0.05)
    batch = batch_of(torch.eye(2)[states], actions)
    losses = [imitate(policy, optimizer, batch, 10.0) for _ in range(300)]
    with torch.no_grad():
        learned = policy.actor(torch.eye(2)).softmax(-1).double()
    torch.testing.assert_close(learned, table, atol=2e-3, rtol=0)
    best = -torch.log(table[states, actions]).mean().item()
    assert losses[-1] == pytest.approx(best, abs=1e-4)
    assert losses[0] > best + 0.1


def test_the_most_likely_log_std_is_where_the_likelihood_is_flat() -> None:
    generator = torch.Generator().manual_seed(1)
    means = torch.randn(50, 2, generator=generator, dtype=torch.float64)
    actions = means + torch.tensor([0.3, 2.0]) * torch.randn(50, 2, generator=generator, dtype=torch.float64)
    log_std = most_likely_log_std(actions, means).requires_grad_()
    loss = -torch.distributions.Normal(means, log_std.exp()).log_prob(actions).sum()
    (slope,) = torch.autograd.grad(loss, log_std)
    assert slope.abs().max() < 1e-9
    assert most_likely_log_std(torch.tensor([[1.0], [-1.0]]), torch.zeros(2, 1)).item() == 0.0


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_the_critic_is_fitted_by_least_squares(scale: float) -> None:
    policy = linear_policy(spaces.Discrete(2))
    policy.actor.requires_grad_(False)
    optimizer = FlatAdam(policy, learning_rate=0.1)
    batch, targets = batch_of(torch.eye(2)[[0, 0, 1]], torch.tensor([0, 0, 0])), torch.tensor([[1.0], [3.0], [-2.0]])
    first = policy.scaled_values(torch.eye(2))
    expected = ((first[0] - 1) ** 2 + (first[0] - 3) ** 2 + (first[1] + 2) ** 2).item() / 3
    errors = [fit_values(policy, optimizer, batch, targets, scale, 10.0) for _ in range(600)]
    assert errors[0] == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(policy.scaled_values(torch.eye(2)), [2.0, -2.0], atol=0.02)  # the mean of each state


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    policy = linear_policy(spaces.Box(-1, 1, (1,)))
    optimizer = FlatAdam(policy, learning_rate=0.1)
    before = optimizer.weights.clone()
    with pytest.raises(NonFiniteUpdateError):
        imitate(policy, optimizer, batch_of(torch.eye(2), torch.tensor([[float("inf")], [0.0]])), 1.0)
    assert torch.equal(optimizer.weights, before)


def test_returns_to_go_by_hand() -> None:
    rewards = torch.tensor([1.0, 2.0, 4.0, 10.0, 20.0])
    terminated = torch.tensor([False, False, True, False, False])
    ends = torch.tensor([2, 4])
    seen = returns_to_go(rewards, terminated, ends, 0.5, ends_are_seen=True)
    assert seen.sums.tolist() == [1 + 1 + 1, 2 + 2, 4, 10 + 10, 20]
    assert seen.weights.tolist() == [0, 0, 0, 0.25, 0.5]
    # Where nobody knows what was seen after the cut, the last observation stands there: its own reward is left out.
    unseen = returns_to_go(rewards, terminated, ends, 0.5, ends_are_seen=False)
    assert unseen.sums.tolist() == [3, 4, 4, 10, 0]
    assert unseen.weights.tolist() == [0, 0, 0, 0.5, 1]
