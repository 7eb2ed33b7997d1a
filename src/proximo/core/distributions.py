"""Action distributions: one class each, over the last dimension of their parameters.

Leading dimensions are free (`[N]` while acting, `[B, T]` in the update). All logarithms are natural. `actions` are as
`sample` gives them, and that is what a batch keeps; `to_box` makes of continuous ones what the environment's bounds
are laid over, and densities are with respect to that, before any clipping on the way to the environment.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor


@runtime_checkable
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


def allow(logits: Float[Tensor, "*S K"], mask: Bool[Tensor, "*S K"]) -> Float[Tensor, "*S K"]:
    """Logits under which what `mask` forbids has probability 0, and no gradient (Huang and Ontanon 2022)."""
    return logits.masked_fill(~mask, -torch.inf)


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
class MultiCategorical:
    """Several independent choices at once, of `sizes[i]` options each; their logits stand side by side."""

    logits: Float[Tensor, "*S K"]
    sizes: tuple[int, ...]

    def __getitem__(self, rows: Tensor) -> MultiCategorical:
        """Select along the first dimension."""
        return MultiCategorical(self.logits[rows], self.sizes)

    def frozen(self) -> MultiCategorical:
        """A copy that no later step of the networks changes, without gradient."""
        return MultiCategorical(self.logits.detach().clone(), self.sizes)

    @staticmethod
    def parameter_size(sizes: Sequence[int]) -> int:
        """Number of network outputs for choices of so many options."""
        return sum(sizes)

    @property
    def parts(self) -> list[Categorical]:
        """Each choice by itself."""
        return [Categorical(part) for part in self.logits.split(self.sizes, -1)]

    def sample(self, generator: torch.Generator | None = None) -> Int[Tensor, "*S A"]:
        """Draw every choice by the Gumbel-max trick."""
        noisy = self.logits + Categorical.gumbel(torch.empty_like(self.logits), generator)
        return torch.stack([part.argmax(-1) for part in noisy.split(self.sizes, -1)], -1)

    def mode(self) -> Int[Tensor, "*S A"]:
        """The most likely option of every choice."""
        return torch.stack([part.mode() for part in self.parts], -1)

    def log_prob(self, actions: Shaped[Tensor, "*S A"]) -> Float[Tensor, "*S"]:
        """Log-probability of all choices together: the sum over them."""
        return _total([part.log_prob(actions[..., i].long()) for i, part in enumerate(self.parts)])

    def entropy(self) -> Float[Tensor, "*S"]:
        """The sum over the choices, which are independent."""
        return _total([part.entropy() for part in self.parts])

    def kl(self, other: MultiCategorical) -> Float[Tensor, "*S"]:
        """The sum over the choices, which are independent."""
        return _total([mine.kl(its) for mine, its in zip(self.parts, other.parts, strict=True)])


def _total(of_parts: Sequence[Tensor]) -> Tensor:
    """The sum over independent parts."""
    return torch.stack(list(of_parts), -1).sum(-1)


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

    @staticmethod
    def to_box(actions: Float[Tensor, "*S A"]) -> Float[Tensor, "*S A"]:
        """As they are: nothing keeps them within -1 and 1."""
        return actions

    @staticmethod
    def from_box(actions: Float[Tensor, "*S A"]) -> Float[Tensor, "*S A"]:
        """The inverse of `to_box`."""
        return actions


@dataclass(frozen=True)
class GSDE:
    """Generalized state-dependent exploration (Raffin, Kober and Stulp 2021): noise that is a function of the state.

        action = mean + features^T theta,   theta_ij = std_ij * noise_ij,   noise_ij ~ N(0, 1)

    One matrix `noise` that is kept for several steps makes the noise change as smoothly as the features do. Over all
    matrices an action is normal, of variance `features^2 @ std^2` (eq. 9), and that is what its log-probability,
    entropy and KL are of, whichever matrix it came from. 1e-6 is added to the variance, so that features of 0 leave it
    a density. Give the features without gradient: the noise is then no reason to change them, as in the paper.
    """

    mean: Float[Tensor, "*S A"]
    features: Float[Tensor, "*S F"]
    log_std: Float[Tensor, "F A"]
    noise: Float[Tensor, "*S F A"] | None = None
    """Standard normal; without it, `sample` draws a matrix per leading index."""

    def __getitem__(self, rows: Tensor) -> GSDE:
        """Select along the first dimension."""
        noise = None if self.noise is None else self.noise[rows]
        return GSDE(self.mean[rows], self.features[rows], self.log_std, noise)

    def frozen(self) -> GSDE:
        """A copy that no later step of the networks changes, without gradient."""
        mean, features, log_std = (part.detach().clone() for part in (self.mean, self.features, self.log_std))
        return GSDE(mean, features, log_std, self.noise)

    @staticmethod
    def parameter_size(n_dimensions: int) -> int:
        """Number of network outputs (the means) for `n_dimensions` action dimensions."""
        return n_dimensions

    @property
    def marginal(self) -> DiagonalGaussian:
        """The distribution over all matrices."""
        variance = self.features.square() @ (2.0 * self.log_std).exp()
        return DiagonalGaussian(self.mean, 0.5 * (variance + 1e-6).log())

    def sample(self, generator: torch.Generator | None = None) -> Float[Tensor, "*S A"]:
        """What the matrices that are given make of the features; nothing is drawn then."""
        noise = self.noise
        if noise is None:
            shape = (*self.features.shape, self.mean.shape[-1])
            noise = self.mean.new_empty(shape).normal_(generator=generator)
        return self.mean + (self.features.unsqueeze(-2) @ (self.log_std.exp() * noise)).squeeze(-2)

    def mode(self) -> Float[Tensor, "*S A"]:
        """The mean."""
        return self.mean

    def log_prob(self, actions: Shaped[Tensor, "*S A"]) -> Float[Tensor, "*S"]:
        """Log-density of `actions` over all matrices, summed over dimensions."""
        return self.marginal.log_prob(actions)

    def entropy(self) -> Float[Tensor, "*S"]:
        """That of the marginal."""
        return self.marginal.entropy()

    def kl(self, other: GSDE) -> Float[Tensor, "*S"]:
        """That of the marginals."""
        return self.marginal.kl(other.marginal)

    @staticmethod
    def to_box(actions: Float[Tensor, "*S A"]) -> Float[Tensor, "*S A"]:
        """As they are: nothing keeps them within -1 and 1."""
        return actions

    @staticmethod
    def from_box(actions: Float[Tensor, "*S A"]) -> Float[Tensor, "*S A"]:
        """The inverse of `to_box`."""
        return actions


_HERMITE_NODES, _HERMITE_WEIGHTS = (torch.from_numpy(array) for array in np.polynomial.hermite_e.hermegauss(64))
"""Gauss-Hermite quadrature: a mean over a standard normal is the weighted sum over these, divided by sqrt(2 pi)."""


@dataclass(frozen=True)
class SquashedGaussian:
    """`tanh(u)` of a normal u: always within -1 and 1. What is sampled and kept is u, which tanh would round away."""

    mean: Float[Tensor, "*S A"]
    log_std: Float[Tensor, "*L A"]

    def __getitem__(self, rows: Tensor) -> SquashedGaussian:
        """Select along the first dimension; one `log_std` for all states stays as it is."""
        return SquashedGaussian(self.mean[rows], self.log_std if self.log_std.ndim == 1 else self.log_std[rows])

    def frozen(self) -> SquashedGaussian:
        """A copy that no later step of the networks changes, without gradient."""
        return SquashedGaussian(self.mean.detach().clone(), self.log_std.detach().clone())

    @staticmethod
    def parameter_size(n_dimensions: int) -> int:
        """Number of network outputs (the means of u) for `n_dimensions` action dimensions."""
        return n_dimensions

    @property
    def _inner(self) -> DiagonalGaussian:
        return DiagonalGaussian(self.mean, self.log_std)

    def sample(self, generator: torch.Generator | None = None) -> Float[Tensor, "*S A"]:
        """Draw u."""
        return self._inner.sample(generator)

    def mode(self) -> Float[Tensor, "*S A"]:
        """The mean of u, whose tanh is the median."""
        return self.mean

    def log_prob(self, actions: Float[Tensor, "*S A"]) -> Float[Tensor, "*S"]:
        """Log-density of tanh(u): that of u minus `sum log(1 - tanh(u)^2)` (Haarnoja et al. 2018, eq. 21)."""
        return self._inner.log_prob(actions) - _log_slope(actions).sum(-1)

    def entropy(self) -> Float[Tensor, "*S"]:
        """That of u plus the mean of `log(1 - tanh(u)^2)`, an integral per dimension, by quadrature."""
        nodes, weights = (table.to(self.mean) for table in (_HERMITE_NODES, _HERMITE_WEIGHTS))
        u = self.mean.unsqueeze(-1) + self.log_std.exp().unsqueeze(-1) * nodes
        means = (_log_slope(u) * weights).sum(-1) / math.sqrt(2 * math.pi)
        return self._inner.entropy() + means.sum(-1)

    def kl(self, other: SquashedGaussian) -> Float[Tensor, "*S"]:
        """That of the two u: an invertible function of both changes no KL."""
        return self._inner.kl(other._inner)

    @staticmethod
    def to_box(actions: Float[Tensor, "*S A"]) -> Float[Tensor, "*S A"]:
        """`tanh(u)`."""
        return actions.tanh()

    @staticmethod
    def from_box(actions: Float[Tensor, "*S A"]) -> Float[Tensor, "*S A"]:
        """The u of it; of an action at a bound, where u would be infinite, that of the nearest number inside."""
        limit = 1.0 - torch.finfo(actions.dtype).eps
        return actions.clamp(-limit, limit).atanh()


def _log_slope(u: Tensor) -> Tensor:
    """`log(1 - tanh(u)^2) = 2 (log 2 - u - log(1 + exp(-2 u)))`, which does not cancel."""
    return 2.0 * (math.log(2.0) - u - F.softplus(-2.0 * u))


@dataclass(frozen=True)
class Beta:
    """`2 x - 1` of an x between 0 and 1 with density `x^(alpha-1) (1-x)^(beta-1) / B(alpha, beta)` (Chou et al. 2017).

    `raw` are the network's outputs: alpha and beta are 1 plus their softplus, so that there is one peak. x is what is
    sampled and kept.
    """

    raw: Float[Tensor, "*S A 2"]

    def __getitem__(self, rows: Tensor) -> Beta:
        """Select along the first dimension."""
        return Beta(self.raw[rows])

    def frozen(self) -> Beta:
        """A copy that no later step of the networks changes, without gradient."""
        return Beta(self.raw.detach().clone())

    @staticmethod
    def parameter_size(n_dimensions: int) -> int:
        """Number of network outputs for `n_dimensions` action dimensions."""
        return 2 * n_dimensions

    @property
    def concentrations(self) -> tuple[Float[Tensor, "*S A"], Float[Tensor, "*S A"]]:
        """Alpha and beta."""
        alpha, beta = (1.0 + F.softplus(self.raw)).unbind(-1)
        return alpha, beta

    def sample(self, generator: torch.Generator | None = None) -> Float[Tensor, "*S A"]:
        """Draw x as g / (g + h) of two gamma variables; it is never 0 or 1."""
        gamma = torch._standard_gamma  # pyright: ignore[reportPrivateImportUsage]  # the only one with a generator
        g, h = (gamma(shape.detach(), generator=generator) for shape in self.concentrations)
        eps = torch.finfo(g.dtype).eps
        return (g / (g + h)).clamp(eps, 1.0 - eps)

    def mode(self) -> Float[Tensor, "*S A"]:
        """`(alpha - 1) / (alpha + beta - 2)`."""
        above, below = F.softplus(self.raw).clamp_min(torch.finfo(self.raw.dtype).tiny).unbind(-1)  # not 0 / 0
        return above / (above + below)

    def log_prob(self, actions: Float[Tensor, "*S A"]) -> Float[Tensor, "*S"]:
        """Log-density of `2 x - 1`, summed over dimensions."""
        alpha, beta = self.concentrations
        of_x = (alpha - 1.0) * actions.log() + (beta - 1.0) * (-actions).log1p() - _log_beta(alpha, beta)
        return (of_x - math.log(2.0)).sum(-1)

    def entropy(self) -> Float[Tensor, "*S"]:
        """`log B - (a-1) psi(a) - (b-1) psi(b) + (a+b-2) psi(a+b) + log 2` per dimension."""
        a, b = self.concentrations
        of_x = _log_beta(a, b) - (a - 1.0) * a.digamma() - (b - 1.0) * b.digamma() + (a + b - 2.0) * (a + b).digamma()
        return (of_x + math.log(2.0)).sum(-1)

    def kl(self, other: Beta) -> Float[Tensor, "*S"]:
        """`log B'/B + (a-a') psi(a) + (b-b') psi(b) + (a'-a+b'-b) psi(a+b)` per dimension."""
        (a, b), (c, d) = self.concentrations, other.concentrations
        both = (c - a + d - b) * (a + b).digamma()
        terms = _log_beta(c, d) - _log_beta(a, b) + (a - c) * a.digamma() + (b - d) * b.digamma() + both
        return terms.sum(-1)

    @staticmethod
    def to_box(actions: Float[Tensor, "*S A"]) -> Float[Tensor, "*S A"]:
        """`2 x - 1`."""
        return 2.0 * actions - 1.0

    @staticmethod
    def from_box(actions: Float[Tensor, "*S A"]) -> Float[Tensor, "*S A"]:
        """The x of it; of an action at a bound, the nearest number inside."""
        eps = torch.finfo(actions.dtype).eps
        return (0.5 * (actions + 1.0)).clamp(eps, 1.0 - eps)


def _log_beta(alpha: Tensor, beta: Tensor) -> Tensor:
    """Logarithm of the beta function."""
    return alpha.lgamma() + beta.lgamma() - (alpha + beta).lgamma()


@dataclass(frozen=True)
class Joint:
    """Independent actions of several kinds side by side: `actions[..., columns of i]` is that of `parts[i]`.

    A part of one choice (`Categorical`) takes one column. Numbers of options are kept as floats, which are exact for
    whole numbers below 2^24.
    """

    parts: tuple[Distribution, ...]
    widths: tuple[int, ...]

    def __getitem__(self, rows: Tensor) -> Joint:
        """Select along the first dimension."""
        return Joint(tuple(part[rows] for part in self.parts), self.widths)

    def frozen(self) -> Joint:
        """A copy that no later step of the networks changes, without gradient."""
        return Joint(tuple(part.frozen() for part in self.parts), self.widths)

    def sample(self, generator: torch.Generator | None = None) -> Float[Tensor, "*S A"]:
        """Draw every part."""
        return self._side_by_side([part.sample(generator) for part in self.parts])

    def mode(self) -> Float[Tensor, "*S A"]:
        """The mode of every part."""
        return self._side_by_side([part.mode() for part in self.parts])

    def log_prob(self, actions: Float[Tensor, "*S A"]) -> Float[Tensor, "*S"]:
        """The sum over the parts, which are independent."""
        columns = actions.split(self.widths, -1)
        return _total([part.log_prob(_own(part, column)) for part, column in zip(self.parts, columns, strict=True)])

    def entropy(self) -> Float[Tensor, "*S"]:
        """The sum over the parts, which are independent."""
        return _total([part.entropy() for part in self.parts])

    def kl(self, other: Joint) -> Float[Tensor, "*S"]:
        """The sum over the parts, which are independent."""
        return _total([mine.kl(its) for mine, its in zip(self.parts, other.parts, strict=True)])

    def _side_by_side(self, actions: Sequence[Tensor]) -> Tensor:
        columns = [
            action.unsqueeze(-1) if isinstance(part, Categorical) else action
            for part, action in zip(self.parts, actions, strict=True)
        ]
        dtype = next((column.dtype for column in columns if column.is_floating_point()), torch.float32)
        return torch.cat([column.to(dtype) for column in columns], -1)


def _own(part: Distribution, columns: Tensor) -> Tensor:
    """Columns of a joint action as a part has them."""
    return columns.squeeze(-1).long() if isinstance(part, Categorical) else columns
