"""What is shown, and that nobody has to be there to see it."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from proximo.runs.checkpoint import Checkpoint
from proximo.runs.directory import RunDirectory
from proximo.runs.manifest import versions
from proximo.terminal import Display
from proximo.training.config import ControlConfig


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
