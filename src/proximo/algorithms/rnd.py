"""Random network distillation (RND, Burda et al. 2018, "Exploration by random network distillation", arXiv 1810.12894).

A predictor learns what a fixed random target network says of the observations that were seen; where it errs, the policy
has seldom been. The error is a second reward with its own value function, discount and end: here are its settings, its
advantages, and the predictor's learning. The networks are in `models/rnd.py`, the state of a run in
`training/exploration.py`.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from proximo.algorithms.adam import NonFiniteUpdateError, Optimizer
from proximo.core.advantages import gae
from proximo.core.batch import Batch, minibatch_indices
from proximo.errors import in_range, one_of

Exploration = Literal["none", "rnd"]


@dataclass(frozen=True)
class IntrinsicConfig:
    """A reward for what is new, beside the environment's own."""

    exploration: Exploration = "none"
    """`rnd`: random network distillation (Burda et al. 2018), with PPO: observations that a predictor network has not
    learned yet are rewarded."""
    intrinsic_coef: float = 1.0
    """Weight of the advantages of the intrinsic reward."""
    extrinsic_coef: float = 2.0
    """Weight of the advantages of the environment's reward where there is an intrinsic one, too."""
    intrinsic_gamma: float = 0.99
    """Discount per step of the intrinsic reward."""
    intrinsic_episodic: bool = False
    """The intrinsic return ends with the episode; else it goes on through the next one, and dying costs no novelty."""
    rnd_width: int = 128
    """Outputs of target and predictor, and the width of their hidden layers; 512 in the paper, for images."""
    predictor_learning_rate: float = 1e-4
    """Step size of the predictor's own Adam."""
    predictor_share: float = 0.25
    """Share of each minibatch that the predictor learns from; it makes as many epochs as the policy."""
    warmup_rollouts: int = 5
    """Rollouts of the untrained policy that only begin the moments which observations are normalized by, before the
    first update; they count as steps of the run."""

    def __post_init__(self) -> None:
        """Refuse impossible settings.

        Raises:
            UserError: naming the setting, its value, what is possible, and a usual value.
        """
        one_of("exploration", self.exploration, typing.get_args(Exploration))
        in_range("intrinsic_coef", self.intrinsic_coef, at_least=0.0, usual="1.0")
        in_range("extrinsic_coef", self.extrinsic_coef, at_least=0.0, usual="2.0")
        in_range("intrinsic_gamma", self.intrinsic_gamma, at_least=0.0, below=1.0, usual="0.99")
        in_range("rnd_width", self.rnd_width, at_least=1, at_most=10**6, whole=True, usual="128")
        in_range("predictor_learning_rate", self.predictor_learning_rate, above=0.0, usual="0.0001")
        in_range("predictor_share", self.predictor_share, above=0.0, at_most=1.0, usual="0.25")
        in_range("warmup_rollouts", self.warmup_rollouts, at_least=0, at_most=10**9, whole=True, usual="5")

    @property
    def explores(self) -> bool:
        """Whether there is an intrinsic reward."""
        return self.exploration != "none"


def intrinsic_advantages(
    batch: Batch, settings: IntrinsicConfig, gae_lambda: float | Tensor
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """GAE of the intrinsic rewards of a batch, and the targets of their value head (section 2.3 of the paper).

    Not episodic: nothing ends, and an advantage goes on into the next episode; `batch.intrinsic_next_values` must then
    be those of the next step that was acted on (`following_values`). Episodic: as `gae` of the environment's rewards,
    with the values at the true next observations.

    Raises:
        ValueError: if the batch has no intrinsic rewards or values.
    """
    rewards, values, next_values = batch.intrinsic_rewards, batch.intrinsic_values, batch.intrinsic_next_values
    if rewards is None or values is None or next_values is None:
        raise ValueError("exploration needs intrinsic rewards and values in the batch")
    never = torch.zeros_like(batch.done)
    ends = (batch.terminated, batch.done) if settings.intrinsic_episodic else (never, never)
    advantages = gae(
        rewards, values, next_values, *ends, batch.mask, gamma=settings.intrinsic_gamma, gae_lambda=gae_lambda
    )
    return advantages, advantages + values


def following_values(
    values: Float[Tensor, "B T"], last: Float[Tensor, " B"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """At each step the value of the next valid one, whatever episode that is in; `last` after the end of the batch."""
    following, columns = last, []
    for t in range(values.shape[1] - 1, -1, -1):
        columns.append(following)
        following = torch.where(mask[:, t], values[:, t], following)
    return torch.stack(columns[::-1], 1)


def discounted_sums(
    rewards: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    running: Float[Tensor, " B"],
    *,
    gamma: float,
    cut: Bool[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, " B"]]:
    """Running sums `s_t = gamma s_{t-1} + r_t`, from `running` on, whose spread the rewards are divided by.

    Masked steps are passed over. After a `cut` a sum begins at 0 again.

    Returns:
        The sums, and what the next batch goes on from.
    """
    sums = torch.empty_like(rewards)
    for t in range(rewards.shape[1]):
        running = torch.where(mask[:, t], gamma * running + rewards[:, t], running)
        sums[:, t] = running
        if cut is not None:
            running = torch.where(cut[:, t], 0.0, running)
    return sums, running


def distill(
    error: Callable[[Tensor], Float[Tensor, " M"]],
    optimizer: Optimizer,
    observations: Tensor,
    *,
    n_epochs: int,
    batch_size: int,
    share: float,
    max_grad_norm: float,
    generator: torch.Generator,
) -> float:
    """Let the predictor learn on observations `[M, *O]`: of each minibatch a random share, at least one.

    Args:
        error: the predictor's error at some of the observations, with gradient.
        optimizer: over the predictor's weights.
        observations: what was seen.
        n_epochs: passes over them.
        batch_size: observations per minibatch, before the share is taken.
        share: of each minibatch, above 0 and at most 1.
        max_grad_norm: longer gradients are scaled down to this.
        generator: draws the minibatches; what it draws first of a minibatch is the share.

    Returns:
        The mean error over the minibatches of the last epoch, before their steps.

    Raises:
        NonFiniteUpdateError: before a NaN or infinity reaches the weights.
    """
    losses: list[float] = []
    for _ in range(n_epochs):
        losses = []
        for rows in minibatch_indices(len(observations), batch_size, generator):
            rows = rows[: max(1, round(share * len(rows)))]
            optimizer.zero_grad()
            loss = error(observations[rows.to(observations.device)]).mean()
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise NonFiniteUpdateError(f"the predictor's loss is {losses[-1]} (predictor_learning_rate)")
            loss.backward()
            optimizer.clipped_step(max_grad_norm)
    return sum(losses) / len(losses)
