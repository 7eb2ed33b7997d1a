"""The commands `proximo clone` and `proximo record`."""

from __future__ import annotations

import dataclasses
import json
import shlex
import signal
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from proximo.api import make_to_look_at
from proximo.collect.demonstrations import check_output
from proximo.collect.envs import SpacePolicy
from proximo.collect.make import environment_source
from proximo.collect.packed_env import ActionMask
from proximo.errors import UserError, tell
from proximo.from_data import ClonedRun, clone_with, record_opened
from proximo.presets import resolve_settings
from proximo.runs.directory import open_run
from proximo.saved_run import needs_trust, open_policy, skipped_in_words
from proximo.terminal import Display, short
from proximo.training.clone import CloneConfig
from proximo.training.config import ControlConfig, with_settings

Outcome = tuple[int, str]


@dataclass(frozen=True)
class _Task:
    """What clone takes of the settings of `train` beside the networks."""

    gamma: float = 0.99
    """Discount of the returns that the critic learns; that of `train`."""
    seed: int = 0
    """Seeds the weights, what is held out, and the minibatches."""
    max_episode_steps: int | None = None
    """Truncate episodes of the evaluation after this many steps; by default whatever the environment does."""
    action_mask: ActionMask = "auto"
    """Where the environment says which choices are possible; `auto` looks for it."""
    on_space_violation: SpacePolicy = "raise"
    """An observation outside the bounds of its space is refused, or taken all the same (`warn`)."""
    device: str = "cpu"
    """Where the networks are: cpu, cuda, cuda:1, ..."""
    threads: int = 0
    """CPU threads for torch; 0 is one."""


@dataclass(frozen=True)
class _CloneOutput:
    data: str = ""
    """What to learn from: a file of recorded episodes (.npz), the folder of a Minari dataset, or the id of one."""
    config: Path | None = None
    """A TOML file of settings of `proximo train`, such as a run's config.toml; flags go over it."""
    run_dir: Path | None = None
    """Where to write; by default a new folder runs/ENV/TIME-seedSEED."""
    env_kwargs: str = "{}"
    """Arguments for making the environment, as a JSON object."""
    quiet: bool = False
    """Show no progress."""
    json: bool = False
    """Print one JSON object on standard output, and nothing else there."""


@dataclass(frozen=True)
class RecordArguments:
    """Play episodes as `proximo evaluate` does, and write them into a file that `proximo clone` reads."""

    run: tyro.conf.Positional[Path]
    """The run directory."""
    output: Path
    """The file to write, FILE.npz."""
    episodes: int = 50
    """How many episodes."""
    seed: int = 0
    """Fixes the episodes; training never sees the same ones."""
    stochastic: bool = False
    """Sample actions instead of taking the most likely one."""
    checkpoint: str = "latest"
    """latest, best, or the step of one."""
    env: str | None = None
    """The environment, where the run's own name for it is not a registered Gymnasium id."""
    allow_import: bool = False
    """Import the file or module that the run names as its environment; only for runs of your own."""
    json: bool = False
    """Print one JSON object on standard output, and nothing else there."""


def clone_arguments(base: ControlConfig) -> Any:
    """The flags of `proximo clone`: those of cloning, and those of `train` that a clone hangs on, with its values."""
    task = _Task(
        gamma=base.algorithm.gamma,
        seed=base.seed,
        device=base.device,
        threads=base.threads,
        **{name: getattr(base.environment, name) for name in _OF_ENVIRONMENT},
    )
    parts = [("cloning", CloneConfig()), ("network", base.network), ("task", task), ("output", _CloneOutput())]
    arguments = dataclasses.make_dataclass(
        "CloneArguments",
        [(name, Annotated[type(part), tyro.conf.OmitArgPrefixes], field(default=part)) for name, part in parts],
        frozen=True,
    )
    arguments.__doc__ = (
        "Clone the behaviour in recorded episodes. The defaults of networks are those of `proximo train`."
    )
    return arguments


_OF_ENVIRONMENT = ("max_episode_steps", "action_mask", "on_space_violation")


