"""Advantage estimators."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def gae(
    rewards: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    next_values: Float[Tensor, "B T"],
    terminated: Bool[Tensor, "B T"],
    done: Bool[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    gamma: float,
    gae_lambda: float | Tensor,
) -> Float[Tensor, "B T"]:
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16, and 2017, eq. 11-12).

        delta_t = r_t + gamma * V(s_{t+1}) * (1 - terminated_t) - V(s_t)
        A_t     = delta_t + gamma * lambda * (1 - done_t) * A_{t+1}

    Termination and truncation do different things. Only `terminated` removes the value of the next
    observation: a time limit does not make the future worthless. `done` (either of the two) cuts the
    recursion, so nothing of the next episode leaks into this one. `next_values` must be the critic at the
    true next observation, also where an episode was cut.

    Masked steps have advantage 0 and are transparent: the recursion passes over them to the next valid
    step, undiscounted. `gae_lambda` may be one per row `[B]`.
    """
    delta = rewards + gamma * torch.where(terminated, 0.0, next_values) - values
    if delta.device.type == "cpu" and not delta.requires_grad:
        lambdas = torch.as_tensor(gae_lambda, dtype=delta.dtype).reshape(-1, 1)
        decay = torch.where(done, 0.0, gamma * lambdas)
        return torch.from_numpy(_decayed_sums(delta.numpy(), decay.numpy(), mask.numpy()))
    advantages = torch.zeros_like(delta)
    following = torch.zeros_like(delta[:, 0])
    for t in range(delta.shape[1] - 1, -1, -1):
        carried = gamma * gae_lambda * torch.where(done[:, t], 0.0, following)
        following = torch.where(mask[:, t], delta[:, t] + carried, following)
        advantages[:, t] = following
    return torch.where(mask, advantages, 0.0)


def _decayed_sums(delta: np.ndarray, decay: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """`A_t = delta_t + decay_t * A_{t+1}` over valid steps `[B, T]`, 0 at others, in NumPy: torch takes far longer."""
    is_whole = bool(mask.all())
    if not is_whole:  # A_t = 0 + 1 * A_{t+1} passes over what is masked
        delta, decay = np.where(mask, delta, 0), np.where(mask, decay, 1)
    sums = np.zeros(delta.shape[::-1], delta.dtype)
    columns = (np.ascontiguousarray(array.T[::-1]) for array in (delta, decay))
    following, product = np.zeros_like(sums[0]), np.zeros_like(sums[0])
    leaks = not np.isfinite(delta).all()  # 0 times infinity would leak over the end of an episode
    for own, factor, row in zip(*columns, sums[::-1], strict=True):
        np.multiply(factor, following, out=product)
        if leaks:
            product[factor == 0] = 0
        following = np.add(own, product, out=row)
    return np.ascontiguousarray(sums.T if is_whole else np.where(mask, sums.T, 0))


def group_relative(
    scores: Float[Tensor, " B"],
    valid: Bool[Tensor, " B"],
    group: Int[Tensor, " B"],
    *,
    divide_by_std: bool = True,
) -> Float[Tensor, " B"]:
    """Advantages of answers to one prompt against each other (GRPO, Shao et al. 2024, section 4.1.2).

        A_i = (r_i - mean of its group) / (standard deviation of its group + 1e-4)

    `divide_by_std=False` is Dr. GRPO (Liu et al. 2025), whose gradient does not favour prompts on which answers
    hardly differ. The standard deviation has denominator n - 1. Rows that are not `valid` (no score) are left
    out and get 0, as do groups with a single valid row or with equal scores.
    """
    index, sums, counts = _group_sums(scores, valid, group)
    mean = (sums / counts.clamp(min=1))[index]
    centered = torch.where(valid, scores - mean, 0.0)
    squares = torch.zeros_like(sums).index_add_(0, index, centered.square())
    spread = (squares / (counts - 1).clamp(min=1)).sqrt()[index]
    size = torch.zeros_like(sums).scatter_reduce(0, index, torch.where(valid, scores.abs(), 0.0), "amax")[index]
    real = spread > 16 * torch.finfo(scores.dtype).eps * size  # equal scores differ by rounding alone
    centered = torch.where(valid & real, centered, 0.0)
    return centered / (spread + 1e-4) if divide_by_std else centered


def leave_one_out(
    scores: Float[Tensor, " B"], valid: Bool[Tensor, " B"], group: Int[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """REINFORCE with the mean of the other answers as baseline (RLOO, Kool et al. 2019; Ahmadian et al. 2024, eq. 8).

        A_i = r_i - mean of r_j over the j != i of its group

    Rows that are not `valid` are left out and get 0, as does a row without another one in its group.
    """
    index, sums, counts = _group_sums(scores, valid, group)
    others = (sums[index] - scores) / (counts[index] - 1).clamp(min=1)
    return torch.where(valid & (counts[index] > 1), scores - others, 0.0)


def _group_sums(scores: Tensor, valid: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Number the groups; return each row's number, and each group's sum and count of valid scores."""
    numbers, index = group.unique(return_inverse=True)
    sums = scores.new_zeros(len(numbers)).index_add_(0, index, torch.where(valid, scores, 0.0))
    counts = scores.new_zeros(len(numbers)).index_add_(0, index, valid.to(scores.dtype))
    return index, sums, counts
