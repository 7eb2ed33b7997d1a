"""A run gets a folder of its own, is found again from wherever a person stands, and is never overwritten."""

from __future__ import annotations

import errno
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proximo.errors import UserError
from proximo.runs import directory
from proximo.runs.directory import RunDirectory, new_run, open_run, read_config, write_config


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def a_run(path: str, age: float = 0.0) -> RunDirectory:
    run = new_run("CartPole-v1", 1, path)
    write_config(run, {"seed": 1})
    os.utime(run.config_path, (1e9 - age, 1e9 - age))
    return run


# ---------------------------------------------------------------------------------------- new runs


def test_runs_that_start_in_the_same_second_get_folders_of_their_own():
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda _: new_run("CartPole-v1", 7), range(40)))
    paths = {run.path for run in runs}
    assert len(paths) == 40
    assert all(path.is_dir() and path.parent == Path("runs/CartPole-v1") for path in paths)
    assert all("-seed7" in path.name and ":" not in path.name for path in paths)


@pytest.mark.parametrize(
    ("task", "folder"),
    [
        ("CartPole-v1", "CartPole-v1"),
        ("ALE/Pong-v5", "ALE-Pong-v5"),
        ("my_file.py:MyEnv", "my_file.py-MyEnv"),
        ("../../etc/passwd:Env", "etc-passwd-Env"),
        ("/", "task"),
        ("..", "task"),
        ("", "task"),
        ("umwelt-für-übung", "umwelt-f-r-bung"),
    ],
)
def test_any_task_becomes_one_plain_folder_under_runs(task, folder):
    assert new_run(task, 0).path.parent == Path("runs") / folder


@given(task=st.text(st.characters(), max_size=300))
@settings(max_examples=100)
def test_no_task_leads_out_of_runs(task):
    name = directory.folder_name(task)
    assert Path(name).name == name
    assert not name.startswith((".", "-"))
    assert 0 < len(name) <= 80


def test_a_named_folder_is_made_with_its_parents_or_taken_if_empty(tmp_path):
    assert new_run("CartPole-v1", 1, tmp_path / "a" / "b").path == tmp_path / "a" / "b"
    (tmp_path / "empty").mkdir()
    assert new_run("CartPole-v1", 1, "empty").path == Path("empty")


def test_an_existing_run_is_refused_and_untouched():
    run = a_run("mine")
    run.metrics_path.write_text("kept\n")
    with pytest.raises(UserError, match=r"already holds a run.*proximo resume mine.*another name"):
        new_run("CartPole-v1", 1, "mine")
    assert run.metrics_path.read_text() == "kept\n"
    assert read_config(run) == {"seed": 1}


def test_whatever_else_is_there_is_refused_and_untouched(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_bytes(b"kept")
    (tmp_path / "file").write_bytes(b"kept")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name, why in (("photos", "not empty"), ("file", "no folder"), ("dangling", "no folder")):
        with pytest.raises(UserError, match=why):
            new_run("CartPole-v1", 1, name)
    assert (tmp_path / "photos" / "holiday.jpg").read_bytes() == (tmp_path / "file").read_bytes() == b"kept"
    assert not (tmp_path / "nowhere").exists()


def test_a_parent_that_cannot_be_written_to_is_a_readable_error(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/run cannot be created.*--run-dir"):
        new_run("CartPole-v1", 1, tmp_path / "file" / "run")

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "runs")

    with monkeypatch.context() as patch:  # the tests may run as root, who may write anywhere
        patch.setattr(os, "mkdir", refuse)
        with pytest.raises(UserError, match=r"runs cannot be created: Permission denied.*--run-dir"):
            new_run("CartPole-v1", 1)
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match="empty cannot be written to"):
        new_run("CartPole-v1", 1, "empty")


def test_a_folder_with_nothing_but_a_lock_is_empty(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    assert new_run("CartPole-v1", 1, "run").path == Path("run")


@pytest.mark.parametrize("left", [[], [".lock"], [".lock", ".tmp-0123abcd"]], ids=["nothing", "lock", "half a config"])
def test_what_a_run_leaves_that_was_killed_before_it_had_settings_can_be_begun_again(tmp_path, left):
    (tmp_path / "run").mkdir()
    for name in left:
        (tmp_path / "run" / name).touch()
    with pytest.raises(UserError, match="begin it again with the same command; the folder may stay"):
        open_run("run")
    assert new_run("CartPole-v1", 1, "run").path == Path("run")


BAD_PATHS = {"~nosuchuser/x": "user who does not exist", "a\0b": "NUL", "x" * 300: "name too long|There is no"}


@pytest.mark.parametrize("path", BAD_PATHS, ids=["home", "nul", "long"])
@pytest.mark.parametrize("use", [lambda path: new_run("CartPole-v1", 1, path), open_run], ids=["new", "open"])
def test_paths_that_no_system_has_are_readable_errors(use, path):
    with pytest.raises(UserError, match=f"(?i){BAD_PATHS[path]}"):
        use(path)


def test_a_folder_that_may_not_be_read_is_a_readable_error(monkeypatch):
    a_run("mine")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "mine")

    monkeypatch.setattr(Path, "is_file", refuse)  # the tests may run as root, who may read anything
    with pytest.raises(UserError, match=r"mine cannot be read: Permission denied"):
        open_run("mine")


