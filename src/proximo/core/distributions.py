"""Action distributions: one class each, over the last dimension of their parameters.

Leading dimensions are free (`[N]` while acting, `[B, T]` in the update). All logarithms are natural, all
densities are with respect to the sampled action, before any clipping on the way to the environment.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor


class Distribution(Protocol):
    """What the algorithms ask of a distribution."""

    def __getitem__(self, rows: Tensor) -> Distribution:
        """Select along the first dimension."""
        ...

    def frozen(self) -> Distribution:
        """A copy that no later step of the networks changes, without gradient."""
        ...

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw one action per leading index."""
        ...

    def mode(self) -> Tensor:
        """The most likely action."""
        ...

    def log_prob(self, actions: Tensor) -> Tensor:
        """Log-probability (or log-density) of `actions`, shaped as the leading dimensions."""
        ...

    def entropy(self) -> Tensor:
        """Entropy in nats, shaped as the leading dimensions."""
        ...

    def kl(self, other: Any) -> Tensor:
        """Exact KL(self || other) in nats, of two distributions of one kind, shaped as the leading dimensions."""
        ...


@dataclass(frozen=True)
class Categorical:
    """One of K actions, `p = softmax(logits)`."""

    logits: Float[Tensor, "*S K"]

    def __getitem__(self, rows: Tensor) -> Categorical:
        """Select along the first dimension."""
        return Categorical(self.logits[rows])

    def frozen(self) -> Categorical:
        """A copy that no later step of the networks changes, without gradient."""
        return Categorical(self.logits.detach().clone())

    @staticmethod
    def parameter_size(n_actions: int) -> int:
        """Number of network outputs for `n_actions` actions."""
        return n_actions

    @property
    def log_probabilities(self) -> Float[Tensor, "*S K"]:
        """Normalized log-probabilities of every action."""
        return self.logits.log_softmax(-1)

    def sample(self, generator: torch.Generator | None = None) -> Int[Tensor, "*S"]:
        """Draw by the Gumbel-max trick: argmax of logits plus Gumbel noise."""
        return (self.logits + self.gumbel(torch.empty_like(self.logits), generator)).argmax(-1)

    @staticmethod
    def gumbel(noise: Float[Tensor, "*S K"], generator: torch.Generator | None) -> Float[Tensor, "*S K"]:
        """Overwrite `noise` by Gumbel noise and return it."""
        noise.exponential_(generator=generator)
        # It can round to 0, whose logarithm would make any action win: keep it in the normal floats.
        return noise.clamp_(min=torch.finfo(noise.dtype).tiny).log_().neg_()

    def mode(self) -> Int[Tensor, "*S"]:
        """The most likely action; of equals, the first."""
        return self.logits.argmax(-1)

    def log_prob(self, actions: Int[Tensor, "*S"]) -> Float[Tensor, "*S"]:
        """Log-probability of `actions`."""
        return self.log_probabilities.gather(-1, actions.long().unsqueeze(-1)).squeeze(-1)

    def entropy(self) -> Float[Tensor, "*S"]:
        """`-sum p log p`; impossible actions (log p = -inf) add nothing."""
        log_p = self.log_probabilities
        return -(log_p.exp() * torch.where(log_p > -torch.inf, log_p, 0.0)).sum(-1)

    def kl(self, other: Categorical) -> Float[Tensor, "*S"]:
        """`sum p (log p - log q)`."""
        log_p, log_q = self.log_probabilities, other.log_probabilities
        possible = log_p > -torch.inf
        difference = torch.where(possible, log_p, 0.0) - torch.where(possible, log_q, 0.0)
        return (log_p.exp() * difference).sum(-1)


@dataclass(frozen=True)
class DiagonalGaussian:
    """Independent normal actions; `log_std` broadcasts against `mean` (one learned vector for all states)."""

    mean: Float[Tensor, "*S A"]
    log_std: Float[Tensor, "*L A"]

    def __getitem__(self, rows: Tensor) -> DiagonalGaussian:
        """Select along the first dimension; one `log_std` for all states stays as it is."""
        return DiagonalGaussian(self.mean[rows], self.log_std if self.log_std.ndim == 1 else self.log_std[rows])

    def frozen(self) -> DiagonalGaussian:
        """A copy that no later step of the networks changes, without gradient."""
        return DiagonalGaussian(self.mean.detach().clone(), self.log_std.detach().clone())

    @staticmethod
    def parameter_size(n_dimensions: int) -> int:
        """Number of network outputs (the means) for `n_dimensions` action dimensions."""
        return n_dimensions

    def sample(self, generator: torch.Generator | None = None) -> Float[Tensor, "*S A"]:
        """Draw `mean + std * noise`."""
        noise = torch.empty_like(self.mean).normal_(generator=generator)
        return self.mean + self.log_std.exp() * noise

    def mode(self) -> Float[Tensor, "*S A"]:
        """The mean."""
        return self.mean

    def log_prob(self, actions: Shaped[Tensor, "*S A"]) -> Float[Tensor, "*S"]:
        """Log-density of `actions`, summed over dimensions."""
        z = (actions - self.mean) * torch.exp(-self.log_std)
        return -(0.5 * z.square() + self.log_std + 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self) -> Float[Tensor, "*S"]:
        """`sum(log std) + A/2 * log(2 pi e)`; can be negative, as differential entropies can."""
        per_dimension = self.log_std + 0.5 * math.log(2 * math.pi * math.e)
        return per_dimension.expand_as(self.mean).sum(-1)

    def kl(self, other: DiagonalGaussian) -> Float[Tensor, "*S"]:
        """`sum[ log(s2/s1) + (s1^2 + (m1 - m2)^2) / (2 s2^2) - 1/2 ]`."""
        variance_ratio = torch.exp(2 * (self.log_std - other.log_std))
        distance = ((self.mean - other.mean) * torch.exp(-other.log_std)).square()
        return 0.5 * (variance_ratio + distance - 1.0 - variance_ratio.log()).sum(-1)
