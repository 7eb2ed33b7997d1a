"""The names of checkpoints in a folder, their order, and the small files that point at one of them."""

from __future__ import annotations

import re
import stat
from pathlib import Path

from proximo.errors import UserError
from proximo.runs import files

LATEST = "latest"
BEST = "best"

_NAME = re.compile(r"step_([0-9]{12,30})(?:-([0-9]{1,9}))?")
_MOST_NAME_BYTES = 100


def is_name(name: str) -> bool:
    """Return whether `name` is that of a checkpoint; that of a temporary folder never is."""
    return _NAME.fullmatch(name) is not None


def step_of(name: str) -> int:
    """Return the step in a checkpoint's name."""
    return order(name)[0]


def free(folder: Path, step: int) -> str:
    """Return a name after every name this step already has, so that the newest sorts newest."""
    taken = [order(name)[1] for name in all_in(folder) if step_of(name) == step]
    return f"step_{step:012d}" + (f"-{max(taken) + 1}" if taken else "")


def order(name: str) -> tuple[int, int]:
    """Return (step, how many times it had been saved) of a checkpoint's name: what newest means."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is no name of a checkpoint")
    return int(match[1]), int(match[2] or 1)


def all_in(folder: Path) -> list[str]:
    """Return the names of all checkpoints in `folder`, newest first; raise UserError if it is unreadable."""
    try:
        names = [path.name for path in folder.iterdir() if is_name(path.name)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"The checkpoints in {folder} cannot be read: {files.reason(error)}.") from error
    return sorted(names, key=lambda name: (*order(name), name), reverse=True)


def pointed(folder: Path, pointer: str) -> str | None:
    """Return the name in the small file `latest` or `best`, None if there is no such file.

    Raises UserError if it holds anything but the name of a checkpoint, such as a path.
    """
    path = folder / pointer
    check_pointer(path)
    try:
        with path.open("rb") as file:
            text = file.read(_MOST_NAME_BYTES).decode("utf-8", "replace").strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {files.reason(error)}.") from error
    if not is_name(text):
        raise UserError(
            f"{path} is damaged: it should hold the name of a checkpoint, and holds {text!r}. "
            f"Delete the file {path}; the checkpoints themselves are not touched by that."
        )
    return text


def check_pointer(path: Path) -> None:
    """Raise UserError if `latest` or `best` is a folder, or a pipe, which would be waited for for ever."""
    try:
        mode = path.stat().st_mode
    except OSError:  # it is not there; or the disk refuses, which whoever opens it then hears
        return
    if not stat.S_ISREG(mode):
        raise UserError(f"{path} is damaged: it is no plain file. Delete it; no checkpoint is touched by that.")
