"""Running mean and variance, merged batch by batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor


@dataclass(frozen=True)
class RunningMoments:
    """Mean and population variance of everything seen so far, in float64; `count` is how much that was.

    A value, not a mutator: `updated` returns the next one, so nothing can change between collecting and
    learning by accident.
    """

    mean: Float[Tensor, "*S"]
    variance: Float[Tensor, "*S"]
    count: Float[Tensor, ""]

    @staticmethod
    def empty(shape: tuple[int, ...] = ()) -> RunningMoments:
        """Nothing seen: mean 0, variance 1, count 0."""
        f64 = torch.float64
        return RunningMoments(torch.zeros(shape, dtype=f64), torch.ones(shape, dtype=f64), torch.zeros((), dtype=f64))

    def updated(self, samples: Shaped[Tensor, "N *S"]) -> RunningMoments:
        """Merge N more samples (Chan, Golub and LeVeque 1979); without samples, return itself."""
        if samples.shape[0] == 0:
            return self
        x = samples.to(torch.float64)
        n = self.count.new_tensor(float(x.shape[0]))
        mean, variance = x.mean(0), x.var(0, correction=0)
        total = self.count + n
        shift = mean - self.mean
        merged = self.variance * self.count + variance * n + shift.square() * self.count * n / total
        return RunningMoments(self.mean + shift * n / total, merged / total, total)
