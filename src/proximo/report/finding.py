"""A finding of the diagnosis, and how its advice is put together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["problem", "warning", "note", "good"]
"""`problem`: the run failed or will. `warning`: it suffers. `note`: worth knowing. `good`: as it should be."""


@dataclass(frozen=True)
class Finding:
    """Something a run shows, what it usually means, and what to turn."""

    name: str
    """Snake case, the same in every release."""
    severity: Severity
    """How bad it is."""
    seen: str
    """What was seen, with the numbers and the iteration."""
    meaning: str
    """What that usually means."""
    advice: str
    """The settings to turn; empty where nothing needs to be done."""


def advice(*parts: str) -> str:
    """Join what there is to advise into one sentence; empty parts are left out."""
    said = "; ".join(part for part in parts if part)
    return f"{said[:1].upper()}{said[1:]}." if said else ""
