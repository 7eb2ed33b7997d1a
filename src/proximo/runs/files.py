"""Writing files so that a crash or a power cut leaves the old content or the new, never half of it.

Every change to the disk that a checkpoint makes goes through this file, so this is also the place
where crash injection cuts in.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from proximo.errors import UserError

TEMPORARY_PREFIX = ".tmp-"
"""Unfinished files and folders begin with this, and no finished one does: a reader can never mix them up."""

_NO_FOLDER_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP})


def expanded(path: Path | str) -> Path:
    """Return the path with `~` replaced. Raises UserError for what no path can be, or a home that nobody has."""
    if not isinstance(path, (str, os.PathLike)):
        raise UserError(f"A path is a string or a pathlib.Path, not {path!r}, of type {type(path).__name__}.")
    if "\0" in str(path):
        raise UserError(f"The path {str(path)!r} holds a NUL character, which no name of a file can hold. Take it out.")
    try:
        os.fsencode(path)
        return Path(path).expanduser()
    except UnicodeEncodeError as error:
        raise UserError(f"The path {str(path)!r} holds characters that no name of a file can hold ({error}).") from None
    except RuntimeError:
        raise UserError(
            f"{path} begins with the home of a user who does not exist. Write the whole path, or ./{path} for a "
            "folder of that name."
        ) from None


def temporary_beside(path: Path) -> Path:
    """Return a fresh name for unfinished work in the folder that holds `path`."""
    return path.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}")


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names to the disk: without it, a power cut can undo a rename in it.

    Raises OSError, except where the file system has no such thing (some network mounts, Windows).
    """
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Flush what has been written to an existing file to the disk. Raises OSError."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def make_folders(folder: Path) -> None:
    """Create `folder` and its missing parents, each flushed to the disk. Raises OSError."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))


def write_synced(path: Path, data: bytes) -> None:
    """Write a file that does not exist yet, and flush it to the disk. Raises OSError."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def rename(source: Path, target: Path) -> None:
    """Give `source` its final name in the same folder, and flush that folder. Raises OSError.

    `target` must not exist: the caller picks a name that is free.
    """
    source.rename(target)
    sync_folder(target.parent)


def replace_file(path: Path, data: bytes) -> None:
    """Put `data` in the place of a small file: a reader sees the old content or the new. Raises OSError."""
    temporary = temporary_beside(path)
    try:
        write_synced(temporary, data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sweep(folder: Path) -> None:
    """Delete the unfinished work that killed processes have left in `folder`. Raises OSError.

    Only for whoever holds the run: it may be the work of a process that is alive.
    """
    for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
        remove_tree(path)


def remove_tree(path: Path) -> None:
    """Delete a file, or a folder with all that is in it; a link goes, and what it names stays. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def parse_json(data: bytes, *, allow_nan: bool = False) -> Any:
    """Read UTF-8 JSON that may come from a stranger; raises ValueError for everything that is not.

    JSON has no NaN and no infinity; `allow_nan` accepts the names that Python's own writer gives them.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(data.decode("utf-8"), parse_constant=None if allow_nan else refuse)
    except RecursionError:
        # Thousands of brackets: no file of ours, and no reason for a traceback.
        raise ValueError("it is nested too deeply") from None


def reason(error: OSError) -> str:
    """Say an operating-system error in a few words, without a number that nobody knows by heart."""
    return error.strerror or type(error).__name__
