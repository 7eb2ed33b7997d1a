"""One trial: runs of one set of settings with some seeds, and the score of their policies; and the process it is in."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np

from proximo.collect.child_process import begin_group, end_with, hear_signals, kill_group
from proximo.collect.envs import close_quietly
from proximo.collect.make import EnvFactory
from proximo.collect.worker_process import Parcel, unpack
from proximo.errors import UserError, with_traceback
from proximo.process import enough_memory, training_device, training_threads
from proximo.runs.checkpoint import newest_checkpoint
from proximo.runs.directory import RunDirectory, new_run, write_config
from proximo.saved_run import make_for
from proximo.training import control
from proximo.training.choices import with_environments_chosen, with_update_chosen
from proximo.training.config import ControlConfig, settings_of
from proximo.training.environments import Envs, make_envs
from proximo.training.evaluate import evaluate_policy

REPORTS = 10
"""How often a run tells how it does; the last time is its score."""


class Task(NamedTuple):
    """What a process needs for a trial; `folder` is that of the trials, `number` the trial's."""

    parcel: Parcel
    config: ControlConfig
    folder: Path
    number: int
    n_seeds: int
    episodes: int
    evaluation_seed: int


class Report(NamedTuple):
    """How a trial does: mean return of the episodes that ended since the last report. An answer says whether to go on.

    `step` counts tenths of runs: 13 is three tenths of the second seed.
    """

    step: int
    value: float


class Scores(NamedTuple):
    """A trial's end: the mean return of each seed's policy over the episodes of evaluation."""

    values: list[float]


class Failed(NamedTuple):
    """A trial's other end: what went wrong, in words."""

    reason: str


def run_trial(task: Task, factory: EnvFactory) -> Iterator[Report | Scores]:
    """Train with each seed and evaluate its last policy; closing the iterator ends the trial.

    Each run is a run directory of its own, `NUMBER-seedSEED` in the task's folder.

    Raises:
        UserError: whatever ends a run: an environment's fault, updates that are not finite, memory, the disk.
    """
    scores = []
    for index in range(task.n_seeds):
        config = replace(task.config, seed=task.config.seed + index, checkpoint_every=task.config.total_steps)
        name = f"{task.number:04d}-seed{config.seed}"
        run = new_run(config.environment.env_id, config.seed, task.folder / name)
        config = with_environments_chosen(config, factory)
        for tenth, value in _train(config, factory, run):
            yield Report(REPORTS * index + tenth, value)
        scores.append(_evaluated(config, factory, run, task))
    yield Scores(scores)


def _train(config: ControlConfig, factory: EnvFactory, run: RunDirectory) -> Iterator[tuple[int, float]]:
    """Train, and yield (tenth of the run, mean return of the episodes ended since the one before) as it goes."""
    with enough_memory(config), training_device(config), _open_envs(config, factory) as envs:
        state = control.start(config, envs)
        config = with_update_chosen(config, state.policy)
        with training_threads(config):
            write_config(run, settings_of(config))
            told, n_counted = 0, 0
            for row in control.iterate(config, run, state, envs):
                tenth = row["env_steps"] * REPORTS // config.total_steps
                n_new = state.n_episodes - n_counted
                if tenth > told and n_new and not control.finished(config, state):
                    yield tenth, float(np.mean(list(state.recent_returns)[-n_new:]))
                    told, n_counted = tenth, state.n_episodes


def _evaluated(config: ControlConfig, factory: EnvFactory, run: RunDirectory, task: Task) -> float:
    """What `proximo evaluate` says of the run."""
    scores = evaluate_policy(
        control.load_policy(newest_checkpoint(run.checkpoints)),
        lambda: make_for(config, factory),
        n_episodes=task.episodes,
        seed=task.evaluation_seed,
        name=config.environment.env_id,
    )
    return float(np.mean(scores.returns))


@contextmanager
def _open_envs(config: ControlConfig, factory: EnvFactory) -> Iterator[Envs]:
    envs = make_envs(config, factory)
    try:
        yield envs
    finally:
        close_quietly(config.environment.env_id, [envs])


# ------------------------------------------------------------------------------------------------ the process


def serve(number: int, connection: Connection, parent: int) -> None:
    """Run one trial after the other until "close", or until the main process, `parent`, is gone."""
    del number
    begin_group()  # Ctrl-C is for the main process, which then ends us
    end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    hear_signals()
    faulthandler.enable()
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    with suppress(EOFError, OSError):  # the main process is gone
        while True:
            command, task = connection.recv()
            if command == "close":
                break
            _converse(task, connection)


def _converse(task: Task, connection: Connection) -> None:
    """Run a trial; each report is sent and answered with whether to go on, its end is sent."""
    asked: Callable[[], bool] = connection.recv
    try:
        with closing(run_trial(task, unpack(task.parcel))) as trial:  # type: ignore[type-var]
            for said in trial:
                connection.send(said)
                if isinstance(said, Report) and not asked():
                    return
    except (EOFError, BrokenPipeError, ConnectionError):
        raise
    except UserError as error:
        connection.send(Failed(str(error)))
    except Exception as error:  # it may be anything, and is no reason to end the other trials
        connection.send(Failed(with_traceback(error)))


def _leave_with_parent() -> None:
    """End this process and all it has started with the main one, whatever it is doing."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        kill_group(os.getpid())
        os._exit(1)
