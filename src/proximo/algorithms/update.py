"""Epochs of minibatches of microbatches: evaluate, loss, clip, step, and the KL stop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from proximo.algorithms.adam import Optimizer
from proximo.core.batch import Batch, minibatch_indices
from proximo.core.distributions import Distribution
from proximo.core.masked import whiten
from proximo.core.policy import Policy


@dataclass(frozen=True)
class Minibatch:
    """Rows of a batch with what learning adds to them; advantages and returns are `[B, T]`.

    `denominator`: valid steps of the minibatch that this is a part of; None for the whole.
    """

    batch: Batch
    advantages: Tensor
    returns: Tensor
    old_distribution: Distribution | None = None
    denominator: Tensor | None = None

    def __getitem__(self, rows: Tensor) -> Minibatch:
        """Select rows (along B) of every field."""
        old = None if self.old_distribution is None else self.old_distribution[rows]
        return Minibatch(self.batch[rows], self.advantages[rows], self.returns[rows], old, self.denominator)

    def as_steps(self) -> Minibatch:
        """Every valid step as a row of its own, as `Batch.as_steps`; before there is an old distribution."""
        keep = self.batch.mask
        return Minibatch(self.batch.as_steps(), self.advantages[keep].unsqueeze(1), self.returns[keep].unsqueeze(1))

    def split(self, size: int | None) -> list[Minibatch]:
        """Cut into microbatches of at most `size` rows, all with this minibatch's denominator."""
        whole = replace(self, denominator=self.batch.mask.sum().clamp(min=1))
        n_rows = len(self.batch.mask)
        if size is None or size >= n_rows:
            return [whole]
        return [whole[rows] for rows in torch.arange(n_rows, device=self.batch.mask.device).split(size)]


class Loss(NamedTuple):
    """One microbatch's share of the loss and of the metrics; shares add up to the minibatch's mean."""

    total: Tensor
    approx_kl: Tensor
    metrics: dict[str, Tensor]


def run_epochs(
    policy: Policy,
    optimizer: Optimizer,
    everything: Minibatch,
    loss_function: Callable[[Policy, Minibatch], Loss],
    *,
    n_epochs: int,
    batch_size: int,
    microbatch_size: int | None,
    normalize_advantages: bool,
    max_grad_norm: float,
    target_kl: float | None,
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
    for _ in range(n_epochs):
        epoch = []
        for rows in minibatch_indices(len(everything.batch.mask), batch_size, generator):
            minibatch = everything[rows.to(everything.returns.device)]
            if normalize_advantages:
                minibatch = replace(minibatch, advantages=whiten(minibatch.advantages, minibatch.batch.mask))
            optimizer.zero_grad()
            epoch.append(_accumulate_gradients(policy, minibatch.split(microbatch_size), loss_function))
            kl_seen.append(float(epoch[-1]["approx_kl"]))
            stopped = target_kl is not None and kl_seen[-1] > 1.5 * target_kl
            if stopped:
                break
            grad_norms.append(optimizer.clipped_step(max_grad_norm))
        if stopped:
            break
    means = {name: float(torch.stack([metrics[name] for metrics in epoch]).mean()) for name in epoch[0]}
    return means | {
        "approx_kl_max": max(kl_seen),
        "grad_norm": sum(grad_norms) / max(len(grad_norms), 1),
        "n_updates": len(grad_norms),
        "kl_stopped": float(stopped),
    }


def _accumulate_gradients(
    policy: Policy, microbatches: list[Minibatch], loss_function: Callable[[Policy, Minibatch], Loss]
) -> dict[str, Tensor]:
    """Backward through each microbatch; the gradients add up to that of the whole minibatch."""
    summed: dict[str, Tensor] = {}
    for microbatch in microbatches:
        loss = loss_function(policy, microbatch)
        loss.total.backward()
        for name, value in ({"approx_kl": loss.approx_kl} | loss.metrics).items():
            summed[name] = value.detach() + summed[name] if name in summed else value.detach()
    return summed
