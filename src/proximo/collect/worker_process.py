"""What runs in a worker process, and what both sides of its pipe know; it must not import torch."""

from __future__ import annotations

import faulthandler
import math
import mmap
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from pathlib import Path
from typing import Any, NamedTuple, cast

import cloudpickle  # noqa: TID251 (the factory, on its way to our own worker processes; never to or from a file)
import gymnasium as gym
import numpy as np

from proximo.collect.child_process import begin_group, end_with, hear_signals, kill_group
from proximo.collect.envs import EnvironmentFault, Snapshot, SpacePolicy
from proximo.collect.serial_envs import SerialEnvs
from proximo.errors import UserError, in_words, with_traceback

_ORPHAN_SECONDS = 2.0
"""How long a worker whose main process is gone may take before it ends in the middle of what it does."""


# ------------------------------------------------------------------------------------- both sides of the pipe


class Parcel(NamedTuple):
    """What a worker needs to make the environments."""

    factory: bytes
    registered: list[bytes]
    files: dict[str, str]


class Made(NamedTuple):
    """What the environments of a worker look like."""

    spaces: bytes
    shape: tuple[int, ...]
    dtype: str


class Restarted(NamedTuple):
    """What made a worker restart environments, and which episode each of its environments is in since then."""

    faults: list[EnvironmentFault]
    episodes: np.ndarray


class Reply(NamedTuple):
    """A worker's answer to one command; `failure` is a `UserError`, or the traceback of anything else."""

    value: Any
    warnings: list[str]
    failure: UserError | str | None


