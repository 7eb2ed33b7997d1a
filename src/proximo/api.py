"""What Python callers use: `train`, `resume`, `load`, `evaluate`. The command line is built on these."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import tomli_w
import torch

from proximo.collect.envs import VectorEnvs
from proximo.collect.make import EnvFactory, find_factory, make_env, names_code
from proximo.errors import UserError
from proximo.models.control import ActorCritic
from proximo.presets import resolve_settings
from proximo.runs.checkpoint import Checkpoint, named_checkpoint, newest_checkpoint
from proximo.runs.directory import RunDirectory, new_run, open_run, read_config, write_config
from proximo.runs.lock import locked
from proximo.runs.metrics import truncate_metrics
from proximo.terminal import Display
from proximo.training import control
from proximo.training.config import ControlConfig, EnvironmentConfig, settings_of, with_settings
from proximo.training.estimate import estimated_seconds
from proximo.training.evaluate import evaluate_policy

Env = str | type[gym.Env] | Callable[..., Any]
"""A Gymnasium id, `my_file.py:MyEnv`, `package.module:MyEnv`, an environment class, or a factory."""


@dataclass(frozen=True)
class Run:
    """A run that has been trained, wholly or until it was interrupted."""

    path: Path
    """The run directory."""
    config: ControlConfig
    """The settings it was trained with."""
    env_steps: int
    """Environment steps taken."""
    return_mean: float | None
    """Mean return of the last 100 episodes of training."""
    seconds: float
    """Time spent collecting and learning, over all sessions of the run."""
    interrupted_by: int | None = None
    """The signal that ended it early; None if it came to its end."""

    @property
    def policy(self) -> ActorCritic:
        """The policy of the newest checkpoint, for acting."""
        return load(self.path)


def train(
    env: Env | None = None,
    config: ControlConfig | None = None,
    *,
    run_dir: str | Path | None = None,
    quiet: bool = False,
    **settings: Any,
) -> Run:
    """Train a policy and return the run.

    Args:
        env: a Gymnasium id, `my_file.py:MyEnv`, `package.module:MyEnv`, an environment class or a factory.
            May be left out when `config` names the environment.
        config: the settings; without one, the tuned settings of the environment, or defaults by its spaces.
        run_dir: where to write; by default a new folder `runs/<env>/<time>-seed<seed>`.
        quiet: print nothing.
        settings: any setting by its name (`seed=1`, `total_steps=50_000`, `clip_epsilon=0.1`, ...), over
            those of `config`.

    Raises:
        UserError: for an unknown environment or setting, an impossible value, an existing `run_dir`, or an
            environment that breaks the rules of its own spaces.
    """
    env_id, factory = environment_source(env if env is not None else config.environment.env_id if config else None)
    where = "proximo.train()"
    base, source = config, "given as a config"
    if base is None:
        kwargs = with_settings(EnvironmentConfig(), _only(settings, "env_kwargs"), where=where).env_kwargs
        base, source = resolve_settings(env_id, lambda: make_env(factory, env_id, kwargs))
    final = with_settings(base, settings | {"env_id": env_id}, where=where)
    return _unless_interrupted(train_with(final, factory, Display.choose(quiet=quiet), run_dir, source))


def resume(
    run: str | Path,
    env: Env | None = None,
    *,
    allow_import: bool = False,
    total_steps: int | None = None,
    quiet: bool = False,
) -> Run:
    """Go on exactly where a run stopped.

    Args:
        run: the run directory.
        env: the environment, where the run's own name for it is not a registered Gymnasium id.
        allow_import: import the file or module that the run names; only for runs of your own.
        total_steps: train up to this many steps instead of the number the run was begun with.
        quiet: print nothing.

    Raises:
        UserError: if there is no run, no sound checkpoint, or the environment cannot be made.
    """
    display = Display.choose(quiet=quiet)
    return _unless_interrupted(resume_with(run, env, display, allow_import=allow_import, total_steps=total_steps))


def resume_with(
    run: str | Path, env: Env | None, display: Display, *, allow_import: bool, total_steps: int | None
) -> Run:
    """`resume` on a display of the caller's."""
    directory = open_run(run)
    config = read_run_config(directory)
    if total_steps is not None:
        config = replace(config, total_steps=total_steps)
    _, factory = run_environment(config, env, allow_import=allow_import)
    checkpoint = newest_checkpoint(directory.checkpoints)
    with locked(directory), _training_threads(config), _open_envs(config, factory) as envs:
        state, fresh = control.restore(config, checkpoint, envs)
        if total_steps is not None:
            write_config(directory, settings_of(config))
        truncate_metrics(directory.metrics_path, state.iteration)
        display.resumed(directory, checkpoint, fresh, envs.n_envs)
        return _train_to_the_end(config, directory, state, envs, display)


