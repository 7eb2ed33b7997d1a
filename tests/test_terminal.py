"""What is shown, and that nobody has to be there to see it."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

import proximo
from proximo import cli, doctor
from proximo.doctor import Entry
from proximo.lines import fitted
from proximo.runs.checkpoint import Checkpoint
from proximo.runs.directory import RunDirectory
from proximo.runs.manifest import versions
from proximo.terminal import Display
from proximo.training.config import ControlConfig
from tests.tiny_language import save_tiny


@pytest.mark.parametrize("kind", ["closed pipe", "full disk", "closed"])
def test_a_display_that_nobody_reads_goes_quiet(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    stream = None if kind == "closed" else os.fdopen(writer, "w", buffering=1)
    if kind == "full disk":
        stream = open("/dev/full", "w", buffering=1)  # noqa: PTH123, SIM115
    monkeypatch.setattr(sys, "stderr", stream)
    display = Display.choose(quiet=False)
    for _ in range(3):
        display.say("x" * 10_000)
        display.result({"result": "fine"}, None, [], ["next"])


def test_a_quiet_display_shows_skipped_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = Checkpoint(tmp_path, 512, {}, {}, {}, ("step_000000001024: state.json is damaged",))
    Display.choose(quiet=True).resumed(RunDirectory(tmp_path), checkpoint, [], ControlConfig(), "")
    assert "step_000000001024: state.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "fresh", "changed", "level"),
    [
        ("cpu", [], "", "exact: every open episode"),
        ("cuda", [], "", "statistical: a GPU adds numbers up in no fixed order"),
        ("cpu", [1], "", "statistical: 1 of 8 environments"),
        ("cpu", [], "seed was 0 and is 1", "seed was 0 and is 1"),
    ],
)
def test_a_resumed_run_says_how_exactly_it_goes_on(tmp_path: Path, capsys, device, fresh, changed, level) -> None:
    checkpoint = Checkpoint(tmp_path, 512, {}, {}, versions())
    config = replace(ControlConfig(), device=device)
    Display.choose(quiet=False).resumed(RunDirectory(tmp_path), checkpoint, fresh, config, changed)
    said = " ".join(capsys.readouterr().err.split())
    assert f"resume {level}" in said
    assert said.count("exact:") == (level.startswith("exact"))


# --- at 80 columns, in a pipe, without colour, in other encodings ---

TRAIN = ("train", "CartPole-v1", "--total-steps", "2000", "--run-dir", "run")

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")

COLOUR = re.compile(r"\x1b\[(?:[0-9]+;)*(?:3[0-7]|4[0-7]|9[0-7])[0-9;]*m")

COMMAND = re.compile(r"\s*(?:-> )?(?:proximo|pip|cd) ")


def environment(changes: Mapping[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    return {**kept, "TERM": "xterm-256color", **changes}


def on_a_terminal(*words: str, cwd: Path, encoding: str = "utf-8", **changes: str) -> tuple[int, str]:
    """The exit code of a command and what a terminal of 80 columns gets of it."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    changes["PYTHONIOENCODING"] = encoding
    command = [sys.executable, "-m", "proximo", *words]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=cwd, env=environment(changes), start_new_session=True
    )
    os.close(theirs)
    said = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux: the other side is closed
            break
        if not part:
            break
        said += part
    os.close(ours)
    return process.wait(), said.decode(encoding)


def in_a_pipe(*words: str, cwd: Path, encoding: str = "utf-8") -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "proximo", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=cwd,
        env=environment({"PYTHONIOENCODING": encoding}),
        check=False,
    )
    return done.returncode, done.stdout.decode(encoding)


def lines_of(said: str) -> list[str]:
    return [line.rstrip("\r") for line in ESCAPE.sub("", said).split("\n")]


def test_training_fits_80_columns(tmp_path: Path) -> None:
    code, said = on_a_terminal(*TRAIN, cwd=tmp_path)
    assert code == 0
    assert "\x1b[" in said  # live, and coloured
    assert COLOUR.search(said)
    assert max(len(line) for line in lines_of(said)) <= 80
    assert "▁" in said or "▄" in said
    code, said = on_a_terminal("report", "run", cwd=tmp_path)
    assert code == 0
    assert max(len(line) for line in lines_of(said)) <= 80


@pytest.mark.parametrize("words", [("presets",), ("train", "CartPol-v1"), ("nonsense",), ("check-env", "CartPole-v1")])
def test_other_commands_fit_80_columns(words: tuple[str, ...], tmp_path: Path) -> None:
    _, said = on_a_terminal(*words, cwd=tmp_path)
    assert "Traceback" not in said
    assert [line for line in lines_of(said) if len(line) > 80 and not COMMAND.match(line)] == []


@pytest.mark.parametrize("encoding", ["cp437", "cp1252"])
def test_a_code_page_gets_what_it_can_show(encoding: str, tmp_path: Path) -> None:
    code, said = on_a_terminal(*TRAIN, cwd=tmp_path, encoding=encoding)
    assert code == 0
    assert re.search(r"return [.:=+*#@-]{4,}", said), said
    for words in (("report", "run"), ("presets",), ("train", "CartPole-v1", "--help")):
        code, more = in_a_pipe(*words, cwd=tmp_path, encoding=encoding)
        assert code == 0
        said += more
    assert "\\u" not in said
    assert "?" not in said.replace("[?25", "")  # of hiding the cursor


