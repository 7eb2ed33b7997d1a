"""`WorkerEnvs`: environments in worker processes, for those slow enough to be worth the way to and fro."""

from __future__ import annotations

import atexit
import faulthandler
import itertools
import math
import mmap
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from typing import Any, NamedTuple

import cloudpickle  # noqa: TID251 (the factory, on its way to our own worker processes; never to or from a file)
import gymnasium as gym
import numpy as np

from proximo.collect.envs import EnvironmentFault, SerialEnvs, Snapshot, SpacePolicy, Step, episode_seed
from proximo.errors import UserError, in_range

START_SECONDS = 120.0
"""How long a worker may take to start Python, import what it needs, and make its environments."""

CLOSE_SECONDS = 5.0
"""How long the workers may take to close their environments before they are killed."""

_ORPHAN_SECONDS = 2.0
"""How long a worker whose main process is gone may take before it ends in the middle of what it does."""

_ONE_THREAD: dict[str, str] = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1"
)
_HINTS = {
    "SIGKILL": "It was killed from outside; often that is the system, out of memory: use fewer n_envs.",
    "SIGSEGV": "Native code that the environment calls has crashed; standard error may show where.",
    "SIGABRT": "Native code that the environment calls has given up; standard error may show why.",
    "SIGBUS": "Native code that the environment calls has crashed; standard error may show where.",
}


