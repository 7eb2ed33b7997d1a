"""What TensorBoard, W&B and Trackio get of a run: each row once, whatever happens to the run or to them."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import proximo
from proximo.cli import main
from proximo.errors import UserError
from proximo.loggers import following
from proximo.loggers.following import Loggers, MetricsReader, refuse_missing
from proximo.runs.checkpoint import newest_checkpoint
from proximo.runs.directory import RunDirectory
from proximo.runs.metrics import read_metrics
from tests.loggers.test_events import read
from tests.tiny_language import save_tiny

SMALL: dict[str, Any] = dict(total_steps=2048, n_envs=2, rollout_length=64, batch_size=32, n_epochs=1, seed=1)

FAKE = """
import json, os, pathlib, time

place = pathlib.Path(os.environ["FAKE_LOGGED"])

def init(**settings):
    what = os.environ.get("FAKE_DOES", "")
    if what == "refuse":
        print("a long story that nobody asked for")
        raise RuntimeError("No API key configured. Use `wandb login` to log in.")
    if what == "die":
        os._exit(7)
    if what == "hang":
        time.sleep(600)
    note({"init": {"id": settings.get("id"), "name": settings["name"], "config": settings["config"]}})
    return Session()

def note(what):
    with place.open("a") as file:
        file.write(json.dumps(what) + "\\n")

class Settings:
    def __init__(self, **settings): pass

class Session:
    url = "https://somewhere/run"
    def define_metric(self, name, step_metric): pass
    def log(self, row, step): note({"step": step, "row": row})
    def finish(self): note({"finish": True})
