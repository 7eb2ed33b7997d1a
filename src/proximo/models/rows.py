"""Rows of text without their left padding: a causal model then needs neither a mask nor positions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """What a trunk is called with, and how its output comes back to the places that the tokens had."""

    tokens: Tensor
    """[B, W] int64: 0 at padding, so that the embedding need not know whatever id stands for it."""
    mask: Tensor | None
    """[B, W] int64, or None where being causal is enough."""
    positions: Tensor | None
    """[B, W] int64, or None where they are 0, 1, 2, ..."""
    places: Tensor | None
    """[B, L]: the column in `tokens` of each of the original places, or None where nothing was moved."""

    def back(self, states: Tensor) -> Tensor:
        """Move states `[B, W, H]` to the places that the tokens had `[B, L, H]`."""
        if self.places is None:
            return states
        return states.gather(1, self.places.unsqueeze(-1).expand(-1, -1, states.shape[-1]))


def rows_of(tokens: Tensor, attention: Tensor) -> Rows:
    """Move the real tokens of each row `[B, L]` to its beginning, and cut off what no row needs.

    Padding then comes after all that is real, where a causal model does not see it. The positions are those of
    `position_ids` either way. Rows whose real tokens are not side by side keep their places, with a mask.
    """
    plain = tokens.masked_fill(~attention, 0)
    lengths = attention.sum(1)
    longest = int(lengths.max()) if len(lengths) else 0
    starts = attention.long().argmax(1)
    columns = torch.arange(tokens.shape[1], device=tokens.device)
    places = columns - starts.unsqueeze(1)
    together = (places >= 0) & (places < lengths.unsqueeze(1))
    if not torch.equal(together, attention):
        return Rows(plain, attention.long(), position_ids(attention), None)
    if not bool(starts.any()) and longest == tokens.shape[1]:
        return Rows(plain, None, None, None)
    sources = (starts.unsqueeze(1) + columns[:longest]).clamp(max=tokens.shape[1] - 1)
    moved = plain.gather(1, sources).masked_fill(columns[:longest] >= lengths.unsqueeze(1), 0)
    return Rows(moved, None, None, places.clamp(min=0, max=max(longest - 1, 0)))


def position_ids(attention: Tensor) -> Tensor:
    """The number of real tokens before each one `[B, L]`: 0 at a prompt's first token, however it is padded."""
    return (attention.long().cumsum(-1) - attention.long()).clamp(min=0)