def test_a_dumb_terminal_gets_plain_lines_as_it_goes(tmp_path: Path) -> None:
    code, said = on_a_terminal(*TRAIN, cwd=tmp_path, TERM="dumb")
    assert code == 0
    assert "\x1b" not in said
    assert re.search(r"/2,000 steps  return .* steps/s", said)


def test_without_colour_there_is_none(tmp_path: Path) -> None:
    for words in (TRAIN, ("report", "run"), ("train", "CartPole-v1", "--help"), ("train", "--nonsense")):
        _, said = on_a_terminal(*words, cwd=tmp_path, NO_COLOR="1")
        assert said
        assert "Traceback" not in said
        assert COLOUR.search(said) is None, words


def test_a_pipe_gets_no_escapes_and_no_blanks_at_the_end_of_lines(tmp_path: Path) -> None:
    code, said = in_a_pipe(*TRAIN, cwd=tmp_path)
    assert code == 0
    assert "\x1b" not in said
    assert [line for line in said.split("\n") if line != line.rstrip()] == []
    assert "checkpoint  run/checkpoints/step_" in said


def test_quiet_is_quiet_on_a_terminal(tmp_path: Path) -> None:
    assert on_a_terminal(*TRAIN, "--quiet", cwd=tmp_path) == (0, "")


def small_run(path: Path) -> None:
    proximo.train("CartPole-v1", run_dir=path, quiet=True, total_steps=256, n_envs=2, rollout_length=64, batch_size=32)


def test_what_programs_read_is_whole_on_a_terminal_too(tmp_path: Path) -> None:
    small_run(tmp_path / "run")
    code, said = on_a_terminal("report", "run", "--json", cwd=tmp_path)
    assert code == 0
    assert json.loads(said)["folder"] == "run/report"
    (tmp_path / "zoo.yml").write_text("MyEnv-v0:\n  n_timesteps: 4096\n  policy: MlpPolicy\n  noise_std: 0.1\n")
    _, whole = in_a_pipe("convert", "zoo.yml", cwd=tmp_path)
    assert max(map(len, whole.split("\n"))) > 80
    _, said = on_a_terminal("convert", "zoo.yml", cwd=tmp_path)
    assert said.replace("\r", "") == whole


def test_tables_are_whole_on_a_terminal_too(tmp_path: Path) -> None:
    names = ("one", "another-one-with-a-name-that-takes-much-of-the-line")
    for name in names:
        small_run(tmp_path / name)
    code, said = on_a_terminal("report", *names, cwd=tmp_path)
    assert code == 0
    rows = [line for line in lines_of(said) if line.startswith("|")]
    assert len(rows) == 4
    assert all(len(row) > 80 and row.endswith("|") for row in rows)


def test_the_path_of_a_language_runs_page_is_whole(tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "the cat sleeps"}\n' * 8)
    save_tiny(tmp_path / "model")
    name = "a-run-with-a-name-that-is-as-long-as-those-of-people-who-put-all-settings-into-it"
    words = ("sft", "--model", "model", "--data", "texts.jsonl", "--batch-size", "4", "--n-epochs", "1")
    code, said = on_a_terminal(*words, "--run-dir", name, cwd=tmp_path)
    assert code == 0, said
    page = next(line for line in lines_of(said) if line.startswith("page"))
    assert page.endswith(f" {name}/report/index.html   (open it in a browser)")


# --- breaking lines ---


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("one two three four five six", "one two three four\nfive six"),
        ("- one two three four five", "- one two three four\n  five"),
        ("label     one two three", "label     one two\n          three"),
        ("short\n\nlines", "short\n\nlines"),
        ("  proximo resume runs/CartPole-v1/of-today", "  proximo resume runs/CartPole-v1/of-today"),
        ("Go on: proximo resume runs/a --env b. It is saved.", "Go on:\nproximo resume runs/a --env b.\nIt is saved."),
        ("a runs/without/any/blank/at/all b", "a\nruns/without/any/blank/at/all\nb"),
        ("| run | steps | mean return |\n|---|---|---|", "| run | steps | mean return |\n|---|---|---|"),
    ],
)
def test_lines_are_broken_between_words_and_commands_never(text: str, wanted: str) -> None:
    assert fitted(text, 20) == wanted
    assert fitted(text, None) == text


# --- Ctrl-C, and the doctor's exit code ---


def test_ctrl_c_while_libraries_are_imported_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tyro.py").write_text("import os, time\nos.write(1, b'importing')\ntime.sleep(60)\n")
    path = os.pathsep.join([str(tmp_path), str(Path(proximo.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        [sys.executable, "-m", "proximo", *TRAIN],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env=environment({"PYTHONPATH": path}),
        # Whatever began the tests may have done so in the background, where Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(9) == b"importing"
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (130, b"proximo: interrupted\n")


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("missing", 0), ("problem", 2)])
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_the_doctor_exits_by_whether_something_is_broken(monkeypatch, capsys, status, code, flags) -> None:
    monkeypatch.setattr(doctor, "diagnose_machine", lambda *, speed: [Entry("torch", status, "as it is", "mend it")])
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", *flags])
    assert ended.value.code == code
    assert "as it is" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["train", "--help"], ["doctor", "--help"], ["--help"]])
def test_help_whose_reader_has_gone_is_no_fault(words: list[str]):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        command = [sys.executable, "-m", "proximo", *words]
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
