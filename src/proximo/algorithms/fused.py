"""PPO-Clip's epochs for plain perceptrons on the CPU, with the gradient written out in NumPy: no autograd, no graph.

Small networks spend nearly all their time on dispatching operations. This does the same arithmetic as
`update.run_epochs` with `PPO._loss`, which stays the reference: the same minibatches in the same order, and
parameters that agree with it to rounding (tests/algorithms/test_fused.py). `compiled.py` does it in machine code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from proximo.algorithms.adam import FlatAdam, NonFiniteUpdateError
from proximo.algorithms.update import Minibatch
from proximo.core.batch import minibatch_indices
from proximo.core.policy import PlainActorCritic

ROUNDING = 16
"""Times the float's precision: advantages that spread by less of their size differ by rounding alone (as
`masked.rounding` has it)."""


class ClipSettings(NamedTuple):
    """The settings of `ppo.PPO` of the same names."""

    n_epochs: int
    batch_size: int
    clip_epsilon: float
    normalize_advantages: bool
    value_coef: float
    value_clip_epsilon: float | None
    entropy_coef: float
    max_grad_norm: float
    target_kl: float | None


class Columns(NamedTuple):
    """What one minibatch needs; all `[n]` but `inputs` `[n, F]` and `actions` `[n]` or `[n, A]`."""

    inputs: np.ndarray
    actions: np.ndarray
    old_log_probs: np.ndarray
    advantages: np.ndarray
    returns: np.ndarray
    old_values: np.ndarray


METRICS = ("approx_kl", "policy_loss", "value_loss", "entropy", "clip_fraction")
Metrics = tuple[float, float, float, float, float]


def can_fuse(plain: PlainActorCritic, optimizer: object) -> bool:
    """Whether the networks are all that a `FlatAdam` on the CPU optimizes, the critic's weights after the actor's."""
    if not isinstance(optimizer, FlatAdam) or optimizer.weights.device.type != "cpu":
        return False
    actor, critic = parameters_of(plain.actor), parameters_of(plain.critic)
    actor += [] if plain.log_std is None else [plain.log_std]
    n_weights = sum(parameter.numel() for parameter in actor + critic)
    in_order = max(map(Tensor.data_ptr, actor)) < min(map(Tensor.data_ptr, critic))
    return n_weights == optimizer.weights.numel() and in_order


def run_fused_epochs(
    plain: PlainActorCritic,
    optimizer: FlatAdam,
    everything: Minibatch,
    settings: ClipSettings,
    generator: torch.Generator,
) -> dict[str, float]:
    """Do what `update.run_epochs` does with the loss of PPO-Clip; see there for metrics, KL stop and errors."""
    optimizer.check_gradients()
    columns = columns_of(plain, everything, optimizer)
    networks, vectors = _Networks.of(plain), views(*vectors_of(optimizer))
    seen: list[Metrics] = []
    grad_norms: list[float] = []
    first_of_epoch, stopped = 0, False
    with np.errstate(all="ignore"):  # what is not finite is refused below
        for _ in range(settings.n_epochs):
            first_of_epoch = len(seen)
            rows = [part.numpy() for part in minibatch_indices(len(columns.inputs), settings.batch_size, generator)]
            for part in rows:
                steps = Columns(*[column.take(part, 0) for column in columns])
                seen.append(networks.write_gradient(steps, settings))
                approx_kl, policy_loss, value_loss = seen[-1][:3]
                if not math.isfinite(policy_loss + value_loss):  # an overflown square has a finite gradient
                    raise bad_loss(policy_loss, value_loss)
                stopped = settings.target_kl is not None and approx_kl > 1.5 * settings.target_kl
                if stopped:
                    break
                if not math.isfinite(approx_kl):  # where the advantage is above 0 the surrogate hides it
                    raise bad_gradient(0.0, approx_kl)
                grad_norms.append(_clipped_step(optimizer, vectors, settings.max_grad_norm))
            if stopped:
                break
    return summary(np.array(seen), first_of_epoch, grad_norms, stopped)


def bad_loss(policy_loss: float, value_loss: float) -> NonFiniteUpdateError:
    """Say which of the two losses is not finite."""
    name, loss = ("policy", policy_loss) if math.isfinite(value_loss) else ("value", value_loss)
    return NonFiniteUpdateError(f"the {name} loss is {loss}")


def bad_gradient(norm: float, approx_kl: float) -> NonFiniteUpdateError:
    """Say what makes a gradient useless: its own norm, or a ratio that is infinite."""
    if math.isfinite(norm):
        return NonFiniteUpdateError(f"the KL to the policy of before is {approx_kl}: a probability ratio overflows")
    return NonFiniteUpdateError(f"the gradient's norm is {norm}")


def columns_of(plain: PlainActorCritic, everything: Minibatch, optimizer: FlatAdam) -> Columns:
    """Every step of a rollout as a row, in the kind of float that the weights are of."""
    batch, dtype = everything.batch, optimizer.weights.dtype
    assert everything.returns is not None
    assert batch.values is not None
    actions = batch.actions.flatten(0, 1)
    if plain.log_std is not None:
        actions = actions.flatten(1).to(dtype)
    numbers = (batch.log_probs, everything.advantages, everything.returns, batch.values)
    columns = (plain.inputs.to(dtype), actions, *(column.flatten().to(dtype) for column in numbers))
    return Columns(*(column.detach().contiguous().numpy() for column in columns))


def summary(seen: np.ndarray, first_of_epoch: int, grad_norms: list[float], stopped: bool) -> dict[str, float]:
    """The metrics of an update: means over the last epoch that was begun, and what was counted over all."""
    return dict(zip(METRICS, seen[first_of_epoch:].mean(0).tolist(), strict=True)) | {
        "approx_kl_max": float(seen[:, 0].max()),
        "grad_norm": sum(grad_norms) / max(len(grad_norms), 1),
        "n_updates": len(grad_norms),
        "kl_stopped": float(stopped),
    }


class _Layer(NamedTuple):
    """Views of the optimizer's vectors."""

    weight: np.ndarray
    bias: np.ndarray
    weight_gradient: np.ndarray
    bias_gradient: np.ndarray


