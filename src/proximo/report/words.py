"""Numbers as people read them."""

from __future__ import annotations

import math


def number(value: float | None) -> str:
    """Write a number with thousands separators and about four digits that count; a dash for none."""
    if value is None or not math.isfinite(value):
        return "-"
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e15:
        text = f"{value:.3g}"
    elif size >= 1000:
        text = f"{value:,.0f}"
    elif size >= 1:
        text = f"{value:.1f}" if size >= 100 else f"{value:.2f}"
        text = text.rstrip("0").rstrip(".")
    else:
        text = f"{value:.3g}"
    return text


def percent(share: float) -> str:
    """Write a share as a percentage: 0.256 is 26 %; what is not quite nothing or all does not become it."""
    if 0 < share < 0.005:
        return "less than 1 %"
    if 0.995 <= share < 1:
        return "more than 99 %"
    return f"{100 * share:.0f} %"


def duration(seconds: float | None) -> str:
    """Write a time: 0.4 seconds, 35 seconds, 2 min 5 s, 3 h 20 min."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    if seconds < 10:
        return f"{seconds:.1f} seconds"
    whole = round(seconds)
    if whole < 100:
        return f"{whole} seconds"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(whole / 60)
    return f"{minutes // 60:,} h {minutes % 60} min"


def plural(count: int, noun: str) -> str:
    """Write a count with its noun: 1 episode, 2,000 episodes."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
