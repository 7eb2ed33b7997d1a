"""Advantage estimators."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
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
    gae_lambda: float,
) -> Float[Tensor, "B T"]:
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16, and 2017, eq. 11-12).

        delta_t = r_t + gamma * V(s_{t+1}) * (1 - terminated_t) - V(s_t)
        A_t     = delta_t + gamma * lambda * (1 - done_t) * A_{t+1}

    Termination and truncation do different things. Only `terminated` removes the value of the next
    observation: a time limit does not make the future worthless. `done` (either of the two) cuts the
    recursion, so nothing of the next episode leaks into this one. `next_values` must be the critic at the
    true next observation, also where an episode was cut.

    Masked steps have advantage 0 and are transparent: the recursion passes over them to the next valid
    step, undiscounted.
    """
    delta = rewards + gamma * torch.where(terminated, 0.0, next_values) - values
    advantages = torch.zeros_like(delta)
    following = torch.zeros_like(delta[:, 0])
    for t in range(delta.shape[1] - 1, -1, -1):
        carried = gamma * gae_lambda * torch.where(done[:, t], 0.0, following)
        following = torch.where(mask[:, t], delta[:, t] + carried, following)
        advantages[:, t] = following
    return torch.where(mask, advantages, 0.0)
