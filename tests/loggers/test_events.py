"""TensorBoard's event files: the checksum's published values, bytes by hand, and TensorBoard's own reader."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import pytest

from proximo.loggers.events import EventFile, crc32c, event


@pytest.mark.parametrize(
    ("data", "checksum"),
    [
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),  # these three: RFC 3720, appendix B.4
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
    ],
)
def test_the_checksum_is_castagnolis(data: bytes, checksum: int) -> None:
    assert crc32c(data) == checksum


def test_an_event_is_what_it_is_by_hand() -> None:
    # wall_time: field 1, 8 bytes; step 300 = 0b10_0101100: field 2, varint; summary: field 5, with one value of
    # 8 bytes: tag "a" in field 1, 1.0 as a float in field 2.
    wanted = bytes.fromhex("09 000000000000f03f 10 ac02 2a0a 0a08 0a0161 15 0000803f")
    assert event(1.0, 300, {"a": 1.0, "words": "no number", "none": None}) == wanted


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The points of a folder, by TensorBoard's own reader."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="pip install tensorboard"
    )
    found = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(one.step, one.value) for one in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    file = EventFile(tmp_path)
    file.add([(10.0, 256, {"loss": 0.5, "count": 3, "stopped": True}), (11.0, 512, {"loss": -1e300})])
    file.add([(12.0, 2**40, {"loss": math.nan, "count": 10**9})])
    points = read(tmp_path)
    assert points["count"] == [(256, 3.0), (2**40, 1e9)]
    assert points["stopped"] == [(256, 1.0)]
    assert points["loss"][:2] == [(256, 0.5), (512, -math.inf)]
    assert math.isnan(points["loss"][2][1])


def test_a_later_file_takes_the_place_of_points_from_its_step_on(tmp_path: Path) -> None:
    EventFile(tmp_path).add([(1.0, step, {"loss": float(step)}) for step in (1, 2, 3, 4)])
    EventFile(tmp_path, from_step=3).add([(2.0, 3, {"loss": 30.0}), (2.0, 5, {"loss": 50.0})])
    assert read(tmp_path) == {"loss": [(1, 1.0), (2, 2.0), (3, 30.0), (5, 50.0)]}


def test_half_a_record_at_the_end_of_a_killed_file_hides_nothing_else(tmp_path: Path) -> None:
    killed = EventFile(tmp_path)
    killed.add([(1.0, 1, {"loss": 1.0}), (1.0, 2, {"loss": 2.0})])
    killed.path.write_bytes(killed.path.read_bytes()[:-7])
    EventFile(tmp_path, from_step=2).add([(2.0, 2, {"loss": 20.0})])
    assert read(tmp_path) == {"loss": [(1, 1.0), (2, 20.0)]}


def test_every_record_is_framed_by_its_length(tmp_path: Path) -> None:
    file = EventFile(tmp_path)
    file.add([(1.0, 1, {"loss": 1.0})])
    data, sizes = file.path.read_bytes(), []
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        sizes.append(size)
        data = data[16 + size :]
    assert len(sizes) == 2  # the version of the format, and the row
