"""Behaviour cloning: the likelihood of demonstrated actions, and a critic from the returns that followed them.

The policy is fitted by maximum likelihood (Pomerleau 1989, "ALVINN"; Bain and Sammut 1995), the critic by least squares
on discounted returns-to-go, in a phase of its own: neither has to be weighed against the other, and each stops where
it is best on what was held out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from proximo.algorithms.adam import NonFiniteUpdateError, Optimizer
from proximo.core.batch import Batch
from proximo.core.policy import Policy


def negative_log_likelihood(policy: Policy, batch: Batch) -> Tensor:
    """Mean of `-log pi(a | s)` over the steps of a batch (nats; actions in the policy's units), with gradient."""
    return -policy.evaluate(batch).log_probs[batch.mask].mean()


def most_likely_log_std(actions: Tensor, means: Tensor) -> Tensor:
    """The `log_std` `[A]` that makes `actions` `[N, A]` most likely under normals of these `means` `[N, A]`.

    The root mean square distance, of each dimension. It holds for a squashed normal too, with actions before the tanh.
    """
    return 0.5 * (actions - means).square().mean(0).clamp_min(1e-30).log()


def imitate(policy: Policy, optimizer: Optimizer, batch: Batch, max_grad_norm: float) -> float:
    """Take one step of maximum likelihood on a minibatch; return its loss before the step.

    Raises:
        NonFiniteUpdateError: if the loss or its gradient is not finite; the weights are as they were.
    """
    return _step(optimizer, lambda: negative_log_likelihood(policy, batch), max_grad_norm)


def fit_values(
    policy: Policy, optimizer: Optimizer, batch: Batch, targets: Tensor, scale: float, max_grad_norm: float
) -> float:
    """Take one step of least squares of the critic to `targets` `[B, T]`.

    The error is measured in `scale`, a typical size of the targets, so that no step hangs on the unit of rewards.

    Returns:
        The mean squared error before the step, in units of the targets squared.

    Raises:
        NonFiniteUpdateError: if the loss or its gradient is not finite; the weights are as they were.
    """

    def loss() -> Tensor:
        values = policy.evaluate(batch).values
        assert values is not None
        return F.mse_loss(values[batch.mask] / scale, targets[batch.mask] / scale)

    return _step(optimizer, loss, max_grad_norm) * scale**2


def _step(optimizer: Optimizer, loss_of: Callable[[], Tensor], max_grad_norm: float) -> float:
    optimizer.zero_grad()
    loss = loss_of()
    value = float(loss.detach())
    if not math.isfinite(value):
        raise NonFiniteUpdateError(f"the loss is {value}")
    loss.backward()
    optimizer.clipped_step(max_grad_norm)
    return value


class ReturnsToGo(NamedTuple):
    """`sums + weights * V(s_end)`: what a step's value should be, where V is taken at the end of its episode."""

    sums: Tensor
    """`[N]`: discounted rewards from the step to the end of its episode."""
    weights: Tensor
    """`[N]`: discount of what comes after that end; 0 where the environment itself ended the episode."""


def returns_to_go(
    rewards: Tensor, terminated: Tensor, ends: Tensor, gamma: float, *, ends_are_seen: bool
) -> ReturnsToGo:
    """Discounted returns-to-go of episodes that lie one after the other.

    An episode that was cut off has rewards that nobody has seen. V at the observation after its last step stands for
    them. Where that was not kept, V at the last step's own observation does, and the last reward is not counted: the
    last step then learns nothing.

    Args:
        rewards: `[N]`, as scaled for learning.
        terminated: `[N]`, bools.
        ends: `[E]`, the last step of each episode, ascending; the last is N - 1.
        gamma: the discount.
        ends_are_seen: whether there is an observation after the last step of each episode.
    """
    sums, weights = torch.empty_like(rewards), torch.empty_like(rewards)
    first = 0
    for last in ends.tolist():
        is_cut = not bool(terminated[last])
        is_lost = is_cut and not ends_are_seen
        total, weight = 0.0, float(is_cut)
        for step in range(last, first - 1, -1):
            if not (is_lost and step == last):
                total, weight = float(rewards[step]) + gamma * total, gamma * weight
            sums[step], weights[step] = total, weight
        first = last + 1
    return ReturnsToGo(sums, weights)
