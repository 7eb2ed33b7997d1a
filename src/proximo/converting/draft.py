"""Our settings as they come together from those of another library, with what there is to say about them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from proximo.errors import shown


@dataclass
class Draft:
    """Settings of theirs that are still to be read, and ours that came of them."""

    theirs: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    """Ours, in the order in which they are printed."""
    because: dict[str, str] = field(default_factory=dict)
    """What is said beside a setting."""
    remarks: list[str] = field(default_factory=list)
    """What differs in meaning, or has no counterpart and matters."""
    idle: list[str] = field(default_factory=list)
    """Theirs that have no counterpart and need none."""

    def take(self, name: str, default: Any = None) -> Any:
        """The value of a setting of theirs, which is then read."""
        value = self.theirs.pop(name, None)
        return default if value is None else value

    def put(self, name: str, value: Any, because: str = "") -> None:
        """Set a setting of ours."""
        self.settings[name] = value
        if because:
            self.because[name] = because

    def say(self, remark: str) -> None:
        """Add a remark."""
        self.remarks.append(remark)

    def without_counterpart(self, reasons: dict[str, str]) -> None:
        """Tell of settings that matter and that Proximo does not have; `{}` in a reason is the value."""
        for name, reason in reasons.items():
            value = self.take(name)
            if value not in (None, False, 0, 0.0, [], {}, ""):
                self.say(f"{name} = {shown(value)}: {reason}")

    def not_needed(self, *names: str) -> None:
        """Read settings that say where results go or how things are computed; a name ending in `*` is a beginning."""
        for name in list(self.theirs):
            if name in names or any(each.endswith("*") and name.startswith(each[:-1]) for each in names):
                self.theirs.pop(name)
                self.idle.append(name)

    @property
    def unknown(self) -> list[str]:
        """Theirs that nobody has read."""
        return sorted(self.theirs)
