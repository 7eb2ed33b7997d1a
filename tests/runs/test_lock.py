"""One process at a time per run, and words for every way in which that fails."""

from __future__ import annotations

import errno
import os

import pytest

from proximo.errors import UserError
from proximo.runs import lock
from proximo.runs.directory import RunDirectory
from proximo.runs.lock import locked


def test_a_run_is_held_by_one_and_given_back(tmp_path):
    run = RunDirectory(tmp_path)
    with locked(run), pytest.raises(UserError, match="being trained by another process"), locked(run):
        pass
    with locked(run):
        pass


def test_whoever_holds_a_run_sweeps_what_killed_processes_have_left_unfinished(tmp_path):
    run = RunDirectory(tmp_path)
    for folder in (run.path, run.checkpoints):
        (folder / ".tmp-1").mkdir(parents=True)
        (folder / ".tmp-1" / "state.json").touch()
        (folder / ".tmp-2").touch()
        (folder / "mine").touch()
    with locked(run):
        assert sorted(path.name for path in run.path.iterdir()) == [".lock", "checkpoints", "mine"]
        assert [path.name for path in run.checkpoints.iterdir()] == ["mine"]
        (run.path / ".tmp-3").touch()  # at work
        with pytest.raises(UserError), locked(run):
            pass
        assert (run.path / ".tmp-3").exists()


def test_a_lock_that_cannot_be_opened_is_a_readable_error(tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(UserError, match=r"\.lock cannot be written.*Is a directory"), locked(RunDirectory(tmp_path)):
        pass


def test_a_disk_without_locks_is_not_taken_for_another_process(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with pytest.raises(UserError, match="cannot be locked: No locks available"), locked(RunDirectory(tmp_path)):
        pass
