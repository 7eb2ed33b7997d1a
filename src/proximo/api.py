"""What Python callers use: `train`, `resume`, `load`, `evaluate`. The command line is built on these."""

from __future__ import annotations

import shlex
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import gymnasium as gym
import numpy as np
import tomli_w

from proximo.algorithms.ppo import PPO
from proximo.baselines import served
from proximo.collect.device_envs import make_device_envs
from proximo.collect.envs import VectorEnvs
from proximo.collect.make import Env, EnvFactory, environment_source, make_packed_env, names_code
from proximo.collect.parallel_envs import ParallelEnvs
from proximo.errors import UserError, shown, tell
from proximo.loggers.following import NO_LOGGERS, Loggers, ResumeLoggers, following, refuse_missing, taken_from
from proximo.models.packing import PackedObservations
from proximo.presets import resolve_settings
from proximo.process import check_device, enough_memory, noted_signals, training_device, training_threads
from proximo.runs import names
from proximo.runs.checkpoint import Checkpoint, finish_save, newest_checkpoint
from proximo.runs.directory import RunDirectory, new_run, open_run, read_config, write_config
from proximo.runs.lock import locked
from proximo.runs.metrics import truncate_metrics
from proximo.saved_run import (
    checkpoint_of,
    evaluate_opened,
    load_policy,
    needs_trust,
    open_policy,
    rate_opened,
    read_run_config,
    run_environment,
    skipped_in_words,
)
from proximo.terminal import Display
from proximo.training import agents, control, selfplay
from proximo.training.agents_config import AgentsConfig, SelfPlayConfig
from proximo.training.choices import with_environments_chosen, with_update_chosen
from proximo.training.config import ControlConfig, EnvironmentConfig, changed_settings, settings_of, with_settings
from proximo.training.environments import make_envs
from proximo.training.estimate import estimated_seconds
from proximo.training.initial import begin_from

Ended = TypeVar("Ended", bound=Any)
"""A run, or what else has a `path` and `interrupted_by`."""


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
    """Mean return of the last 100 episodes of training, of fewer where fewer have ended."""
    seconds: float
    """Time spent collecting and learning, over all sessions of the run."""
    interrupted_by: int | None = None
    """The signal that ended it early; None if it came to its end."""
    return_episodes: int = 0
    """How many episodes `return_mean` is over."""
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds by phase since the run was begun or last resumed: `seconds_acting` and `seconds_environment`, which are
    in `seconds_collecting`, `seconds_updating`, and `seconds_overhead` between the iterations."""

    @property
    def policy(self) -> Any:
        """The policy of the newest checkpoint, for acting; see `load`."""
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
            those of `config`; and `tensorboard=True`, `wandb=True`, `trackio=True` (docs/logging.md).

    Raises:
        UserError: for an unknown environment or setting, an impossible value, an existing `run_dir`, or an
            environment that breaks the rules of its own spaces.
    """
    loggers = taken_from(settings, where="proximo.train()")
    final, factory, source = complete_settings(env, config, settings, where="proximo.train()")
    return unless_interrupted(train_with(final, factory, Display.choose(quiet=quiet), run_dir, source, loggers))


def complete_settings(
    env: Env | None, config: ControlConfig | None, settings: dict[str, Any], *, where: str
) -> tuple[ControlConfig, EnvFactory, str]:
    """What `train` is given, as all settings, a factory of the environment, and where the settings come from.

    Raises:
        UserError: for an unknown environment or setting, or an impossible value.
    """
    if config is not None and not isinstance(config, ControlConfig):
        raise UserError(
            f"{where} takes settings as keywords, or a ControlConfig, not a {type(config).__name__}. "
            f'Write {where[:-1]}"CartPole-v1", seed=1), or with a dict: {where[:-1]}"CartPole-v1", **settings).'
        )
    env_id, factory = environment_source(env if env is not None else config.environment.env_id if config else None)
    if settings.get("init_from") is not None:  # a run, or where it is
        settings["init_from"] = str(getattr(settings["init_from"], "path", settings["init_from"]))
    base, source = config, "given as a config"
    if base is None:
        kwargs = with_settings(EnvironmentConfig(), _only(settings, "env_kwargs"), where=where).env_kwargs
        on_device = settings.get("device", "cpu") if settings.get("vectorization") == "device" else None
        base, source = resolve_settings(env_id, lambda: make_to_look_at(factory, env_id, kwargs, on_device))
    final = with_settings(base, settings | {"env_id": env_id}, where=where)
    return final, factory, source


