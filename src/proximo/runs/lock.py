"""One process at a time per run."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from proximo.errors import UserError
from proximo.runs import files
from proximo.runs.directory import LOCK_NAME, RunDirectory

try:
    import fcntl
except ImportError:  # Windows has no such lock
    fcntl = None


@contextmanager
def locked(run: RunDirectory) -> Iterator[None]:
    """Hold the run for this process; the lock goes with the process, however it ends.

    What killed processes left unfinished in the run is deleted: whoever holds the lock knows that nobody works on it.

    Raises:
        UserError: if another process holds it, or it cannot be had here.
    """
    if fcntl is None:
        yield
        return
    path = run.path / LOCK_NAME
    try:
        file = path.open("a")  # not "w": nothing of the run is changed by that
    except OSError as error:
        raise UserError(
            f"{path} cannot be written, so the run cannot be trained: {files.reason(error)}. "
            "Let this user write there, or train a copy of the run."
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(
                    f"{run.path} is being trained by another process. Wait for it, or stop it first."
                ) from error
            raise UserError(
                f"{path} cannot be locked: {files.reason(error)}. Some network file systems have no locks: keep the "
                "run on a disk of this machine."
            ) from error
        with suppress(OSError):  # it takes some room, no more
            files.sweep(run.path)
            files.sweep(run.checkpoints)
        yield