def test_a_deleted_current_folder_is_said(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(UserError, match="current folder has been deleted"):
        new_run("CartPole-v1", 1)
    with pytest.raises(UserError):
        open_run("runs")


# ------------------------------------------------------------------------------------ finding runs


def test_a_run_is_found_from_anywhere_inside_it(tmp_path, monkeypatch):
    run = a_run("mine")
    inside = run.checkpoints / "step_000000000128"
    inside.mkdir(parents=True)
    (inside / "manifest.json").touch()
    for path in ("mine", "mine/", "mine/checkpoints", inside, inside / "manifest.json", "mine/config.toml"):
        assert open_run(path).path.samefile("mine")
    monkeypatch.chdir(inside)
    for path in (".", "..", "../..", "../../checkpoints"):
        assert open_run(path).path.samefile(tmp_path / "mine")


def test_a_configuration_further_up_does_not_make_a_run_of_everything_below(tmp_path):
    (tmp_path / "config.toml").touch()
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match="runs is not a run: it has no config"):
        open_run("runs")


@pytest.mark.parametrize("parent", ["runs/CartPole-v1", "runs"])
def test_a_folder_of_runs_picks_none_and_lists_the_newest(parent):
    for number in range(8):
        a_run(f"runs/CartPole-v1/run-{number}", age=abs(number - 4))
    with pytest.raises(UserError) as caught:
        open_run(parent)
    listed = [line.strip() for line in str(caught.value).splitlines()[1:]]
    assert listed[0] == "runs/CartPole-v1/run-4"
    assert {path[-1] for path in listed[:5]} == set("23456")
    assert listed[5:] == ["and 3 older"]


def test_a_missing_path_gets_the_nearest_names():
    a_run("runs/CartPole-v1/2026-01-01T10-00-00-seed1")
    a_run("runs/Pendulum-v1/2026-01-01T10-00-00-seed1")
    for wrong, right in (
        ("runs/CartPole-v0", "runs/CartPole-v1"),
        ("runs/cartpole-v1/x", "runs/CartPole-v1"),
        ("runs/CartPole-v1/2026-01-01T10-00-00-seed2", "runs/CartPole-v1/2026-01-01T10-00-00-seed1"),
        ("Pendulum-v1", "runs/Pendulum-v1"),
    ):
        with pytest.raises(UserError) as caught:
            open_run(wrong)
        assert f"There is no {wrong}" in str(caught.value)
        assert str(caught.value).splitlines()[1].strip() == right
    with pytest.raises(UserError, match=r"The newest runs are:\n  runs/"):
        open_run("/qqqq/zzzz")


@pytest.mark.parametrize("path", [3, None, ["runs"]])
def test_what_is_no_path_at_all_is_said_to_be_none(path: Any):
    with pytest.raises(UserError, match=r"A path is a string or a pathlib.Path, not .*, of type \w+\."):
        open_run(path)


def test_a_missing_path_where_there_are_no_runs_says_so():
    with pytest.raises(UserError, match="There are no runs here yet"):
        open_run("runs/CartPole-v1")


# ------------------------------------------------------------------------------------ the settings

toml_values = st.recursive(
    st.booleans()
    | st.integers(-(2**80), 2**80)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=40, deadline=None)
@given(config=st.dictionaries(st.text(), toml_values, max_size=4))
def test_settings_come_back_as_they_were(config):
    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory(Path(folder))
        write_config(run, config)
        assert repr(read_config(run)) == repr(config) or read_config(run) == config


def test_none_is_left_out_at_every_depth_and_tuples_become_lists():
    run = a_run("mine")
    write_config(run, {"a": None, "b": {"c": None, "d": 1}, "e": ({"f": None}, {"g": 2})})
    assert read_config(run) == {"b": {"d": 1}, "e": [{}, {"g": 2}]}


def test_a_config_is_replaced_as_a_whole_or_not_at_all(monkeypatch):
    run = a_run("mine")
    with pytest.raises(TypeError):
        write_config(run, {"env": object()})

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match="No space left"):
        write_config(run, {"seed": 2})
    assert read_config(run) == {"seed": 1}
    assert [path.name for path in run.path.iterdir()] == ["config.toml"]


@pytest.mark.parametrize(
    "data", [b"seed = ", b"\xff\xfe", b"a = " + b"[" * 100_000, b"a = 1\na = 2", b"a = 1" + b"0" * 9999]
)
def test_a_damaged_config_is_a_readable_error(data):
    run = a_run("mine")
    run.config_path.write_bytes(data)
    with pytest.raises(UserError, match=r"mine/config\.toml is no valid TOML"):
        read_config(run)


def test_a_mark_of_an_editor_in_front_is_passed_over():
    run = a_run("mine")
    run.config_path.write_bytes("\ufeffname = 'für'\r\n".encode())
    assert read_config(run) == {"name": "für"}


def test_a_missing_config_is_a_readable_error(tmp_path):
    with pytest.raises(UserError, match=r"config\.toml cannot be read.*Is .* a run\?"):
        read_config(RunDirectory(tmp_path))
