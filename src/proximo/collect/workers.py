"""`WorkerEnvs`: environments in worker processes, for those slow enough to be worth the way to and fro."""

from __future__ import annotations

import atexit
import itertools
import math
import os
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

import cloudpickle  # noqa: TID251 (spaces, on their way from our own worker processes; never to or from a file)
import gymnasium as gym
import numpy as np

from proximo.collect.child_process import n_cores
from proximo.collect.envs import (
    LONGEST_REPLAY,
    EnvironmentFault,
    Snapshot,
    SpacePolicy,
    Step,
    check_snapshot,
    episode_seed,
    too_many_restarts,
)
from proximo.collect.worker_handle import CLOSE_SECONDS, Worker
from proximo.collect.worker_process import Layout, Made, Memory, Reply, Restarted, pack
from proximo.errors import UserError, in_range

START_SECONDS = 120.0
"""How long a worker may take to start Python, import what it needs, and make its environments."""

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
    `if __name__ == "__main__":`. Each has a process group of its own, which is killed with it, so that nothing
    is left of what environments start. They ignore SIGINT, SIGTERM and SIGUSR1, which are this process's to act
    on, and leave when it ends or dies.
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
        max_restarts: int = 0,
    ) -> None:
        """Start the workers and make the environments in them; the default is one worker for each core.

        `timeout` is how many seconds one call of one environment (a reset or a step) may take. With `max_restarts`
        above 0, an environment that fails is made anew, so many times in all, as by `SerialEnvs`; one that hangs or
        takes its process with it is killed with all environments of that worker, and the episodes of all are cut.

        Raises:
            UserError: if the factory cannot be sent, or an environment cannot be made.
        """
        self._workers: list[Worker] = []
        self._memory: Memory | None = None
        self._descriptor: int | None = None
        self._owner = os.getpid()
        if sys.platform == "win32":
            raise UserError("Worker processes need Linux or macOS. Use serial environments here.")
        in_range("n_workers", n_workers, optional=True, at_least=1, whole=True, usual="the number of cores")
        in_range("timeout", timeout, above=0, usual="60 (seconds)")
        self.n_envs = n_envs
        self.warnings: list[str] = []
        self._seed = seed
        self._name = name
        self._timeout = timeout
        self._max_restarts = max_restarts
        self._layout: Layout | None = None
        self.goes_on: np.ndarray | None = None
        self.n_restarts = 0
        self.faults: list[EnvironmentFault] = []
        self._episodes = np.zeros(n_envs, np.int64)
        self._reward_sums = np.zeros(n_envs)
        self._actions: list[list[np.ndarray]] = [[] for _ in range(n_envs)]
        self._forgotten = np.zeros(n_envs, np.int64)
        self._awaiting = False
        _OPEN.add(self)
        try:
            self._parcel = pack(make, name)
            self._on_space_violation: SpacePolicy = on_space_violation
            self._start(min(n_workers or n_cores(), n_envs))
        except BaseException:
            self.close()
            raise

    def reset(self) -> np.ndarray:
        """Begin episode 0 of each environment, or the first one that can be begun; return observations `[N, *O]`.

        Raises:
            EnvironmentFault: if one raises, returns what it must not, hangs, or takes its process with it, and may not
                be restarted (any more).
        """
        memory = self._opened()
        self._episodes[:] = 0
        self._reward_sums[:] = 0.0
        self._forgotten[:] = 0
        self._actions = [[] for _ in range(self.n_envs)]
        for number, answer in enumerate(self._ask("reset", may_lose=self._max_restarts > 0)):
            self._go_on_after(number, answer)
        return memory.observations

    def step(self, actions: np.ndarray) -> Step:
        """Step each environment with its row of `actions`.

        Raises:
            EnvironmentFault: if one raises, returns what it must not, hangs, or takes its process with it, and may not
                be restarted (any more).
            UserError: if a worker is lost outside of its environments.
        """
        memory = self._opened()
        acted_on = memory.observations.copy() if self._max_restarts else memory.observations
        memory.actions_as(actions.dtype.str, actions.shape)[...] = actions
        for taken, action in zip(self._actions, actions, strict=True):
            taken.append(action)
        described = [(actions.dtype.str, actions.shape)] * len(self._workers)
        answers = self._ask("step", described, may_lose=self._max_restarts > 0)
        for worker, answer in zip(self._workers, answers, strict=True):
            if isinstance(answer, UserError):
                memory.cut(slice(worker.start, worker.stop), acted_on)
        self._reward_sums += memory.rewards
        for index in np.flatnonzero(memory.terminated | memory.truncated):
            self._episodes[index] += 1
            self._reward_sums[index] = 0.0
            self._forgotten[index] = 0
            self._actions[index] = []
        for number, answer in enumerate(answers):
            self._go_on_after(number, answer)
        for index, taken in enumerate(self._actions):
            if len(taken) >= LONGEST_REPLAY:
                self._forgotten[index] += len(taken)
                taken.clear()
        return Step(
            memory.observations,
            memory.rewards,
            memory.terminated,
            memory.truncated,
            memory.final_observations,
            memory.valid,
        )

    def snapshot(self) -> Snapshot:
        """The same as that of a `SerialEnvs`, which can go on from it, as can any number of workers."""
        whole = [[] if forgotten else taken for taken, forgotten in zip(self._actions, self._forgotten, strict=True)]
        arrays = {
            "observations": self._opened().observations.copy(),
            "episodes": self._episodes.copy(),
            "reward_sums": self._reward_sums.copy(),
            "lengths": np.where(self._forgotten > 0, -1, [len(taken) for taken in whole]),
        }
        if any(whole):
            arrays["open_actions"] = np.concatenate([np.stack(taken) for taken in whole if taken])
        return Snapshot(arrays, {"n_restarts": self.n_restarts})

    def restore(self, snapshot: Snapshot) -> tuple[np.ndarray, list[int]]:
        """Play the open episodes again, as `SerialEnvs.restore` does, the workers side by side.

        Raises:
            EnvironmentFault: if an environment cannot be reset, hangs, or takes its process with it, and may not be
                restarted (any more).
        """
        memory, arrays = self._opened(), snapshot.arrays
        check_snapshot(snapshot, self.n_envs)
        self.faults.clear()  # those of the moment that is left behind
        self.n_restarts = int(snapshot.values["n_restarts"])
        lengths = np.maximum(arrays["lengths"], 0)
        bounds = [0, *np.cumsum(lengths).tolist()]
        rows = arrays["open_actions"] if bounds[-1] else np.zeros(0)
        self._episodes[:] = arrays["episodes"]
        self._reward_sums[:] = arrays["reward_sums"]
        self._forgotten[:] = 0
        self._actions = [list(rows[begin:end]) for begin, end in itertools.pairwise(bounds)]
        parts = []
        for worker in self._workers:
            own = slice(worker.start, worker.stop)
            part = {name: arrays[name][own] for name in ("observations", "episodes", "lengths", "reward_sums")}
            part["open_actions"] = rows[bounds[worker.start] : bounds[worker.stop]]
            parts.append(Snapshot(part, snapshot.values))
        fresh = []
        for number, answer in enumerate(self._ask("restore", parts, may_lose=self._max_restarts > 0)):
            if isinstance(answer, EnvironmentFault):  # no episode of that worker can be come back to
                indices = list(range(self._workers[number].start, self._workers[number].stop))
                self._episodes[indices] += 1
                self._go_on_after(number, answer)
            else:
                indices, restarted = answer
                self._note(self._workers[number], restarted)
            fresh += indices
        for index in fresh:
            self._reward_sums[index] = 0.0
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
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        _OPEN.discard(self)

    def __del__(self) -> None:
        self.close()

    def _start(self, n_workers: int) -> None:
        sizes = [self.n_envs // n_workers + (i < self.n_envs % n_workers) for i in range(n_workers)]
        bounds = [0, *itertools.accumulate(sizes)]
        for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
            self._workers.append(Worker.begin(number, start, stop))
        tasks = [self._task(worker) for worker in self._workers]
        made = [Made(*values) for values in self._ask("make", tasks)]
        first = made[0]
        for worker, other in zip(self._workers, made, strict=True):
            if (other.shape, other.dtype) != (first.shape, first.dtype):
                raise UserError(
                    f"{self._name}: the observations of environment {worker.start} are {other.dtype} of "
                    f"shape {other.shape}, those of environment 0 {first.dtype} of shape {first.shape}. "
                    "All must be the same."
                )
        self.observation_space, self.action_space = cloudpickle.loads(first.spaces)
        layout = Layout(self.n_envs, n_workers, first.shape, first.dtype, 8 * math.prod(self.action_space.shape or ()))
        self._descriptor = _unnamed_file(layout.size)
        memory = Memory.map(layout, self._descriptor)
        self._ask("share", [layout] * n_workers, descriptor=self._descriptor)
        if not self._max_restarts:
            os.close(self._descriptor)  # the mapping stays
            self._descriptor = None
        self._layout, self._memory = layout, memory

    def _task(self, worker: Worker) -> tuple[Any, ...]:
        """What a worker needs to make its environments."""
        n_envs, policy = worker.stop - worker.start, self._on_space_violation
        return self._parcel, n_envs, self._seed, self._name, worker.start, policy, self._max_restarts

    def _note(self, worker: Worker, restarted: Restarted) -> None:
        """Take over what a worker says of environments that it restarted.

        Raises:
            EnvironmentFault: if it was one too many, counted over all workers.
        """
        self._episodes[worker.start : worker.stop] = restarted.episodes
        for fault in restarted.faults:
            self._count(fault)

    def _count(self, fault: EnvironmentFault) -> None:
        if self.n_restarts >= self._max_restarts:
            raise too_many_restarts(fault, self._max_restarts)
        self.n_restarts += 1
        self.faults.append(fault)

    def _go_on_after(self, number: int, answer: Restarted | EnvironmentFault | None) -> None:
        """Note which environments a worker restarted; put one that was lost back to work."""
        memory = self._memory
        assert memory is not None
        own = slice(self._workers[number].start, self._workers[number].stop)
        while isinstance(answer, EnvironmentFault):
            self._count(answer)
            index = answer.record["env_index"]  # the episode that failed may be one that was only being begun
            self._episodes[index] = max(int(self._episodes[index]), answer.record["episode"] + 1)
            self._workers[number].end(0.0)
            memory.pulses[number, :2] = 0, -1  # what was done before is nothing that the fresh worker can be lost in
            self._workers[number] = fresh = Worker.begin(number, own.start, own.stop)
            self._ask("make", [self._task(fresh)], workers=[fresh], timeout=max(self._timeout, START_SECONDS))
            self._ask("share", [self._layout], workers=[fresh], descriptor=self._descriptor)
            (answer,) = self._ask("begin_at", [self._episodes[own]], workers=[fresh], may_lose=True)
        if isinstance(answer, Restarted):
            self._note(self._workers[number], answer)

    def _opened(self) -> Memory:
        if self._memory is None:
            raise RuntimeError("These environments are closed.")
        if self._awaiting:
            raise RuntimeError("A worker was lost, or a step interrupted: these environments can only be closed.")
        return self._memory

    def _ask(
        self,
        command: str,
        payloads: list[Any] | None = None,
        *,
        descriptor: int | None = None,
        workers: list[Worker] | None = None,
        timeout: float | None = None,
        may_lose: bool = False,
    ) -> list[Any]:
        """Give every worker a command and wait for all replies, so that none is left for the next command.

        With `may_lose`, the fault of a worker that is lost stands in the place of its answer.

        Raises:
            EnvironmentFault, UserError: the one of the first worker that has one.
            RuntimeError: for a mistake of ours in a worker, with its traceback.
        """
        self._awaiting = True
        workers = self._workers if workers is None else workers
        for worker, payload in itertools.zip_longest(workers, payloads or []):
            worker.send(command, payload)
            if descriptor is not None:
                worker.send_descriptor(descriptor)
        usual = self._timeout if self._memory else max(self._timeout, START_SECONDS)
        replies = self._gather(workers, timeout or usual, may_lose=may_lose)
        self._awaiting = False
        for worker, reply in zip(workers, replies, strict=True):
            if not self.warnings:  # each worker says a thing once; of all of them, too, once is enough
                self.warnings += reply.warnings[:1]
            if isinstance(reply.failure, UserError):
                raise reply.failure
            if reply.failure is not None:
                raise RuntimeError(f"{worker} failed:\n{reply.failure}")
        return [reply.value for reply in replies]

    def _gather(self, workers: list[Worker], timeout: float, *, may_lose: bool) -> list[Reply]:
        """Wait for the reply of every worker, as long as each of them begins a new call within `timeout`."""
        replies: dict[int, Reply] = {}
        pending = list(workers)
        tick = min(timeout / 10, 1.0)
        beats, quiet = {worker.number: self._beat(worker) for worker in pending}, dict.fromkeys(range(self.n_envs), 0.0)
        while pending:
            channels = [channel for w in pending for channel in (w.connection, w.process.sentinel)]
            ready = set(wait(channels, tick))
            for worker in pending.copy():
                if worker.connection in ready or worker.process.sentinel in ready:
                    reply = worker.receive()
                    if reply is None:
                        reply = self._without(worker, worker.death(), may_lose=may_lose)
                    replies[worker.number] = reply
                    pending.remove(worker)
            if ready:
                continue
            # Ticks are counted, no clock is read: a process that was stopped for an hour (Ctrl-Z) has not waited for
            # an hour.
            for worker in pending.copy():
                beat = self._beat(worker)
                quiet[worker.number] = quiet[worker.number] + tick if beat == beats[worker.number] else 0.0
                beats[worker.number] = beat
                if quiet[worker.number] >= timeout:
                    worker.kill()
                    what = f"was not back after {timeout:g} s"
                    replies[worker.number] = self._without(worker, what, may_lose=may_lose)
                    pending.remove(worker)
        return [replies[worker.number] for worker in workers]

    def _without(self, worker: Worker, what: str, *, may_lose: bool) -> Reply:
        """The reply of a worker that is lost: its fault; raises that where none may be lost."""
        fault = self._lost(worker, what)
        if not may_lose:
            raise fault
        if not isinstance(fault, EnvironmentFault):  # killed between two calls: nothing of it can be played again
            record = {"env_index": worker.start, "episode": int(self._episodes[worker.start]), "step": 0}
            fault = EnvironmentFault(str(fault), record | {"seed": None, "actions": [], "problem": what})
        return Reply(fault, [], None)

    def _beat(self, worker: Worker) -> int:
        """How many calls of its environments the worker has begun."""
        return int(self._memory.pulses[worker.number, 0]) if self._memory else 0

    def _lost(self, worker: Worker, what: str) -> UserError:
        """Say which worker is gone, how, and what it did; with a record if an environment was at work."""
        hint = next((f"\n{text}" for name, text in _HINTS.items() if name in what), "")
        if self._memory is None:
            return UserError(f"{self._name}: {worker} {what} while it made its environments.{hint}")
        _, index, seed, steps = self._memory.pulses[worker.number, :4].tolist()
        if index < 0:
            return UserError(f"{self._name}: {worker} {what} while none of its environments was at work.{hint}")
        forgotten = int(self._forgotten[index])
        episode, actions = int(self._episodes[index]), self._actions[index][: max(0, steps - forgotten)]
        if seed != episode_seed(self._seed, index, episode):  # the next episode was being begun within the step
            episode, actions, forgotten = episode + 1, [], 0
        if "not back" in what:
            hint = f"\nA call may take {self._timeout:g} s; if it really is slower, raise it: --step-timeout."
        call = "step()" if steps else "reset()"
        problem = f"{call} did not return: {worker} {what}"
        last = f" The action was {actions[-1].tolist()}." if actions else ""
        record = {
            "env_index": index,
            "episode": episode,
            "step": steps,
            "seed": None if forgotten else seed,  # None: it cannot be played again
            "actions": [action.tolist() for action in actions],
            "problem": problem,
        }
        where = f"{self._name}, environment {index}, episode {episode}, step {steps} (seed {seed})"
        return EnvironmentFault(f"{where}: {problem}.{last}{hint}", record)


_OPEN: weakref.WeakSet[WorkerEnvs] = weakref.WeakSet()


@atexit.register  # runs before multiprocessing's own, which would wait for our workers for ever
def _close_open() -> None:
    for envs in list(_OPEN):
        envs.close()


def _unnamed_file(size: int) -> int:
    """A descriptor of memory that no name leads to: it is gone with the last process that has it."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("proximo")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor
