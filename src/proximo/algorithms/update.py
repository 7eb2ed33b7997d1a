"""Epochs of minibatches of microbatches: evaluate, loss, clip, step, and the KL stop."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from proximo.algorithms.adam import NonFiniteUpdateError, Optimizer
from proximo.algorithms.rnd import IntrinsicConfig, intrinsic_advantages
from proximo.core.advantages import gae
from proximo.core.batch import Batch, minibatch_indices, pieces
from proximo.core.distributions import Distribution
from proximo.core.masked import explained_variance, whiten
from proximo.core.policy import Policy


@dataclass(frozen=True)
class Minibatch:
    """Rows of a batch with what learning adds to them; advantages and returns are `[B, T]`.

    `returns` is None without a critic, `intrinsic_returns` without one of intrinsic rewards. `denominator`: what the
    sums of losses are divided by, as in `masked_mean`: a number for the whole minibatch that this is a part of, or one
    per row `[B, 1]`.
    """

    batch: Batch
    advantages: Tensor
    returns: Tensor | None
    old_distribution: Distribution | None = None
    denominator: Tensor | None = None
    intrinsic_returns: Tensor | None = None

    def __getitem__(self, rows: Tensor) -> Minibatch:
        """Select rows (along B) of every field."""
        old = None if self.old_distribution is None else self.old_distribution[rows]
        returns = None if self.returns is None else self.returns[rows]
        per_row = self.denominator is not None and self.denominator.ndim > 0
        denominator = self.denominator[rows] if per_row and self.denominator is not None else self.denominator
        intrinsic = None if self.intrinsic_returns is None else self.intrinsic_returns[rows]
        return Minibatch(self.batch[rows], self.advantages[rows], returns, old, denominator, intrinsic)

    def as_steps(self) -> Minibatch:
        """Every valid step as a row of its own, as `Batch.as_steps`; before there is an old distribution."""
        keep = self.batch.mask
        everywhere = bool(keep.all())

        def steps(tensor: Tensor) -> Tensor:
            return (tensor.flatten() if everywhere else tensor[keep]).unsqueeze(1)

        returns = None if self.returns is None else steps(self.returns)
        intrinsic = None if self.intrinsic_returns is None else steps(self.intrinsic_returns)
        return Minibatch(self.batch.as_steps(), steps(self.advantages), returns, intrinsic_returns=intrinsic)

    def as_pieces(self) -> Minibatch:
        """The rows of a policy that remembers, cut where it is known what it remembered, as `Batch.as_pieces`."""
        if self.batch.n_pieces == 1:
            return self
        n = self.batch.n_pieces
        returns = None if self.returns is None else pieces(self.returns, n)
        intrinsic = None if self.intrinsic_returns is None else pieces(self.intrinsic_returns, n)
        return Minibatch(self.batch.as_pieces(), pieces(self.advantages, n), returns, intrinsic_returns=intrinsic)


def estimated(
    policy: Policy,
    batch: Batch,
    *,
    gamma: float,
    gae_lambda: float | Tensor,
    value_gae_lambda: float | None = None,
    intrinsic: IntrinsicConfig | None = None,
) -> tuple[Minibatch, dict[str, float]]:
    """Advantages by GAE, the critic's targets, and metrics of the values of collection time.

    The metrics are `explained_variance`, and `advantage_std`: the standard deviation of the advantages before they are
    normalized, in the units of the critic. The targets are advantages plus values, the advantages those of
    `value_gae_lambda` where that is given. With `intrinsic` the advantages are the weighted sum of those of both
    rewards. Without memory every step is a row of its own.
    """
    if batch.values is None or batch.next_values is None:
        raise ValueError("this algorithm needs values in the batch; one without a critic is in grpo.py")
    estimate = partial(
        gae,
        batch.rewards,
        batch.values,
        batch.next_values,
        batch.terminated,
        batch.done,
        batch.mask,
        gamma=gamma,
    )
    advantages = estimate(gae_lambda=gae_lambda)
    if value_gae_lambda is None:
        returns = advantages + batch.values
    else:
        returns = estimate(gae_lambda=value_gae_lambda) + batch.values
    quality = {"explained_variance": float(explained_variance(batch.values, returns, batch.mask))}
    intrinsic_returns = None
    if intrinsic is not None:
        novel, intrinsic_returns = intrinsic_advantages(batch, intrinsic, gae_lambda)
        advantages = intrinsic.extrinsic_coef * advantages + intrinsic.intrinsic_coef * novel
    valid = advantages[batch.mask]  # their sum must not hang on how much is masked
    quality["advantage_std"] = float(valid.std(correction=0)) if len(valid) else 0.0
    everything = Minibatch(batch, advantages, returns, intrinsic_returns=intrinsic_returns)
    return everything.as_pieces() if policy.has_memory else everything.as_steps(), quality


def n_rows_of(batch: Batch, n_steps: int) -> int:
    """How many rows make about `n_steps` steps in control; for language models, a row is what is counted."""
    return n_steps if batch.hidden is None else max(1, round(n_steps / batch.mask.shape[1]))


Weighing = Literal["steps", "rows", "longest"]
"""What a loss is a mean over: `steps`, all valid steps alike; `rows`, the mean over rows of each row's own mean;
`longest`, each step over rows times the longest possible row, so that no length is favoured."""


def denominator_of(mask: Tensor, weighing: Weighing, longest: int) -> Tensor:
    """Return the denominator of a minibatch with this mask `[B, T]`: a number, or one per row `[B, 1]`."""
    if weighing == "steps":
        return mask.sum().clamp(min=1)
    n_rows = mask.any(1).sum().clamp(min=1)
    if weighing == "longest":
        return n_rows * longest
    return n_rows * mask.sum(1, keepdim=True).clamp(min=1)


class Loss(NamedTuple):
    """One microbatch's share of the loss and of the metrics; shares add up to the minibatch's mean."""

    total: Tensor
    approx_kl: Tensor
    metrics: dict[str, Tensor]


class Epochs(NamedTuple):
    """How a rollout is gone through; the settings of `ppo.PPO` and `grpo.GRPO` of the same names."""

    n_epochs: int
    batch_size: int
    normalize_advantages: bool
    max_grad_norm: float
    target_kl: float | None = None
    microbatch_size: int | None = None
    microbatch_tokens: int | None = None
    weighing: Weighing = "steps"
    longest: int = 1


def run_epochs(
    policy: Policy,
    optimizer: Optimizer,
    everything: Minibatch,
    loss_function: Callable[[Policy, Minibatch], Loss],
    epochs: Epochs,
    generator: torch.Generator,
) -> dict[str, float]:
    """Take `n_epochs` passes over the rows of `everything`, a fresh random order each, a step per minibatch.

    Advantages are normalized over each whole minibatch, before it is cut into microbatches, so the cut
    changes nothing. The KL stop looks at each minibatch before its step: where
    `approx_kl > 1.5 * target_kl`, that step is not taken and the whole update ends, not only the epoch.
    `approx_kl_max` and `kl_stopped` come from the very numbers that decided.

    Returns:
        Means over the minibatches of the last epoch of `approx_kl` and of the loss's own metrics;
        `approx_kl_max` over all of them; `grad_norm`, the mean norm before clipping; `n_updates`, the steps
        taken; `kl_stopped`, 1.0 if the KL stop ended it.

    Raises:
        NonFiniteUpdateError: before a NaN or infinity reaches the weights.
    """
    kl_seen: list[float] = []
    grad_norms: list[float] = []
    stopped = False
    epoch: list[dict[str, Tensor]] = []
    n_rows = n_rows_of(everything.batch, epochs.batch_size)
    for _ in range(epochs.n_epochs):
        epoch = []
        for rows in minibatch_indices(len(everything.batch.mask), n_rows, generator):
            minibatch = everything[rows.to(everything.advantages.device)]
            if epochs.normalize_advantages:
                minibatch = replace(minibatch, advantages=whiten(minibatch.advantages, minibatch.batch.mask))
            optimizer.zero_grad()
            loss, metrics = _accumulate_gradients(policy, microbatches(policy, minibatch, epochs), loss_function)
            if not math.isfinite(loss):  # its gradient may be finite all the same: that of an overflown square
                raise NonFiniteUpdateError(f"the loss is {loss}")
            epoch.append(metrics)
            kl_seen.append(float(epoch[-1]["approx_kl"]))
            stopped = epochs.target_kl is not None and kl_seen[-1] > 1.5 * epochs.target_kl
            if stopped:
                break
            grad_norms.append(optimizer.clipped_step(epochs.max_grad_norm))
        if stopped:
            break
    means = {name: float(torch.stack([metrics[name] for metrics in epoch]).mean()) for name in epoch[0]}
    return means | {
        "approx_kl_max": max(kl_seen),
        "grad_norm": sum(grad_norms) / max(len(grad_norms), 1),
        "n_updates": len(grad_norms),
        "kl_stopped": float(stopped),
    }


def microbatches(policy: Policy, minibatch: Minibatch, epochs: Epochs) -> list[Minibatch]:
    """Cut a minibatch into pieces that fit the memory, all with the denominator of the whole."""
    mask = minibatch.batch.mask
    whole = replace(minibatch, denominator=denominator_of(mask, epochs.weighing, epochs.longest))
    if epochs.microbatch_tokens is not None and policy.has_memory:
        pieces = _within_budget(policy.row_lengths(minibatch.batch), epochs.microbatch_tokens, epochs.microbatch_size)
        return [whole[torch.tensor(rows, device=mask.device)] for rows in pieces]
    if epochs.microbatch_size is None:
        return [whole]
    n_rows = n_rows_of(minibatch.batch, epochs.microbatch_size)
    if n_rows >= len(mask):
        return [whole]
    return [whole[rows] for rows in torch.arange(len(mask), device=mask.device).split(n_rows)]


def _within_budget(lengths: list[int], budget: int, most_rows: int | None) -> list[list[int]]:
    """Group rows, longest first, so that rows times the longest of them stays within `budget` (one row at least)."""
    pieces: list[list[int]] = []
    room = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if not pieces or len(pieces[-1]) >= room:
            pieces.append([])
            room = min(max(1, budget // max(lengths[row], 1)), most_rows or len(lengths))
        pieces[-1].append(row)
    return pieces


def _accumulate_gradients(
    policy: Policy, microbatches: list[Minibatch], loss_function: Callable[[Policy, Minibatch], Loss]
) -> tuple[float, dict[str, Tensor]]:
    """Backward through each microbatch; gradients, losses and metrics add up to those of the whole minibatch."""
    summed: dict[str, Tensor] = {}
    total = 0.0
    for microbatch in microbatches:
        loss = loss_function(policy, microbatch)
        loss.total.backward()
        total += float(loss.total.detach())
        for name, value in ({"approx_kl": loss.approx_kl} | loss.metrics).items():
            summed[name] = value.detach() + summed[name] if name in summed else value.detach()
    return total, summed
