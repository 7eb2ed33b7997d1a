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
    *,
    compiled: bool = False,
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
        compiled: in machine code, which needs numba and tensors on the CPU; 1e-6 apart in single precision.

    Returns:
        h and c after every step.
    """
    return _Lstm.apply(gates, weight, hidden, cell, keep, compiled)


def gru(
    gates: Float[Tensor, "T B G"],
    weight: Float[Tensor, "G H"],
    bias: Float[Tensor, " G"],
    hidden: Float[Tensor, "B H"],
    keep: Float[Tensor, "T B"],
    *,
    compiled: bool = False,
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
        compiled: in machine code, which needs numba and tensors on the CPU; 1e-6 apart in single precision.

    Returns:
        h after every step.
    """
    return _Gru.apply(gates, weight, bias, hidden, keep, compiled)


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
    def forward(
        ctx: Any, gates: Tensor, weight: Tensor, hidden: Tensor, cell: Tensor, keep: Tensor, compiled: bool
    ) -> Any:
        outputs, cells, squashed = gates.new_empty(3, *gates.shape[:2], hidden.shape[1]).unbind(0)
        gated = gates.clone(memory_format=torch.contiguous_format)
        run = _lstm_kernel if compiled else _lstm_steps
        run(gated, weight, hidden.clone(), cell.clone(), keep, outputs, cells, squashed)
        ctx.compiled = compiled
        ctx.save_for_backward(gates, weight, hidden, cell, keep, gated, outputs, cells, squashed)
        return outputs, cells

    @staticmethod
    def backward(ctx: Any, d_outputs: Tensor, d_cells: Tensor) -> Any:  # type: ignore[override]
        gates, weight, hidden, cell, keep, gated, outputs, cells, squashed = ctx.saved_tensors
        if torch.is_grad_enabled():
            given = (gates, weight, hidden, cell)
            return *_again(ctx, plain_lstm, given, keep, (d_outputs, d_cells)), None, None
        d_gates, d_h, d_c = torch.empty_like(gated), torch.zeros_like(hidden), torch.zeros_like(cell)
        run = _lstm_kernel_back if ctx.compiled else _lstm_steps_back
        run(gated, weight, cell, keep, cells, squashed, d_outputs, d_cells, d_gates, d_h, d_c)
        d_weight = d_gates.flatten(0, 1).T @ _before(hidden, outputs, keep).flatten(0, 1)
        return d_gates, d_weight, d_h, d_c, None, None


class _Gru(Function):
    @staticmethod
    def forward(
        ctx: Any, gates: Tensor, weight: Tensor, bias: Tensor, hidden: Tensor, keep: Tensor, compiled: bool
    ) -> Any:
        outputs = gates.new_empty(*gates.shape[:2], hidden.shape[1])
        gated, own = gates.clone(memory_format=torch.contiguous_format), gates.new_empty(gates.shape)
        run = _gru_kernel if compiled else _gru_steps
        run(gated, weight, bias, hidden.clone(), keep, own, outputs)
        ctx.compiled = compiled
        ctx.save_for_backward(gates, weight, bias, hidden, keep, gated, own, outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, d_outputs: Tensor) -> Any:  # type: ignore[override]
        gates, weight, bias, hidden, keep, gated, own, outputs = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_again(ctx, plain_gru, (gates, weight, bias, hidden), keep, (d_outputs,)), None, None
        d_gates, d_own, d_h = torch.empty_like(gated), torch.empty_like(gated), torch.zeros_like(hidden)
        run = _gru_kernel_back if ctx.compiled else _gru_steps_back
        run(gated, weight, hidden, keep, own, outputs, d_outputs, d_gates, d_own, d_h)
        rows = d_own.flatten(0, 1)
        return d_gates, rows.T @ _before(hidden, outputs, keep).flatten(0, 1), rows.sum(0), d_h, None, None


# --- step by step, by torch -----------------------------------------------------------------------------------------


def _lstm_steps(
    gated: Tensor, weight: Tensor, h: Tensor, c: Tensor, keep: Tensor, outputs: Tensor, cells: Tensor, squashed: Tensor
) -> None:
    parts, across = gated.unflatten(-1, (4, -1)), weight.T
    columns = (gated, parts[:, :, :2], *parts.unbind(2), outputs, cells, squashed)
    for gate, both, i, f, g, o, out, new, flat, kept in zip(*map(_rows, columns), _cuts(keep), strict=True):
        if kept is not None:
            h, c = h * kept, c * kept
        gate.addmm_(h, across)
        both.sigmoid_()
        g.tanh_()
        o.sigmoid_()
        c = torch.mul(f, c, out=new).addcmul_(i, g)
        h = torch.mul(o, torch.tanh(c, out=flat), out=out)