def resume(
    run: str | Path | Run,
    env: Env | None = None,
    *,
    allow_import: bool = False,
    total_steps: int | None = None,
    quiet: bool = False,
    loggers: ResumeLoggers | None = None,
) -> Run:
    """Go on exactly where a control run stopped; `proximo.resume` (in language.py) takes runs of both kinds.

    Args:
        run: the run, or its directory.
        env: the environment, where the run's own name for it is not a registered Gymnasium id.
        allow_import: import the file or module that the run names; only for runs of your own.
        total_steps: train up to this many steps instead of the number the run was begun with.
        quiet: print nothing.
        loggers: where its metrics go.

    Raises:
        UserError: if there is no run, no sound checkpoint, or the environment cannot be made.
    """
    display, chosen = Display.choose(quiet=quiet), (loggers or ResumeLoggers()).of(_directory(run))
    return unless_interrupted(
        resume_with(run, env, display, allow_import=allow_import, total_steps=total_steps, loggers=chosen)
    )


def resume_with(
    run: str | Path | Run,
    env: Env | None,
    display: Display,
    *,
    allow_import: bool,
    total_steps: int | None,
    loggers: Loggers,
) -> Run:
    """`resume` on a display of the caller's."""
    directory = _directory(run)
    _, factory = run_environment(read_run_config(directory), env, allow_import=allow_import)
    with locked(directory):  # before anything is read that another process may be writing
        config = read_run_config(directory)
        checkpoint = newest_checkpoint(directory.checkpoints)
        if "clone" in checkpoint.state:
            raise UserError(
                f"{directory.path} is a cloned policy, with nothing to go on with. Let PPO begin from it: "
                f"{shlex.join(['proximo', 'train', config.environment.env_id, '--init-from', str(directory.path)])}"
            )
        changed = changed_settings(checkpoint.state.get("settings"), config)
        if total_steps is not None:
            config = _with_total_steps(config, total_steps, checkpoint.step, directory)
        written = config
        config = with_environments_chosen(config, factory)
        with enough_memory(config), training_device(config), _open_envs(config, factory) as envs:
            state, fresh = _loop_of(config).restore(config, checkpoint, envs)
            config = with_update_chosen(config, state.policy, display.say)
            with training_threads(config):
                if total_steps is not None or config != written:  # what `auto` came to in a run of before
                    write_config(directory, settings_of(config))
                finish_save(
                    directory.checkpoints,
                    checkpoint,
                    keep_last=config.keep_checkpoints,
                    keep_every=config.keep_every,
                    best=checkpoint.state.get("is_best") is True,
                )
                truncate_metrics(directory.metrics_path, state.iteration)
                display.resumed(directory, checkpoint, fresh, config, changed)
                if control.finished(config, state):
                    display.say(_already_finished(config, state, directory))
                with following(directory, loggers, display.say, resumed=True) as follow:
                    return _train_to_the_end(config, directory, state, envs, display, follow)


def _with_total_steps(config: ControlConfig, total_steps: int, done: int, directory: RunDirectory) -> ControlConfig:
    """Refuse to end a run before where it already is."""
    if total_steps < done:
        raise UserError(
            f"total_steps is {total_steps:,}, but {directory.path} has already done {done:,} steps of "
            f"{config.total_steps:,}. Give a larger number to go on."
        )
    return replace(config, total_steps=total_steps)


def _already_finished(config: ControlConfig, state: control.ControlState, directory: RunDirectory) -> str:
    done = f"This run is finished: {state.env_steps:,} of {config.total_steps:,} steps are done"
    if state.env_steps + config.steps_per_iteration <= config.total_steps:
        return f"{done}, and its mean return has reached stop_at_return ({config.stop_at_return:g})."
    more = max(2 * config.total_steps, state.env_steps + config.steps_per_iteration)
    return (
        f"{done}, and an iteration takes {config.steps_per_iteration:,}. "
        f"To go on: {resume_command(config, directory, total_steps=more)}"
    )


def resume_command(config: ControlConfig, directory: RunDirectory, *, total_steps: int | None = None) -> str:
    """What to type to go on with a run; Python where no name leads to its environment."""
    if not config.environment.can_be_named:
        steps = "" if total_steps is None else f", total_steps={total_steps}"
        return f"proximo.resume({str(directory.path)!r}, env{steps})"
    trust = ["--allow-import"] if needs_trust(config) else []
    steps = [] if total_steps is None else ["--total-steps", str(total_steps)]
    return shlex.join(["proximo", "resume", str(directory.path), *trust, *steps])


