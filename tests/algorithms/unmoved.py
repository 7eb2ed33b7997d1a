"""An optimizer for tests that look at gradients."""

from __future__ import annotations

import math

from torch import nn


class Unmoved:
    """An optimizer that takes no step, so that the gradients can be looked at."""

    learning_rate = 0.0

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def zero_grad(self) -> None:
        self.module.zero_grad()

    def clipped_step(self, max_grad_norm: float) -> float:
        del max_grad_norm
        return math.sqrt(sum(float(p.grad.square().sum()) for p in self.module.parameters() if p.grad is not None))
