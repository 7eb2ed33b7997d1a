"""One process at a time per run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from proximo.errors import UserError
from proximo.runs.directory import RunDirectory

try:
    import fcntl
except ImportError:  # Windows has no such lock
    fcntl = None


@contextmanager
def locked(run: RunDirectory) -> Iterator[None]:
    """Hold the run for this process; the lock goes with the process, however it ends.

    Raises:
        UserError: if another process holds it.
    """
    if fcntl is None:
        yield
        return
    with (run.path / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"{run.path} is being trained by another process. Wait for it, or stop it first."
            ) from error
        yield
