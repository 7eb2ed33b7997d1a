"""Log-probabilities and entropies over a vocabulary, without holding the logits of a whole batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

KEPT_LOGITS = 2**16
"""Up to this many logits are kept from the forward to the backward pass; more are made twice."""

LOGITS_AT_ONCE = {"cpu": 2**21, "cuda": 2**26}
"""Logits held at a time where they are made twice: what stays in a processor's cache, or keeps a GPU busy."""

Head = Callable[[Tensor], Tensor]


def token_scores(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    temperature: float,
    n_vocabulary: int,
    *,
    with_entropy: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target and entropy of its distribution `[N]`, float32, from hidden states `[N, H]`.

    The logits of only so many places at a time are held, and made again in the backward pass, so the memory
    does not grow with the vocabulary. Without `with_entropy`, the entropy is None and costs nothing. An entropy
    that is only looked at costs no gradient.
    """
    at_once = LOGITS_AT_ONCE.get(hidden.device.type, LOGITS_AT_ONCE["cuda"])
    size = max(1, at_once // max(n_vocabulary, 1))
    if len(targets) * n_vocabulary <= KEPT_LOGITS:
        return _kept(hidden, head, targets, temperature, with_entropy)
    linear: Any = head if type(head) is nn.Linear else None  # a subclass may do more than the product
    if linear is not None and not linear._forward_hooks and not linear._forward_pre_hooks:
        arguments = (hidden, linear.weight, linear.bias, targets, temperature, size, with_entropy)
        scores, entropies = _Projected.apply(*arguments)
        return scores, entropies if with_entropy else None
    if len(targets) <= size:
        return _kept(hidden, head, targets, temperature, with_entropy)
    pieces = []
    for states, wanted in zip(hidden.split(size), targets.split(size), strict=True):
        arguments = (states, head, wanted, temperature, with_entropy)
        learns = torch.is_grad_enabled()
        pieces.append(checkpoint(_kept, *arguments, use_reentrant=False) if learns else _kept(*arguments))
    scores, entropies = zip(*pieces, strict=True)
    return torch.cat(scores), torch.cat(entropies) if with_entropy else None


def _kept(
    hidden: Tensor, head: Head, targets: Tensor, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    logits = head(hidden).float()
    if temperature != 1.0:
        logits = logits / temperature
    if with_entropy:
        return _FromLogits.apply(logits, targets)
    return -nn.functional.cross_entropy(logits, targets, reduction="none"), None


class _FromLogits(torch.autograd.Function):
    """log p(target) and the entropy of softmax(logits): one tensor is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        log_p = logits.log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        ctx.save_for_backward(log_p, targets, entropy)
        ctx.set_materialize_grads(False)
        return log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1), entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        log_p, targets, entropy = ctx.saved_tensors
        of_score, of_entropy = gradients
        return _gradient(log_p.clone(), targets, entropy, of_score, of_entropy), None


def _gradient(
    log_p: Tensor, targets: Tensor, entropy: Tensor, of_score: Tensor | None, of_entropy: Tensor | None
) -> Tensor:
    """Gradient with respect to logits `[N, V]`, in the place of `log_p`.

    d log p(target) / d logits = onehot(target) - p; dH / d logits = -p (log p + H).
    """
    if of_entropy is None:
        assert of_score is not None
        found = log_p.exp_().mul_(-of_score.unsqueeze(-1))
    else:
        p = log_p.exp()
        found = log_p.add_(entropy.unsqueeze(-1)).mul_(-of_entropy.unsqueeze(-1))
        found = (found if of_score is None else found.sub_(of_score.unsqueeze(-1))).mul_(p)
    if of_score is not None:
        found.scatter_add_(-1, targets.unsqueeze(-1), of_score.unsqueeze(-1))
    return found


class _Projected(torch.autograd.Function):
    """The same of a linear head, a piece of the rows at a time in the same memory, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        size: int,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        logits_of = _Logits(hidden, weight, bias, temperature, dtype, min(size, len(targets)))
        log_total = torch.empty(len(targets), device=hidden.device)
        scores, entropy = torch.empty_like(log_total), torch.zeros_like(log_total)
        exponentials = torch.empty_like(logits_of.buffer)
        for start in range(0, len(targets), size):
            rows = slice(start, start + size)
            logits = logits_of(rows)
            wanted = logits.gather(-1, targets[rows].unsqueeze(-1)).squeeze(-1)
            highest = logits.amax(-1, keepdim=True)
            p = torch.exp(logits.sub_(highest), out=exponentials[: len(logits)])
            total = p.sum(-1)
            log_total[rows] = highest.squeeze(-1) + total.log()
            scores[rows] = wanted - log_total[rows]
            if with_entropy:
                entropy[rows] = total.log() - logits.mul_(p).sum(-1) / total
        ctx.save_for_backward(hidden, weight, bias, targets, log_total, entropy)
        ctx.settings = (temperature, size, dtype)
        ctx.set_materialize_grads(False)
        return scores, entropy

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Any
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, log_total, entropy = ctx.saved_tensors
        temperature, size, dtype = ctx.settings
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        logits_of = _Logits(hidden, weight, bias, temperature, dtype, min(size, len(targets)))
        of_hidden = torch.empty_like(hidden) if wants_hidden else None
        of_weight = torch.zeros_like(weight) if wants_weight else None
        of_bias = torch.zeros_like(bias) if wants_bias else None
        for start in range(0, len(targets), size):
            rows = slice(start, start + size)
            log_p = logits_of(rows).sub_(log_total[rows].unsqueeze(-1))
            of_score, of_entropy = (None if each is None else each[rows] for each in gradients)
            gradient = _gradient(log_p, targets[rows], entropy[rows], of_score, of_entropy)
            if temperature != 1.0:
                gradient.div_(temperature)
            low = gradient.to(dtype)
            if of_hidden is not None:
                of_hidden[rows] = low @ logits_of.weight
            if of_weight is not None and dtype == of_weight.dtype:
                of_weight.addmm_(low.T, logits_of.hidden[rows])
            elif of_weight is not None:  # summed up in the precision of the weights
                of_weight += low.T @ logits_of.hidden[rows]
            if of_bias is not None:
                of_bias += gradient.sum(0)
        return of_hidden, of_weight, of_bias, None, None, None, None


class _Logits:
    """Logits of a piece of the rows, over the temperature, float32, written into the same memory each time."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, dtype: torch.dtype, size: int
    ) -> None:
        self.hidden, self.weight, self.bias, self.temperature = hidden.to(dtype), weight.to(dtype), bias, temperature
        self.buffer = torch.empty(size, len(weight), device=hidden.device)

    def __call__(self, rows: slice) -> Tensor:
        states = self.hidden[rows]
        logits = self.buffer[: len(states)]
        if self.weight.dtype == logits.dtype:
            torch.mm(states, self.weight.T, out=logits)
        else:
            logits.copy_(torch.mm(states, self.weight.T))
        if self.bias is not None:
            logits.add_(self.bias)
        return logits if self.temperature == 1.0 else logits.div_(self.temperature)
