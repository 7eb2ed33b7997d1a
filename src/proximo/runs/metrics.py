"""The metrics of a run: one JSON object per line, one line per iteration, readable by anything.

A line counts once it is whole. A kill in the middle of a write leaves a torn last line, which readers
pass over and the next write removes.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from proximo.errors import DiskError, UserError, tell
from proximo.runs import files

MetricValue = float | int | bool | None | str


def append_metrics(path: Path, row: dict[str, MetricValue]) -> None:
    """Write one row at the end of the file, in one write, visible to readers at once.

    JSON has no NaN and no infinity: they become null. The row is not flushed to the disk: it survives a
    kill of the process, and `sync_metrics` makes it survive a power cut.

    Raises TypeError for a value that is no number, boolean, string or None, and DiskError if the disk
    refuses, with the file as it was.
    """
    line = (json.dumps({key: _plain(key, value) for key, value in row.items()}) + "\n").encode()
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            _mend_tail(descriptor)
            _write_all(descriptor, line)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise DiskError(
            f"The metrics could not be written to {path}: {files.reason(error)}. "
            "Free some space there, or let this user write there."
        ) from error


def sync_metrics(path: Path) -> None:
    """Flush the file to the disk. Before a checkpoint is saved, so that no row it counts on can be lost.

    Raises DiskError if the disk refuses; a file that does not exist yet is none to flush.
    """
    try:
        files.sync_file(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise DiskError(
            f"The metrics in {path} could not be flushed to the disk: {files.reason(error)}. "
            "Free some space there, or let this user write there."
        ) from error


def read_metrics(path: Path) -> list[dict[str, MetricValue]]:
    """Return all rows, none if the file does not exist yet; a torn last line is passed over.

    Raises UserError that names the line for anything else that is not a JSON object.
    """
    return [row for _, row in _rows(path)]


def truncate_metrics(path: Path, iteration: int) -> None:
    """Keep the rows whose "iteration" is at most `iteration`, byte for byte, and drop the rest.

    A resumed run writes those again. The file is replaced as a whole, or not at all. Rows that are not there, or
    twice, are told on standard error: nothing but pictures hangs on them.

    Raises UserError for a damaged file, a row without an iteration, and a disk that refuses.
    """
    kept: list[bytes] = []
    iterations: list[int] = []
    for number, (line, row) in enumerate(_rows(path), start=1):
        value = row.get("iteration")
        if not isinstance(value, int) or isinstance(value, bool):
            raise UserError(f"{path}, line {number} has no whole number under 'iteration'. Delete the line.")
        if value <= iteration:
            kept.append(line + b"\n")
            iterations.append(value)
    if len(iterations) != iteration or any(one != number for number, one in enumerate(iterations, start=1)):
        missing = max(iteration - len(set(iterations)), 0)
        what = (
            f"{missing} of the {iteration} rows are not there"
            if missing
            else "some rows are doubled, or not in their order"
        )
        tell(
            f"proximo: {path} is not as the run has left it: {what}. Training goes on as if they were; pictures do not."
        )
    data = b"".join(kept)
    try:
        if path.exists() and path.read_bytes() != data:
            files.replace_file(path, data)
    except OSError as error:
        raise UserError(
            f"{path} could not be cut back to iteration {iteration}: {files.reason(error)}. It is as it was. "
            "Free some space there, or let this user write there."
        ) from error


def _plain(key: str, value: object) -> MetricValue:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    raise TypeError(f"metric {key!r} is a {type(value).__name__}: make it a Python number")


def _parsed(line: bytes) -> dict[str, Any] | None:
    """Return the row in this line, None if it is not one."""
    try:
        row = files.parse_json(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _rows(path: Path) -> list[tuple[bytes, dict[str, MetricValue]]]:
    """Return each line with its row."""
    try:
        *lines, tail = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"The metrics in {path} cannot be read: {files.reason(error)}.") from error
    rows: list[tuple[bytes, dict[str, MetricValue]]] = []
    for number, line in enumerate(lines, start=1):
        row = _parsed(line)
        if row is None:
            raise UserError(
                f"{path}, line {number} is damaged: it is not a JSON object. Restore the file from a copy, "
                "or delete the line."
            )
        rows.append((line, row))
    # An editor may have taken the last newline from a whole row; half a row never parses.
    last = _parsed(tail)
    return rows if last is None else [*rows, (tail, last)]


def _mend_tail(descriptor: int) -> None:
    """Let the file end after its last whole row, or a torn line would swallow the next one."""
    size = os.fstat(descriptor).st_size
    if size == 0:
        return
    os.lseek(descriptor, size - 1, os.SEEK_SET)
    if os.read(descriptor, 1) == b"\n":
        return
    os.lseek(descriptor, 0, os.SEEK_SET)
    with os.fdopen(descriptor, "rb", closefd=False) as file:
        data = file.read()
    whole = data.rfind(b"\n") + 1
    if _parsed(data[whole:]) is None:
        os.ftruncate(descriptor, whole)
    else:
        _write_all(descriptor, b"\n")


def _write_all(descriptor: int, data: bytes) -> None:
    """Append all of `data`, or none of it: a full disk may take a part of a line before it says so."""
    before = os.fstat(descriptor).st_size
    try:
        while data:
            data = data[os.write(descriptor, data) :]
    except OSError:
        os.ftruncate(descriptor, before)
        raise