"""
"""A package `wandb` that writes down what it is given; the process that it is called in is the real one."""


@pytest.fixture
def logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the package in place of wandb writes down what it is given."""
    place = tmp_path / "packages"
    place.mkdir()
    (place / "wandb.py").write_text(FAKE)
    path = [str(place), str(Path(proximo.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
    monkeypatch.setenv("FAKE_LOGGED", str(tmp_path / "logged.jsonl"))
    monkeypatch.setattr(following, "_is_installed", lambda name: True)
    return tmp_path / "logged.jsonl"


def rows_of(run: Path) -> list[dict[str, Any]]:
    return read_metrics(RunDirectory(run).metrics_path)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def damage_newest(run: Path) -> None:
    """So that a resumed run begins before the last rows, as after a kill."""
    (newest_checkpoint(RunDirectory(run).checkpoints).path / "state.json").write_text("{}")


def test_the_reader_gives_each_row_once_and_none_that_is_half_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    reader = MetricsReader(path)
    assert reader.new_rows() == []
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert reader.new_rows() == [{"a": 1}, {"a": 2}]
    assert reader.new_rows() == []
    path.write_text('{"a": 1}\n{"a": 2}\n{"a": 3}\n')  # the torn line was written again
    assert reader.new_rows() == [{"a": 3}]


def test_tensorboard_has_the_numbers_of_metrics_jsonl(tmp_path: Path) -> None:
    proximo.train("CartPole-v1", run_dir=tmp_path / "run", quiet=True, tensorboard=True, **SMALL)
    points, rows = read(tmp_path / "run" / "tensorboard"), rows_of(tmp_path / "run")
    assert len(rows) == 16
    for name in ("return_mean", "policy_loss", "entropy", "learning_rate"):
        wanted = [(row["env_steps"], pytest.approx(row[name])) for row in rows if row[name] is not None]
        assert points[name] == wanted, name


def test_a_resumed_run_has_no_point_twice_and_none_of_before(tmp_path: Path) -> None:
    run = proximo.train(
        "CartPole-v1", run_dir=tmp_path / "run", quiet=True, tensorboard=True, checkpoint_every=512, **SMALL
    ).path
    damage_newest(run)
    proximo.resume(run, quiet=True)
    points, rows = read(run / "tensorboard"), rows_of(run)
    assert len(list((run / "tensorboard").iterdir())) == 2
    assert [step for step, _ in points["entropy"]] == [row["env_steps"] for row in rows]
    assert [value for _, value in points["seconds"]] == pytest.approx([row["seconds"] for row in rows])


def test_a_language_run_goes_to_tensorboard_by_iterations(tmp_path: Path) -> None:
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": f"the {word} sleeps"}) + "\n" for word in ("cat", "dog", "bird") * 4))
    model = save_tiny(tmp_path / "model")
    settings: dict[str, Any] = dict(batch_size=4, n_epochs=2, quiet=True, tensorboard=True)
    run = proximo.sft(model, data, run_dir=tmp_path / "run", **settings).path
    points, rows = read(run / "tensorboard"), rows_of(run)
    assert len(rows) >= 4
    assert points["loss"] == [(row["iteration"], pytest.approx(row["loss"])) for row in rows]


def test_a_run_that_is_not_asked_for_it_writes_no_events(tmp_path: Path) -> None:
    run = proximo.train("CartPole-v1", run_dir=tmp_path / "run", quiet=True, **SMALL).path
    assert not (run / "tensorboard").exists()
    assert not (run / "loggers").exists()


def test_an_old_run_goes_to_tensorboard_with_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = proximo.train("CartPole-v1", run_dir=tmp_path / "old run", quiet=True, **SMALL).path
    with pytest.raises(SystemExit) as ended:
        main(["report", str(run), "--tensorboard", str(tmp_path / "board")])
    assert ended.value.code == 0
    points = read(tmp_path / "board" / "old run")
    assert points["entropy"] == [(row["env_steps"], pytest.approx(row["entropy"])) for row in rows_of(run)]
    assert f"tensorboard --logdir {tmp_path / 'board'}" in capsys.readouterr().err


def exported(metrics: str, folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run whose metrics.jsonl is this text, once it is exported into `folder`."""
    run = folder.parent / "run"
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text(metrics)
    following.export_events(RunDirectory(run), folder)
    return read(folder)


def test_exporting_again_takes_the_place_of_what_was_exported_and_of_nothing_else(tmp_path: Path) -> None:
    board, first = tmp_path / "board", '{"env_steps": 1, "entropy": 0.5}\n'
    board.mkdir()
    other = board / "events.out.tfevents.0000000001.machine.1.0"  # TensorFlow's own, and empty
    other.write_bytes(b"")
    assert exported(first, board)["entropy"] == [(1, 0.5)]
    assert exported(first + '{"env_steps": 2, "entropy": 0.25}\n', board)["entropy"] == [(1, 0.5), (2, 0.25)]
    assert len(list(board.iterdir())) == 2
    assert other.exists()


def test_an_export_that_the_disk_refuses_leaves_what_was_there(tmp_path: Path, monkeypatch) -> None:
    exported('{"env_steps": 1, "entropy": 0.5}\n', tmp_path / "board")

    def refuse(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(following.EventFile, "add", refuse)
    with pytest.raises(UserError, match="No space left"):
        following.export_events(RunDirectory(tmp_path / "run"), tmp_path / "board")
    assert read(tmp_path / "board")["entropy"] == [(1, 0.5)]


@pytest.mark.parametrize("seconds", ['"x"', "[1]", "1e999", "-1e308", "1" + 400 * "0", "true", "null"])
def test_a_clock_that_shows_no_time_is_none(tmp_path: Path, seconds: str) -> None:
    rows = f'{{"env_steps": 1, "seconds": {seconds}, "entropy": 0.5}}\n{{"env_steps": 2, "entropy": 0.25}}\n'
    assert exported(rows, tmp_path / "board")["entropy"] == [(1, 0.5), (2, 0.25)]


@pytest.mark.parametrize("step", ["-5", str(2**63), '"x"', "null", "1.5"])
def test_a_row_whose_step_is_none_is_left_out_and_told(tmp_path: Path, step: str, capsys) -> None:
    rows = f'{{"env_steps": 1, "entropy": 0.5}}\n{{"env_steps": {step}, "entropy": 9.0}}\n'
    last = f'{{"env_steps": {2**63 - 1}, "entropy": 0.25}}\n'
    assert exported(rows + last, tmp_path / "board")["entropy"] == [(1, 0.5), (2**63 - 1, 0.25)]
    assert "note: 1 of 3 rows" in capsys.readouterr().err


def test_a_last_row_without_a_newline_is_exported_too_and_half_a_row_is_not(tmp_path: Path) -> None:
    rows = '{"env_steps": 1, "entropy": 0.5}\n{"env_steps": 2, "entropy": 0.25}'
    assert exported(rows, tmp_path / "board")["entropy"] == [(1, 0.5), (2, 0.25)]
    assert exported(rows[:-3], tmp_path / "board")["entropy"] == [(1, 0.5)]


def test_a_name_that_is_no_text_stops_no_export(tmp_path: Path) -> None:
    points = exported('{"env_steps": 1, "a\\ud800": 1.0, "entropy": 0.5}\n', tmp_path / "board")
    assert points == {"env_steps": [(1, 1.0)], "a?": [(1, 1.0)], "entropy": [(1, 0.5)]}


def test_a_service_gets_each_row_once_also_of_a_resumed_run(logged: Path, tmp_path: Path, capsys) -> None:
    run = proximo.train("CartPole-v1", run_dir=tmp_path / "run", wandb=True, checkpoint_every=512, **SMALL).path
    said = capsys.readouterr().err
    assert "Weights & Biases: https://somewhere/run" in said
    damage_newest(run)
    proximo.resume(run, total_steps=3072, quiet=True, wandb=True)
    told, rows = lines(logged), rows_of(run)
    begun = [line["init"] for line in told if "init" in line]
    sent = [line for line in told if "step" in line]
    assert [each["step"] for each in sent] == [row["iteration"] for row in rows] == list(range(1, 25))
    entropies = [(each["row"]["entropy"], row["entropy"]) for each, row in zip(sent, rows, strict=True)]
    # The four between were sent, and then learned again with the schedule of more steps.
    assert all(was == now for was, now in entropies[:12] + entropies[16:])
    assert begun[0]["id"] == begun[1]["id"]
    assert begun[0]["config"]["total_steps"] == 2048
    assert [line for line in told if "finish" in line] == [{"finish": True}] * 2


@pytest.mark.parametrize(
    ("does", "words"),
    [
        ("refuse", "Weights & Biases gets nothing: RuntimeError: No API key configured. Use `wandb login` to log in."),
        ("die", "Weights & Biases gets nothing more: its process ended with code 7"),
        ("hang", "Weights & Biases has not got everything: it was not done after 1 s"),
    ],
)
def test_a_service_that_fails_stops_no_run(logged: Path, tmp_path: Path, monkeypatch, capsys, does, words) -> None:
    monkeypatch.setenv("FAKE_DOES", does)
    monkeypatch.setattr(following, "WAIT_AT_END", 1.0 if does == "hang" else 60.0)
    monkeypatch.setattr(following, "QUIET_AT_END", 0.0 if does == "hang" else 60.0)
    run = proximo.train("CartPole-v1", run_dir=tmp_path / "run", wandb=True, **SMALL)
    said = " ".join(capsys.readouterr().err.split())
    assert run.env_steps == 2048
    assert said.count(words) == 1, said
    assert "a long story" not in said
    assert "Traceback" not in said
    assert said.count("waiting for Weights & Biases (Ctrl-C stops it)") == (does == "hang")


def resumed(run: Path, *flags: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["resume", str(run), *flags])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_a_resumed_run_sends_nothing_to_a_service_unasked(logged: Path, tmp_path: Path, capsys) -> None:
    run = proximo.train("CartPole-v1", run_dir=tmp_path / "run", quiet=True, wandb=True, **SMALL).path
    sent = logged.read_text()
    capsys.readouterr()
    proximo.resume(run, total_steps=2560, quiet=True)
    said = capsys.readouterr().err
    assert logged.read_text() == sent
    assert said == (
        "note: Weights & Biases gets no more of this run. To go on sending: --wandb (Python: wandb=True).\n"
    )
    assert resumed(run, "--total-steps", "3072", "--no-wandb") == 0
    assert logged.read_text() == sent
    capsys.readouterr()
    assert resumed(run, "--total-steps", "4096", "--wandb") == 0
    assert "Weights & Biases: https://somewhere/run" in capsys.readouterr().err
    steps = [line["step"] for line in lines(logged) if "step" in line]
    assert steps == [row["iteration"] for row in rows_of(run)] == list(range(1, 33))


def test_a_language_run_sends_nothing_to_a_service_unasked(logged: Path, tmp_path: Path, capsys) -> None:
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": f"the {word} sleeps"}) + "\n" for word in ("cat", "dog", "bird") * 4))
    settings: dict[str, Any] = dict(batch_size=4, n_epochs=1, checkpoint_every=1, quiet=True, wandb=True)
    run = proximo.sft(save_tiny(tmp_path / "model"), data, run_dir=tmp_path / "run", **settings).path
    damage_newest(run)
    (run / "loggers" / "wandb.json").write_text('{"id": "a-strangers", "sent": 1}')
    begun, n_rows = logged.read_text(), len(rows_of(run))
    assert resumed(run) == 0
    assert logged.read_text() == begun
    assert "To go on sending: --wandb" in capsys.readouterr().err
    damage_newest(run)
    assert resumed(run, "--wandb") == 0
    told = [json.loads(line) for line in logged.read_text().removeprefix(begun).splitlines()]
    assert [line["step"] for line in told if "step" in line] == list(range(2, n_rows + 1))


def test_a_resumed_run_can_begin_and_end_writing_events(tmp_path: Path, capsys) -> None:
    run = proximo.train("CartPole-v1", run_dir=tmp_path / "run", quiet=True, **SMALL).path
    assert resumed(run, "--total-steps", "2560") == 0
    assert not (run / "tensorboard").exists()
    assert resumed(run, "--total-steps", "3072", "--tensorboard") == 0
    wanted = [(row["env_steps"], pytest.approx(row["entropy"])) for row in rows_of(run)]
    assert len(wanted) == 24  # those of before too
    assert read(run / "tensorboard")["entropy"] == wanted
    assert resumed(run, "--total-steps", "3584", "--no-tensorboard") == 0
    assert read(run / "tensorboard")["entropy"] == wanted
    capsys.readouterr()
    assert resumed(run, "--tensorboard", "--no-tensorboard") == 2
    assert "Leave one out" in capsys.readouterr().err


def test_a_missing_package_and_a_wrong_value_are_refused_at_resume(tmp_path: Path, monkeypatch, capsys) -> None:
    run = proximo.train("CartPole-v1", run_dir=tmp_path / "run", quiet=True, **SMALL).path
    wrong: Any = "yes"
    with pytest.raises(UserError, match=r"wandb is 'yes'; it must be True or False"):
        proximo.resume(run, wandb=wrong)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert resumed(run, "--trackio") == 2
    assert '".[trackio]"' in capsys.readouterr().err


def test_ctrl_c_ends_the_wait_for_a_service_and_names_the_flag_to_go_on(logged: Path, tmp_path: Path) -> None:
    words = ["train", "CartPole-v1", "--total-steps", "100000000", "--wandb", "--run-dir", "run"]
    with subprocess.Popen(
        [sys.executable, "-m", "proximo.cli", *words],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"FAKE_DOES": "hang"},
        # Whatever began the tests may have done so in the background, where Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        assert process.stderr is not None
        said, awaited = "", ["steps/s  ", "waiting for Weights & Biases (Ctrl-C stops it)"]
        for line in process.stderr:
            said += line
            if awaited and awaited[0] in line:  # the first ends the training, and saves; the second ends the wait
                awaited.pop(0)
                process.send_signal(signal.SIGINT)
    assert process.returncode == 130
    assert "Weights & Biases has not got everything: it was interrupted" in said
    assert "  proximo resume run --wandb\n" in said
    assert "Traceback" not in said


def test_events_that_the_disk_refuses_stop_no_run(tmp_path: Path, monkeypatch, capsys) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(following.EventFile, "add", refuse)
    monkeypatch.setattr(following, "LOOK_EVERY", 0.0)
    run = proximo.train("CartPole-v1", run_dir=tmp_path / "run", tensorboard=True, **SMALL)
    assert run.env_steps == 2048
    assert capsys.readouterr().err.count("TensorBoard gets nothing more: OSError: [Errno 28] No space left") == 1


def test_a_killed_run_still_sends_what_it_has_written(logged: Path, tmp_path: Path) -> None:
    words = ["train", "CartPole-v1", "--total-steps", "100000000", "--quiet", "--wandb", "--run-dir", "run"]
    with subprocess.Popen([sys.executable, "-m", "proximo.cli", *words], cwd=tmp_path) as process:
        while not (logged.exists() and any("step" in line for line in lines(logged))):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    while not any("finish" in line for line in lines(logged)):
        time.sleep(0.05)
    sent = [line["step"] for line in lines(logged) if "step" in line]
    assert sent == [row["iteration"] for row in rows_of(tmp_path / "run")]


def test_a_package_that_is_missing_is_named_before_anything_begins(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        main(["train", "CartPole-v1", "--wandb", "--run-dir", str(tmp_path / "run")])
    assert ended.value.code == 2
    assert 'pip install -c constraints.txt -e ".[wandb]"' in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r'"\.\[trackio\]"'):
        refuse_missing(Loggers(trackio=True))
    refuse_missing(Loggers(tensorboard=True))


def test_a_folder_that_wandb_has_left_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    importlib.invalidate_caches()
    with pytest.raises(UserError, match="is not installed"):
        refuse_missing(Loggers(wandb=True))


def test_neither_true_nor_false_is_refused() -> None:
    with pytest.raises(UserError, match=r"tensorboard is 'runs'; it must be True or False"):
        proximo.train("CartPole-v1", tensorboard="runs")


def log_records(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format after a header of 7 bytes.

    https://github.com/google/leveldb/blob/main/doc/log_format.md
    """
    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # the rest of a block that holds no header
            at += 32768 - at % 32768
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last of its parts
            yield record
            record = b""


def test_wandb_itself_gets_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="pip install wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    run = proximo.train("CartPole-v1", run_dir=tmp_path / "run", quiet=True, wandb=True, **SMALL).path
    steps = []
    for record in map(Record.FromString, log_records(next(run.glob("loggers/wandb/offline-run-*/*.wandb")))):
        if record.HasField("history"):
            items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
            steps.append(json.loads(items["env_steps"]))
    assert steps == [row["env_steps"] for row in rows_of(run)]


def test_trackio_itself_gets_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio", reason="pip install trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    run = proximo.train(
        "CartPole-v1", run_dir=tmp_path / "run", quiet=True, trackio=True, checkpoint_every=512, **SMALL
    ).path
    damage_newest(run)
    proximo.resume(run, quiet=True, trackio=True)
    with sqlite3.connect(tmp_path / "trackio" / "proximo.db") as database:
        found = database.execute("select step, metrics from metrics order by id").fetchall()
    assert [step for step, _ in found] == [row["env_steps"] for row in rows_of(run)]
    assert [json.loads(text)["entropy"] for _, text in found] == [row["entropy"] for row in rows_of(run)]
