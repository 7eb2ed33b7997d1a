"""The loops over time of `recurrence.py` in machine code, by numba: what torch dispatches per step is one call."""

from __future__ import annotations

import numpy as np

from proximo.machine_code import jit, tanh

MACHINE_CODE = "f0e01cab2ae17063"
"""The digest of machine_code.py: what numba keeps on the disk is made anew where this very file has changed."""


@jit
def _sigmoid(row, product, first, last):
    """Add the product to these columns of a row, then the sigmoid, in place."""
    half = row.dtype.type(0.5)
    for j in range(first, last):
        row[j] = half + half * tanh(half * (row[j] + product[j]))


@jit
def _tanh(row, product, first, last):
    """Add the product to these columns of a row, then tanh, in place."""
    for j in range(first, last):
        row[j] = tanh(row[j] + product[j])


@jit
def lstm_forward(gated, across, hidden, cell, keep, outputs, cells, squashed):
    """Fill `outputs`, `cells` and `squashed` `[T, B, H]`; `gated` `[T, B, 4 H]`, the gates' inputs, become the gates.

    `across` `[H, 4 H]` is the transposed weight. `hidden` and `cell` `[B, H]` are overwritten: the state at the end.
    """
    n_steps, n_rows, size = outputs.shape
    product = np.empty((n_rows, 4 * size), outputs.dtype)
    for t in range(n_steps):
        for b in range(n_rows):
            for j in range(size):
                hidden[b, j] *= keep[t, b]
                cell[b, j] *= keep[t, b]
        np.dot(hidden, across, product)
        for b in range(n_rows):
            gate = gated[t, b]
            _sigmoid(gate, product[b], 0, 2 * size)
            _tanh(gate, product[b], 2 * size, 3 * size)
            _sigmoid(gate, product[b], 3 * size, 4 * size)
            i, f, g, o = gate[:size], gate[size : 2 * size], gate[2 * size : 3 * size], gate[3 * size :]
            h, c, flat = hidden[b], cell[b], squashed[t, b]
            for j in range(size):
                c[j] = f[j] * c[j] + i[j] * g[j]
                flat[j] = tanh(c[j])
                h[j] = o[j] * flat[j]
            outputs[t, b] = h
            cells[t, b] = c


@jit
def lstm_backward(gated, weight, cell, keep, cells, squashed, d_outputs, d_cells, d_gates, d_hidden, d_cell):
    """Fill `d_gates` `[T, B, 4 H]`; `d_hidden` and `d_cell` `[B, H]` become the gradients of the first state.

    `weight` is `[4 H, H]`, `cell` the state before the first step.
    """
    n_steps, n_rows, size = cells.shape
    one = cells.dtype.type(1)
    for t in range(n_steps - 1, -1, -1):
        for b in range(n_rows):
            gate, slope, kept = gated[t, b], d_gates[t, b], keep[t, b]
            i, f, g, o = gate[:size], gate[size : 2 * size], gate[2 * size : 3 * size], gate[3 * size :]
            before = cells[t - 1, b] if t else cell[b]
            d_h, d_c, flat = d_hidden[b], d_cell[b], squashed[t, b]
            for j in range(size):
                to_h = d_h[j] + d_outputs[t, b, j]
                to_c = d_c[j] + d_cells[t, b, j] + to_h * o[j] * (one - flat[j] * flat[j])
                slope[j] = to_c * g[j] * i[j] * (one - i[j])
                slope[size + j] = to_c * before[j] * kept * f[j] * (one - f[j])
                slope[2 * size + j] = to_c * i[j] * (one - g[j] * g[j])
                slope[3 * size + j] = to_h * flat[j] * o[j] * (one - o[j])
                d_c[j] = to_c * f[j] * kept
        np.dot(d_gates[t], weight, d_hidden)
        for b in range(n_rows):
            for j in range(size):
                d_hidden[b, j] *= keep[t, b]


@jit
def gru_forward(gated, across, bias, hidden, keep, own, outputs):
    """Fill `own` `[T, B, 3 H]`, what the hidden state adds, and `outputs` `[T, B, H]`; `gated` become r, z, n.

    `across` `[H, 3 H]` is the transposed weight; `hidden` `[B, H]` becomes the state at the end.
    """
    n_steps, n_rows, size = outputs.shape
    one = outputs.dtype.type(1)
    for t in range(n_steps):
        for b in range(n_rows):
            for j in range(size):
                hidden[b, j] *= keep[t, b]
        np.dot(hidden, across, own[t])
        for b in range(n_rows):
            gate, product, h = gated[t, b], own[t, b], hidden[b]
            for j in range(3 * size):
                product[j] += bias[j]
            _sigmoid(gate, product, 0, 2 * size)
            r, z, n, s = gate[:size], gate[size : 2 * size], gate[2 * size :], product[2 * size :]
            for j in range(size):
                n[j] = tanh(n[j] + r[j] * s[j])
                h[j] = (one - z[j]) * n[j] + z[j] * h[j]
            outputs[t, b] = h


@jit
def gru_backward(gated, weight, hidden, keep, own, outputs, d_outputs, d_gates, d_own, d_hidden):
    """Fill `d_gates` and `d_own` `[T, B, 3 H]`; `d_hidden` `[B, H]` becomes the gradient of the first state.

    `weight` is `[3 H, H]`, `hidden` the state before the first step.
    """
    n_steps, n_rows, size = outputs.shape
    one = outputs.dtype.type(1)
    through = np.empty((n_rows, size), outputs.dtype)
    for t in range(n_steps - 1, -1, -1):
        for b in range(n_rows):
            gate, to_own, to_gate, d_h = gated[t, b], d_own[t, b], d_gates[t, b], d_hidden[b]
            r, z, n, s = gate[:size], gate[size : 2 * size], gate[2 * size :], own[t, b, 2 * size :]
            before = outputs[t - 1, b] if t else hidden[b]
            for j in range(size):
                to_h = d_h[j] + d_outputs[t, b, j]
                to_n = to_h * (one - z[j]) * (one - n[j] * n[j])
                to_gate[j] = to_n * s[j] * r[j] * (one - r[j])
                to_gate[size + j] = to_h * (before[j] * keep[t, b] - n[j]) * z[j] * (one - z[j])
                to_gate[2 * size + j] = to_n
                to_own[j] = to_gate[j]
                to_own[size + j] = to_gate[size + j]
                to_own[2 * size + j] = to_n * r[j]
                through[b, j] = to_h * z[j]
        np.dot(d_own[t], weight, d_hidden)
        for b in range(n_rows):
            for j in range(size):
                d_hidden[b, j] = (d_hidden[b, j] + through[b, j]) * keep[t, b]