def clone_command(env_id: str | None, rest: list[str], from_file: dict[str, Any], kwargs: dict[str, Any]) -> Outcome:
    """`proximo clone ENV --data DATA [flags]`; `from_file` has the settings of --config, over which flags go."""
    base, source, factory = ControlConfig(), "", None
    if env_id is not None:
        env_id, factory = environment_source(env_id)
        made, name = factory, env_id
        base, source = resolve_settings(name, lambda: make_to_look_at(made, name, kwargs, None))
        changes = from_file | {"env_id": env_id, "env_kwargs": kwargs}
        base = with_settings(base, changes, where="proximo clone --config" if from_file else "proximo clone")
    given = tyro.cli(clone_arguments(base), args=rest, prog=f"proximo clone {env_id or 'ENV'}")
    if not given.output.data:
        raise UserError(
            f"proximo clone needs data: proximo clone {env_id} --data FILE.npz (or the folder or the id of a Minari "
            "dataset). proximo record makes such a file."
        )
    assert factory is not None
    config = _with_task(replace(base, network=given.network), given.task)
    display = Display.choose(quiet=given.output.quiet)
    run = clone_with(config, given.cloning, factory, given.output.data, display, given.output.run_dir, source)
    return _finish(run, display, as_json=given.output.json)


def _with_task(config: ControlConfig, task: _Task) -> ControlConfig:
    """The settings of `train` with what clone was given."""
    environment = replace(config.environment, **{name: getattr(task, name) for name in _OF_ENVIRONMENT})
    algorithm = replace(config.algorithm, gamma=task.gamma)
    return replace(
        config,
        environment=environment,
        algorithm=algorithm,
        seed=task.seed,
        device=task.device,
        threads=task.threads,
    )


def _finish(run: ClonedRun, display: Display, *, as_json: bool) -> Outcome:
    """Show the result, and say what may be typed next."""
    path, config = shlex.quote(str(run.path)), run.config
    trust = " --allow-import" if needs_trust(config) else ""
    env_id = shlex.quote(config.environment.env_id)
    commands = [f"proximo train {env_id} --init-from {path}", f"proximo evaluate {path}{trust}"]
    display.result(result_in_words(run.measured), None, [], commands)
    told = {
        "run": str(run.path),
        "env_id": config.environment.env_id,
        **run.measured,
        "interrupted": run.interrupted_by is not None,
    }
    code = 0
    if run.interrupted_by is not None:
        code = 130 if run.interrupted_by == signal.SIGINT else 128 + run.interrupted_by
    return code, json.dumps(told) if as_json else ""


def result_in_words(measured: dict[str, Any]) -> dict[str, str]:
    """What came out of cloning."""
    facts = {}
    if "log_prob_held_out" in measured:
        fit = f"log-probability {short(measured['log_prob_held_out'])} a step"
        if "accuracy_held_out" in measured:
            fit += f", {measured['accuracy_held_out']:.1%} of the actions are the most likely one"
        else:
            fit += f", the most likely action is {short(measured['error_held_out'])} off (root mean square)"
        facts["held out"] = fit
    if "value_r2_held_out" in measured:
        facts["critic"] = f"explains {measured['value_r2_held_out']:.0%} of the variance of held-out returns-to-go"
    if "log_std_mean" in measured:
        facts["log_std"] = f"{measured['log_std_mean']:.2f} on average: what PPO will explore with"
    if "return_mean" in measured:
        facts["return"] = (
            f"{short(measured['return_mean'])} by the most likely actions, {short(measured['sampled_return_mean'])} by "
            f"sampled ones; that of the data is {short(measured['data_return_mean'])}"
        )
    return facts


def record_command(words: list[str]) -> Outcome:
    """`proximo record RUN --output FILE.npz`."""
    given = tyro.cli(RecordArguments, args=words, prog="proximo record")
    path = check_output(given.output)
    config, policy, checkpoint = open_policy(open_run(given.run), given.checkpoint)
    if checkpoint.skipped:
        tell(f"proximo: {skipped_in_words(checkpoint)}")
    told = record_opened(
        path,
        config,
        policy,
        checkpoint,
        given.env,
        episodes=given.episodes,
        seed=given.seed,
        deterministic=not given.stochastic,
        allow_import=given.allow_import,
    )
    if given.json:
        return 0, json.dumps(told)
    how = "most likely actions" if told["deterministic"] else "sampled actions"
    return 0, (
        f"{told['file']}: {told['episodes']:,} episodes of {told['env_id']}, {told['steps']:,} steps, {how}, seed "
        f"{told['seed']}, mean return {told['return_mean']:.2f}\n"
        f"Clone it: proximo clone {shlex.quote(told['env_id'])} --data {shlex.quote(told['file'])}"
    )
