"""Estimates of the KL divergence from samples, and the coefficients that penalize it.

The exact divergence between two distributions is a method of the distribution (`core/distributions.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from jaxtyping import Float
from torch import Tensor


def k1(log_probs: Float[Tensor, "*S"], other_log_probs: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """`log p - log q` at samples of p: unbiased for KL(p || q), can be negative (Schulman 2020, k1)."""
    return log_probs - other_log_probs


def k2(log_probs: Float[Tensor, "*S"], other_log_probs: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """`(log p - log q)^2 / 2` at samples of p: biased, low variance, never negative (Schulman 2020, k2)."""
    return (log_probs - other_log_probs).square() / 2


def k3(log_probs: Float[Tensor, "*S"], other_log_probs: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """`q/p - 1 - log(q/p)` at samples of p: unbiased for KL(p || q), never negative (Schulman 2020, k3)."""
    log_ratio = other_log_probs - log_probs
    return log_ratio.expm1() - log_ratio


@dataclass(frozen=True)
class ReferenceKL:
    """The KL to a frozen reference as a term of the loss: `coef` times this estimate per step."""

    coef: float
    estimator: Literal["k2", "k3"]


@dataclass(frozen=True)
class AdaptiveKL:
    """The adaptive coefficient of PPO-Penalty (Schulman et al. 2017, section 4).

    After each policy update: `kl < target / 1.5` halves the coefficient, `kl > target * 1.5` doubles it.
    Kept within [1e-6, 1e6] so that a run of one-sided updates cannot make it vanish or overflow.
    """

    coef: float
    target: float

    def updated(self, kl: float) -> AdaptiveKL:
        """Return the coefficient for the next iteration, given the mean KL (nats) that the last one reached."""
        factor = 0.5 if kl < self.target / 1.5 else 2.0 if kl > self.target * 1.5 else 1.0
        return replace(self, coef=min(max(self.coef * factor, 1e-6), 1e6))


@dataclass(frozen=True)
class ProportionalKL:
    """The adaptive coefficient of language models (Ziegler et al. 2019, eq. 2): proportional control of log beta.

        error = clip(KL / target - 1, -0.2, 0.2);   coef *= 1 + error * n / horizon

    n is the number of responses of the iteration, `horizon` the number over which beta may grow by a fifth.
    """

    coef: float
    target: float
    horizon: float = 10_000.0

    def updated(self, kl: float, n_responses: int) -> ProportionalKL:
        """Return the coefficient for the next iteration, given the mean KL per response (nats)."""
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        return replace(self, coef=self.coef * max(1.0 + error * n_responses / self.horizon, 0.1))
