"""LSTM and GRU over whole rows of steps, with episodes that begin within them; the gradient is written out.

Torch's own layers run over rows that are whole, and take an operation at a time, each with its own place in the graph,
where rows are cut. Here the state is set to zero where `keep` says so, and the backward pass is a few products per step
with all that does not depend on the step before worked out for all steps at once.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function


def lstm(
    gates: Float[Tensor, "T B G"],
    weight: Float[Tensor, "G H"],
    hidden: Float[Tensor, "B H"],
    cell: Float[Tensor, "B H"],
    keep: Float[Tensor, "T B"],
) -> tuple[Float[Tensor, "T B H"], Float[Tensor, "T B H"]]:
    """Long short-term memory (Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000).

        i, f, g, o = gates_t + weight h      where h, c are those of the step before, times keep_t
        c_t = sigmoid(f) c + sigmoid(i) tanh(g)
        h_t = sigmoid(o) tanh(c_t)

    Args:
        gates: what the inputs add to the four gates, both biases among it, in torch's order.
        weight: from the hidden state to the gates.
        hidden: h before the first step.
        cell: c before the first step.
        keep: 0 where an episode begins, 1 elsewhere.

    Returns:
        h and c after every step.
    """
    return _Lstm.apply(gates, weight, hidden, cell, keep)


def gru(
    gates: Float[Tensor, "T B G"],
    weight: Float[Tensor, "G H"],
    bias: Float[Tensor, " G"],
    hidden: Float[Tensor, "B H"],
    keep: Float[Tensor, "T B"],
) -> Float[Tensor, "T B H"]:
    """Gated recurrent unit (Cho et al. 2014), with the reset gate after the product, as torch and cuDNN have it.

        p, q, s = weight h + bias            where h is that of the step before, times keep_t
        r, z = sigmoid(gates_t[r, z] + [p, q])
        n = tanh(gates_t[n] + r s)
        h_t = (1 - z) n + z h

    Args:
        gates: what the inputs add to r, z and n, with their own biases.
        weight: from the hidden state.
        bias: of the hidden state's part.
        hidden: h before the first step.
        keep: 0 where an episode begins, 1 elsewhere.

    Returns:
        h after every step.
    """
    return _Gru.apply(gates, weight, bias, hidden, keep)


def plain_lstm(gates: Tensor, weight: Tensor, hidden: Tensor, cell: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """`lstm` operation by operation, for derivatives of derivatives."""
    outputs, cells = [], []
    for gate, kept in zip(gates, keep.unsqueeze(-1), strict=True):
        i, f, g, o = (gate + (hidden * kept) @ weight.T).chunk(4, -1)
        cell = f.sigmoid() * (cell * kept) + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * cell.tanh()
        outputs.append(hidden)
        cells.append(cell)
    return torch.stack(outputs), torch.stack(cells)


def plain_gru(gates: Tensor, weight: Tensor, bias: Tensor, hidden: Tensor, keep: Tensor) -> Tensor:
    """`gru` operation by operation, for derivatives of derivatives."""
    outputs = []
    for gate, kept in zip(gates, keep.unsqueeze(-1), strict=True):
        before = hidden * kept
        (r, z, n), (p, q, s) = gate.chunk(3, -1), (before @ weight.T + bias).chunk(3, -1)
        z = (z + q).sigmoid()
        hidden = torch.lerp((n + (r + p).sigmoid() * s).tanh(), before, z)
        outputs.append(hidden)
    return torch.stack(outputs)


def _rows(tensor: Tensor) -> list[Tensor]:
    return list(tensor.unbind(0))


def _before(first: Tensor, states: Tensor, keep: Tensor) -> Tensor:
    """`[T, B, H]`: the state that each step began with."""
    return torch.cat([first.unsqueeze(0), states[:-1]]) * keep.unsqueeze(-1)


def _cuts(keep: Tensor) -> list[Tensor | None]:
    """Per step `[B, 1]`, or None where every row goes on."""
    goes_on = (keep == 1).all(1).tolist()
    return [None if whole else row for whole, row in zip(goes_on, keep.unsqueeze(-1), strict=True)]


class _Lstm(Function):
    @staticmethod
    def forward(ctx: Any, gates: Tensor, weight: Tensor, hidden: Tensor, cell: Tensor, keep: Tensor) -> Any:
        n_steps, n_rows, width = gates.shape
        size = width // 4
        gated = gates.clone()
        outputs, cells, squashed = gates.new_empty(3, n_steps, n_rows, size).unbind(0)
        parts = gated.view(n_steps, n_rows, 4, size)
        across = weight.T
        rows = zip(
            *map(_rows, (gated, parts[:, :, :2], *parts.unbind(2), outputs, cells, squashed)), _cuts(keep), strict=True
        )
        h, c = hidden, cell
        for gate, both, i, f, g, o, out, new, tanh, kept in rows:
            if kept is not None:
                h, c = h * kept, c * kept
            gate.addmm_(h, across)
            both.sigmoid_()
            g.tanh_()
            o.sigmoid_()
            c = torch.mul(f, c, out=new).addcmul_(i, g)
            h = torch.mul(o, torch.tanh(c, out=tanh), out=out)
        ctx.save_for_backward(gates, weight, hidden, cell, keep, gated, outputs, cells, squashed)
        return outputs, cells

    @staticmethod
    def backward(ctx: Any, d_outputs: Tensor, d_cells: Tensor) -> Any:  # type: ignore[override]
        gates, weight, hidden, cell, keep, gated, outputs, cells, squashed = ctx.saved_tensors
        if torch.is_grad_enabled():
            given = (gates, weight, hidden, cell)
            return *_again(ctx, plain_lstm, given, keep, (d_outputs, d_cells)), None
        n_steps, n_rows, size = outputs.shape
        i, f, g, o = gated.view(n_steps, n_rows, 4, size).unbind(2)
        before = _before(cell, cells, keep)
        by_cell = o * (1 - squashed.square())
        # What a gate's input changes: the first three through the cell, the last one through the output.
        slopes = torch.stack([g * i * (1 - i), before * f * (1 - f), i * (1 - g.square()), squashed * o * (1 - o)], 2)
        d_gates = torch.empty_like(slopes)
        through = f * keep.unsqueeze(-1)
        firsts, lasts = (slopes[:, :, :3], d_gates[:, :, :3]), (slopes[:, :, 3], d_gates[:, :, 3])
        flat = d_gates.view(n_steps, n_rows, 4 * size)
        columns = (d_outputs, d_cells, by_cell, through, *firsts, *lasts, flat)
        rows = list(zip(*map(_rows, columns), _cuts(keep), strict=True))
        d_h, d_c = torch.zeros_like(hidden), torch.zeros_like(cell)
        for d_out, d_cell, slope, f_t, first, d_first, last, d_last, d_all, kept in reversed(rows):
            d_h = d_h + d_out
            d_c = torch.addcmul(d_c + d_cell, d_h, slope)
            torch.mul(d_c.unsqueeze(1), first, out=d_first)
            torch.mul(d_h, last, out=d_last)
            d_c = d_c * f_t
            d_h = d_all @ weight
            if kept is not None:
                d_h = d_h * kept
        d_weight = flat.flatten(0, 1).T @ _before(hidden, outputs, keep).flatten(0, 1)
        return flat, d_weight, d_h, d_c, None


class _Gru(Function):
    @staticmethod
    def forward(ctx: Any, gates: Tensor, weight: Tensor, bias: Tensor, hidden: Tensor, keep: Tensor) -> Any:
        n_steps, n_rows, width = gates.shape
        size = width // 3
        own = gates.new_empty(gates.shape)
        gated = gates.clone()
        outputs = gates.new_empty(n_steps, n_rows, size)
        across = weight.T
        both = slice(0, 2 * size)
        columns = (own, own[..., both], own[..., 2 * size :], gated[..., both], *gated.chunk(3, -1), outputs)
        h = hidden
        for product, p_q, s, r_z, r, z, n, out, kept in zip(*map(_rows, columns), _cuts(keep), strict=True):
            if kept is not None:
                h = h * kept
            torch.addmm(bias, h, across, out=product)
            r_z.add_(p_q).sigmoid_()
            n.addcmul_(r, s).tanh_()
            h = torch.lerp(n, h, z, out=out)
        ctx.save_for_backward(gates, weight, bias, hidden, keep, gated, own, outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, d_outputs: Tensor) -> Any:  # type: ignore[override]
        gates, weight, bias, hidden, keep, gated, own, outputs = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_again(ctx, plain_gru, (gates, weight, bias, hidden), keep, (d_outputs,)), None
        n_steps, n_rows, size = outputs.shape
        (r, z, n), s = gated.chunk(3, -1), own[..., 2 * size :]
        before = _before(hidden, outputs, keep)
        inner = (1 - z) * (1 - n.square())
        slopes = torch.stack([inner * s * r * (1 - r), (before - n) * z * (1 - z), inner * r], 2)
        d_own = torch.empty_like(slopes)
        d_after = torch.empty_like(outputs)
        through = z * keep.unsqueeze(-1)
        columns = (d_outputs, d_after, through, slopes, d_own, d_own.view(n_steps, n_rows, 3 * size))
        rows = list(zip(*map(_rows, columns), _cuts(keep), strict=True))
        d_h = torch.zeros_like(hidden)
        for d_out, d_new, z_t, slope, d_part, d_all, kept in reversed(rows):
            torch.add(d_h, d_out, out=d_new)
            torch.mul(d_new.unsqueeze(1), slope, out=d_part)
            d_back = d_all @ weight
            if kept is not None:
                d_back = d_back * kept
            d_h = d_back.addcmul_(d_new, z_t)
        flat = d_own.view(n_steps, n_rows, 3 * size)
        d_gates = torch.cat([flat[..., : 2 * size], d_after * inner], -1)
        rows_of = flat.flatten(0, 1)
        return d_gates, rows_of.T @ before.flatten(0, 1), rows_of.sum(0), d_h, None


def _again(ctx: Any, function: Any, given: tuple[Tensor, ...], keep: Tensor, d_results: tuple[Tensor, ...]) -> Any:
    """Gradients that can be differentiated once more."""
    needed = [tensor for tensor, needs in zip(given, ctx.needs_input_grad, strict=False) if needs]
    results = function(*given, keep)
    results = results if isinstance(results, tuple) else (results,)
    found = iter(torch.autograd.grad(results, needed, d_results, create_graph=True, allow_unused=True))
    return [next(found) if needs else None for _, needs in zip(given, ctx.needs_input_grad, strict=False)]