class _Networks(NamedTuple):
    actor: list[_Layer]
    critic: list[_Layer]
    log_std: np.ndarray | None
    log_std_gradient: np.ndarray | None
    is_tanh: bool

    @staticmethod
    def of(plain: PlainActorCritic) -> _Networks:
        """Views of the live weights and their gradients."""
        actor, critic = (
            [_Layer(*views(weight, bias), *views(weight.grad, bias.grad)) for weight, bias in layers]
            for layers in (plain.actor, plain.critic)
        )
        log_std = None if plain.log_std is None else views(plain.log_std)[0]
        gradient = None if plain.log_std is None else views(plain.log_std.grad)[0]
        return _Networks(actor, critic, log_std, gradient, plain.activation == "tanh")

    def write_gradient(self, steps: Columns, settings: ClipSettings) -> Metrics:
        """Write the gradient of eq. 9 (Schulman et al. 2017) into the optimizer's; return the metrics."""
        advantages = _normalized(steps.advantages) if settings.normalize_advantages else steps.advantages
        hidden, outputs = _forward(self.actor, steps.inputs, self.is_tanh)
        policy = _categorical if self.log_std is None else self._gaussian
        to_outputs, log_ratio, surrogate, entropy = policy(outputs, steps, advantages, settings)
        _backward(self.actor, hidden, to_outputs, self.is_tanh)
        hidden, values = _forward(self.critic, steps.inputs, self.is_tanh)
        to_values, value_loss = _value(values[:, 0], steps, settings)
        _backward(self.critic, hidden, to_values[:, None], self.is_tanh)
        change = np.expm1(log_ratio)
        clip_fraction = np.count_nonzero(np.abs(change) > settings.clip_epsilon) / len(change)
        n = len(change)
        return float((change - log_ratio).sum()) / n, -float(surrogate.sum()) / n, value_loss, entropy, clip_fraction

    def _gaussian(
        self, means: np.ndarray, steps: Columns, advantages: np.ndarray, settings: ClipSettings
    ) -> _PolicyStep:
        """`d log p / d mean = z / std`, `d log p / d log_std = z^2 - 1`, `d H / d log_std = 1`; z standardized."""
        assert self.log_std is not None
        assert self.log_std_gradient is not None
        inverse_std = np.exp(-self.log_std)
        z = (steps.actions - means) * inverse_std
        squares = z * z
        constant = self.log_std.sum() + 0.5 * _LOG_2_PI * len(self.log_std)
        log_ratio = -0.5 * squares.sum(1) - constant - steps.old_log_probs
        surrogate, gradient = _clipped(log_ratio, advantages, settings.clip_epsilon)
        np.subtract(gradient @ (squares - 1), settings.entropy_coef, out=self.log_std_gradient)
        to_means = z * inverse_std * gradient[:, None]
        return to_means, log_ratio, surrogate, float(constant + 0.5 * len(self.log_std))


_PolicyStep = tuple[np.ndarray, np.ndarray, np.ndarray, float]
"""Gradient to the actor's outputs, log-ratio, clipped surrogate, mean entropy."""

_LOG_2_PI = 1.8378770664093453


