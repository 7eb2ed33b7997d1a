"""Critic-free relatives of PPO for several answers to each prompt: GRPO, Dr. GRPO, DAPO's loss, RLOO."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from proximo.algorithms.adam import Optimizer
from proximo.algorithms.ppo import Schedule, kl_term
from proximo.algorithms.update import Epochs, Loss, Minibatch, Weighing, run_epochs
from proximo.core.advantages import group_relative, leave_one_out
from proximo.core.batch import Batch
from proximo.core.kl import ReferenceKL
from proximo.core.losses import clipped_surrogate
from proximo.core.masked import masked_mean
from proximo.core.policy import Policy
from proximo.errors import in_range, one_of

Baseline = Literal["group_std", "group_mean", "leave_one_out"]


@dataclass(frozen=True)
class GRPO:
    """Settings of group-relative policy optimization (Shao et al. 2024), and the update that follows them.

    The relatives are settings: see `PAPERS`.
    """

    baseline: Baseline = "group_std"
    """What a response's score is compared with: `group_std`, the group's mean, over its standard deviation (GRPO);
    `group_mean`, without dividing (Dr. GRPO); `leave_one_out`, the mean of the others (RLOO)."""
    weighing: Weighing = "rows"
    """What the loss is a mean over: `rows`, responses, of each one's mean over its tokens (GRPO); `steps`, all tokens
    alike (DAPO); `longest`, tokens over responses times the longest possible one (Dr. GRPO)."""
    learning_rate: float = 1e-5
    """Step size of Adam."""
    learning_rate_schedule: Schedule = "constant"
    """`linear` brings the learning rate down to 0 at the end of the run."""
    clip_epsilon: float = 0.2
    """The probability ratio may leave [1 - clip_epsilon, 1 + clip_epsilon] without reward for it."""
    clip_epsilon_high: float | None = None
    """The upper end of the band is 1 plus this (clip-higher, DAPO); by default clip_epsilon."""
    dual_clip: float | None = None
    """Where the advantage is negative, the objective is at least this times it (Ye et al. 2020); none by default."""
    n_epochs: int = 1
    """Passes over each rollout."""
    batch_size: int = 64
    """Responses per minibatch; minibatches differ in size by at most one."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    max_grad_norm: float = 1.0
    """The gradient of all weights together is scaled down to this norm."""
    target_kl: float | None = None
    """End the update of a rollout once a minibatch's approx_kl exceeds 1.5 times this; never by default."""
    microbatch_size: int | None = None
    """Cut minibatches into pieces of this many responses to save memory; the gradient stays the same."""
    microbatch_tokens: int | None = 16_384
    """Cut minibatches into pieces of at most this many tokens, padding counted."""

    def __post_init__(self) -> None:
        """Refuse impossible settings.

        Raises:
            UserError: naming the setting, its value, what is possible, and a usual value.
        """
        one_of("baseline", self.baseline, ("group_std", "group_mean", "leave_one_out"))
        one_of("weighing", self.weighing, ("rows", "steps", "longest"))
        one_of("learning_rate_schedule", self.learning_rate_schedule, ("constant", "linear"))
        in_range("learning_rate", self.learning_rate, above=0.0, usual="0.00001")
        in_range("clip_epsilon", self.clip_epsilon, above=0.0, below=1.0, usual="0.2")
        in_range("clip_epsilon_high", self.clip_epsilon_high, optional=True, above=0.0, usual="0.28, or none at all")
        in_range("dual_clip", self.dual_clip, optional=True, above=1.0, usual="3.0, or none at all")
        in_range("n_epochs", self.n_epochs, at_least=1, whole=True, usual="1")
        in_range("batch_size", self.batch_size, at_least=1, whole=True, usual="64")
        in_range("entropy_coef", self.entropy_coef, at_least=0.0, usual="0.0")
        in_range("max_grad_norm", self.max_grad_norm, above=0.0, usual="1.0")
        in_range("target_kl", self.target_kl, optional=True, above=0.0, usual="0.01 to 0.05, or none at all")
        in_range("microbatch_size", self.microbatch_size, optional=True, at_least=1, whole=True, usual="none at all")
        in_range("microbatch_tokens", self.microbatch_tokens, optional=True, at_least=1, whole=True, usual="8192")

    def at(self, remaining: float) -> GRPO:
        """Return the settings in force when `remaining` (1 at the start, 0 at the end) of the run is left."""
        rate_factor = max(remaining, 1e-8) if self.learning_rate_schedule == "linear" else 1.0
        return replace(self, learning_rate=self.learning_rate * rate_factor)

    def update(
        self,
        policy: Policy,
        optimizer: Optimizer,
        batch: Batch,
        generator: torch.Generator,
        *,
        longest: int,
        reference_kl: ReferenceKL | None = None,
    ) -> dict[str, float]:
        """Improve `policy` in place on responses in groups; return metrics by their names.

        A row's score is the sum of its rewards. Rows without a valid step count for nothing.

        Args:
            policy: scores actions; no critic is asked for.
            optimizer: over the policy's weights.
            batch: experience with `group`; with `ref_log_probs` for `reference_kl`.
            generator: draws the order of rows.
            longest: the longest possible response, for weighing "longest".
            reference_kl: a penalty in the loss for the distance to the reference.

        Raises:
            NonFiniteUpdateError: if the loss or gradient is not finite; the weights stay finite.
        """
        optimizer.learning_rate = self.learning_rate
        advantages = self.advantages(batch)
        settings = {name: getattr(self, name) for name in Epochs._fields if hasattr(self, name)}
        return run_epochs(
            policy,
            optimizer,
            Minibatch(batch, advantages, None),
            partial(self._loss, reference_kl),
            Epochs(**settings, normalize_advantages=False, longest=longest),
            generator,
        )

    def advantages(self, batch: Batch) -> Tensor:
        """Each row's advantage against its group, the same at all of its valid steps `[B, T]`; 0 elsewhere."""
        if batch.group is None:
            raise ValueError("GRPO needs the group of each row in the batch")
        scores = torch.where(batch.mask, batch.rewards, 0.0).sum(1)
        valid = batch.mask.any(1)
        if self.baseline == "leave_one_out":
            per_row = leave_one_out(scores, valid, batch.group)
        else:
            per_row = group_relative(scores, valid, batch.group, divide_by_std=self.baseline == "group_std")
        return torch.where(batch.mask, per_row.unsqueeze(1), 0.0)

    def _loss(self, reference_kl: ReferenceKL | None, policy: Policy, minibatch: Minibatch) -> Loss:
        batch, denominator = minibatch.batch, minibatch.denominator
        new = policy.evaluate(batch)
        surrogate = clipped_surrogate(
            new.log_probs,
            batch.log_probs,
            minibatch.advantages,
            batch.mask,
            clip_epsilon=self.clip_epsilon,
            clip_epsilon_high=self.clip_epsilon_high,
            dual_clip=self.dual_clip,
            denominator=denominator,
        )
        entropy = masked_mean(new.entropy, batch.mask, denominator=denominator)
        total = surrogate.loss
        if self.entropy_coef:
            total = total - self.entropy_coef * entropy
        metrics = {"policy_loss": surrogate.loss, "entropy": entropy, "clip_fraction": surrogate.clip_fraction}
        if reference_kl is not None:
            kl_loss = kl_term(new.log_probs, batch, reference_kl, denominator)
            total = total + reference_kl.coef * kl_loss
            metrics["kl_loss"] = kl_loss
        return Loss(total, surrogate.approx_kl, metrics)


PAPERS: dict[str, GRPO] = {
    "grpo": GRPO(),
    "dr_grpo": GRPO(baseline="group_mean", weighing="longest"),
    "dapo": GRPO(weighing="steps", clip_epsilon_high=0.28),
    "rloo": GRPO(baseline="leave_one_out", weighing="steps"),
}
"""Settings by the names of the papers: GRPO (Shao et al. 2024), Dr. GRPO (Liu et al. 2025), the loss of
DAPO (Yu et al. 2025; its dynamic sampling of prompts is not here), RLOO (Ahmadian et al. 2024)."""
