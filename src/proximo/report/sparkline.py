"""A curve in one line of text."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

_BLOCKS = "▁▂▃▄▅▆▇█"

_ASCII = ".:-=+*#@"
"""From light to dark, where the blocks cannot be written."""


def sparkline(values: Sequence[float | None], width: int, encoding: str = "utf-8") -> str:
    """Draw `values` as at most `width` block characters, the lowest value as ▁ and the highest as █.

    Where `encoding` has no blocks, they are drawn from . to @ instead.

    More values than characters are averaged in groups. None, NaN and infinities are passed over; a group
    of nothing else is a space. Equal values give a line at half height.

    Raises:
        ValueError: if `width` is negative.
    """
    if width < 0:
        raise ValueError(f"width is {width}; it must be 0 or more")
    n_characters = min(width, len(values))
    bounds = [len(values) * index // max(n_characters, 1) for index in range(n_characters + 1)]
    levels = [_mean(values[first:last]) for first, last in itertools.pairwise(bounds)]
    known = [level for level in levels if level is not None]
    if not known:
        return " " * n_characters
    low, high, blocks = min(known), max(known), _BLOCKS if _has_blocks(encoding) else _ASCII
    return "".join(" " if level is None else blocks[_height(level, low, high)] for level in levels)


def _has_blocks(encoding: str) -> bool:
    try:
        return bool(_BLOCKS.encode(encoding))
    except (UnicodeEncodeError, LookupError):
        return False


def _mean(values: Sequence[float | None]) -> float | None:
    finite = [value for value in values if value is not None and math.isfinite(value)]
    # Divided before it is added up: the sum of large numbers may overflow where their mean does not.
    return sum(value / len(finite) for value in finite) if finite else None


def _height(level: float, low: float, high: float) -> int:
    # Halved for the same reason.
    span = high / 2 - low / 2
    if span <= 0:
        return len(_BLOCKS) // 2 - 1
    share = (level / 2 - low / 2) / span
    return round(share * (len(_BLOCKS) - 1))