@dataclass(frozen=True)
class Layout:
    """What lies in the shared memory; both sides find the same places from it."""

    n_envs: int
    n_workers: int
    observation_shape: tuple[int, ...]
    observation_dtype: str
    action_bytes: int

    def fields(self) -> Iterator[tuple[int, tuple[int, ...], np.dtype]]:
        """Offset, shape and type of each field of `Memory`; each begins a cache line of its own."""
        observations = ((self.n_envs, *self.observation_shape), np.dtype(self.observation_dtype))
        numbers, flags = ((self.n_envs,), np.dtype(np.float64)), ((self.n_envs,), np.dtype(bool))
        actions = ((self.n_envs * self.action_bytes,), np.dtype(np.uint8))
        pulses = ((self.n_workers, 8), np.dtype(np.int64))
        offset = 0
        for shape, dtype in (observations, observations, numbers, flags, flags, flags, actions, pulses):
            yield offset, shape, dtype
            offset += -(-math.prod(shape) * dtype.itemsize // 64) * 64

    @property
    def size(self) -> int:
        """Bytes."""
        offset, shape, dtype = list(self.fields())[-1]
        return offset + math.prod(shape) * dtype.itemsize


class Memory(NamedTuple):
    """The shared arrays."""

    observations: np.ndarray
    final_observations: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    valid: np.ndarray
    actions: np.ndarray
    pulses: np.ndarray
    """[n_workers, 8]: calls begun, and of the last one: environment (-1: none), seed, step (0: a reset)."""

    @staticmethod
    def map(layout: Layout, descriptor: int) -> Memory:
        """Map a file; it is unmapped when the last array is gone."""
        shared = mmap.mmap(descriptor, layout.size)
        return Memory(*(np.ndarray(shape, dtype, shared, offset) for offset, shape, dtype in layout.fields()))

    def cut(self, rows: slice, acted_on: np.ndarray) -> None:
        """Let these environments' episodes end before the step that was lost, at the observation acted on."""
        self.final_observations[rows] = acted_on[rows]
        self.rewards[rows] = 0.0
        self.terminated[rows], self.truncated[rows], self.valid[rows] = False, True, False

    def actions_as(self, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        """The actions, of whatever type the policy has given them, so that the environments see that type."""
        kind = np.dtype(dtype)
        if kind.kind not in "fiub" or math.prod(shape) * kind.itemsize > self.actions.size:
            raise ValueError(f"actions of shape {shape} and type {kind} are not what the action space asks for")
        return np.ndarray(shape, kind, self.actions.data)


def pack(make: Callable[[], gym.Env], name: str) -> Parcel:
    """Pack the factory with what it finds here and would not find in a fresh process.

    Raises:
        UserError: if it holds something that cannot be sent.
    """
    try:
        factory = cloudpickle.dumps(make)
    except Exception as error:
        raise UserError(
            f"{name}: what makes the environment cannot be sent to a worker process: "
            f"{in_words(error)}\n"
            "Let it make what it needs (open files, threads, windows) itself instead of holding it, "
            "or use serial environments."
        ) from error
    registered = []
    for spec in gym.registry.values():
        if not str(spec.entry_point).startswith("gymnasium."):
            with suppress(Exception):  # one that cannot be sent is missed only if it is the one asked for
                registered.append(cloudpickle.dumps(spec))
    # Environments from a file are classes of modules that no place on sys.path leads to (see make.py).
    files = {
        name: module.__file__
        for name, module in list(sys.modules.items())
        if name.startswith("_proximo_env_") and module.__file__
    }
    return Parcel(factory, registered, files)


# ----------------------------------------------------------------------------------------- the worker process


def work(number: int, connection: Connection, parent: int) -> None:
    """Serve commands until "close", or until the main process, `parent` (see `as_parent`), is gone."""
    begin_group()
    end_with(parent)
    # A scheduler's signals reach every process of a job; the main process still needs us for its
    # checkpoint. SIGINT stays ignored in simulators that the environment starts; SIGTERM must not (an ignored
    # signal is inherited, a handler is not), because that is how an environment ends its simulator.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number_of_signal in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number_of_signal, lambda *_: None)
    hear_signals()
    faulthandler.enable()
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    service = _Service(number, connection)
    try:
        while True:
            command, payload = connection.recv()
            if command == "close":
                break
            reply = service.reply(command, payload)
            service.end_a_fork()
            connection.send(reply)
    except (EOFError, OSError):  # the main process is gone, and nobody else ends what the environments leave behind
        service.close()
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        kill_group(os.getpid())
    finally:
        service.close()


def _leave_with_parent() -> None:
    """End this process if the main one is gone and an environment that hangs keeps us from seeing it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        time.sleep(_ORPHAN_SECONDS)
        kill_group(os.getpid())  # with whatever the environments have started
        os._exit(1)


class _Service:
    """The worker's environments, and a method for each command."""

    def __init__(self, number: int, connection: Connection) -> None:
        self._number = number
        self._connection = connection
        self._pulse = np.zeros(8, np.int64)
        self._warnings: list[str] = []
        self._closing = ExitStack()
        self._process = os.getpid()

    def reply(self, command: str, payload: Any) -> Reply:
        """Do what is asked; what goes wrong goes back as a value."""
        value, failure = None, None
        try:
            value = getattr(self, command)(payload)
        except UserError as error:
            failure = error
        except Exception:
            failure = traceback.format_exc()
        self._pulse[1] = -1
        warnings = self._warnings.copy()
        self._warnings.clear()
        return Reply(value, warnings, failure)

    def make(self, task: tuple[Parcel, int, int, str, int, SpacePolicy, int]) -> Made:
        """Make the environments of this worker.

        Raises:
            UserError: if that fails.
        """
        parcel, n_envs, seed, name, first_index, on_space_violation, max_restarts = task
        try:
            factory = unpack(parcel)
            envs = SerialEnvs(
                factory,
                n_envs,
                seed,
                name=name,
                first_index=first_index,
                on_space_violation=on_space_violation,
                max_restarts=max_restarts,
                wrap=lambda env, index: cast(gym.Env, _Watched(env, index, self)),
            )
        except UserError:
            raise
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise UserError(f"{name} could not be made in a worker process: {with_traceback(error)}") from error
        self._closing.callback(envs.close)
        self._serial, self._warnings = envs, envs.warnings
        self._own = slice(first_index, first_index + n_envs)
        observations = envs.snapshot().arrays["observations"]
        spaces = cloudpickle.dumps((envs.observation_space, envs.action_space))
        return Made(spaces, observations.shape[1:], observations.dtype.str)

    def share(self, layout: Layout) -> None:
        """Map the shared memory, whose descriptor follows the command."""
        descriptor = recv_handle(self._connection)
        memory = Memory.map(layout, descriptor)
        os.close(descriptor)
        self._memory, self._pulse = memory, memory.pulses[self._number]

    def reset(self, _: None) -> Restarted | None:
        """Begin the first episodes."""
        return self.begin_at(np.zeros(self._serial.n_envs, np.int64))

    def begin_at(self, episodes: np.ndarray) -> Restarted | None:
        """Begin the given episodes."""
        self._memory.observations[self._own] = self._serial.begin(episodes)
        return self._restarted() if self._serial.faults else None

    def step(self, described: tuple[str, tuple[int, ...]]) -> Restarted | None:
        """Step each environment."""
        memory, own = self._memory, self._own
        step = self._serial.step(memory.actions_as(*described)[own].copy())
        memory.observations[own] = step.observations
        memory.final_observations[own] = step.final_observations
        memory.rewards[own] = step.rewards
        memory.terminated[own] = step.terminated
        memory.truncated[own] = step.truncated
        memory.valid[own] = step.valid
        return self._restarted() if self._serial.faults else None

    def restore(self, snapshot: Snapshot) -> tuple[list[int], Restarted]:
        """Play the open episodes again."""
        self._memory.observations[self._own], fresh = self._serial.restore(snapshot)
        return fresh, self._restarted()

    def _restarted(self) -> Restarted:
        faults = self._serial.faults.copy()
        self._serial.faults.clear()
        return Restarted(faults, self._serial.episodes)

    def close(self) -> None:
        """Close the environments."""
        self._closing.close()

    def end_a_fork(self) -> None:
        """End this process if it is a fork that an environment let come back: only one of the two may answer."""
        if os.getpid() != self._process:
            os._exit(0)

    def begin(self, index: int, seed: int, step: int) -> None:
        """Note the call that is about to be made, for the main process to read if it does not end."""
        self._pulse[1], self._pulse[2], self._pulse[3] = index, seed, step
        self._pulse[0] += 1


class _Watched:
    """An environment whose every call is noted before it is made; as much of one as `SerialEnvs` uses."""

    def __init__(self, env: gym.Env, index: int, service: _Service) -> None:
        self._env, self._index, self._service = env, index, service
        self.observation_space, self.action_space = env.observation_space, env.action_space
        self._seed, self._steps = 0, 0

    def reset(self, *, seed: int) -> Any:
        self._seed, self._steps = seed, 0
        self._service.begin(self._index, seed, 0)
        try:
            return self._env.reset(seed=seed)
        finally:
            self._service.end_a_fork()

    def step(self, action: Any) -> Any:
        self._steps += 1
        self._service.begin(self._index, self._seed, self._steps)
        try:
            return self._env.step(action)
        finally:
            self._service.end_a_fork()

    def close(self) -> None:
        self._env.close()


class _FileFinder(MetaPathFinder):
    """Finds the modules that the main process has imported from a file under a name of its own."""

    def __init__(self, files: dict[str, str]) -> None:
        self._files = files

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """What `import` asks; None for all other names."""
        return spec_from_file_location(fullname, self._files[fullname]) if fullname in self._files else None


def unpack(parcel: Parcel) -> Callable[[], gym.Env]:
    """Rebuild the factory and what it needs around it, looking where the main process has looked."""
    places = {str(Path.cwd()), *(str(Path(file).parent) for file in parcel.files.values())}
    before = sys.path.copy()
    sys.path[:0] = sorted(places)
    sys.meta_path.append(_FileFinder(parcel.files))
    try:
        for packed in parcel.registered:
            with suppress(Exception):  # missed only if it is the one asked for
                spec = cloudpickle.loads(packed)
                gym.registry.setdefault(spec.id, spec)
        return cloudpickle.loads(parcel.factory)
    finally:
        sys.path[:] = before
