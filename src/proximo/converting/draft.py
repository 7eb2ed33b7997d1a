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

    def without_counterpart(self, reasons: dict[str, str], defaults: dict[str, Any] | None = None) -> None:
        """Tell of settings that matter and that Proximo does not have, where they are not off or as by default."""
        for name, reason in reasons.items():
            value, default = self.take(name), (defaults or {}).get(name)
            is_default = _is_off(value) if default is None else value is None or _is_same(value, default)
            if not is_default:
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


def _is_off(value: Any) -> bool:
    return not value or (isinstance(value, str) and value.lower() in ("false", "none", "null"))


def _is_same(value: Any, default: Any) -> bool:
    """Whether a value is the default, also where it is written as text."""
    if isinstance(default, (tuple, list)):
        parts = value.split() if isinstance(value, str) else value
        return (
            isinstance(parts, list)
            and len(parts) == len(default)
            and all(_is_same(each, other) for each, other in zip(parts, default, strict=True))
        )
    if isinstance(default, (int, float)) and not isinstance(default, bool):
        try:
            return float(value) == default
        except (TypeError, ValueError, OverflowError):
            return False
    return shown(value).strip("'").lower() == str(default).lower()
