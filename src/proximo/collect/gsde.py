"""The noise of state-dependent exploration (gsde) while collecting: a matrix per environment, kept for some steps."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from proximo.models.control import ActorCritic


class HoldsNoise(Protocol):
    """What one rollout leaves to the next, on the host (`rollout.Carry`) or on a device (`device_rollout`)."""

    noise: Any
    """[N, F, columns], standard normal; None where there is none to hold."""
    noise_age: Any
    """[]: steps taken with it; -1 before it was ever drawn."""


class SteadyNoise:
    """Draws the matrices of a rollout when they are due, into the memory that the carry keeps them in.

    What is kept is standard normal: the policy multiplies by its standard deviations of the moment, so a matrix that
    outlives an update still has the spread that log-probabilities are taken with.
    """

    def __init__(self, carry: HoldsNoise, every: int, generator: torch.Generator) -> None:
        """At the beginning of a rollout; `every` is `sde_sample_freq`."""
        self._carry, self._every, self._generator = carry, every, generator
        noise = carry.noise
        self._noise: Tensor = torch.from_numpy(noise) if isinstance(noise, np.ndarray) else noise
        if every < 0:
            carry.noise_age[...] = -1

    def next(self) -> Tensor:
        """The matrices `[N, F, columns]` to take the next step with, drawn anew if they are due."""
        age = int(self._carry.noise_age)
        if age < 0 or 0 < self._every <= age:
            self._draw()
            age = 0
        self._carry.noise_age[...] = age + 1
        return self._noise

    def _draw(self) -> None:
        on_generator = torch.empty(self._noise.shape, device=self._generator.device)
        self._noise.copy_(on_generator.normal_(generator=self._generator))


def steady_noise(policy: ActorCritic, carry: HoldsNoise, generator: torch.Generator) -> SteadyNoise | None:
    """What draws the matrices of a rollout; None where the policy has none."""
    if policy.noise_shape is None:
        return None
    return SteadyNoise(carry, policy.config.sde_sample_freq, generator)
