"""Adam on one flat vector: a handful of operations a step, however many small tensors the networks have."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn

AT_ONCE = 2**26
"""Weights that a step is made for at a time: it needs room for so many numbers more, however large the model."""


class Optimizer(Protocol):
    """What an update asks of an optimizer."""

    learning_rate: float

    def zero_grad(self) -> None:
        """Set all gradients to zero."""
        ...

    def clipped_step(self, max_grad_norm: float) -> float:
        """Scale the gradient down to `max_grad_norm`, step, and return its norm before that."""
        ...


class NonFiniteUpdateError(ArithmeticError):
    """The loss or its gradient is NaN or infinite; the weights are as they were before that step."""


class FlatAdam:
    """Adam (Kingma and Ba 2015, algorithm 1) with the global norm of the gradient clipped.

    The module's parameters become views of one vector, and their gradients views of another, so the
    module's device must not change afterwards. Loading a state dict into the module is fine.

    Args:
        module: whose parameters to optimize; all of one dtype, on one device.
        learning_rate: step size; may be set anew before each step.
        eps: added to the root of the second moment; 1e-5 in the code of the PPO paper.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        learning_rate: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-5,
    ) -> None:
        """Gather the parameters."""
        self.learning_rate = learning_rate
        self.betas = betas
        self.eps = eps
        self.n_steps = 0
        self.pace: Any = None
        """How many threads the compiled update takes (`compiled.Pace`); None: as many as torch has."""
        self.graphed: object | None = None
        """An update that is captured over these very vectors (graphed.py), to be replayed at the next iteration."""
        parameters = [p for p in module.parameters() if p.requires_grad]
        size = sum(parameter.numel() for parameter in parameters)
        self.weights = torch.empty(size, dtype=parameters[0].dtype, device=parameters[0].device)
        self.gradient = torch.zeros_like(self.weights)
        self.first_moment = torch.zeros_like(self.weights)
        self.second_moment = torch.zeros_like(self.weights)
        self._first = parameters[0]
        offset = 0
        for parameter in parameters:
            size = parameter.numel()
            own = self.weights[offset : offset + size].view(parameter.shape)
            parameter.data = own.copy_(parameter.detach())  # one after the other: never two of every weight
            parameter.grad = self.gradient[offset : offset + size].view(parameter.shape)
            offset += size

    def zero_grad(self) -> None:
        """Set all gradients to zero, in place: they stay views of the one vector."""
        self.gradient.zero_()

    def check_gradients(self) -> None:
        """Raise RuntimeError if the module's gradients are no longer views of the one vector."""
        if self._first.grad is None or self._first.grad.data_ptr() != self.gradient.data_ptr():
            raise RuntimeError("the gradients were replaced (module.zero_grad()?): use FlatAdam.zero_grad() alone")

    def clipped_step(self, max_grad_norm: float) -> float:
        """Scale the gradient down to `max_grad_norm` if it is longer, step, and return its norm before that.

        Raises:
            NonFiniteUpdateError: if the gradient is not finite; nothing is changed then.
            RuntimeError: if the module's gradients are no longer views of the one vector.
        """
        self.check_gradients()
        norm = float(torch.linalg.vector_norm(self.gradient))
        if not math.isfinite(norm):
            raise NonFiniteUpdateError(f"the gradient's norm is {norm}")
        self.gradient.mul_(min(1.0, max_grad_norm / (norm + 1e-6)))
        beta1, beta2 = self.betas
        self.n_steps += 1
        self.first_moment.lerp_(self.gradient, 1.0 - beta1)
        self.second_moment.mul_(beta2).addcmul_(self.gradient, self.gradient, value=1.0 - beta2)
        size, correction = -self.learning_rate / (1.0 - beta1**self.n_steps), math.sqrt(1.0 - beta2**self.n_steps)
        vectors = (self.weights, self.first_moment, self.second_moment)
        for weights, first, second in zip(*(vector.split(AT_ONCE) for vector in vectors), strict=True):
            weights.addcdiv_(first, second.sqrt().div_(correction).add_(self.eps), value=size)
        return norm

    def restart(self) -> None:
        """Forget the moments, for when other weights begin to learn.

        Theirs are 0 still, and the correction for that has run out with the steps that were taken: their first steps
        would be several times too long.
        """
        self.first_moment.zero_()
        self.second_moment.zero_()
        self.n_steps = 0

    def state_dict(self) -> dict[str, Tensor]:
        """Moments and step count."""
        return {
            "first_moment": self.first_moment,
            "second_moment": self.second_moment,
            "n_steps": torch.tensor(self.n_steps),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            ValueError: if it is of other weights, or of nothing at all.
        """
        for name, own in self.state_dict().items():
            if name not in state or (state[name].shape, state[name].dtype) != (own.shape, own.dtype):
                raise ValueError(f"the optimizer's {name} is of another shape or kind")
        if int(state["n_steps"]) < 0:
            raise ValueError("the optimizer's count of steps is below 0")
        self.first_moment.copy_(state["first_moment"])
        self.second_moment.copy_(state["second_moment"])
        self.n_steps = int(state["n_steps"])
