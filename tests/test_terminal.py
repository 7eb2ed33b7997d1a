"""What is shown, and that nobody has to be there to see it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from proximo.runs.checkpoint import Checkpoint
from proximo.runs.directory import RunDirectory
from proximo.terminal import Display


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
        display.result({"result": "fine"}, [], [], ["next"])


def test_a_quiet_display_shows_skipped_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = Checkpoint(tmp_path, 512, {}, {}, {}, ("step_000000001024: state.json is damaged",))
    Display.choose(quiet=True).resumed(RunDirectory(tmp_path), checkpoint, [], 2, "")
    assert "step_000000001024: state.json is damaged" in capsys.readouterr().err
