"""What a full disk does to a run: nothing, until it refuses too often."""

from __future__ import annotations

from pathlib import Path

import pytest

from proximo.errors import DiskError, UserError
from proximo.runs import keeping
from proximo.runs.keeping import WAITS, Keeper
from proximo.runs.metrics import read_metrics


class Clock:
    """A clock that only `sleep` moves."""

    def __init__(self) -> None:
        self.now, self.slept = 0.0, list[float]()

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept.append(seconds)


class Disk:
    """Saves that fail as often as they are told to."""

    def __init__(self, failures: int) -> None:
        self.failures, self.tries, self.saved = failures, 0, 0

    def save(self) -> None:
        self.tries += 1
        if self.tries <= self.failures:
            raise DiskError("the checkpoint does not fit")
        self.saved += 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(keeping, "time", clock)
    return clock


def test_a_refused_save_is_tried_again_when_its_time_has_come(tmp_path: Path, clock: Clock, capfd):
    disk, keeper = Disk(failures=2), Keeper(tmp_path / "metrics.jsonl")
    clock.now = 100.0
    keeper.keep({"iteration": 1}, disk.save, is_due=True)
    assert (disk.tries, disk.saved) == (1, 0)
    clock.now += WAITS[0] - 0.1
    keeper.keep({"iteration": 2}, disk.save, is_due=False)
    assert disk.tries == 1
    clock.now += 0.2
    keeper.keep({"iteration": 3}, disk.save, is_due=False)
    assert disk.tries == 2
    clock.now += WAITS[1]
    keeper.keep({"iteration": 4}, disk.save, is_due=False)
    assert disk.saved == 1
    keeper.keep({"iteration": 5}, disk.save, is_due=False)
    assert disk.saved == 1  # wanted once
    assert [row["iteration"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    said = capfd.readouterr().err
    assert "does not fit" in said
    assert "1 of 8 tries" in said
    assert "2 of 8 tries" in said
    assert "takes what is written again" in said


def test_rows_that_the_disk_refuses_come_before_the_checkpoint_that_counts_on_them(tmp_path: Path, clock: Clock):
    path, disk = tmp_path / "there" / "metrics.jsonl", Disk(failures=0)
    keeper = Keeper(path)
    keeper.keep({"iteration": 1}, disk.save, is_due=True)
    assert disk.tries == 0
    path.parent.mkdir()
    clock.now += WAITS[0]
    keeper.keep({"iteration": 2}, disk.save, is_due=False)
    assert [row["iteration"] for row in read_metrics(path)] == [1, 2]
    assert disk.saved == 1


def test_too_many_refusals_in_a_row_end_the_run(tmp_path: Path, clock: Clock):
    disk, keeper = Disk(failures=100), Keeper(tmp_path / "metrics.jsonl")
    for iteration in range(len(WAITS)):
        keeper.keep({"iteration": iteration}, disk.save, is_due=iteration == 0)
        clock.now += 61.0
    with pytest.raises(UserError, match=r"does not fit(.|\n)*tried 8 times"):
        keeper.keep({"iteration": 7}, disk.save, is_due=False)
    assert disk.tries == len(WAITS) + 1


def test_a_success_makes_a_fresh_beginning(tmp_path: Path, clock: Clock):
    disk, keeper = Disk(failures=5), Keeper(tmp_path / "metrics.jsonl")
    for iteration in range(20):
        clock.now += 61.0
        keeper.keep({"iteration": iteration}, disk.save, is_due=True)
    disk.failures = disk.tries + 7
    for iteration in range(20, 40):
        clock.now += 61.0
        keeper.keep({"iteration": iteration}, disk.save, is_due=True)
    assert disk.saved == 15 + 13


def test_the_last_save_is_waited_for(tmp_path: Path, clock: Clock):
    disk, keeper = Disk(failures=3), Keeper(tmp_path / "metrics.jsonl")
    keeper.keep({"iteration": 1}, disk.save, is_due=True, is_last=True)
    assert disk.saved == 1
    assert clock.slept == list(WAITS[:3])


def test_an_urgent_save_is_tried_once(tmp_path: Path, clock: Clock):
    disk, keeper = Disk(failures=1), Keeper(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match="does not fit"):
        keeper.keep({"iteration": 1}, disk.save, is_due=True, is_urgent=True)
    assert clock.slept == []


def test_no_checkpoint_is_made_while_updates_are_left_out(tmp_path: Path, clock: Clock):
    disk, keeper = Disk(failures=1), Keeper(tmp_path / "metrics.jsonl")
    keeper.keep({"iteration": 1}, disk.save, is_due=True)
    clock.now += WAITS[0]
    keeper.keep({"iteration": 2}, disk.save, is_due=True, is_sound=False)  # the disk would take it now
    assert (disk.tries, disk.saved) == (1, 0)
    assert [row["iteration"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    keeper.keep({"iteration": 3}, disk.save, is_due=False)
    assert disk.saved == 1
    keeper.keep({"iteration": 4}, disk.save, is_due=True, is_sound=False, is_urgent=True)
    assert disk.saved == 2


def test_a_run_that_may_rest_saves_no_oftener_than_its_saves_are_short(tmp_path: Path, clock: Clock):
    saved: list[float] = []

    def save() -> None:
        clock.now += 0.5
        saved.append(clock.now)

    keeper = Keeper(tmp_path / "metrics.jsonl", may_rest=True)
    for iteration in range(300):
        clock.now += 1.0
        keeper.keep({"iteration": iteration}, save, is_due=True, is_last=iteration == 299)
    assert saved == [1.5, 102.0, 202.5, 302.0]  # each rests for 100 seconds; the last one cannot
