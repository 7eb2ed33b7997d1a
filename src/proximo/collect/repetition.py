"""How much of what a language model says it has said before in the same response."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

PIECE = 3
"""Tokens of a piece. Pairs come back in any sound text; three in a row that come back are usually a loop."""


def repetition(tokens: Int[Tensor, "B T"], last: Bool[Tensor, "B T"], n_tokens: Sequence[int]) -> float:
    """The share of pieces of three tokens that stood in the same response before; 0 where there are none.

    Args:
        tokens: what was said, each response in one run of its row.
        last: True at the last token of each response.
        n_tokens: how many tokens each response has.
    """
    lengths = torch.tensor(list(n_tokens), device=tokens.device)
    ends = torch.where(last.any(1), last.int().argmax(1), -1)
    places = torch.arange(tokens.shape[1], device=tokens.device)
    inside = (places <= ends[:, None]) & (places > (ends - lengths)[:, None])
    if tokens.shape[1] < PIECE:
        return 0.0
    whole = inside[:, PIECE - 1 :] & inside[:, : 1 - PIECE]
    n_pieces = int(whole.sum())
    if n_pieces == 0:
        return 0.0
    base = int(tokens.max()) + 1
    pieces = torch.zeros_like(tokens[:, PIECE - 1 :], dtype=torch.int64)
    for shift in range(PIECE):  # under a vocabulary of two million these numbers are exact
        pieces = pieces * base + tokens[:, shift : tokens.shape[1] - PIECE + 1 + shift]
    nothing = -1 - torch.arange(pieces.shape[1], device=tokens.device)  # no two alike
    ordered = torch.where(whole, pieces, nothing).sort(1).values
    return int((ordered[:, 1:] == ordered[:, :-1]).sum()) / n_pieces
