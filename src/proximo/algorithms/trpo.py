"""Trust region policy optimization (Schulman et al. 2015): the natural gradient, as far as the KL constraint allows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from proximo.algorithms.adam import NonFiniteUpdateError, Optimizer
from proximo.algorithms.ppo import Schedule
from proximo.algorithms.update import Minibatch, estimated, n_rows_of
from proximo.core.batch import Batch, minibatch_indices
from proximo.core.distributions import Distribution
from proximo.core.losses import value_loss
from proximo.core.masked import masked_mean, whiten
from proximo.core.policy import Policy
from proximo.errors import in_range, one_of


class SplitPolicy(Policy, Protocol):
    """A policy that says which of its weights the distribution hangs on, and which the values alone."""

    def policy_weights(self) -> list[Tensor]:
        """Weights that change what is done."""
        ...

    def critic_weights(self) -> list[Tensor]:
        """Weights that change the values and nothing else."""
        ...


@dataclass(frozen=True)
class TRPO:
    """Settings of TRPO, and the update that follows them."""

    max_kl: float = 0.01
    """The mean KL(old || new) of one update, in nats, is at most this (delta of the paper's eq. 14)."""
    conjugate_gradient_steps: int = 10
    """Steps of the conjugate gradient for the direction; each needs one Fisher-vector product."""
    conjugate_gradient_damping: float = 0.1
    """Times the vector itself, added to each Fisher-vector product."""
    line_search_steps: int = 10
    """So many lengths of the step are tried, the first as long as the constraint allows to second order."""
    line_search_factor: float = 0.8
    """Each is this times the one before."""
    learning_rate: float = 1e-3
    """Step size of Adam, for the critic alone."""
    learning_rate_schedule: Schedule = "constant"
    """`linear` brings the learning rate down to 0 at the end of the run."""
    n_epochs: int = 10
    """Passes of the critic over each rollout."""
    batch_size: int = 64
    """Steps per minibatch of the critic."""
    gamma: float = 0.99
    """Discount per step."""
    gae_lambda: float = 0.95
    """Bias against variance of the advantages: 0 is the one-step TD error, 1 is Monte Carlo minus value."""
    normalize_advantages: bool = True
    """Shift and scale the advantages of the rollout to mean 0 and standard deviation 1."""
    max_grad_norm: float = 0.5
    """The critic's gradient is scaled down to this norm."""

    def __post_init__(self) -> None:
        """Refuse impossible settings.

        Raises:
            UserError: naming the setting, its value, what is possible, and a usual value.
        """
        in_range("max_kl", self.max_kl, above=0.0, usual="0.01")
        steps = self.conjugate_gradient_steps
        in_range("conjugate_gradient_steps", steps, at_least=1, at_most=10**4, whole=True, usual="10")
        in_range("conjugate_gradient_damping", self.conjugate_gradient_damping, at_least=0.0, usual="0.1")
        in_range("line_search_steps", self.line_search_steps, at_least=1, at_most=10**4, whole=True, usual="10")
        in_range("line_search_factor", self.line_search_factor, above=0.0, below=1.0, usual="0.8")
        in_range("learning_rate", self.learning_rate, above=0.0, usual="0.001")
        one_of("learning_rate_schedule", self.learning_rate_schedule, ("constant", "linear"))
        in_range("n_epochs", self.n_epochs, at_least=1, whole=True, usual="10")
        in_range("batch_size", self.batch_size, at_least=1, whole=True, usual="64")
        in_range("gamma", self.gamma, at_least=0.0, at_most=1.0, usual="0.99")
        in_range("gae_lambda", self.gae_lambda, at_least=0.0, at_most=1.0, usual="0.95")
        in_range("max_grad_norm", self.max_grad_norm, above=0.0, usual="0.5")

    def at(self, remaining: float) -> TRPO:
        """Return the settings in force when `remaining` (1 at the start, 0 at the end) of the run is left."""
        rate_factor = max(remaining, 1e-8) if self.learning_rate_schedule == "linear" else 1.0
        return replace(self, learning_rate=self.learning_rate * rate_factor)

    def update(
        self, policy: SplitPolicy, optimizer: Optimizer, batch: Batch, generator: torch.Generator
    ) -> dict[str, float]:
        """Improve `policy` in place on one rollout; return metrics by their names.

        The policy takes one step, or none where no length of it is better within the constraint
        (`line_search_steps_taken` is 0 then); the critic is fitted afterwards. Where both see images through one
        encoder, the policy alone teaches it, or the critic would move the policy.

        Raises:
            NonFiniteUpdateError: if the gradient is not finite; the weights stay finite.
        """
        everything, quality = estimated(policy, batch, gamma=self.gamma, gae_lambda=self.gae_lambda)
        if self.normalize_advantages:
            everything = replace(everything, advantages=whiten(everything.advantages, everything.batch.mask))
        metrics = self._step(policy, everything)
        optimizer.learning_rate = self.learning_rate
        metrics |= self._fit_critic(policy, optimizer, everything, generator)
        return metrics | quality

    def _step(self, policy: SplitPolicy, everything: Minibatch) -> dict[str, float]:
        """Take the step of the policy (Schulman et al. 2015, appendix C)."""
        weights, batch = policy.policy_weights(), everything.batch
        with torch.no_grad():
            old = policy.evaluate(batch).distribution
        assert old is not None
        old = old.frozen()
        new = policy.evaluate(batch)
        objective = _objective(new.log_probs, everything)
        gradient = _flat(torch.autograd.grad(objective, weights, allow_unused=True), weights)
        norm = float(gradient.norm())
        before, entropy = float(objective.detach()), float(masked_mean(new.entropy.detach(), batch.mask))
        if not math.isfinite(norm) or not math.isfinite(before):
            raise NonFiniteUpdateError(f"the gradient's norm is {norm}, the objective {before}")
        taken, kl, after = 0, 0.0, before
        if norm > 0:
            product = fisher_vector_product(policy, batch, old, weights, self.conjugate_gradient_damping)
            direction = conjugate_gradient(product, gradient, self.conjugate_gradient_steps)
            curvature = float(direction @ product(direction))
            if curvature > 0:
                longest = math.sqrt(2.0 * self.max_kl / curvature) * direction
                taken, kl, after = self._line_search(policy, everything, old, weights, longest, before)
        return {
            "policy_loss": -after,
            "entropy": entropy,
            "approx_kl": kl,
            "approx_kl_max": kl,
            "kl_old_new": kl,
            "grad_norm": norm,
            "line_search_steps_taken": float(taken),
        }

    def _line_search(
        self,
        policy: SplitPolicy,
        everything: Minibatch,
        old: Distribution,
        weights: list[Tensor],
        longest: Tensor,
        before: float,
    ) -> tuple[int, float, float]:
        """Leave the weights at the first length that is better and within the constraint, or where they were.

        Returns:
            How many were tried (0: none was good), the KL, and the objective.
        """
        start = _flat([weight.detach() for weight in weights], weights)
        for tried in range(self.line_search_steps):
            _set(weights, start + self.line_search_factor**tried * longest)
            with torch.no_grad():
                new = policy.evaluate(everything.batch)
                assert new.distribution is not None
                kl = float(masked_mean(old.kl(new.distribution), everything.batch.mask))
                after = float(_objective(new.log_probs, everything))
            if kl <= self.max_kl and after > before:  # False for a NaN
                return tried + 1, kl, after
        _set(weights, start)
        return 0, 0.0, before

    def _fit_critic(
        self, policy: SplitPolicy, optimizer: Optimizer, everything: Minibatch, generator: torch.Generator
    ) -> dict[str, float]:
        """Epochs of minibatches for the values alone; Adam leaves weights without any gradient where they are."""
        weights, losses = policy.critic_weights(), []
        n_rows = n_rows_of(everything.batch, self.batch_size)
        for _ in range(self.n_epochs):
            losses = []
            for rows in minibatch_indices(len(everything.batch.mask), n_rows, generator):
                minibatch = everything[rows.to(everything.advantages.device)]
                values = policy.evaluate(minibatch.batch).values
                assert values is not None
                assert minibatch.returns is not None
                loss = value_loss(values, minibatch.returns, minibatch.batch.mask)
                if not math.isfinite(float(loss.detach())):
                    raise NonFiniteUpdateError(f"the value loss is {float(loss.detach())}")
                optimizer.zero_grad()
                for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                    assert weight.grad is not None
                    weight.grad.copy_(gradient)
                optimizer.clipped_step(self.max_grad_norm)
                losses.append(loss.detach())
        return {"value_loss": float(torch.stack(losses).mean()), "n_updates": float(self.n_epochs * len(losses))}


def _objective(log_probs: Tensor, everything: Minibatch) -> Tensor:
    """`mean[ratio * A]`, to be maximized (eq. 14)."""
    mask = everything.batch.mask
    log_ratio = torch.where(mask, log_probs - everything.batch.log_probs, 0.0)
    return masked_mean(log_ratio.exp() * torch.where(mask, everything.advantages, 0.0), mask)


def fisher_vector_product(
    policy: Policy, batch: Batch, old: Distribution, weights: list[Tensor], damping: float
) -> Callable[[Tensor], Tensor]:
    """Return v -> (F + damping) v, F being the Hessian of the mean KL(old || new) where both are the same."""
    new = policy.evaluate(batch).distribution
    assert new is not None
    kl = masked_mean(old.kl(new), batch.mask)
    slopes = _flat(torch.autograd.grad(kl, weights, create_graph=True, allow_unused=True), weights)

    def product(vector: Tensor) -> Tensor:
        along = slopes @ vector
        curved = torch.autograd.grad(along, weights, retain_graph=True, allow_unused=True)
        return _flat(curved, weights) + damping * vector

    return product


def conjugate_gradient(product: Callable[[Tensor], Tensor], wanted: Tensor, n_steps: int) -> Tensor:
    """Solve `product(x) = wanted` for a positive definite product, from x = 0, in so many steps at most."""
    solution = torch.zeros_like(wanted)
    residual = direction = wanted
    squares = residual @ residual
    first = float(squares)
    for _ in range(n_steps):
        if float(squares) <= 1e-10 * first:
            break
        image = product(direction)
        curvature = float(direction @ image)
        if not curvature > 0:  # rounding; what there is so far is a direction of ascent all the same
            break
        step = squares / curvature
        solution = solution + step * direction
        residual = residual - step * image
        before, squares = squares, residual @ residual
        direction = residual + (squares / before) * direction
    return solution


def _flat(tensors: object, weights: list[Tensor]) -> Tensor:
    """One vector; zeros for a weight without a gradient."""
    pieces = [
        torch.zeros_like(weight).flatten() if tensor is None else tensor.flatten()
        for tensor, weight in zip(tensors, weights, strict=True)  # type: ignore[call-overload]
    ]
    return torch.cat(pieces)


def _set(weights: list[Tensor], vector: Tensor) -> None:
    """Write a vector into the weights where they are: an optimizer has views of the same memory."""
    with torch.no_grad():
        for weight, piece in zip(weights, vector.split([weight.numel() for weight in weights]), strict=True):
            weight.copy_(piece.view_as(weight))
