"""A run that lies on the disk: its settings, its policies, and its environment, which may be code of a stranger's."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np

from proximo.collect.make import Env, EnvFactory, environment_source, make_packed_env, names_code
from proximo.errors import UserError
from proximo.runs.checkpoint import Checkpoint, named_checkpoint, newest_checkpoint
from proximo.runs.directory import RunDirectory, read_config
from proximo.training import agents, control, selfplay
from proximo.training.agents_config import AgentsConfig, SelfPlayConfig, config_for
from proximo.training.agents_evaluate import evaluate_agents
from proximo.training.config import ControlConfig, with_settings
from proximo.training.evaluate import evaluate_policy


def open_policy(directory: RunDirectory, checkpoint: str) -> tuple[ControlConfig, Any, Checkpoint]:
    """The settings of a run, the policy of one of its checkpoints, and that checkpoint.

    The caller must show the checkpoint's `skipped` to the person.
    """
    config = read_run_config(directory)
    found = checkpoint_of(directory, checkpoint)
    return config, load_policy(found), found


def load_policy(checkpoint: Checkpoint) -> Any:
    """The policy of a checkpoint: an `ActorCritic`, or, of several agents, an `AgentsPolicy`."""
    return agents.load_policies(checkpoint) if "learners" in checkpoint.state else control.load_policy(checkpoint)


def checkpoint_of(directory: RunDirectory, name: str) -> Checkpoint:
    """`latest`, `best`, or the one of a step."""
    return (
        newest_checkpoint(directory.checkpoints) if name == "latest" else named_checkpoint(directory.checkpoints, name)
    )


def skipped_in_words(checkpoint: Checkpoint) -> str:
    """Say that a damaged checkpoint was passed over; empty if none was."""
    if not checkpoint.skipped:
        return ""
    return f"Step {checkpoint.step:,} is used instead of what was damaged: {'; '.join(checkpoint.skipped)}."


def read_run_config(directory: RunDirectory) -> ControlConfig:
    """The settings that a run was begun with.

    Raises:
        UserError: if its config.toml is damaged, emptied or cut short.
    """
    settings = read_config(directory)
    if "stage" in settings:
        raise UserError(
            f"{directory.path} is a language run ({settings['stage']}), which has no environment. Look at it with: "
            f"proximo chat {directory.path}, or proximo sample {directory.path} --prompts FILE"
        )
    # The first and the last that are written: defaults must not stand in silently for what was lost between.
    lost = [name for name in ("env_id", "env_kwargs") if name not in settings]
    if lost:
        raise UserError(
            f"{directory.config_path} was emptied or damaged: it lacks {' and '.join(lost)}. Restore it from a copy, "
            'or write all settings of the run into it again: env_id = "CartPole-v1", ..., and at the end [env_kwargs]'
        )
    settings = control.BEFORE_ENCODERS | {"action_mask": "none"} | settings  # what runs that say nothing of it had
    return with_settings(config_for(settings), settings, where=str(directory.config_path))


def run_environment(config: ControlConfig, env: Env | None, *, allow_import: bool) -> tuple[str, EnvFactory]:
    """The environment of a run: `env` if given, else the one its config names, if that runs no code of its own.

    Raises:
        UserError: if the name points to code and nobody has allowed that, or leads nowhere.
    """
    if env is not None:
        return environment_source(env)
    env_id, kwargs = config.environment.env_id, config.environment.env_kwargs
    if not config.environment.can_be_named:
        raise UserError(
            f"This run's environment is {env_id!r}, which only the program that trained it can make. Use the run "
            "from there: proximo.resume(run, env), proximo.evaluate(run, env); or name a file: --env FILE.py:NAME."
        )
    if not allow_import and not names_code(env_id) and needs_trust(config):
        raise UserError(
            f"This run's environment is {env_id!r} with the arguments {kwargs!r}, which may open files or import code. "
            "If the run is your own, add --allow-import (Python: allow_import=True)."
        )
    if names_code(env_id) and not allow_import:
        raise UserError(
            f"This run's environment is {env_id!r}: using it runs that code. If the run is your own, add "
            "--allow-import (Python: allow_import=True), or name the environment yourself: "
            f"--env {shlex.quote(env_id)} (Python: env=...)."
        )
    return environment_source(env_id)


def needs_trust(config: ControlConfig) -> bool:
    """Whether making the environment that a run names may run code or open files of the run's choice."""
    env_id = config.environment.env_id
    return names_code(env_id) or env_id.startswith("Gym") or _names_a_place(config.environment.env_kwargs)


def _names_a_place(value: Any) -> bool:
    """Whether an argument, at any depth, is a string that could be a file or a module."""
    if isinstance(value, dict):
        return any(_names_a_place(inner) for inner in value.values())
    if isinstance(value, list):
        return any(_names_a_place(inner) for inner in value)
    return isinstance(value, str) and any(mark in value for mark in ":/\\")


def make_for(config: ControlConfig, factory: EnvFactory, *, render_mode: str | None = None) -> gym.Env:
    """One environment as the run has it."""
    task = config.environment
    try:
        return make_packed_env(
            factory,
            task.env_id,
            task.env_kwargs,
            max_episode_steps=task.max_episode_steps,
            render_mode=render_mode,
            action_mask=task.action_mask,
        )
    except UserError as error:
        if task.vectorization != "device":
            raise
        raise UserError(
            f"{error}\nThe environments of this run live on a device, all in one. Name one environment of the same "
            "spaces: --env FILE.py:NAME (Python: env=...)."
        ) from error


def evaluate_opened(
    config: ControlConfig,
    policy: Any,
    step: int,
    env: Env | None,
    *,
    episodes: int,
    seed: int,
    deterministic: bool,
    allow_import: bool,
) -> dict[str, Any]:
    """`evaluate` with what `open_policy` returned."""
    env_id, factory = run_environment(config, env, allow_import=allow_import)
    about = {"env_id": env_id, "episodes": episodes, "deterministic": deterministic, "seed": seed, "step": step}
    if isinstance(config, AgentsConfig):
        config = replace(config, environment=replace(config.environment, env_id=env_id))
        return about | evaluate_agents(
            config, policy, factory, n_episodes=episodes, seed=seed, deterministic=deterministic
        )
    scores = evaluate_policy(
        policy,
        lambda: make_for(config, factory),
        n_episodes=episodes,
        seed=seed,
        deterministic=deterministic,
        name=env_id,
    )
    return {
        "env_id": env_id,
        "episodes": episodes,
        "return_mean": float(np.mean(scores.returns)),
        "return_std": float(np.std(scores.returns)),
        "return_min": min(scores.returns),
        "return_max": max(scores.returns),
        "length_mean": float(np.mean(scores.lengths)),
        "deterministic": deterministic,
        "seed": seed,
        "step": step,
    }


def rate_opened(
    config: SelfPlayConfig, checkpoint: Checkpoint, env: Env | None, *, episodes: int, seed: int, allow_import: bool
) -> dict[str, Any]:
    """The evaluation of a self-play run: ratings of its past selves; see `training.selfplay.rate`."""
    env_id, factory = run_environment(config, env, allow_import=allow_import)
    config = replace(config, environment=replace(config.environment, env_id=env_id))
    rated = selfplay.rate(config, checkpoint, factory, n_games=episodes, seed=seed)
    return {"env_id": env_id, "step": checkpoint.step, "seed": seed} | rated
