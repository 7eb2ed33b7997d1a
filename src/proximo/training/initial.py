"""Beginning from the policy of another run: its weights and its normalizers."""

from __future__ import annotations

from typing import Any

from proximo.errors import UserError, shown
from proximo.models.control import ActorCritic
from proximo.runs import files, names
from proximo.runs.checkpoint import Checkpoint, named_checkpoint, newest_checkpoint
from proximo.runs.directory import open_run, read_config
from proximo.training.config import ControlConfig, settings_of
from proximo.training.control import load_policy

_INTRINSIC = "intrinsic_critic."

_ONLY_AT_FIRST = ("orthogonal_init", "precision")
"""Settings of networks under which the same weights do the same."""


def begin_from(config: ControlConfig, policy: ActorCritic) -> str:
    """Give `policy` the weights and normalizers of the run that `init_from` names; return a line that says so.

    `init_from` is a run, for its newest checkpoint, or one of its checkpoints: RUN/checkpoints/best.

    The critic of an intrinsic reward is not taken over: what is new for this run was not for that one.

    Raises:
        UserError: if there is no such run, or its policy has other spaces or networks than this run's.
    """
    assert config.init_from is not None
    checkpoint = _found(config.init_from)
    theirs = load_policy(checkpoint)
    _check_fit(config, policy, theirs)
    kept = {name: tensor for name, tensor in theirs.state_dict().items() if not name.startswith(_INTRINSIC)}
    policy.load_state_dict(
        {name: tensor for name, tensor in policy.state_dict().items() if name.startswith(_INTRINSIC)} | kept
    )
    said = f"begins from the policy of {checkpoint.path}"
    if policy.intrinsic_critic is not None:
        said += " (with an intrinsic critic of its own)"
    if checkpoint.skipped:
        said += f" (damaged and passed over: {'; '.join(checkpoint.skipped)})"
    described = checkpoint.state.get("settings")
    gamma = described.get("gamma") if isinstance(described, dict) else None
    if isinstance(gamma, int | float) and gamma != config.algorithm.gamma:
        said += f"; its critic was learned with gamma {gamma:g}, and this run has {config.algorithm.gamma:g}"
    return said


def _found(place: str) -> Checkpoint:
    path = files.expanded(place)
    run = open_run(path)
    if "stage" in read_config(run):
        raise UserError(f"init_from is {place}, which is a language run; a policy for environments is needed.")
    if "agents" in read_config(run):
        raise UserError(
            f"init_from is {place}, which is a run of several agents; a run of a single agent cannot begin from it."
        )
    if names.is_name(path.name) or path.name in (names.LATEST, names.BEST):
        return named_checkpoint(run.checkpoints, path.name)
    return newest_checkpoint(run.checkpoints)


def _check_fit(config: ControlConfig, policy: ActorCritic, theirs: ActorCritic) -> None:
    for word in ("observation_space", "action_space"):
        mine, its = getattr(policy, word), getattr(theirs, word)
        if mine != its:
            raise UserError(
                f"init_from is {config.init_from}, whose policy has the {word.replace('_', ' ')} {its}, but this run's "
                f"is {mine}: it is of another task, or of other action masks."
            )
    mine, its = settings_of(policy.config), settings_of(theirs.config)
    ignored: set[str] = set(_ONLY_AT_FIRST)
    if not policy.config.state_dependent_std:
        ignored.add("log_std_init")
    if policy.encoder is None and theirs.encoder is None:
        ignored.add("encoder")  # auto may have come to the same
    other = {name: value for name, value in its.items() if value != mine[name] and name not in ignored}
    if other:
        listed = ", ".join(f"{name} {shown(value)} (this run has {shown(mine[name])})" for name, value in other.items())
        flags = " ".join(_flag(name, value) for name, value in other.items())
        raise UserError(f"init_from is {config.init_from}, whose policy has {listed}. Give this run the same: {flags}")


def _flag(name: str, value: Any) -> str:
    word = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{word}" if value else f"--no-{word}"
    return f"--{word} {' '.join(map(str, value)) if isinstance(value, list) else value}"
