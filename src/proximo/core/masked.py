"""Masked reductions, all of them here, each with an explicit denominator.

What stands at a masked place never reaches a result, not even as NaN or infinity times zero.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def masked_sum(x: Float[Tensor, "*S"], mask: Bool[Tensor, "*S"]) -> Float[Tensor, ""]:
    """Sum of `x` where `mask` is True."""
    return torch.where(mask, x, 0.0).sum()


def masked_mean(
    x: Float[Tensor, "*S"], mask: Bool[Tensor, "*S"], *, denominator: float | Tensor | None = None
) -> Float[Tensor, ""]:
    """Sum of `x` where `mask` is True, over `denominator`, or over the number of valid steps without one.

    Pass the whole batch's count of valid steps as `denominator` when `x` is only a part of it (a
    microbatch): the parts then add up to the mean of the whole, however they were cut. A denominator with
    dimensions (broadcasting against `x`) weighs each place by itself. Without a single valid step the
    result is 0.
    """
    if isinstance(denominator, Tensor) and denominator.ndim > 0:
        return masked_sum(x / denominator, mask)
    count = mask.sum().clamp(min=1) if denominator is None else denominator
    return masked_sum(x, mask) / count


def masked_variance(x: Float[Tensor, "*S"], mask: Bool[Tensor, "*S"]) -> Float[Tensor, ""]:
    """Population variance (denominator: the number of valid steps) of `x` where `mask` is True."""
    return masked_mean((x - masked_mean(x, mask)).square(), mask)


def whiten(x: Float[Tensor, "*S"], mask: Bool[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """Shift and scale `x` to mean 0 and standard deviation 1 over valid steps; masked places become 0.

    The standard deviation has denominator `n - 1`, as in Schulman's and most later code, and 1e-8 is added
    to it. A single valid step has no spread: it is returned as it is rather than as 0 / 0.
    """
    count = mask.sum()
    centered = x - masked_mean(x, mask)
    spread = (masked_sum(centered.square(), mask) / (count - 1).clamp(min=1)).sqrt()
    # What differs by rounding alone has no spread either: blown up to 1, it would be a signal out of nothing.
    spread = torch.where(spread > rounding(torch.where(mask, x, 0.0)), spread + 1e-8, torch.inf)
    whitened = torch.where(count > 1, centered / spread, x)
    return torch.where(mask, whitened, 0.0)


def rounding(x: Float[Tensor, "*S"]) -> Float[Tensor, ""]:
    """How far equal numbers of this size may seem to spread, for the rounding of their mean."""
    return 16 * torch.finfo(x.dtype).eps * x.abs().max()


def explained_variance(
    predictions: Float[Tensor, "*S"], targets: Float[Tensor, "*S"], mask: Bool[Tensor, "*S"]
) -> Float[Tensor, ""]:
    """`1 - Var[targets - predictions] / Var[targets]` over valid steps.

    1: the critic predicts the returns exactly; 0: no better than their mean; negative: worse than that.
    NaN where the targets do not vary, since nothing is there to explain.
    """
    if mask.all():
        target_variance = targets.var(correction=0)
        explained = 1.0 - (targets - predictions).var(correction=0) / target_variance
    else:
        target_variance = masked_variance(targets, mask)
        explained = 1.0 - masked_variance(targets - predictions, mask) / target_variance
    smallest = rounding(torch.where(mask, targets, 0.0)).square()
    return torch.where(target_variance > smallest, explained, torch.nan)
