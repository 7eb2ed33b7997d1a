"""Metrics survive a kill in the middle of a line, and a resumed run continues them byte for byte."""

from __future__ import annotations

import errno
import json
import math
import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proximo.errors import UserError
from proximo.runs.metrics import append_metrics, read_metrics, sync_metrics, truncate_metrics

ROWS = [{"iteration": i, "return_mean": i / 3, "solved": i == 3, "note": None} for i in range(1, 5)]


@pytest.fixture
def log(tmp_path) -> Path:
    path = tmp_path / "metrics.jsonl"
    for row in ROWS:
        append_metrics(path, row)
    return path


values = st.none() | st.booleans() | st.integers(-(2**80), 2**80) | st.floats() | st.text(st.characters())


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.dictionaries(st.text(), values, max_size=4), max_size=4))
def test_every_row_comes_back_and_every_line_is_strict_json(rows):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        for row in rows:
            append_metrics(path, row)
        read = read_metrics(path)
        lines = path.read_text().splitlines() if rows else []
    finite = [
        {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
        for row in rows
    ]
    assert repr(read) == repr(finite)
    assert len(lines) == len(rows)
    assert not any(token in json.dumps(json.loads(line)) for line in lines for token in (": NaN", ": Infinity"))


@pytest.mark.parametrize("value", [torch.tensor(1.0), [1.0], {"a": 1.0}, 1j])
def test_what_is_no_number_is_refused_and_nothing_is_written(log, value):
    before = log.read_bytes()
    with pytest.raises(TypeError, match="'loss'"):
        append_metrics(log, {"iteration": 5, "loss": value})
    assert log.read_bytes() == before


def test_a_torn_last_line_is_passed_over_and_does_not_swallow_the_next_row(log):
    whole = log.read_bytes()
    start_of_last = whole.rstrip().rfind(b"\n") + 1
    for cut in range(start_of_last, len(whole)):
        log.write_bytes(whole[:cut])
        expected = ROWS if cut == len(whole) - 1 else ROWS[:-1]  # only the newline missing: the row is whole
        assert read_metrics(log) == expected
        append_metrics(log, {"iteration": 9})
        assert read_metrics(log) == [*expected, {"iteration": 9}]


def test_zeros_at_the_end_are_a_torn_line_too(log):
    with log.open("ab") as file:
        file.write(b"\0" * 100)  # what a power cut leaves of a line whose length was flushed before its bytes
    assert read_metrics(log) == ROWS
    append_metrics(log, {"iteration": 5})
    assert read_metrics(log) == [*ROWS, {"iteration": 5}]


@pytest.mark.parametrize(
    "line", [b"", b'{"iteration": 2, "ret', b"[1]", b"null", b'{"x": NaN}', b"\xff", b"[" * 99_999]
)
@pytest.mark.parametrize("number", [1, 3, 4])
def test_damage_anywhere_else_is_an_error_that_names_the_line(log, line, number):
    lines = log.read_bytes().split(b"\n")
    lines[number - 1] = line
    log.write_bytes(b"\n".join(lines))
    for read in (read_metrics, lambda path: truncate_metrics(path, 1)):
        with pytest.raises(UserError, match=rf"metrics\.jsonl, line {number} is damaged"):
            read(log)


def test_a_log_that_was_not_begun_is_empty(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    truncate_metrics(path, 3)
    sync_metrics(path)
    assert not path.exists()


@pytest.mark.parametrize(("iteration", "kept"), [(0, 0), (2, 2), (4, 4), (9, 4)])
def test_truncating_keeps_the_bytes_of_the_rows_it_keeps(log, iteration, kept):
    lines = log.read_bytes().splitlines(keepends=True)
    with log.open("ab") as file:
        file.write(b'{"iteration": 5, "torn')
    truncate_metrics(log, iteration)
    assert log.read_bytes() == b"".join(lines[:kept])
    assert [path.name for path in log.parent.iterdir()] == ["metrics.jsonl"]


def test_truncating_gives_back_a_newline_that_an_editor_took(log):
    whole = log.read_bytes()
    log.write_bytes(whole[:-1])
    truncate_metrics(log, 4)
    assert log.read_bytes() == whole


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        ([], "3 of the 3 rows are not there"),
        ([0, 3], "2 of the 3 rows are not there"),
        ([0, 1, 0, 1, 2], "some rows are doubled, or not in their order"),
        ([0, 2, 1, 3], "some rows are doubled, or not in their order"),
    ],
)
def test_truncating_says_what_is_not_as_the_run_has_left_it(log, kept, said, capfd):
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[number] for number in kept))
    truncate_metrics(log, 3)
    assert said in capfd.readouterr().err
    log.unlink()
    truncate_metrics(log, 3)
    assert "3 of the 3 rows" in capfd.readouterr().err
    truncate_metrics(log, 10**15)  # a stranger's number
    assert "1000000000000000 of the" in capfd.readouterr().err
    truncate_metrics(log, 0)
    assert not capfd.readouterr().err


@pytest.mark.parametrize("row", [{"step": 1}, {"iteration": 1.0}, {"iteration": True}, {"iteration": "1"}])
def test_truncating_refuses_rows_whose_iteration_is_unknown(log, row):
    append_metrics(log, row)
    before = log.read_bytes()
    with pytest.raises(UserError, match="line 5 has no whole number"):
        truncate_metrics(log, 2)
    assert log.read_bytes() == before


def test_truncating_on_a_full_disk_leaves_the_log_as_it_was(log, monkeypatch):
    before = log.read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match="No space left"):
        truncate_metrics(log, 2)
    assert log.read_bytes() == before
    assert [path.name for path in log.parent.iterdir()] == ["metrics.jsonl"]


def test_a_disk_that_fills_up_within_a_line_leaves_no_part_of_it(log, monkeypatch):
    before = log.read_bytes()
    original = os.write
    calls = 0

    def fill_up(descriptor: int, data: bytes) -> int:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(descriptor, data[:7])

    monkeypatch.setattr(os, "write", fill_up)
    with pytest.raises(UserError, match="No space left"):
        append_metrics(log, {"iteration": 5})
    assert calls == 2
    assert log.read_bytes() == before


def test_a_log_that_cannot_be_opened_is_a_readable_error(tmp_path):
    (tmp_path / "folder").mkdir()
    for call in (lambda path: append_metrics(path, {}), read_metrics, sync_metrics):
        with pytest.raises(UserError, match=str(tmp_path / "folder")):
            call(tmp_path / "folder")