class WorkerEnvs:
    """N environments in worker processes; number for number what one `SerialEnvs` with all of them gives.

    Each worker runs a `SerialEnvs` over its slice of the environments. Numbers travel through shared memory
    that has no name, so nothing of it outlives the processes, however they end; commands and replies travel
    through one pipe per worker. The actions of the open episodes are kept here too: with them a hang or a
    crash can be played again, and a snapshot needs no worker.

    The factory may be a lambda or a closure. Workers do not run the main module again, so a script needs no
    `if __name__ == "__main__":`. They ignore SIGINT, SIGTERM and SIGUSR1, which are this process's to act on,
    and leave when it ends or dies.
    """

    def __init__(
        self,
        make: Callable[[], gym.Env],
        n_envs: int,
        seed: int,
        *,
        name: str = "the environment",
        n_workers: int | None = None,
        on_space_violation: SpacePolicy = "raise",
        timeout: float = 60.0,
    ) -> None:
        """Start the workers and make the environments in them; the default is one worker for each core.

        `timeout` is how many seconds one call of one environment (a reset or a step) may take.

        Raises:
            UserError: if the factory cannot be sent, or an environment cannot be made.
        """
        self._workers: list[_Worker] = []
        self._memory: _Memory | None = None
        self._owner = os.getpid()
        if sys.platform == "win32":
            raise UserError("Worker processes need Linux or macOS. Use serial environments here.")
        in_range("n_workers", n_workers, at_least=1, usual="the number of cores")
        in_range("timeout", timeout, above=0, usual="60 (seconds)")
        self.n_envs = n_envs
        self.warnings: list[str] = []
        self._seed = seed
        self._name = name
        self._timeout = timeout
        self._episodes = np.zeros(n_envs, np.int64)
        self._actions: list[list[np.ndarray]] = [[] for _ in range(n_envs)]
        self._valid = np.ones(n_envs, bool)
        self._awaiting = False
        _OPEN.add(self)
        try:
            self._start(_parcel(make, name), min(n_workers or _n_cores(), n_envs), on_space_violation)
        except BaseException:
            self.close()
            raise

    def reset(self) -> np.ndarray:
        """Begin episode 0 of each environment; return observations `[N, *O]`.

        Raises:
            EnvironmentFault: if one raises, returns what it must not, hangs, or takes its process with it.
        """
        memory = self._opened()
        self._episodes[:] = 0
        self._actions = [[] for _ in range(self.n_envs)]
        self._ask("reset")
        return memory.observations

    def step(self, actions: np.ndarray) -> Step:
        """Step each environment with its row of `actions`.

        Raises:
            EnvironmentFault: if one raises, returns what it must not, hangs, or takes its process with it.
            UserError: if a worker is lost outside of its environments.
        """
        memory = self._opened()
        memory.actions_as(actions.dtype.str, actions.shape)[...] = actions
        for taken, action in zip(self._actions, actions, strict=True):
            taken.append(action)
        self._ask("step", [(actions.dtype.str, actions.shape)] * len(self._workers))
        for index in np.flatnonzero(memory.terminated | memory.truncated):
            self._episodes[index] += 1
            self._actions[index] = []
        return Step(
            memory.observations,
            memory.rewards,
            memory.terminated,
            memory.truncated,
            memory.final_observations,
            self._valid,
        )

    def snapshot(self) -> Snapshot:
        """The same as that of a `SerialEnvs`, which can go on from it, as can any number of workers."""
        arrays = {
            "observations": self._opened().observations.copy(),
            "episodes": self._episodes.copy(),
            "lengths": np.array([len(taken) for taken in self._actions]),
        }
        if any(self._actions):
            arrays["open_actions"] = np.concatenate([np.stack(taken) for taken in self._actions if taken])
        return Snapshot(arrays, {})

    def restore(self, snapshot: Snapshot) -> tuple[np.ndarray, list[int]]:
        """Play the open episodes again, as `SerialEnvs.restore` does, the workers side by side.

        Raises:
            EnvironmentFault: if an environment cannot be reset, hangs, or takes its process with it.
        """
        memory, arrays = self._opened(), snapshot.arrays
        lengths = arrays["lengths"]
        bounds = [0, *np.cumsum(lengths).tolist()]
        rows = arrays["open_actions"] if bounds[-1] else np.zeros(0)
        self._episodes[:] = arrays["episodes"]
        self._actions = [list(rows[begin:end]) for begin, end in itertools.pairwise(bounds)]
        parts = []
        for worker in self._workers:
            own = slice(worker.start, worker.stop)
            part = {name: arrays[name][own] for name in ("observations", "episodes", "lengths")}
            part["open_actions"] = rows[bounds[worker.start] : bounds[worker.stop]]
            parts.append(Snapshot(part, snapshot.values))
        fresh = [index for indices in self._ask("restore", parts) for index in indices]
        for index in fresh:
            self._episodes[index] += 1
            self._actions[index] = []
        return memory.observations, fresh

    def close(self) -> None:
        """End every worker: those that do not close their environments within 5 seconds are killed."""
        if os.getpid() != self._owner:  # a fork of this process: the workers are not its own
            return
        for worker in self._workers:
            worker.send("close")
        deadline = time.monotonic() + CLOSE_SECONDS
        while self._workers:
            self._workers[-1].end(deadline)
            self._workers.pop()
        self._memory = None
        _OPEN.discard(self)

    def __del__(self) -> None:
        self.close()

    def _start(self, parcel: _Parcel, n_workers: int, on_space_violation: SpacePolicy) -> None:
        sizes = [self.n_envs // n_workers + (i < self.n_envs % n_workers) for i in range(n_workers)]
        bounds = [0, *itertools.accumulate(sizes)]
        for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
            self._workers.append(_Worker.begin(number, start, stop))
        tasks = [
            (parcel, size, self._seed, self._name, start, on_space_violation)
            for size, start in zip(sizes, bounds, strict=False)
        ]
        made = [_Made(*values) for values in self._ask("make", tasks)]
        first = made[0]
        for worker, other in zip(self._workers, made, strict=True):
            if (other.shape, other.dtype) != (first.shape, first.dtype):
                raise UserError(
                    f"{self._name}: the observations of environment {worker.start} are {other.dtype} of "
                    f"shape {other.shape}, those of environment 0 {first.dtype} of shape {first.shape}. "
                    "All must be the same."
                )
        self.observation_space, self.action_space = cloudpickle.loads(first.spaces)
        layout = _Layout(self.n_envs, n_workers, first.shape, first.dtype, 8 * math.prod(self.action_space.shape or ()))
        descriptor = _unnamed_file(layout.size)
        try:
            memory = _Memory.map(layout, descriptor)
            self._ask("share", [layout] * n_workers, descriptor=descriptor)
        finally:
            os.close(descriptor)  # the mapping stays
        self._memory = memory

    def _opened(self) -> _Memory:
        if self._memory is None:
            raise RuntimeError("These environments are closed.")
        if self._awaiting:
            raise RuntimeError("A worker was lost, or a step interrupted: these environments can only be closed.")
        return self._memory

    def _ask(self, command: str, payloads: list[Any] | None = None, *, descriptor: int | None = None) -> list[Any]:
        """Give every worker a command and wait for all replies, so that none is left for the next command.

        Raises:
            EnvironmentFault, UserError: the one of the first worker that has one.
            RuntimeError: for a mistake of ours in a worker, with its traceback.
        """
        self._awaiting = True
        for worker, payload in itertools.zip_longest(self._workers, payloads or []):
            worker.send(command, payload)
            if descriptor is not None:
                worker.send_descriptor(descriptor)
        replies = self._gather(self._timeout if self._memory else max(self._timeout, START_SECONDS))
        self._awaiting = False
        for worker, reply in zip(self._workers, replies, strict=True):
            if not self.warnings:  # each worker says a thing once; of all of them, too, once is enough
                self.warnings += reply.warnings[:1]
            if isinstance(reply.failure, UserError):
                raise reply.failure
            if reply.failure is not None:
                raise RuntimeError(f"{worker} failed:\n{reply.failure}")
        return [reply.value for reply in replies]

    def _gather(self, timeout: float) -> list[_Reply]:
        """Wait for the reply of every worker, as long as each of them begins a new call within `timeout`."""
        replies: dict[int, _Reply] = {}
        pending = list(self._workers)
        tick = min(timeout / 10, 1.0)
        beats, quiet = [self._beat(worker) for worker in pending], [0.0] * len(pending)
        while pending:
            channels = [channel for w in pending for channel in (w.connection, w.process.sentinel)]
            ready = set(wait(channels, tick))
            for worker in pending.copy():
                if worker.connection in ready or worker.process.sentinel in ready:
                    reply = worker.receive()
                    if reply is None:
                        raise self._lost(worker, worker.death())
                    replies[worker.number] = reply
                    pending.remove(worker)
            if ready:
                continue
            # Ticks are counted, no clock is read: a process group that was stopped for an hour (Ctrl-Z) has
            # not waited for an hour.
            for worker in pending:
                beat = self._beat(worker)
                quiet[worker.number] = quiet[worker.number] + tick if beat == beats[worker.number] else 0.0
                beats[worker.number] = beat
                if quiet[worker.number] >= timeout:
                    worker.process.kill()
                    raise self._lost(worker, f"was not back after {timeout:g} s")
        return [replies[worker.number] for worker in self._workers]

    def _beat(self, worker: _Worker) -> int:
        """How many calls of its environments the worker has begun."""
        return int(self._memory.pulses[worker.number, 0]) if self._memory else 0

    def _lost(self, worker: _Worker, what: str) -> UserError:
        """Say which worker is gone, how, and what it did; with a record if an environment was at work."""
        hint = next((f"\n{text}" for name, text in _HINTS.items() if name in what), "")
        if self._memory is None:
            return UserError(f"{self._name}: {worker} {what} while it made its environments.{hint}")
        _, index, seed, steps = self._memory.pulses[worker.number, :4].tolist()
        if index < 0:
            return UserError(f"{self._name}: {worker} {what} while none of its environments was at work.{hint}")
        episode, actions = int(self._episodes[index]), self._actions[index][:steps]
        if seed != episode_seed(self._seed, index, episode):  # the next episode was being begun within the step
            episode, actions = episode + 1, []
        if "not back" in what:
            hint = f"\nA call may take timeout={self._timeout:g} s; if it really is slower, raise timeout."
        call = "step()" if steps else "reset()"
        problem = f"{call} did not return: {worker} {what}"
        last = f" The action was {actions[-1].tolist()}." if actions else ""
        record = {
            "env_index": index,
            "episode": episode,
            "step": len(actions),
            "seed": seed,
            "actions": [action.tolist() for action in actions],
            "problem": problem,
        }
        where = f"{self._name}, environment {index}, episode {episode}, step {len(actions)} (seed {seed})"
        return EnvironmentFault(f"{where}: {problem}.{last}{hint}", record)


_OPEN: weakref.WeakSet[WorkerEnvs] = weakref.WeakSet()


@atexit.register  # runs before multiprocessing's own, which would wait for our workers for ever
def _close_open() -> None:
    for envs in list(_OPEN):
        envs.close()


# ------------------------------------------------------------------------------------- both sides of the pipe


class _Parcel(NamedTuple):
    """What a worker needs to make the environments."""

    factory: bytes
    registered: list[bytes]
    files: dict[str, str]


class _Made(NamedTuple):
    """What the environments of a worker look like."""

    spaces: bytes
    shape: tuple[int, ...]
    dtype: str


class _Reply(NamedTuple):
    """A worker's answer to one command; `failure` is a `UserError`, or the traceback of anything else."""

    value: Any
    warnings: list[str]
    failure: UserError | str | None


@dataclass(frozen=True)
class _Layout:
    """What lies in the shared memory; both sides find the same places from it."""

    n_envs: int
    n_workers: int
    observation_shape: tuple[int, ...]
    observation_dtype: str
    action_bytes: int

    def fields(self) -> Iterator[tuple[int, tuple[int, ...], np.dtype]]:
        """Offset, shape and type of each field of `_Memory`; each begins a cache line of its own."""
        observations = ((self.n_envs, *self.observation_shape), np.dtype(self.observation_dtype))
        numbers, flags = ((self.n_envs,), np.dtype(np.float64)), ((self.n_envs,), np.dtype(bool))
        actions = ((self.n_envs * self.action_bytes,), np.dtype(np.uint8))
        pulses = ((self.n_workers, 8), np.dtype(np.int64))
        offset = 0
        for shape, dtype in (observations, observations, numbers, flags, flags, actions, pulses):
            yield offset, shape, dtype
            offset += -(-math.prod(shape) * dtype.itemsize // 64) * 64

    @property
    def size(self) -> int:
        """Bytes."""
        offset, shape, dtype = list(self.fields())[-1]
        return offset + math.prod(shape) * dtype.itemsize


class _Memory(NamedTuple):
    """The shared arrays."""

    observations: np.ndarray
    final_observations: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    actions: np.ndarray
    pulses: np.ndarray
    """[n_workers, 8]: calls begun, and of the last one: environment (-1: none), seed, step (0: a reset)."""

    @staticmethod
    def map(layout: _Layout, descriptor: int) -> _Memory:
        """Map a file; it is unmapped when the last array is gone."""
        shared = mmap.mmap(descriptor, layout.size)
        return _Memory(*(np.ndarray(shape, dtype, shared, offset) for offset, shape, dtype in layout.fields()))

    def actions_as(self, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        """The actions, of whatever type the policy has given them, so that the environments see that type."""
        kind = np.dtype(dtype)
        if kind.kind not in "fiub" or math.prod(shape) * kind.itemsize > self.actions.size:
            raise ValueError(f"actions of shape {shape} and type {kind} are not what the action space asks for")
        return np.ndarray(shape, kind, self.actions.data)


# ------------------------------------------------------------------------------------------- the main process


@dataclass(frozen=True)
class _Worker:
    """A worker process and the slice of environments in it, `start` to `stop - 1`."""

    number: int
    start: int
    stop: int
    process: SpawnProcess
    connection: Connection

    @staticmethod
    def begin(number: int, start: int, stop: int) -> _Worker:
        """Start a process that waits for commands."""
        context = multiprocessing.get_context("spawn")  # a fork would copy torch's threads' locks, held or not
        ours, theirs = context.Pipe()
        with theirs, _clean_start():
            process = context.Process(target=_work, args=(number, theirs), name=f"proximo-worker-{number}")
            process.start()
        return _Worker(number, start, stop, process, ours)

    def __str__(self) -> str:
        if self.stop - self.start == 1:
            return f"worker {self.number} (environment {self.start})"
        return f"worker {self.number} (environments {self.start} to {self.stop - 1})"

    def send(self, command: str, payload: Any = None) -> None:
        """Send a command; that the worker is gone is found out when its reply is waited for."""
        with suppress(OSError):
            self.connection.send((command, payload))

    def send_descriptor(self, descriptor: int) -> None:
        """Send a file descriptor."""
        with suppress(OSError):
            send_handle(self.connection, descriptor, self.process.pid)

    def receive(self) -> _Reply | None:
        """The reply that is there, or None from a dead worker."""
        try:
            return self.connection.recv() if self.connection.poll() else None
        except (EOFError, OSError):
            return None

    def death(self) -> str:
        """How the process ended, in words."""
        self.process.join(CLOSE_SECONDS)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
            return "closed its pipe"
        if code < 0:
            known = {s.value: s.name for s in signal.Signals}
            return f"was ended by {known.get(-code, f'signal {-code}')}"
        return f"ended with exit code {code}"

    def end(self, deadline: float) -> None:
        """Wait for the process until `deadline`, then kill it (SIGTERM it ignores); leave nothing of it."""
        self.process.join(max(0.0, deadline - time.monotonic()))
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.process.close()
        self.connection.close()


def _n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _unnamed_file(size: int) -> int:
    """A descriptor of memory that no name leads to: it is gone with the last process that has it."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("proximo")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor


def _parcel(make: Callable[[], gym.Env], name: str) -> _Parcel:
    """Pack the factory with what it finds here and would not find in a fresh process.

    Raises:
        UserError: if it holds something that cannot be sent.
    """
    try:
        factory = cloudpickle.dumps(make)
    except Exception as error:
        raise UserError(
            f"{name}: what makes the environment cannot be sent to a worker process: "
            f"{type(error).__name__}: {error}\n"
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
    return _Parcel(factory, registered, files)


_START_LOCK = threading.Lock()


@contextmanager
def _clean_start() -> Iterator[None]:
    """Let processes start with one thread each, and without running the main module again.

    Python's spawn runs the main module a second time in each child, for pickles that refer to it; cloudpickle
    sends what is defined there by value. And threads must be limited before numpy loads its BLAS, so before
    the child's first line that is ours.
    """
    with _START_LOCK:
        main, before = sys.modules["__main__"], {key: os.environ.get(key) for key in _ONE_THREAD}
        sys.modules["__main__"] = types.ModuleType("__main__")
        os.environ.update(_ONE_THREAD)
        try:
            yield
        finally:
            sys.modules["__main__"] = main
            for key, value in before.items():
                if value is None:
                    del os.environ[key]
                else:
                    os.environ[key] = value


# ----------------------------------------------------------------------------------------- the worker process


def _work(number: int, connection: Connection) -> None:
    """Serve commands until "close", or until the main process is gone."""
    # Ctrl-C and a scheduler's signals reach the whole process group; the main process still needs us for its
    # checkpoint. SIGINT stays ignored in simulators that the environment starts; SIGTERM must not (an ignored
    # signal is inherited, a handler is not), because that is how an environment ends its simulator.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number_of_signal in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number_of_signal, lambda *_: None)
    faulthandler.enable()
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    service = _Service(number, connection)
    try:
        while True:
            command, payload = connection.recv()
            if command == "close":
                break
            connection.send(service.reply(command, payload))
    except (EOFError, OSError):  # the main process is gone
        pass
    finally:
        service.close()


def _leave_with_parent() -> None:
    """End this process if the main one is gone and an environment that hangs keeps us from seeing it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        time.sleep(_ORPHAN_SECONDS)
        os._exit(1)


class _Service:
    """The worker's environments, and a method for each command."""

    def __init__(self, number: int, connection: Connection) -> None:
        self._number = number
        self._connection = connection
        self._pulse = np.zeros(8, np.int64)
        self._warnings: list[str] = []
        self._closing = ExitStack()

    def reply(self, command: str, payload: Any) -> _Reply:
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
        return _Reply(value, warnings, failure)

    def make(self, task: tuple[_Parcel, int, int, str, int, SpacePolicy]) -> _Made:
        """Make the environments of this worker.

        Raises:
            UserError: if that fails.
        """
        parcel, n_envs, seed, name, first_index, on_space_violation = task
        indices = itertools.count(first_index)
        try:
            factory = _unpack(parcel)
            envs = SerialEnvs(
                lambda: _watched(factory(), next(indices), self),
                n_envs,
                seed,
                name=name,
                first_index=first_index,
                on_space_violation=on_space_violation,
            )
        except UserError:
            raise
        except Exception as error:
            own = "".join(traceback.format_exception(error)[-4:]).rstrip()
            what = f"{name} could not be made in a worker process: {type(error).__name__}: {error}"
            raise UserError(f"{what}\n{own}") from error
        self._closing.callback(envs.close)
        self._serial, self._warnings = envs, envs.warnings
        self._own = slice(first_index, first_index + n_envs)
        observations = envs.snapshot().arrays["observations"]
        spaces = cloudpickle.dumps((envs.observation_space, envs.action_space))
        return _Made(spaces, observations.shape[1:], observations.dtype.str)

    def share(self, layout: _Layout) -> None:
        """Map the shared memory, whose descriptor follows the command."""
        descriptor = recv_handle(self._connection)
        memory = _Memory.map(layout, descriptor)
        os.close(descriptor)
        self._memory, self._pulse = memory, memory.pulses[self._number]

    def reset(self, _: None) -> None:
        """Begin the first episodes."""
        self._memory.observations[self._own] = self._serial.reset()

    def step(self, described: tuple[str, tuple[int, ...]]) -> None:
        """Step each environment."""
        memory, own = self._memory, self._own
        step = self._serial.step(memory.actions_as(*described)[own].copy())
        memory.observations[own] = step.observations
        memory.final_observations[own] = step.final_observations
        memory.rewards[own] = step.rewards
        memory.terminated[own] = step.terminated
        memory.truncated[own] = step.truncated

    def restore(self, snapshot: Snapshot) -> list[int]:
        """Play the open episodes again."""
        self._memory.observations[self._own], fresh = self._serial.restore(snapshot)
        return fresh

    def close(self) -> None:
        """Close the environments."""
        self._closing.close()

    def begin(self, index: int, seed: int, step: int) -> None:
        """Note the call that is about to be made, for the main process to read if it does not end."""
        self._pulse[1], self._pulse[2], self._pulse[3] = index, seed, step
        self._pulse[0] += 1


class _Watched:
    """An environment whose every call is noted before it is made."""

    def __init__(self, env: gym.Env, index: int, service: _Service) -> None:
        self._env, self._index, self._service = env, index, service
        self.observation_space, self.action_space = env.observation_space, env.action_space
        self._seed, self._steps = 0, 0

    def reset(self, *, seed: int) -> Any:
        self._seed, self._steps = seed, 0
        self._service.begin(self._index, seed, 0)
        return self._env.reset(seed=seed)

    def step(self, action: Any) -> Any:
        self._steps += 1
        self._service.begin(self._index, self._seed, self._steps)
        return self._env.step(action)

    def close(self) -> None:
        self._env.close()


def _watched(env: gym.Env, index: int, service: _Service) -> Any:
    """As `Any`, because it is as much of a `gym.Env` as `SerialEnvs` uses, and no more."""
    return _Watched(env, index, service)


class _FileFinder(MetaPathFinder):
    """Finds the modules that the main process has imported from a file under a name of its own."""

    def __init__(self, files: dict[str, str]) -> None:
        self._files = files

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """What `import` asks; None for all other names."""
        return spec_from_file_location(fullname, self._files[fullname]) if fullname in self._files else None


def _unpack(parcel: _Parcel) -> Callable[[], gym.Env]:
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
