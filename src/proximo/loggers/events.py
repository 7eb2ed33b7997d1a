"""TensorBoard's event files, written without TensorBoard: records with checksums, and numbers in protocol buffers.

The format is small, and so is what is needed of it here, that `--tensorboard` works without anything to install:
tensorboardX would bring protobuf along, which many other packages want in versions of their own. The records are those
of TFRecord (https://www.tensorflow.org/tutorials/load_data/tfrecord), the fields those of event.proto and summary.proto
in https://github.com/tensorflow/tensorboard/tree/master/tensorboard/compat/proto.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

OURS = "events.out.tfevents.*.proximo"
"""What the names of our own event files look like."""

HIGHEST_STEP = 2**63 - 1
"""The format has 64 bits for a step, one of them for its sign."""


class EventFile:
    """One event file, which grows."""

    def __init__(self, folder: Path, *, from_step: int = 0) -> None:
        """Begin a file in `folder`; points from `from_step` on in older files there count no more.

        Raises:
            OSError: if the disk refuses.
        """
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time()
        # TensorBoard reads the files of a folder in the order of their names.
        self.path = folder / f"events.out.tfevents.{int(now * 1e6):020d}.{os.getpid()}.proximo"
        self.path.write_bytes(_record(_double(1, now) + _bytes(3, b"brain.Event:2")))
        if from_step:  # session_log with status START: what TensorBoard takes for a restart
            self.path.write_bytes(
                self.path.read_bytes() + _record(_double(1, now) + _integer(2, from_step) + _bytes(7, _integer(1, 1)))
            )

    def add(self, rows: list[tuple[float, int, Mapping[str, Any]]]) -> None:
        """Append wall time, step and metrics of each row; what is no number is left out.

        Raises:
            OSError: if the disk refuses; the file may then end in half a record, where TensorBoard stops reading it.
        """
        data = b"".join(_record(event(*row)) for row in rows)
        with self.path.open("ab") as file:
            file.write(data)


def event(wall_time: float, step: int, metrics: Mapping[str, Any]) -> bytes:
    """The numbers of one moment as an event."""
    numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    values = (_bytes(1, _bytes(1, name.encode(errors="replace")) + _float(2, value)) for name, value in numbers.items())
    return _double(1, wall_time) + _integer(2, step) + _bytes(5, b"".join(values))


def _record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", _masked(length)) + data + struct.pack("<I", _masked(data))


def _masked(data: bytes) -> int:
    checksum = crc32c(data)
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF


def crc32c(data: bytes) -> int:
    """The Castagnoli checksum (RFC 3720, appendix B.4)."""
    checksum = 0xFFFFFFFF
    for byte in data:
        checksum = _TABLE[(checksum ^ byte) & 0xFF] ^ checksum >> 8
    return checksum ^ 0xFFFFFFFF


def _table() -> list[int]:
    table = list(range(256))
    for _ in range(8):
        table = [(entry >> 1) ^ (0x82F63B78 if entry & 1 else 0) for entry in table]
    return table


_TABLE = _table()


def _integer(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _double(field: int, value: float) -> bytes:
    return _varint(field << 3 | 1) + struct.pack("<d", value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _float(field: int, value: float) -> bytes:
    try:
        packed = struct.pack("<f", value)
    except (OverflowError, struct.error):  # beyond what four bytes hold, or even eight
        packed = struct.pack("<f", float("inf") if value > 0 else float("-inf"))
    return _varint(field << 3 | 5) + packed


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the eighth says that more follow."""
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])
