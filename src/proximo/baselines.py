"""What the settings of a run are held against on its page: those of its preset, and the defaults; and the live page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from proximo.errors import UserError
from proximo.presets import preset_of
from proximo.report.page_settings import Baseline
from proximo.runs.directory import RunDirectory, read_config
from proximo.training.agents_config import AgentsConfig, SelfPlayConfig
from proximo.training.config import ALGORITHMS, ControlConfig, settings_of, with_settings


def baselines_of(runs: Sequence[RunDirectory]) -> dict[Path, Baseline]:
    """By the path of each run, what its settings are held against; nothing for one whose settings make no sense.

    No environment is made for it, and no code of a run is imported.

    Raises:
        UserError: if a config.toml cannot be read.
    """
    found = {}
    for run in runs:
        baseline = baseline_of(read_config(run))
        if baseline is not None:
            found[run.path] = baseline
    return found


def baseline_of(settings: Mapping[str, Any]) -> Baseline | None:
    """The tuned settings of the task, where there are any, and the defaults; None if it is no run of ours."""
    try:
        if "stage" in settings:
            return _of_language(settings)
        return _of_control(settings)
    except (UserError, ImportError):  # of a language run, where the extra is not installed
        return None


def served(run: RunDirectory, settings: Mapping[str, Any], port: int | None) -> AbstractContextManager[None]:
    """The page of a run in a browser for as long as the block goes on; nothing for port None."""
    if port is None:
        return nullcontext()
    from proximo.report.dashboard import serving

    return serving(run, port, baseline_of(settings))


def _of_control(settings: Mapping[str, Any]) -> Baseline | None:
    kind = AgentsConfig if "agents" in settings else SelfPlayConfig if "latest_share" in settings else ControlConfig
    algorithm = settings.get("algorithm", "ppo")
    if not isinstance(algorithm, str) or algorithm not in ALGORITHMS:
        return None
    defaults = with_settings(kind(), {"algorithm": algorithm}, where="the defaults")
    env_id = settings.get("env_id")
    preset = preset_of(env_id) if isinstance(env_id, str) else None
    if preset is None:
        return Baseline("the defaults, for nobody has tuned this environment", None, settings_of(defaults))
    known = settings_of(defaults)
    tuned = {name: value for name, value in preset.settings.items() if name in known}
    if algorithm != "ppo":  # the tuned settings are PPO's: of another algorithm only those of the run, and the discount
        own = {entry.name for entry in fields(type(ALGORITHMS[algorithm]))} - {"gamma"}
        tuned = {name: value for name, value in tuned.items() if name not in own}
    config = settings_of(defaults) | {"action_mask": "none"} | tuned
    return Baseline(f"the settings tuned for {env_id} ({preset.source})", config, settings_of(defaults))


def _of_language(settings: Mapping[str, Any]) -> Baseline | None:
    """The defaults of a stage. Their modules bring in transformers, as whoever looks at such a run has installed."""
    stage, algorithm = settings.get("stage"), settings.get("algorithm", "ppo")
    if stage == "align":
        from proximo.training.align_config import ALGORITHMS as KINDS
        from proximo.training.align_config import AlignConfig

        kinds = {type(kind).__name__.lower(): kind for kind in reversed(list(KINDS.values()))} | dict(KINDS)
        if not isinstance(algorithm, str) or algorithm not in kinds:
            return None
        config: Any = AlignConfig(algorithm=kinds[algorithm])
    elif stage == "sft":
        from proximo.training.sft import SFTConfig

        config = SFTConfig()
    elif stage == "reward":
        from proximo.training.reward import RewardConfig

        config = RewardConfig()
    elif stage == "dpo":
        from proximo.training.dpo import DPOConfig

        config = DPOConfig()
    else:
        return None
    assert is_dataclass(config)
    return Baseline(f"the defaults of proximo {stage}", None, settings_of(config))
