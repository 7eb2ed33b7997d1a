"""The settings of a run beside those it may be compared with: of its preset, and the defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Baseline:
    """What the settings of a run are held against."""

    source: str
    """Where `preset` comes from, in words."""
    preset: Mapping[str, Any] | None
    """The tuned settings of the task, all of them; None where nobody has tuned it."""
    defaults: Mapping[str, Any]
    """Every setting as it is where nobody says anything."""


@dataclass(frozen=True)
class SettingRow:
    """A line of the table of settings, its values in words; the empty text where there is nothing to compare with."""

    name: str
    value: str
    preset: str
    default: str
    differs: bool
    """Whether it is another value than the preset's; where there is no preset, than the default."""
    differs_from_default: bool


_OF_ITS_OWN = frozenset({"env_id", "stage", "model", "data", "prompts", "reward", "gold", "env_kwargs", "seed"})
"""What a run is about, which is nothing to differ in."""


def setting_rows(settings: Mapping[str, Any], baseline: Baseline | None) -> list[SettingRow]:
    """The table of settings, those that differ from the preset first.

    A setting that a run says nothing of is None, or newer than the run: that is no difference.
    """
    preset = baseline.preset if baseline else None
    defaults = baseline.defaults if baseline else {}
    rows = []
    for name in dict.fromkeys([*settings, *defaults]):
        value = settings.get(name)
        is_said = name in settings
        has_default = name in defaults
        from_default = is_said and has_default and differs(name, value, defaults[name])
        from_preset = from_default
        if preset is not None:
            from_preset = is_said and name in preset and differs(name, value, preset[name])
        rows.append(
            SettingRow(
                name,
                in_words(value) if is_said or defaults.get(name) is None else "-",
                "" if preset is None or name not in preset else in_words(preset[name]),
                in_words(defaults[name]) if has_default else "",
                from_preset,
                from_default,
            )
        )
    return sorted(rows, key=lambda row: (not row.differs, not row.differs_from_default))


def differs(name: str, value: Any, other: Any) -> bool:
    """Whether a setting is another one; what `auto` stands for, and 0 threads, was chosen and not set."""
    if name in _OF_ITS_OWN or other == "auto" or (name == "threads" and other == 0):
        return False
    return _same(value) != _same(other)


def in_words(value: Any) -> str:
    """A value as one writes it: none, true, 0.0003, [64, 64]."""
    if value is None or value == "none":
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(in_words(each) for each in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {in_words(each)}" for key, each in value.items()) + "}"
    return str(value)


def _same(value: Any) -> Any:
    """One form of what TOML and a dataclass write differently."""
    return in_words(value)