def parameters_of(layers: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Weights and biases, layer by layer."""
    return [parameter for layer in layers for parameter in layer]


def views(*tensors: Tensor | None) -> list[np.ndarray]:
    """Views of tensors that are there."""
    return [tensor.detach().numpy() for tensor in tensors if tensor is not None]


def _normalized(advantages: np.ndarray) -> np.ndarray:
    """As `masked.whiten`."""
    if len(advantages) < 2:
        return advantages
    centered = advantages - advantages.sum() / len(advantages)
    spread = math.sqrt(float(np.dot(centered, centered)) / (len(advantages) - 1))
    smallest = ROUNDING * np.finfo(advantages.dtype).eps * float(np.abs(advantages).max())
    return centered / advantages.dtype.type(math.inf if spread <= smallest else spread + 1e-8)


def _forward(layers: Sequence[_Layer], inputs: np.ndarray, is_tanh: bool) -> tuple[list[np.ndarray], np.ndarray]:
    """The input of every layer, and the output of the last."""
    hidden = [inputs]
    for layer in layers[:-1]:
        after = hidden[-1] @ layer.weight.T
        after += layer.bias
        hidden.append(np.tanh(after, out=after) if is_tanh else np.maximum(after, 0, out=after))
    outputs = hidden[-1] @ layers[-1].weight.T
    outputs += layers[-1].bias
    return hidden, outputs


def _backward(layers: Sequence[_Layer], hidden: list[np.ndarray], gradient: np.ndarray, is_tanh: bool) -> None:
    """Write each layer's gradient, from the gradient to the last layer's output."""
    ones = np.ones(len(gradient), gradient.dtype)
    for index in range(len(layers) - 1, -1, -1):
        layer, before = layers[index], hidden[index]
        np.matmul(gradient.T, before, out=layer.weight_gradient)
        np.matmul(ones, gradient, out=layer.bias_gradient)  # a third of the time of sum(0)
        if index == 0:
            return
        gradient = gradient @ layer.weight
        if is_tanh:
            slope = before * before
            gradient *= np.subtract(1, slope, out=slope)
        else:
            gradient *= before > 0


def _clipped(log_ratio: np.ndarray, advantages: np.ndarray, clip_epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """Clipped surrogate, and the gradient of its negative mean to the log-probabilities."""
    ratio = np.exp(log_ratio)
    unclipped = ratio * advantages
    clipped = np.minimum(np.maximum(ratio, 1.0 - clip_epsilon), 1.0 + clip_epsilon) * advantages
    # Where the clipped term is the smaller one, the ratio is outside the band and the gradient is zero. A NaN is
    # never greater: it passes on, and is refused before the step.
    gradient = np.where(unclipped > clipped, 0, unclipped) * (-1.0 / len(advantages))
    return np.minimum(unclipped, clipped), gradient.astype(advantages.dtype, copy=False)


def _categorical(logits: np.ndarray, steps: Columns, advantages: np.ndarray, settings: ClipSettings) -> _PolicyStep:
    """`d log p(a) / d logits = onehot(a) - p`; `d H / d logits = -p (log p + H)`."""
    log_p = np.ascontiguousarray(logits.T)  # [k, n]: NumPy is slow at sums of a few numbers in a row
    log_p -= log_p.max(0)
    p = np.exp(log_p)
    log_p -= np.log(p.sum(0))
    np.exp(log_p, out=p)
    entropy = -(p * log_p).sum(0)
    taken = steps.actions, np.arange(len(logits))
    log_ratio = log_p[taken] - steps.old_log_probs
    surrogate, gradient = _clipped(log_ratio, advantages, settings.clip_epsilon)
    weight = -gradient
    if settings.entropy_coef:
        weight = weight + (log_p + entropy) * (settings.entropy_coef / len(logits))
    p *= weight
    p[taken] += gradient
    return p.T, log_ratio, surrogate, float(entropy.sum()) / len(logits)


def _value(values: np.ndarray, steps: Columns, settings: ClipSettings) -> tuple[np.ndarray, float]:
    """Gradient of value_coef times the value loss to the values, and the loss itself."""
    error = values - steps.returns
    squared = error * error
    if settings.value_clip_epsilon is not None:
        limit = settings.value_clip_epsilon
        change = values - steps.old_values
        clipped_error = steps.old_values + np.clip(change, -limit, limit) - steps.returns
        clipped_squared = clipped_error * clipped_error
        inside = np.where(np.abs(change) <= limit, clipped_error, 0)
        error = np.where(squared < clipped_squared, inside, error)
        squared = np.maximum(squared, clipped_squared)
    return error * (2.0 * settings.value_coef / len(values)), float(squared.sum()) / len(values)


def vectors_of(optimizer: FlatAdam) -> tuple[Tensor, ...]:
    """Weights, gradient, first and second moments."""
    return optimizer.weights, optimizer.gradient, optimizer.first_moment, optimizer.second_moment


def _clipped_step(optimizer: FlatAdam, vectors: Sequence[np.ndarray], max_grad_norm: float) -> float:
    """`FlatAdam.clipped_step` in NumPy, which takes a third of torch's time on so few numbers."""
    weights, gradient, first, second = vectors
    norm = math.sqrt(float(np.dot(gradient, gradient)))
    if not math.isfinite(norm):
        raise NonFiniteUpdateError(f"the gradient's norm is {norm}")
    gradient *= min(1.0, max_grad_norm / (norm + 1e-6))
    beta1, beta2 = optimizer.betas
    optimizer.n_steps += 1
    change = gradient - first
    change *= 1.0 - beta1
    first += change
    np.multiply(gradient, gradient, out=change)
    change *= 1.0 - beta2
    second *= beta2
    second += change
    np.sqrt(second, out=change)
    change *= 1.0 / math.sqrt(1.0 - beta2**optimizer.n_steps)
    change += optimizer.eps
    np.divide(first, change, out=change)
    change *= optimizer.learning_rate / (1.0 - beta1**optimizer.n_steps)
    weights -= change
    return norm
