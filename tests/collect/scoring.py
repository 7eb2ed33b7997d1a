"""Asking a source of reward, and what it has started, for the tests of sources."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from proximo.collect.rewards import Reward, Scores


def ask(source: Reward, *responses: str, **columns: list[Any]) -> Scores:
    return source(["what?"] * len(responses), list(responses), columns)


def ended(pid: int) -> bool:
    """Whether a process is gone, or a zombie that nobody has waited for."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False
