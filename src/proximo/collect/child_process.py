"""What the child processes of a run have in common: groups of their own, and an end with the run. No heavy imports."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker

_OF_THE_RUN = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
"""What a run notes, to save before it ends; its children must outlive them."""

_PR_SET_PDEATHSIG = 1


def as_parent() -> int:
    """This process, for a child to end with (`end_with`); 0 in a thread, whose own end the system would tell."""
    return os.getpid() if threading.current_thread() is threading.main_thread() else 0


def end_with(parent: int) -> None:
    """Let the system end this process 3 seconds after the main one, whatever it does then (Linux only).

    A thread that waits for the main process's end and then leaves is not enough: native code that holds Python's lock
    (a regular expression that backtracks for ever) keeps it from running. And SIGKILL at once would leave no time to
    close environments, which end what they have started. So the system sends SIGQUIT, and its handler is C's own
    `alarm`, called with the number of the signal: 3 seconds later SIGALRM ends the process, with or without Python
    (unless the user's own code handles SIGALRM).
    """
    if not parent or not sys.platform.startswith("linux"):
        return
    with suppress(OSError, AttributeError):  # a C library without them
        libc = ctypes.CDLL(None)
        libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
        libc.signal(signal.SIGQUIT, ctypes.cast(libc.alarm, ctypes.c_void_p))
        libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGQUIT))
    if os.getppid() != parent:  # it was gone before we asked to be told
        os._exit(1)


def begin_group() -> None:
    """Leave the terminal's group for one of our own, to be killed as a whole."""
    with suppress(OSError):  # it is ours already
        os.setsid()


def kill_group(pid: int | None) -> None:
    """Kill a process and all that it has started, if it has begun a group; it must not have been waited for."""
    with suppress(ProcessLookupError, PermissionError):
        if pid is not None and os.getpgid(pid) == pid:
            os.killpg(pid, signal.SIGKILL)


@contextmanager
def signals_held_back() -> Iterator[None]:
    """Let processes start that hear no signal of the run's until they `hear_signals`; ours come afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_RUN)
    try:
        resource_tracker.ensure_running()  # started with the first process otherwise; it lets two of them through again
        signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_RUN)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def hear_signals() -> None:
    """Undo in a child what it has from `signals_held_back`."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _OF_THE_RUN)


def n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
