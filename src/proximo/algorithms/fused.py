"""PPO-Clip's epochs for plain perceptrons, with the gradient written out: no autograd, no graph, few operations.

Small networks spend nearly all their time on dispatching operations. This does the same arithmetic as
`update.run_epochs` with `PPO._loss`, which stays the reference: the same minibatches in the same order, and
parameters that agree with it to rounding (tests/algorithms/test_fused.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from proximo.algorithms.adam import NonFiniteUpdateError, Optimizer
from proximo.algorithms.update import Minibatch
from proximo.core.batch import minibatch_indices
from proximo.core.masked import rounding
from proximo.core.policy import PlainActorCritic


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


class _Steps(NamedTuple):
    """What one minibatch needs; all `[n]` but `inputs` `[n, F]` and `actions` `[n]` or `[n, A]`."""

    inputs: Tensor
    actions: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    returns: Tensor
    old_values: Tensor


class _PolicyStep(NamedTuple):
    """Gradient of the loss to the actor's outputs, and what the metrics are made of."""

    output_gradient: Tensor
    log_ratio: Tensor
    ratio: Tensor
    surrogate: Tensor
    entropy: Tensor


@torch.no_grad()
def run_fused_epochs(
    plain: PlainActorCritic,
    optimizer: Optimizer,
    everything: Minibatch,
    settings: ClipSettings,
    generator: torch.Generator,
) -> dict[str, float]:
    """Do what `update.run_epochs` does with the loss of PPO-Clip; see there for metrics, KL stop and errors."""
    batch = everything.batch
    assert everything.returns is not None
    assert batch.values is not None
    columns = _Steps(
        plain.inputs,
        batch.actions.flatten(0, 1),
        batch.log_probs.flatten(),
        everything.advantages.flatten(),
        everything.returns.flatten(),
        batch.values.flatten(),
    )
    kl_seen: list[Tensor] = []
    grad_norms: list[float] = []
    epoch: list[Tensor] = []
    stopped = False
    for _ in range(settings.n_epochs):
        epoch = []
        rows = minibatch_indices(len(columns.inputs), settings.batch_size, generator)
        order = torch.cat(rows).to(columns.inputs.device)
        shuffled = [column.index_select(0, order) for column in columns]
        offset = 0
        for part in rows:
            steps = _Steps(*(column.narrow(0, offset, len(part)) for column in shuffled))
            offset += len(part)
            metrics = _write_gradient(plain, steps, settings)
            if not math.isfinite(value_loss := float(metrics[2])):  # an overflown square has a finite gradient
                raise NonFiniteUpdateError(f"the value loss is {value_loss}")
            epoch.append(metrics)
            kl_seen.append(metrics[0])
            stopped = settings.target_kl is not None and float(metrics[0]) > 1.5 * settings.target_kl
            if stopped:
                break
            grad_norms.append(optimizer.clipped_step(settings.max_grad_norm))
        if stopped:
            break
    means = torch.stack(epoch).mean(0).tolist()
    names = ("approx_kl", "policy_loss", "value_loss", "entropy", "clip_fraction")
    return dict(zip(names, means, strict=True)) | {
        "approx_kl_max": float(torch.stack(kl_seen).max()),
        "grad_norm": sum(grad_norms) / max(len(grad_norms), 1),
        "n_updates": len(grad_norms),
        "kl_stopped": float(stopped),
    }


def _write_gradient(plain: PlainActorCritic, steps: _Steps, settings: ClipSettings) -> Tensor:
    """Write the gradient of eq. 9 (Schulman et al. 2017) into each parameter's `.grad`; return the metrics."""
    n = len(steps.inputs)
    advantages = steps.advantages
    if settings.normalize_advantages and n > 1:
        spread, mean = torch.std_mean(advantages)
        spread = torch.where(spread > rounding(advantages), spread + 1e-8, torch.inf)  # as in masked.whiten
        advantages = (advantages - mean).div_(spread)
    actor_hidden, outputs = _forward(plain.actor, steps.inputs, plain.activation)
    critic_hidden, values = _forward(plain.critic, steps.inputs, plain.activation)
    if plain.log_std is None:
        policy = _categorical(outputs, steps, advantages, settings)
    else:
        policy = _gaussian(outputs, plain.log_std, steps, advantages, settings)
    value_gradient, value_loss = _value(values.squeeze(1), steps, settings)
    _backward(plain.actor, actor_hidden, policy.output_gradient, plain.activation)
    _backward(plain.critic, critic_hidden, value_gradient.unsqueeze(1), plain.activation)
    return torch.stack(
        (
            (policy.log_ratio.expm1() - policy.log_ratio).mean(),
            -policy.surrogate.mean(),
            value_loss,
            policy.entropy.mean(),
            (policy.ratio.sub(1.0).abs_() > settings.clip_epsilon).to(values.dtype).mean(),
        )
    )


def _forward(layers: Sequence[tuple[Tensor, Tensor]], inputs: Tensor, activation: str) -> tuple[list[Tensor], Tensor]:
    """The input of every layer, and the output of the last."""
    hidden = [inputs]
    for weight, bias in layers[:-1]:
        before = torch.addmm(bias, hidden[-1], weight.t())
        hidden.append(before.tanh_() if activation == "tanh" else before.relu_())
    weight, bias = layers[-1]
    return hidden, torch.addmm(bias, hidden[-1], weight.t())


def _backward(layers: Sequence[tuple[Tensor, Tensor]], hidden: list[Tensor], gradient: Tensor, activation: str) -> None:
    """Write each layer's gradient, from the gradient to the last layer's output."""
    for index in range(len(layers) - 1, -1, -1):
        weight, bias = layers[index]
        torch.mm(gradient.t(), hidden[index], out=weight.grad)
        torch.sum(gradient, 0, out=bias.grad)
        if index == 0:
            return
        gradient = torch.mm(gradient, weight)
        if activation == "tanh":
            gradient = torch.ops.aten.tanh_backward(gradient, hidden[index])
        else:
            gradient = torch.ops.aten.threshold_backward(gradient, hidden[index], 0)


def _clipped(
    log_probs: Tensor, steps: _Steps, advantages: Tensor, settings: ClipSettings
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-ratio, ratio, clipped surrogate, and the gradient of its negative mean to the log-probabilities."""
    log_ratio = log_probs - steps.old_log_probs
    ratio = log_ratio.exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1.0 - settings.clip_epsilon, 1.0 + settings.clip_epsilon).mul_(advantages)
    surrogate = torch.minimum(unclipped, clipped)
    # Where the clipped term is the smaller one, the ratio is outside the band and the gradient is zero. A NaN is
    # never greater: it passes on, and is refused before the step.
    gradient = torch.where(unclipped > clipped, 0.0, unclipped).mul_(-1.0 / len(advantages))
    return log_ratio, ratio, surrogate, gradient


def _categorical(logits: Tensor, steps: _Steps, advantages: Tensor, settings: ClipSettings) -> _PolicyStep:
    """`d log p(a) / d logits = onehot(a) - p`; `d H / d logits = -p (log p + H)`."""
    log_p = logits.log_softmax(1)
    p = log_p.exp()
    entropy = -(p * log_p).sum(1)
    actions = steps.actions.unsqueeze(1)
    log_ratio, ratio, surrogate, gradient = _clipped(log_p.gather(1, actions).squeeze(1), steps, advantages, settings)
    weight = -gradient.unsqueeze(1)
    if settings.entropy_coef:
        weight = weight + (log_p + entropy.unsqueeze(1)).mul_(settings.entropy_coef / len(logits))
    to_logits = p.mul_(weight).scatter_add_(1, actions, gradient.unsqueeze(1))
    return _PolicyStep(to_logits, log_ratio, ratio, surrogate, entropy)


def _gaussian(means: Tensor, log_std: Tensor, steps: _Steps, advantages: Tensor, settings: ClipSettings) -> _PolicyStep:
    """`d log p / d mean = z / std`, `d log p / d log_std = z^2 - 1`, `d H / d log_std = 1`; z standardized."""
    inverse_std = torch.exp(-log_std)
    z = (steps.actions - means).mul_(inverse_std)
    z_squared = z.square()
    constant = log_std.sum() + 0.5 * _LOG_2_PI * log_std.numel()
    log_probs = z_squared.sum(1).mul_(-0.5).sub_(constant)
    log_ratio, ratio, surrogate, gradient = _clipped(log_probs, steps, advantages, settings)
    torch.mv(z_squared.sub_(1.0).t(), gradient, out=log_std.grad)
    if settings.entropy_coef:
        log_std.grad.sub_(settings.entropy_coef)  # type: ignore[union-attr]
    entropy = constant + 0.5 * log_std.numel()
    return _PolicyStep(z.mul_(inverse_std).mul_(gradient.unsqueeze(1)), log_ratio, ratio, surrogate, entropy)


_LOG_2_PI = 1.8378770664093453


def _value(values: Tensor, steps: _Steps, settings: ClipSettings) -> tuple[Tensor, Tensor]:
    """Gradient of value_coef times the value loss to the values, and the loss itself."""
    error = values - steps.returns
    squared = error.square()
    if settings.value_clip_epsilon is not None:
        limit = settings.value_clip_epsilon
        change = values - steps.old_values
        clipped_error = steps.old_values + change.clamp(-limit, limit) - steps.returns
        clipped_squared = clipped_error.square()
        inside = change.abs_() <= limit
        error = torch.where(squared < clipped_squared, torch.where(inside, clipped_error, 0.0), error)
        squared = torch.maximum(squared, clipped_squared)
    return error.mul(2.0 * settings.value_coef / len(values)), squared.mean()
