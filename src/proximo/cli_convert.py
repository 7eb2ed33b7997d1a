"""The command `convert`: settings of another library as a file of ours."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from proximo.converting.convert import Kind, convert

Outcome = tuple[int, str]
"""The exit code, and what goes to standard output."""


@dataclass(frozen=True)
class ConvertArguments:
    """Print the settings of another library as a TOML file for train --config or align --config."""

    file: tyro.conf.Positional[Path]
    """A YAML or JSON file: hyperparameters of RL Baselines3 Zoo, arguments of SB3's PPO or RecurrentPPO, CleanRL's
    arguments, TRL's PPOConfig or GRPOConfig, OpenRLHF's flags by their names, flat or
    dotted."""
    env: str | None = None
    """The environment; in a file of RL Zoo, which entry."""
    kind: Kind = "auto"
    """Whose settings they are; `auto` tells by their names, and by the environment's actions for CleanRL."""
    json: bool = False
    """Print one JSON object on standard output, and nothing else there."""


def convert_command(words: list[str]) -> Outcome:
    """`proximo convert FILE [--env ENV]`."""
    given = tyro.cli(ConvertArguments, args=words, prog="proximo convert")
    found = convert(given.file, given.env, given.kind)
    return 0, json.dumps(asdict(found) | {"toml": found.toml}) if given.json else found.toml.rstrip("\n")
