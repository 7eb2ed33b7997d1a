"""Starting from data, for Python callers: `clone` and `record`. The command line is built on these."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from proximo.api import Run, load, make_to_look_at
from proximo.collect.demonstrations import Demonstrations, check_output, read_demonstrations, write_recording
from proximo.collect.make import Env, EnvFactory, environment_source
from proximo.collect.record import Notebook, recording_of, with_notebook
from proximo.errors import UserError
from proximo.models.control import ActorCritic
from proximo.presets import resolve_settings
from proximo.process import enough_memory, noted_signals, training_device, training_threads
from proximo.runs.checkpoint import Checkpoint
from proximo.runs.directory import RunDirectory, new_run, open_run, write_config
from proximo.runs.lock import locked
from proximo.saved_run import make_for, open_policy, run_environment
from proximo.terminal import Display, short
from proximo.training import clone as cloning_loop
from proximo.training.choices import with_environments_chosen
from proximo.training.clone import CloneConfig
from proximo.training.config import ControlConfig, EnvironmentConfig, settings_of, with_settings
from proximo.training.evaluate import EpisodeScores, evaluate_policy

SHOWN_EVERY = 2.0
"""Seconds between two lines of progress."""


@dataclass(frozen=True)
class ClonedRun:
    """A policy that was cloned from data: a run directory like any other."""

    path: Path
    """The run directory."""
    config: ControlConfig
    """The settings that PPO would go on with."""
    measured: dict[str, Any]
    """`data_return_mean`, `data_episodes` and `data_steps`; `log_prob_held_out`, and `accuracy_held_out` or
    `error_held_out`, where something was held out; `value_r2_held_out`; `return_mean` of the most likely actions and
    `sampled_return_mean` of sampled ones, where it was evaluated; `log_std_mean` of one standard deviation for all
    states; `seconds`."""
    interrupted_by: int | None = None
    """The signal that ended it early; its best weights so far are kept. None if it came to its end."""

    @property
    def policy(self) -> ActorCritic:
        """The policy, for acting."""
        return load(self.path)


def clone(
    env: Env,
    data: str | Path,
    *,
    run_dir: str | Path | None = None,
    quiet: bool = False,
    **settings: Any,
) -> ClonedRun:
    """Clone the behaviour in recorded episodes: fit the policy that `train` would begin with by maximum likelihood.

    Args:
        env: as for `train`.
        data: a file of recorded episodes (.npz), the folder of a Minari dataset, or the id of one.
        run_dir: where to write; by default a new folder `runs/<env>/<time>-seed<seed>`.
        quiet: print nothing.
        settings: of `CloneConfig` by their names (`n_epochs=50`), and all others of `train` (`seed=1`,
            `hidden_sizes=(256, 256)`, `gamma=0.99`, ...).

    Raises:
        UserError: for an unknown setting, an impossible value, an existing `run_dir`, or data that is damaged or does
            not fit the environment.
    """
    env_id, factory = environment_source(env)
    where = "proximo.clone()"
    own = {field.name for field in fields(CloneConfig)}
    cloning = with_settings(CloneConfig(), {k: v for k, v in settings.items() if k in own}, where=where)
    others = {k: v for k, v in settings.items() if k not in own}
    kwargs = with_settings(
        EnvironmentConfig(), {k: v for k, v in others.items() if k == "env_kwargs"}, where=where
    ).env_kwargs
    base, source = resolve_settings(env_id, lambda: make_to_look_at(factory, env_id, kwargs, None))
    config = with_settings(base, others | {"env_id": env_id}, where=where)
    run = clone_with(config, cloning, factory, data, Display.choose(quiet=quiet), run_dir, source)
    if run.interrupted_by == signal.SIGINT:
        raise KeyboardInterrupt(f"{run.path} is saved")
    if run.interrupted_by is not None:  # all is saved: now let it do what it does to any Python program
        signal.raise_signal(run.interrupted_by)
    return run


def clone_with(
    config: ControlConfig,
    cloning: CloneConfig,
    factory: EnvFactory,
    data: str | Path,
    display: Display,
    run_dir: str | Path | None,
    source: str,
) -> ClonedRun:
    """`clone` with settings that are complete; `source` says where they come from."""
    if config.network.memory != "none":
        raise UserError(
            f"memory is {config.network.memory!r}; a policy that remembers cannot be cloned here, for its steps would "
            "have to be learned from along whole episodes. Leave it out: --memory none."
        )
    if config.network.distribution == "gsde":
        raise UserError(
            "distribution is 'gsde', whose noise is steady over steps in a row; what was demonstrated does not tell it "
            "apart. Clone with --distribution gaussian."
        )
    config = with_environments_chosen(replace(config, threads=config.threads or 1), factory)
    with enough_memory(config), training_device(config):
        env = make_for(config, factory)
        try:
            spaces = env.observation_space, env.action_space
            found = read_demonstrations(data, env, on_space_violation=config.environment.on_space_violation)
        finally:
            env.close()
        policy = cloning_loop.new_policy(config, *spaces)
        laid_out = cloning_loop.prepare(config, cloning, policy, found)
        directory = new_run(config.environment.env_id, config.seed, run_dir)
        with training_threads(config), locked(directory):
            write_config(directory, settings_of(config))
            display.facts(_plan(config, directory, found, laid_out, str(data), source))
            return _cloned(config, cloning, factory, directory, policy, laid_out, found, display)


def _plan(
    config: ControlConfig,
    directory: RunDirectory,
    found: Demonstrations,
    laid_out: cloning_loop.CloningData,
    data: str,
    source: str,
) -> dict[str, str]:
    """What will be done."""
    returns = found.returns
    return {
        "environment": config.environment.env_id,
        "data": f"{data}: {len(returns):,} episodes, {len(found.rewards):,} steps, of which {len(laid_out.held_out):,} "
        f"are held out; mean return {returns.mean():.4g}",
        "settings": source,
        "run directory": str(directory.path),
    }


def _cloned(
    config: ControlConfig,
    cloning: CloneConfig,
    factory: EnvFactory,
    directory: RunDirectory,
    policy: ActorCritic,
    data: cloning_loop.CloningData,
    found: Demonstrations,
    display: Display,
) -> ClonedRun:
    """Learn, save, and evaluate; a signal ends the learning early."""
    told, seconds = -SHOWN_EVERY, 0.0
    with noted_signals() as received:
        for row in cloning_loop.clone(config, cloning, directory, policy, data, lambda: received):
            seconds = row["seconds"]
            if time.monotonic() - told >= SHOWN_EVERY or row["epoch"] == 1:
                told = time.monotonic()
                display.say(_row_in_words(row))
        measured: dict[str, Any] = {
            "data_return_mean": float(found.returns.mean()),
            "data_episodes": len(found.ends),
            "data_steps": len(found.rewards),
            **cloning_loop.measure_actor(policy, data, data.held_out),
            **(cloning_loop.measure_critic(policy, data, data.held_out) if cloning.fit_critic else {}),
        }
        if policy.log_std is not None:
            measured["log_std_mean"] = float(policy.log_std.detach().mean())
        measured["seconds"] = seconds
        cloning_loop.save(config, cloning, directory, policy, measured)
    if not received and cloning.eval_episodes:
        for name, deterministic in (("return_mean", True), ("sampled_return_mean", False)):
            scores = _scores(config, factory, policy, cloning.eval_episodes, deterministic=deterministic)
            measured[name] = float(np.mean(scores.returns))
    return ClonedRun(directory.path, config, measured, received[0] if received else None)


def _scores(
    config: ControlConfig, factory: EnvFactory, policy: ActorCritic, n_episodes: int, *, deterministic: bool
) -> EpisodeScores:
    return evaluate_policy(
        policy,
        lambda: make_for(config, factory),
        n_episodes=n_episodes,
        seed=config.seed,
        deterministic=deterministic,
        name=config.environment.env_id,
    )


def _row_in_words(row: dict[str, Any]) -> str:
    names = [name for name in row if name not in ("iteration", "phase", "epoch", "is_best", "seconds")]
    values = "  ".join(f"{name.replace('_', ' ')} {short(row[name])}" for name in names)
    return f"{row['phase']} epoch {row['epoch']:>3}  {values}{'  *' if row['is_best'] else ''}"


def record(
    run: str | Path | Run,
    output: str | Path,
    env: Env | None = None,
    *,
    episodes: int = 50,
    seed: int = 0,
    deterministic: bool = True,
    checkpoint: str = "latest",
    allow_import: bool = False,
) -> dict[str, Any]:
    """Play episodes as `evaluate` does, and write them into a file that `clone` reads.

    Returns:
        `file`, `env_id`, `episodes`, `steps`, `return_mean`, `deterministic`, `seed`, and the checkpoint's `step`.

    Raises:
        UserError: as `evaluate`, and if the file exists or cannot be written.
    """
    path = check_output(output)
    place: Any = getattr(run, "path", run)
    config, policy, found = open_policy(open_run(place), checkpoint)
    return record_opened(
        path,
        config,
        policy,
        found,
        env,
        episodes=episodes,
        seed=seed,
        deterministic=deterministic,
        allow_import=allow_import,
    )


def record_opened(
    path: Path,
    config: ControlConfig,
    policy: ActorCritic,
    checkpoint: Checkpoint,
    env: Env | None,
    *,
    episodes: int,
    seed: int,
    deterministic: bool,
    allow_import: bool,
) -> dict[str, Any]:
    """`record` with what `open_policy` returned."""
    env_id, factory = run_environment(config, env, allow_import=allow_import)
    notebooks: list[Notebook] = []
    scores = evaluate_policy(
        policy,
        _noting(lambda: make_for(config, factory), notebooks),
        n_episodes=episodes,
        seed=seed,
        deterministic=deterministic,
        name=env_id,
    )
    # Episode e was played by environment e mod n, one after the other.
    n_envs = len(notebooks)
    played = [notebooks[number % n_envs].episodes[number // n_envs] for number in range(episodes)]
    if [len(episode.rewards) for episode in played] != scores.lengths:
        raise UserError(
            f"{env_id} does not step as it is asked to: what was written down are other episodes than those played."
        )
    write_recording(path, recording_of(notebooks[0], played))
    return {
        "file": str(path),
        "env_id": env_id,
        "episodes": episodes,
        "steps": sum(scores.lengths),
        "return_mean": float(np.mean(scores.returns)),
        "deterministic": deterministic,
        "seed": seed,
        "step": checkpoint.step,
    }


def _noting(make: Callable[[], gym.Env], notebooks: list[Notebook]) -> Callable[[], gym.Env]:
    def make_noted() -> gym.Env:
        env, notebook = with_notebook(make())
        notebooks.append(notebook)
        return env

    return make_noted
