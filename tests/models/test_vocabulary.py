"""Scores over a vocabulary: every way of holding the logits gives what float64 and autograd give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from proximo.models import vocabulary
from proximo.models.vocabulary import token_scores

N, WIDTH, VOCABULARY = 10, 4, 7


def inputs(*, bias: bool = False) -> tuple[Tensor, nn.Linear, Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCABULARY, bias=bias)
    return 3.0 * torch.randn(N, WIDTH), head, torch.randint(VOCABULARY, (N,))


def plainly(hidden: Tensor, head: nn.Linear, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """What is to be found, by torch's own Categorical."""
    distribution = torch.distributions.Categorical(logits=head(hidden) / temperature)
    return distribution.log_prob(targets), distribution.entropy()


@pytest.fixture(params=["kept", "in pieces", "in pieces, other head"])
def way(request: Any, monkeypatch: Any) -> str:
    if request.param != "kept":
        monkeypatch.setattr(vocabulary, "KEPT_LOGITS", 0)
        monkeypatch.setitem(vocabulary.LOGITS_AT_ONCE, "cpu", 3 * VOCABULARY)  # three rows of ten at a time
    return request.param


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("asked", [(1.0, 0.0), (0.0, 1.0), (1.0, 0.3)], ids=["score", "entropy", "both"])
def test_scores_entropies_and_gradients_are_those_of_float64(
    way: str, temperature: float, bias: bool, asked: tuple[float, float]
) -> None:
    hidden, head, targets = inputs(bias=bias)
    exact_head = nn.Linear(WIDTH, VOCABULARY, bias=bias).double()
    exact_head.load_state_dict({name: value.double() for name, value in head.state_dict().items()})
    weights = torch.randn(2, N).double() * torch.tensor(asked).double().unsqueeze(1)
    exact_hidden, hidden = hidden.double().requires_grad_(), hidden.requires_grad_()
    expected = plainly(exact_hidden, exact_head, targets, temperature)
    (weights[0] * expected[0] + weights[1] * expected[1]).sum().backward()

    called = head if way != "in pieces, other head" else lambda states: head(states)
    scores, entropies = token_scores(hidden, called, targets, temperature, VOCABULARY)
    assert entropies is not None
    total = (weights[0].float() * scores).sum() if asked[0] else torch.zeros(())
    total = total + (weights[1].float() * entropies).sum() if asked[1] else total
    total.backward()

    torch.testing.assert_close(scores.double(), expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropies.double(), expected[1], rtol=1e-5, atol=1e-6)
    assert exact_hidden.grad is not None
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad.double(), exact_hidden.grad, rtol=1e-4, atol=1e-6)
    for mine, exact in zip(head.parameters(), exact_head.parameters(), strict=True):
        assert mine.grad is not None
        assert exact.grad is not None
        torch.testing.assert_close(mine.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


def test_without_entropy_scores_and_gradients_are_the_same(way: str) -> None:
    found = []
    for with_entropy in (True, False):
        hidden, head, targets = inputs()
        hidden.requires_grad_()
        scores, entropies = token_scores(hidden, head, targets, 0.7, VOCABULARY, with_entropy=with_entropy)
        assert (entropies is not None) == with_entropy
        scores.square().sum().backward()
        found.append((scores.detach(), hidden.grad, head.weight.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_frozen_head_gets_no_gradient_and_its_input_does(way: str) -> None:
    hidden, head, targets = inputs()
    head.requires_grad_(False)
    hidden.requires_grad_()
    token_scores(hidden, head, targets, 1.0, VOCABULARY)[0].sum().backward()
    assert head.weight.grad is None
    assert hidden.grad is not None
    assert bool(hidden.grad.abs().sum() > 0)


def test_under_autocast_weights_get_float32_gradients_near_the_exact_ones(way: str) -> None:
    hidden, head, targets = inputs()
    expected, _ = plainly(hidden, head, targets, 1.0)
    expected.sum().backward()
    exact = head.weight.grad
    head.weight.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        scores, _ = token_scores(hidden, head, targets, 1.0, VOCABULARY)
    scores.sum().backward()
    assert scores.dtype == torch.float32
    assert head.weight.grad is not None
    assert head.weight.grad.dtype == torch.float32
    torch.testing.assert_close(scores, expected, rtol=0.05, atol=0.1)
    torch.testing.assert_close(head.weight.grad, exact, rtol=0.1, atol=0.15)


def test_logits_of_all_rows_are_never_held(monkeypatch: Any) -> None:
    """Nothing of the size of all logits is kept for the backward pass, whatever kind of head."""
    monkeypatch.setattr(vocabulary, "KEPT_LOGITS", 0)
    monkeypatch.setitem(vocabulary.LOGITS_AT_ONCE, "cpu", 3 * VOCABULARY)
    hidden, head, targets = inputs()
    sizes: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    for called in (head, lambda states: head(states)):
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            token_scores(hidden.requires_grad_(), called, targets, 1.0, VOCABULARY)
    assert max(sizes) < N * VOCABULARY


def test_enormous_logits_stay_finite(way: str) -> None:
    _, head, targets = inputs()
    hidden = torch.full((N, WIDTH), 1e4, requires_grad=True)
    scores, entropies = token_scores(hidden, head, targets, 1.0, VOCABULARY)
    assert entropies is not None
    scores.sum().backward()
    assert bool(torch.isfinite(scores).all() and torch.isfinite(entropies).all())
    assert hidden.grad is not None
    assert bool(torch.isfinite(hidden.grad).all())
