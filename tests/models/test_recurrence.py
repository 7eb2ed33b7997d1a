"""Recurrences against torch's own layers over each episode by itself; derivatives against differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from proximo.models.recurrence import gru, lstm, plain_gru, plain_lstm

T, B, F, H = 5, 3, 2, 2


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + math.prod(shape)), dtype=torch.float64)


def episodes() -> Tensor:
    """Row 0 goes on, row 1 begins anew twice in a row, row 2 at the first and the last step."""
    keep = torch.ones(T, B, dtype=torch.float64)
    keep[2, 1] = keep[3, 1] = keep[0, 2] = keep[T - 1, 2] = 0
    return keep


def by_torch(layer: nn.LSTM | nn.GRU, inputs: Tensor, state: tuple[Tensor, ...], keep: Tensor) -> Tensor:
    """Torch's layer over one step at a time, row by row, with a state of zeros where an episode begins."""
    rows = []
    for b in range(inputs.shape[1]):
        own = tuple(part[b].view(1, 1, -1) for part in state)
        steps = []
        for t in range(len(inputs)):
            own = tuple(part * keep[t, b] for part in own)
            out, own = layer(inputs[t, b].view(1, 1, -1), own if isinstance(layer, nn.LSTM) else own[0])
            own = own if isinstance(layer, nn.LSTM) else (own,)
            steps.append(out.flatten())
        rows.append(torch.stack(steps))
    return torch.stack(rows, 1)


def test_one_step_of_an_lstm_by_hand():
    """Gates of 0 are open by half and tanh(0) is 0, so half of the cell stays; the output is half of its tanh."""
    out, cell = lstm(torch.zeros(1, 1, 4), torch.zeros(4, 1), torch.ones(1, 1), torch.tensor([[0.8]]), torch.ones(1, 1))
    assert cell.item() == pytest.approx(0.4)
    assert out.item() == pytest.approx(0.5 * math.tanh(0.4))


def test_one_step_of_a_gru_by_hand():
    """r = z = 1/2, s = 2 by its bias: n = tanh(0 + 1/2 * 2), and the new state is the middle of n and the old one."""
    bias, before = torch.tensor([0.0, 0.0, 2.0]), torch.tensor([[0.6]])
    out = gru(torch.zeros(1, 1, 3), torch.zeros(3, 1), bias, before, torch.ones(1, 1))
    assert out.item() == pytest.approx(0.5 * math.tanh(1.0) + 0.3)


@pytest.mark.parametrize("compiled", [False, True])
class TestLstm:
    def given(self) -> tuple[Tensor, ...]:
        tensors = some(T, B, 4 * H), some(4 * H, H), some(B, H), some(B, H, seed=1)
        return tuple(tensor.requires_grad_() for tensor in tensors)

    def test_is_torchs_over_each_episode(self, compiled):
        layer = nn.LSTM(F, H).double()
        inputs, hidden, cell, keep = some(T, B, F), some(B, H), some(B, H, seed=1), episodes()
        gates = inputs @ layer.weight_ih_l0.T + layer.bias_ih_l0 + layer.bias_hh_l0
        outputs, _ = lstm(gates, layer.weight_hh_l0, hidden, cell, keep, compiled=compiled)
        torch.testing.assert_close(outputs, by_torch(layer, inputs, (hidden, cell), keep))

    def test_derivatives(self, compiled):
        assert torch.autograd.gradcheck(lambda *given: lstm(*given, episodes(), compiled=compiled), self.given())

    def test_derivatives_of_derivatives(self, compiled):
        assert torch.autograd.gradgradcheck(lambda *given: lstm(*given, episodes(), compiled=compiled), self.given())

    def test_written_out_and_plain_are_one(self, compiled):
        given, keep = self.given(), episodes()
        for one, other in zip(lstm(*given, keep, compiled=compiled), plain_lstm(*given, keep), strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("compiled", [False, True])
class TestGru:
    def given(self) -> tuple[Tensor, ...]:
        tensors = some(T, B, 3 * H), some(3 * H, H), some(3 * H), some(B, H)
        return tuple(tensor.requires_grad_() for tensor in tensors)

    def test_is_torchs_over_each_episode(self, compiled):
        layer = nn.GRU(F, H).double()
        inputs, hidden, keep = some(T, B, F), some(B, H), episodes()
        gates = inputs @ layer.weight_ih_l0.T + layer.bias_ih_l0
        outputs = gru(gates, layer.weight_hh_l0, layer.bias_hh_l0, hidden, keep, compiled=compiled)
        torch.testing.assert_close(outputs, by_torch(layer, inputs, (hidden,), keep))

    def test_derivatives(self, compiled):
        assert torch.autograd.gradcheck(lambda *given: gru(*given, episodes(), compiled=compiled), self.given())

    def test_derivatives_of_derivatives(self, compiled):
        assert torch.autograd.gradgradcheck(lambda *given: gru(*given, episodes(), compiled=compiled), self.given())

    def test_written_out_and_plain_are_one(self, compiled):
        given, keep = self.given(), episodes()
        torch.testing.assert_close(gru(*given, keep, compiled=compiled), plain_gru(*given, keep))


def test_nothing_goes_over_the_start_of_an_episode():
    """Neither forwards nor backwards: what came before changes nothing, and learns nothing from what came after."""
    keep = torch.ones(T, 1, dtype=torch.float64)
    keep[2] = 0
    gates = some(T, 1, 4 * H).requires_grad_()
    outputs, _ = lstm(gates, some(4 * H, H), some(1, H), some(1, H), keep)
    outputs[2:].sum().backward()
    assert gates.grad is not None
    assert (gates.grad[:2] == 0).all()
    assert (gates.grad[3:] != 0).all()