def _lstm_steps_back(
    gated: Tensor,
    weight: Tensor,
    cell: Tensor,
    keep: Tensor,
    cells: Tensor,
    squashed: Tensor,
    d_outputs: Tensor,
    d_cells: Tensor,
    d_gates: Tensor,
    d_hidden: Tensor,
    d_cell: Tensor,
) -> None:
    i, f, g, o = gated.chunk(4, -1)
    before = _before(cell, cells, keep)
    by_cell = o * (1 - squashed.square())
    # What a gate's input changes: the first three through the cell, the last one through the output.
    slopes = torch.stack([g * i * (1 - i), before * f * (1 - f), i * (1 - g.square()), squashed * o * (1 - o)], 2)
    parts = d_gates.unflatten(-1, (4, -1))
    firsts, lasts = (slopes[:, :, :3], parts[:, :, :3]), (slopes[:, :, 3], parts[:, :, 3])
    columns = (d_outputs, d_cells, by_cell, f * keep.unsqueeze(-1), *firsts, *lasts, d_gates)
    rows = list(zip(*map(_rows, columns), _cuts(keep), strict=True))
    d_h, d_c = d_hidden, d_cell
    for d_out, d_new, slope, through, first, d_first, last, d_last, d_all, kept in reversed(rows):
        d_h = d_h + d_out
        d_c = torch.addcmul(d_c + d_new, d_h, slope)
        torch.mul(d_c.unsqueeze(1), first, out=d_first)
        torch.mul(d_h, last, out=d_last)
        d_c = d_c * through
        d_h = d_all @ weight
        if kept is not None:
            d_h = d_h * kept
    d_hidden.copy_(d_h)
    d_cell.copy_(d_c)


def _gru_steps(
    gated: Tensor, weight: Tensor, bias: Tensor, h: Tensor, keep: Tensor, own: Tensor, outputs: Tensor
) -> None:
    size, across = outputs.shape[-1], weight.T
    both = slice(0, 2 * size)
    columns = (own, own[..., both], own[..., 2 * size :], gated[..., both], *gated.chunk(3, -1), outputs)
    for product, p_q, s, r_z, r, z, n, out, kept in zip(*map(_rows, columns), _cuts(keep), strict=True):
        if kept is not None:
            h = h * kept
        torch.addmm(bias, h, across, out=product)
        r_z.add_(p_q).sigmoid_()
        n.addcmul_(r, s).tanh_()
        h = torch.lerp(n, h, z, out=out)


def _gru_steps_back(
    gated: Tensor,
    weight: Tensor,
    hidden: Tensor,
    keep: Tensor,
    own: Tensor,
    outputs: Tensor,
    d_outputs: Tensor,
    d_gates: Tensor,
    d_own: Tensor,
    d_hidden: Tensor,
) -> None:
    size = outputs.shape[-1]
    (r, z, n), s = gated.chunk(3, -1), own[..., 2 * size :]
    before = _before(hidden, outputs, keep)
    inner = (1 - z) * (1 - n.square())
    slopes = torch.stack([inner * s * r * (1 - r), (before - n) * z * (1 - z), inner * r], 2)
    after = torch.empty_like(outputs)
    columns = (d_outputs, after, z * keep.unsqueeze(-1), slopes, d_own.unflatten(-1, (3, -1)), d_own)
    rows = list(zip(*map(_rows, columns), _cuts(keep), strict=True))
    d_h = d_hidden
    for d_out, d_new, through, slope, d_part, d_all, kept in reversed(rows):
        torch.add(d_h, d_out, out=d_new)
        torch.mul(d_new.unsqueeze(1), slope, out=d_part)
        d_back = d_all @ weight
        if kept is not None:
            d_back = d_back * kept
        d_h = d_back.addcmul_(d_new, through)
    d_hidden.copy_(d_h)
    d_gates.copy_(torch.cat([d_own[..., : 2 * size], after * inner], -1))


# --- in machine code ------------------------------------------------------------------------------------------------


def _arrays(*tensors: Tensor) -> list[Any]:
    return [tensor.detach().contiguous().numpy() for tensor in tensors]


def _lstm_kernel(gated: Tensor, weight: Tensor, *rest: Tensor) -> None:
    from proximo.models.recurrence_kernels import lstm_forward

    lstm_forward(*_arrays(gated, weight.T, *rest))


def _lstm_kernel_back(*given: Tensor) -> None:
    from proximo.models.recurrence_kernels import lstm_backward

    lstm_backward(*_arrays(*given))


def _gru_kernel(gated: Tensor, weight: Tensor, *rest: Tensor) -> None:
    from proximo.models.recurrence_kernels import gru_forward

    gru_forward(*_arrays(gated, weight.T, *rest))


def _gru_kernel_back(*given: Tensor) -> None:
    from proximo.models.recurrence_kernels import gru_backward

    gru_backward(*_arrays(*given))


def _again(ctx: Any, function: Any, given: tuple[Tensor, ...], keep: Tensor, d_results: tuple[Tensor, ...]) -> Any:
    """Gradients that can be differentiated once more."""
    needed = [tensor for tensor, needs in zip(given, ctx.needs_input_grad, strict=False) if needs]
    results = function(*given, keep)
    results = results if isinstance(results, tuple) else (results,)
    found = iter(torch.autograd.grad(results, needed, d_results, create_graph=True, allow_unused=True))
    return [next(found) if needs else None for _, needs in zip(given, ctx.needs_input_grad, strict=False)]
