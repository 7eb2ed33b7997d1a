"""The command `tune`: searching for the settings of a control task."""

from __future__ import annotations

import dataclasses
import json
import shlex
from dataclasses import field
from typing import Annotated, Any

import tyro

from proximo.collect.make import EnvFactory
from proximo.errors import UserError
from proximo.runs import files
from proximo.terminal import Display
from proximo.training.config import ControlConfig, train_arguments
from proximo.tuning.loop import TuneConfig, tune_with
from proximo.tuning.result import BEST_NAME, PICTURE_NAME, Tuning, table
from proximo.tuning.study import JOURNAL_NAME


def tune_arguments(base: ControlConfig) -> Any:
    """The flags of `proximo tune`: its own, and all of `proximo train`, which hold a setting where it is."""
    of_training = train_arguments(base)
    arguments = dataclasses.make_dataclass(
        "TuneArguments",
        [
            ("tuning", Annotated[TuneConfig, tyro.conf.OmitArgPrefixes], field(default_factory=TuneConfig)),
            *((each.name, each.type, field(default=each.default)) for each in dataclasses.fields(of_training)),
        ],
        frozen=True,
    )
    arguments.__doc__ = (
        "Search for the settings of a control task, beginning with those of the environment named, which are the "
        "defaults shown. A flag of a setting holds it where it is. The same command again goes on where it stopped."
    )
    return arguments


def tune_command(
    config: ControlConfig, factory: EnvFactory, tuning: TuneConfig, output: Any, flags: list[str], command: str
) -> tuple[int, str]:
    """Run or go on with a study; its exit code, and its table or JSON."""
    fixed = {flag.removeprefix("--no-").removeprefix("--").replace("-", "_") for flag in flags}
    display = Display.choose(quiet=output.quiet)
    found = tune_with(config, factory, display, tuning, fixed=fixed, run_dir=output.run_dir, command=command)
    code = 0 if found.interrupted_by is None else 128 + found.interrupted_by
    return code, json.dumps(_told(found)) if output.json else _in_words(found)


def _told(found: Tuning) -> dict[str, Any]:
    return {
        "run": str(found.path),
        "env_id": found.config.environment.env_id,
        "best": found.best.number,
        "score": found.score,
        "settings": found.best.settings,
        "config": str(found.path / BEST_NAME),
        "picture": str(found.path / PICTURE_NAME),
        "trials": [dataclasses.asdict(record) for record in found.trials],
        "seconds": found.seconds,
        "interrupted": found.interrupted_by is not None,
    }


def refuse_folder(words: list[str]) -> None:
    """Say how to go on with a study to someone who names its folder.

    Raises:
        UserError: if the first word is the folder of a study.
    """
    if words and not words[0].startswith("-") and (files.expanded(words[0]) / JOURNAL_NAME).is_file():
        raise UserError(
            f"{words[0]} is the folder of a study, and proximo tune takes an environment. To go on with it, give the "
            f"command that began it once more: proximo tune ENV ... --run-dir {shlex.quote(words[0])}"
        )


def _in_words(found: Tuning) -> str:
    env_id = found.config.environment.env_id
    train = shlex.join(["proximo", "train", env_id, "--config", str(found.path / BEST_NAME), "--seed"])
    lines = [
        table(list(found.trials)),
        "",
        f"best settings  {found.path / BEST_NAME}",
        f"picture        {found.path / PICTURE_NAME}",
        f"next           {train} {found.config.seed + 100}",
    ]
    return "\n".join(lines)
