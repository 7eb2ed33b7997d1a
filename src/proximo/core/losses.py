"""Losses, all to be minimized. A `denominator` is as in `masked.masked_mean`."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from proximo.core.kl import k2, k3
from proximo.core.masked import masked_mean


class SurrogateLoss(NamedTuple):
    """A policy loss and what it shows of the step away from the old policy (scalars, no gradient but `loss`).

    `approx_kl` is the k3 estimate of KL(old || new), `clip_fraction` the share of steps whose ratio is
    outside the band.
    """

    loss: Float[Tensor, ""]
    approx_kl: Float[Tensor, ""]
    clip_fraction: Float[Tensor, ""]


def clipped_surrogate(
    log_probs: Float[Tensor, "B T"],
    old_log_probs: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    clip_epsilon: float | Tensor,
    clip_epsilon_high: float | Tensor | None = None,
    dual_clip: float | None = None,
    denominator: float | Tensor | None = None,
) -> SurrogateLoss:
    """PPO-Clip policy loss (Schulman et al. 2017, eq. 7), to be minimized.

        ratio = exp(log pi(a|s) - log pi_old(a|s))
        loss  = -mean[ min(ratio * A, clip(ratio, 1 - eps, 1 + eps) * A) ]

    Pessimistic: once the ratio has left [1 - eps, 1 + eps] in the direction that A favours, the gradient
    is zero; outside it in the other direction the gradient is whole, so a mistake is always taken back.
    All tensors are [B, T]; steps where `mask` is False count for nothing.

    `clip_epsilon` may be a tensor without dimensions, and `clip_epsilon_high` then must be one too.
    `clip_epsilon_high`: the upper end of the band is 1 + this ("clip-higher", DAPO, Yu et al. 2025, eq. 8).
    `dual_clip`: where A < 0 the objective is at least this (> 1) times A, so that one huge ratio cannot
    dominate (Ye et al. 2020, eq. 5).
    """
    log_ratio = torch.where(mask, log_probs - old_log_probs, 0.0)
    advantages = torch.where(mask, advantages, 0.0)
    ratio = log_ratio.exp()
    high = clip_epsilon if clip_epsilon_high is None else clip_epsilon_high
    clipped = ratio.clamp(1.0 - clip_epsilon, 1.0 + high)  # type: ignore[arg-type]  # two floats or two tensors
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    if dual_clip is not None:
        objective = torch.where(advantages < 0, torch.maximum(objective, dual_clip * advantages), objective)
    with torch.no_grad():
        outside = ((ratio - 1.0 > high) | (1.0 - ratio > clip_epsilon)).to(ratio.dtype)
        approx_kl = masked_mean(_k3_of(log_ratio), mask, denominator=denominator)
        clip_fraction = masked_mean(outside, mask, denominator=denominator)
    return SurrogateLoss(-masked_mean(objective, mask, denominator=denominator), approx_kl, clip_fraction)


def _k3_of(log_ratio: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    return k3(torch.zeros_like(log_ratio), log_ratio)


def kl_penalized_surrogate(
    log_probs: Float[Tensor, "B T"],
    old_log_probs: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    kl: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    kl_coef: float,
    denominator: float | Tensor | None = None,
) -> SurrogateLoss:
    """PPO-Penalty policy loss (Schulman et al. 2017, eq. 8), to be minimized.

        loss = -mean[ ratio * A - beta * KL(pi_old(.|s) || pi(.|s)) ]

    `kl` is the exact divergence per step, nats, with gradient to the new policy; `kl_coef` is beta. Nothing
    is clipped: `clip_fraction` is 0.
    """
    log_ratio = torch.where(mask, log_probs - old_log_probs, 0.0)
    objective = log_ratio.exp() * torch.where(mask, advantages, 0.0) - kl_coef * torch.where(mask, kl, 0.0)
    with torch.no_grad():
        approx_kl = masked_mean(_k3_of(log_ratio), mask, denominator=denominator)
    loss = -masked_mean(objective, mask, denominator=denominator)
    return SurrogateLoss(loss, approx_kl, torch.zeros_like(approx_kl))


def policy_gradient(
    log_probs: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    denominator: float | Tensor | None = None,
) -> Float[Tensor, ""]:
    """Policy loss whose gradient is the policy gradient (Williams 1992; Mnih et al. 2016), to be minimized.

        loss = -mean[ log pi(a|s) * A ]

    It is right at the policy that acted alone: nothing holds a second step on the same data back.
    """
    objective = torch.where(mask, log_probs, 0.0) * torch.where(mask, advantages, 0.0)
    return -masked_mean(objective, mask, denominator=denominator)


def value_loss(
    values: Float[Tensor, "B T"],
    returns: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    denominator: float | Tensor | None = None,
) -> Float[Tensor, ""]:
    """Mean squared error of the critic, `mean[(V - R)^2]` (Schulman et al. 2017, below eq. 9; no factor 1/2)."""
    return masked_mean(torch.where(mask, values - returns, 0.0).square(), mask, denominator=denominator)


def clipped_value(
    values: Float[Tensor, "B T"],
    old_values: Float[Tensor, "B T"],
    returns: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    clip_epsilon: float,
    denominator: float | Tensor | None = None,
) -> Float[Tensor, ""]:
    """Value loss that takes the worse of the plain and the clipped prediction (as in OpenAI baselines' ppo2).

        V_clip = V_old + clip(V - V_old, -eps, eps)
        loss   = mean[ max((V - R)^2, (V_clip - R)^2) ]

    `clip_epsilon` is in the units of the values. Without the max, a critic on the far side of the band
    would get no gradient to come back.
    """
    values, old_values, returns = (torch.where(mask, x, 0.0) for x in (values, old_values, returns))
    clipped = old_values + (values - old_values).clamp(-clip_epsilon, clip_epsilon)
    worse = torch.maximum((values - returns).square(), (clipped - returns).square())
    return masked_mean(worse, mask, denominator=denominator)


def reference_kl_loss(
    log_probs: Float[Tensor, "B T"],
    ref_log_probs: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    estimator: Literal["k2", "k3"],
    denominator: float | Tensor | None = None,
) -> Float[Tensor, ""]:
    """Mean estimate of KL(pi || reference) per step, as a term of the loss (Shao et al. 2024, eq. 4, has k3).

    The gradient of k2 is that of the KL itself at samples of the present policy; that of k3 is biased, the
    more the further the two are apart (Schulman 2020; Tang and Munos 2025). Nats.
    """
    log_probs, ref_log_probs = (torch.where(mask, x, 0.0) for x in (log_probs, ref_log_probs))
    estimate = k2(log_probs, ref_log_probs) if estimator == "k2" else k3(log_probs, ref_log_probs)
    return masked_mean(estimate, mask, denominator=denominator)


def token_nll(
    log_probs: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    denominator: float | Tensor | None = None,
) -> Float[Tensor, ""]:
    """Mean negative log-likelihood per valid token, nats: the loss of supervised fine-tuning."""
    return -masked_mean(log_probs, mask, denominator=denominator)


def pairwise(
    chosen: Float[Tensor, " P"],
    rejected: Float[Tensor, " P"],
    *,
    margin: Float[Tensor, " P"] | float = 0.0,
    centring_coef: float = 0.0,
) -> Float[Tensor, ""]:
    """Bradley-Terry loss of a reward model on P pairs (Christiano et al. 2017, eq. 1; Touvron et al. 2023, eq. 2).

        loss = mean[ -log sigmoid(r_chosen - r_rejected - margin) + c (r_chosen + r_rejected)^2 ]

    The second term (Eisenstein et al. 2023) keeps rewards around 0: differences alone leave their level free.
    """
    loss = -torch.nn.functional.logsigmoid(chosen - rejected - margin)
    return (loss + centring_coef * (chosen + rejected).square()).mean()


def dpo(
    chosen: Float[Tensor, " P"],
    rejected: Float[Tensor, " P"],
    ref_chosen: Float[Tensor, " P"],
    ref_rejected: Float[Tensor, " P"],
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Direct preference optimization (Rafailov et al. 2023, eq. 7) on P pairs of summed log-probs of responses.

        h    = beta [ (log pi - log pi_ref)(chosen) - (log pi - log pi_ref)(rejected) ]
        loss = mean[ -(1 - s) log sigmoid(h) - s log sigmoid(-h) ]

    `label_smoothing` s is the share of labels taken to be wrong (Mitchell 2023, conservative DPO).
    """
    h = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    right, wrong = torch.nn.functional.logsigmoid(h), torch.nn.functional.logsigmoid(-h)
    return -((1.0 - label_smoothing) * right + label_smoothing * wrong).mean()