def load(run: str | Path | Run, *, checkpoint: str = "latest") -> Any:
    """Load the policy of a run, for acting. Safe for runs from anyone: nothing of theirs is executed.

    It is an `ActorCritic`; of a run of several agents an `AgentsPolicy`, which takes and returns dicts by agent.

    Args:
        run: the run, or its directory.
        checkpoint: `latest`, `best`, or the step of one.

    Raises:
        UserError: if there is no such run or checkpoint, or it is damaged. A damaged latest one is passed over
            with a warning.
    """
    directory = _directory(run)
    _refuse_language_run(directory)
    found = checkpoint_of(directory, checkpoint)
    _warn_of_skipped(found)
    return load_policy(found)


def _refuse_language_run(directory: RunDirectory) -> None:
    """Say what loads the result of a language run, which has no policy for environments."""
    stage = read_config(directory).get("stage")
    if stage is not None:
        kind = "SequenceClassification" if stage == "reward" else "CausalLM"
        raise UserError(
            f"{directory.path} is a language run ({stage}). Once it is whole, its folder is a transformers model: load "
            f"it with transformers.AutoModelFor{kind}.from_pretrained({str(directory.path)!r})."
        )


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
        `length_mean`, `deterministic`, `seed`, and `step`, that of the checkpoint. Of several agents also `agents`,
        each one's mean return, and `team_return_mean`. Of self-play what `training.selfplay.rate` says: ratings of past
        selves, by `episodes` games of each pair.

    Raises:
        UserError: if the run, the checkpoint or the environment is not to be had, or `episodes` is below 1.
    """
    config, policy, found = open_policy(_directory(run), checkpoint)
    _warn_of_skipped(found)
    if isinstance(config, SelfPlayConfig):
        return rate_opened(config, found, env, episodes=episodes, seed=seed, allow_import=allow_import)
    return evaluate_opened(
        config,
        policy,
        found.step,
        env,
        episodes=episodes,
        seed=seed,
        deterministic=deterministic,
        allow_import=allow_import,
    )


def _warn_of_skipped(checkpoint: Checkpoint) -> None:
    if checkpoint.skipped:
        warnings.warn(skipped_in_words(checkpoint), stacklevel=3)


def _directory(run: str | Path | Run) -> RunDirectory:
    path: Any = getattr(run, "path", run)  # of a language run too, which is then refused in words
    return open_run(path)


def make_to_look_at(factory: EnvFactory, env_id: str, kwargs: dict[str, Any], on_device: str | None) -> Any:
    """An environment whose spaces decide on settings; one of a vector environment on a device, where it is so made."""
    if on_device is None:
        return make_packed_env(factory, env_id, kwargs)
    check_device(on_device)
    return make_device_envs(env_id, factory, 1, on_device, 0, kwargs)


def train_with(
    config: ControlConfig,
    factory: EnvFactory,
    display: Display,
    run_dir: str | Path | None,
    source: str,
    loggers: Loggers = NO_LOGGERS,
) -> Run:
    """Train a new run with settings that are complete; `source` says where they come from.

    The environments are made first, so that what is wrong with them leaves no run directory behind.
    """
    refuse_missing(loggers)
    _check_environment(config.environment)
    config = with_environments_chosen(config, factory)
    with enough_memory(config), training_device(config), _open_envs(config, factory) as envs:
        loop = _loop_of(config)
        state = loop.start(config, envs)
        if config.init_from is not None:
            source = f"{source}; {begin_from(config, state.policy)}"
        config = with_update_chosen(config, state.policy, display.say)
        seen = state.carry.observations
        if isinstance(seen, np.ndarray):
            np.zeros((seen.shape[0], config.rollout_length, *seen.shape[1:]), seen.dtype)  # if not, let it fail here
        directory = new_run(config.environment.env_id, config.seed, run_dir)
        with training_threads(config), locked(directory):
            if directory.config_path.exists():  # two began at once, and the other one was faster
                raise UserError(f"{directory.path} holds the run of another process. Choose another --run-dir.")
            write_config(directory, settings_of(config))
            loop.save(config, directory, state, envs)  # so that it can be resumed from its first moment on
            seconds = _estimate(config, factory, state, display)
            display.plan(config, directory, _spaces_in_words(envs), source, seconds)
            with following(directory, loggers, display.say, resumed=False) as follow:
                return _train_to_the_end(config, directory, state, envs, display, follow)


def _estimate(
    config: ControlConfig, factory: EnvFactory, state: control.ControlState, display: Display
) -> float | None:
    """Seconds the run should take; not measured where nobody reads it, or making environments is costly.

    Nor for a person's own environments: a second set may open their files or ports a second time.
    """
    task = config.environment
    if not isinstance(config.algorithm, PPO):
        return None
    if display.console.quiet or task.vectorization in ("workers", "device") or names_code(task.env_id):
        return None
    try:
        return estimated_seconds(config, state.policy, lambda: cast(VectorEnvs, make_envs(config, factory)))
    except Exception:  # a second set of environments may be impossible where the first one works
        return None


def _spaces_in_words(envs: control.Envs) -> str:
    if isinstance(envs, ParallelEnvs):
        return envs.in_words()
    seen, actions = envs.observation_space, envs.action_space
    sees = shown(seen) if isinstance(seen, PackedObservations) else seen.shape
    acts = f"actions {actions.shape}" if type(actions) is gym.spaces.Box else f"actions {shown(actions)}"
    if isinstance(actions, gym.spaces.Discrete):
        acts = f"{actions.n} actions"
    return f"(observations {sees}, {acts})"


def _train_to_the_end(
    config: ControlConfig,
    directory: RunDirectory,
    state: control.ControlState,
    envs: control.Envs,
    display: Display,
    follow: Callable[[], None],
) -> Run:
    """Run the loop, showing each iteration; a signal saves a checkpoint at the next safe point and ends it."""
    interrupted_by = None
    try:
        with (
            served(directory, settings_of(config), display.dashboard_port),
            noted_signals() as received,
            display.live(config, state.env_steps) as show,
        ):
            for row in _loop_of(config).iterate(config, directory, state, envs, lambda: received):
                show(row, cast(VectorEnvs, envs))
                follow()
            if received and not control.finished(config, state):
                interrupted_by = received[0]
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_how_to_go_on(config, directory)) from None
    mean, count = (float(np.mean(state.recent_returns)) if state.recent_returns else None), len(state.recent_returns)
    return Run(directory.path, config, state.env_steps, mean, state.seconds, interrupted_by, count, state.phases)


def _how_to_go_on(config: ControlConfig, directory: RunDirectory) -> str:
    """What is left after a stop at once, as it lies on the disk."""
    saved = names.all_in(directory.checkpoints)
    if not saved:
        return "stopped at once, before the first checkpoint"
    return (
        f"stopped at once; the last checkpoint is of step {names.step_of(saved[0]):,}. "
        f"Go on from there: {resume_command(config, directory)}"
    )


def _loop_of(config: ControlConfig) -> Any:
    """The module with the loop for such a config: all have start, iterate, save, restore."""
    if isinstance(config, SelfPlayConfig):
        return selfplay
    return agents if isinstance(config, AgentsConfig) else control


def unless_interrupted(run: Ended) -> Ended:
    """What a signal asked for is done (all is saved): now let it do what it does to any Python program."""
    if run.interrupted_by == signal.SIGINT:
        raise KeyboardInterrupt(f"{run.path} is saved")
    if run.interrupted_by is not None:
        signal.raise_signal(run.interrupted_by)
    return run


def _only(settings: dict[str, Any], name: str) -> dict[str, Any]:
    return {name: settings[name]} if name in settings else {}


def _check_environment(task: EnvironmentConfig) -> None:
    """Refuse what config.toml cannot hold, before anything is written."""
    try:
        tomli_w.dumps({"env_id": task.env_id}).encode()
    except ValueError as error:  # surrogates: bytes of a file's name that are no UTF-8
        raise UserError(f"env_id is {task.env_id!r}, which is no text that a file can hold. Rename it.") from error
    try:
        tomli_w.dumps({"env_kwargs": task.env_kwargs}).encode()
    except (TypeError, ValueError) as error:
        raise UserError(
            f"env_kwargs is {task.env_kwargs!r}, which config.toml cannot hold ({error}). Leave None out; for objects, "
            "pass a factory instead: proximo.train(lambda: MyEnv(...))."
        ) from error


@contextmanager
def _open_envs(config: ControlConfig, factory: EnvFactory) -> Iterator[control.Envs]:
    is_game = isinstance(config, SelfPlayConfig)
    envs: Any = selfplay.make_self_play(config, factory) if is_game else make_envs(config, factory)
    try:
        yield envs
    finally:
        try:
            envs.close()
        except (Exception, SystemExit) as error:  # what was learned is saved, and worth more
            tell(f"proximo: closing the environments failed: {type(error).__name__}: {error}")
