"""Proximo trains policies with proximal policy optimization: robots, games and language models, one PPO."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from proximo.api import Run as Run
    from proximo.api import evaluate as evaluate
    from proximo.api import load as load
    from proximo.api import train as train
    from proximo.errors import UserError as UserError
    from proximo.exporting import Export as Export
    from proximo.exporting import export as export
    from proximo.from_data import ClonedRun as ClonedRun
    from proximo.from_data import clone as clone
    from proximo.from_data import record as record
    from proximo.language import StageRun as StageRun
    from proximo.language import align as align
    from proximo.language import dpo as dpo
    from proximo.language import resume as resume
    from proximo.language import reward as reward
    from proximo.language import sft as sft
    from proximo.models.control import ActorCritic as ActorCritic
    from proximo.training.config import ControlConfig as ControlConfig
    from proximo.tuning.loop import tune as tune
    from proximo.tuning.result import Tuning as Tuning

    __version__: str

_HOMES = {
    "train": "proximo.api",
    "resume": "proximo.language",
    "load": "proximo.api",
    "evaluate": "proximo.api",
    "export": "proximo.exporting",
    "Export": "proximo.exporting",
    "Run": "proximo.api",
    "clone": "proximo.from_data",
    "record": "proximo.from_data",
    "ClonedRun": "proximo.from_data",
    "align": "proximo.language",
    "dpo": "proximo.language",
    "reward": "proximo.language",
    "sft": "proximo.language",
    "StageRun": "proximo.language",
    "UserError": "proximo.errors",
    "ActorCritic": "proximo.models.control",
    "ControlConfig": "proximo.training.config",
    "tune": "proximo.tuning.loop",
    "Tuning": "proximo.tuning.result",
}

__all__ = [
    "ActorCritic",
    "ClonedRun",
    "ControlConfig",
    "Export",
    "Run",
    "StageRun",
    "Tuning",
    "UserError",
    "align",
    "clone",
    "dpo",
    "evaluate",
    "export",
    "load",
    "record",
    "resume",
    "reward",
    "sft",
    "train",
    "tune",
]


def __getattr__(name: str) -> Any:
    """Import on first use, so that `proximo.core` can be had without Gymnasium."""
    if name == "__version__":
        from importlib.metadata import version

        return version("proximo")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'proximo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
