"""One worker process as its parent sees it: begun, sent commands, listened to, ended or killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from multiprocessing.reduction import send_handle
from typing import Any

from proximo.collect.child_process import as_parent, kill_group, signals_held_back
from proximo.collect.worker_process import Reply, work

CLOSE_SECONDS = 5.0
"""How long the workers may take to close their environments before they are killed."""

_ONE_THREAD: dict[str, str] = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1"
)


@dataclass
class Worker:
    """A worker process and the slice of environments in it, `start` to `stop - 1`."""

    number: int
    start: int
    stop: int
    process: SpawnProcess
    connection: Connection
    was_waited_for: bool = False

    @staticmethod
    def begin(number: int, start: int, stop: int, serve: Callable[[int, Connection, int], None] = work) -> Worker:
        """Start a process that waits for commands, in `serve`."""
        context = multiprocessing.get_context("spawn")  # a fork would copy torch's threads' locks, held or not
        ours, theirs = context.Pipe()
        with theirs, _clean_start():
            process = context.Process(target=serve, args=(number, theirs, as_parent()), name=f"proximo-worker-{number}")
            process.start()
        return Worker(number, start, stop, process, ours)

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

    def receive(self) -> Reply | None:
        """The reply that is there, or None from a dead worker."""
        try:
            return self.connection.recv() if self.connection.poll() else None
        except (EOFError, OSError):
            return None

    def death(self) -> str:
        """How the process ended, in words."""
        ended = wait([self.process.sentinel], CLOSE_SECONDS)
        self.kill()
        if not ended:
            return "closed its pipe"
        self.process.join()
        self.was_waited_for = True
        code = self.process.exitcode or 0
        if code < 0:
            known = {s.value: s.name for s in signal.Signals}
            return f"was ended by {known.get(-code, f'signal {-code}')}"
        return f"ended with exit code {code}"

    def kill(self) -> None:
        """Kill the process, unless it has ended, and whatever its environments have started and left behind."""
        if not self.was_waited_for:  # its number may be another process's by now
            kill_group(self.process.pid)
        self.process.kill()  # one that is only being started has no group yet

    def end(self, deadline: float) -> None:
        """Wait for the process until `deadline`, then kill it (SIGTERM it ignores); leave nothing of it."""
        if self.connection.closed:  # it has ended, and another was to be begun in its place
            return
        wait([self.process.sentinel], max(0.0, deadline - time.monotonic()))
        self.kill()
        self.process.join()
        self.process.close()
        self.connection.close()


_START_LOCK = threading.Lock()


@contextmanager
def _clean_start() -> Iterator[None]:
    """Let processes start with one thread each, deaf to signals, and without running the main module again.

    Python's spawn runs the main module a second time in each child, for pickles that refer to it; cloudpickle
    sends what is defined there by value. And threads must be limited before numpy loads its BLAS, so before
    the child's first line that is ours; before that line it would die of a signal to the group, too.
    """
    with _START_LOCK:
        main, before = sys.modules["__main__"], {key: os.environ.get(key) for key in _ONE_THREAD}
        sys.modules["__main__"] = types.ModuleType("__main__")
        os.environ.update(_ONE_THREAD)
        try:
            with signals_held_back():
                yield
        finally:
            sys.modules["__main__"] = main
            for key, value in before.items():
                if value is None:
                    del os.environ[key]
                else:
                    os.environ[key] = value