def load(run: str | Path, *, checkpoint: str = "latest") -> ActorCritic:
    """Load the policy of a run, for acting. Safe for runs from anyone: nothing of theirs is executed.

    Args:
        run: the run directory.
        checkpoint: `latest`, `best`, or the step of one.

    Raises:
        UserError: if there is no such run or checkpoint, or it is damaged.
    """
    return control.load_policy(_checkpoint(open_run(run), checkpoint))


def evaluate(
    run: str | Path | Run,
    env: Env | None = None,
    *,
    episodes: int = 100,
    seed: int = 0,
    deterministic: bool = True,
    checkpoint: str = "latest",
    allow_import: bool = False,
) -> dict[str, Any]:
    """Play episodes with frozen weights and normalizer; return their scores in the environment's rewards.

    Returns:
        `env_id`, `episodes`, `return_mean`, `return_std` (population), `return_min`, `return_max`,
        `length_mean`, `deterministic`, `seed`.

    Raises:
        UserError: if the run, the checkpoint or the environment is not to be had, or `episodes` is below 1.
    """
    _, config, policy, _ = open_policy(run.path if isinstance(run, Run) else run, checkpoint)
    env_id, factory = run_environment(config, env, allow_import=allow_import)
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
    }


def open_policy(run: str | Path, checkpoint: str) -> tuple[RunDirectory, ControlConfig, ActorCritic, int]:
    """A run with its settings, the policy of one of its checkpoints, and that checkpoint's step."""
    directory = open_run(run)
    found = _checkpoint(directory, checkpoint)
    return directory, read_run_config(directory), control.load_policy(found), found.step


def read_run_config(directory: RunDirectory) -> ControlConfig:
    """The settings that a run was begun with.

    Raises:
        UserError: if its config.toml is damaged.
    """
    return with_settings(ControlConfig(), read_config(directory), where=str(directory.config_path))


def run_environment(config: ControlConfig, env: Env | None, *, allow_import: bool) -> tuple[str, EnvFactory]:
    """The environment of a run: `env` if given, else the one its config names, if that runs no code of its own.

    Raises:
        UserError: if the name points to code and nobody has allowed that.
    """
    if env is not None:
        return environment_source(env)
    env_id, kwargs = config.environment.env_id, config.environment.env_kwargs
    if not allow_import and not names_code(env_id) and (env_id.startswith("Gym") or _names_a_place(kwargs)):
        raise UserError(
            f"This run's environment is {env_id!r} with the arguments {kwargs!r}, which may open files or import code. "
            "If the run is your own, add --allow-import (Python: allow_import=True)."
        )
    if names_code(env_id) and not allow_import:
        raise UserError(
            f"This run's environment is {env_id!r}: using it runs that code. If the run is your own, add "
            f"--allow-import (Python: allow_import=True), or name the environment yourself: --env {env_id} "
            "(Python: env=...)."
        )
    return environment_source(env_id)


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
    return make_env(
        factory,
        task.env_id,
        task.env_kwargs,
        max_episode_steps=task.max_episode_steps,
        render_mode=render_mode,
    )


def train_with(
    config: ControlConfig, factory: EnvFactory, display: Display, run_dir: str | Path | None, source: str
) -> Run:
    """Train a new run with settings that are complete; `source` says where they come from.

    The environments are made first, so that what is wrong with them leaves no run directory behind.
    """
    _check_kwargs(config.environment.env_kwargs)
    with _training_threads(config), _open_envs(config, factory) as envs:
        state = control.start(config, envs)
        directory = new_run(config.environment.env_id, config.seed, None if run_dir is None else Path(run_dir))
        write_config(directory, settings_of(config))
        with locked(directory):
            control.save(config, directory, state, envs)  # so that it can be resumed from its first moment on
            seconds = _estimate(config, factory, state, display)
            display.plan(config, directory, _spaces_in_words(envs), source, seconds)
            return _train_to_the_end(config, directory, state, envs, display)


def _estimate(
    config: ControlConfig, factory: EnvFactory, state: control.ControlState, display: Display
) -> float | None:
    """Seconds the run should take; not measured where nobody reads it, or making environments is costly."""
    if display.console.quiet or config.environment.vectorization == "workers":
        return None
    try:
        return estimated_seconds(config, state.policy, lambda: control.make_envs(config, factory))
    except Exception:  # a second set of environments may be impossible where the first one works
        return None


def _spaces_in_words(envs: VectorEnvs) -> str:
    actions = envs.action_space
    acts = f"{actions.n} actions" if isinstance(actions, gym.spaces.Discrete) else f"actions {actions.shape}"
    return f"(observations {envs.observation_space.shape}, {acts})"


def _train_to_the_end(
    config: ControlConfig,
    directory: RunDirectory,
    state: control.ControlState,
    envs: VectorEnvs,
    display: Display,
) -> Run:
    """Run the loop, showing each iteration; a signal saves a checkpoint at the next safe point and ends it."""
    interrupted_by = None
    with _signals() as received, display.live(config, state.env_steps) as show:
        for row in control.iterate(config, directory, state, envs):
            show(row, envs)
            if received and not control.finished(config, state):
                interrupted_by = received[0]
                if state.saved_at_step != state.env_steps:
                    control.save(config, directory, state, envs)
                break
    return_mean = float(np.mean(state.recent_returns)) if state.recent_returns else None
    return Run(directory.path, config, state.env_steps, return_mean, state.seconds, interrupted_by)


def _unless_interrupted(run: Run) -> Run:
    """What a signal asked for is done (all is saved): now let it do what it does to any Python program."""
    if run.interrupted_by == signal.SIGINT:
        raise KeyboardInterrupt(f"{run.path} is saved")
    if run.interrupted_by is not None:
        signal.raise_signal(run.interrupted_by)
    return run


def _only(settings: dict[str, Any], name: str) -> dict[str, Any]:
    return {name: settings[name]} if name in settings else {}


def _check_kwargs(kwargs: dict[str, Any]) -> None:
    """Refuse what config.toml cannot hold, before anything is written."""
    try:
        tomli_w.dumps({"env_kwargs": kwargs})
    except (TypeError, ValueError) as error:
        raise UserError(
            f"env_kwargs is {kwargs!r}, which config.toml cannot hold ({error}). Leave None out; for objects, pass a "
            "factory instead: proximo.train(lambda: MyEnv(...))."
        ) from error


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM and SIGUSR1 instead of dying; a second SIGINT interrupts at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number: int, frame: object) -> None:
        del frame
        if number == signal.SIGINT and signal.SIGINT in received:
            raise KeyboardInterrupt
        received.append(number)

    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _training_threads(config: ControlConfig) -> Iterator[None]:
    """Give torch the run's number of threads, and back what it had."""
    _check_device(config.device)
    before = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _open_envs(config: ControlConfig, factory: EnvFactory) -> Iterator[VectorEnvs]:
    envs = control.make_envs(config, factory)
    try:
        yield envs
    finally:
        envs.close()


def _check_device(name: str) -> None:
    try:
        torch.zeros(1, dtype=torch.float64, device=name).item()
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device is {name!r}, which cannot be used here: {reason} Use cpu.") from error


def _checkpoint(directory: RunDirectory, name: str) -> Checkpoint:
    return (
        newest_checkpoint(directory.checkpoints) if name == "latest" else named_checkpoint(directory.checkpoints, name)
    )


def environment_source(env: Env | None) -> tuple[str, EnvFactory]:
    """A name to write down and a factory, for whatever stands for an environment."""
    if env is None:
        raise UserError("No environment: name one, such as CartPole-v1.")
    if isinstance(env, str):
        return env, find_factory(env)
    if not callable(env):
        raise UserError(
            f"An environment is named by a string, a class or a function that makes one, not by {type(env).__name__}. "
            "Give the class, or lambda: MyEnv(...)."
        )
    module, name = getattr(env, "__module__", "?"), getattr(env, "__qualname__", type(env).__name__)
    return f"{module}:{name}", env
