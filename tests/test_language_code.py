"""Runs whose reward runs programs: from the command line, and never without leave.

The sandbox here is Python itself, which protects from nothing; the tiny models write no programs that do anything.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

import proximo
from proximo import cli_language
from proximo.errors import UserError
from proximo.language import config_of, read_stage_config
from proximo.runs.directory import RunDirectory
from proximo.runs.metrics import read_metrics
from tests.commands import cut_at_rollout, said_by
from tests.tiny_language import save_tiny

SANDBOX = f"{sys.executable} {{file}}"
ALIGN: dict[str, Any] = dict(
    n_iterations=2, prompts_per_iteration=2, batch_size=2, max_new_tokens=3, n_samples=0, threads=1, beta=0.0
)
QUIET: dict[str, Any] = ALIGN | dict(quiet=True, sandbox=SANDBOX, run_dir="run")

pytestmark = pytest.mark.filterwarnings("ignore::proximo.collect.data.DataNote")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tiny model in a working folder with prompts, whose tests any Python passes."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"the {word}", "tests": "pass"} for word in ("cat", "dog", "bird")]
    Path("prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(save_tiny(tmp_path / "model"))


def flags() -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in ALIGN.items()]


def test_a_run_from_the_command_line_and_what_may_be_typed_next(model, capsys):
    words = ["--model", model, "--prompts", "prompts.jsonl", "--reward", "code:tests", *flags(), "--run-dir", "run"]
    code, _, error = said_by(capsys, "align", *words, "--sandbox", SANDBOX)
    assert code == 0, error
    assert "note: the sandbox command lets programs write files" in error
    rows = read_metrics(RunDirectory(Path("run")).metrics_path)
    assert [row["rewards_missing"] for row in rows] == [0, 0]
    assert all(row["reward_mean"] in (0.0, 0.5, 1.0) for row in rows)
    command = next(line for line in error.splitlines() if "proximo evaluate" in line)
    assert shlex.split(command)[-6:-1] == ["--reward", "code:tests", "--sandbox", SANDBOX, "--prompts"]
    compared = ["evaluate", "run", "--against", model, "--prompts", "prompts.jsonl", "--reward", "code:tests"]
    code, _, error = said_by(capsys, *compared, "--best-of", "2")
    assert code == 2
    assert "--sandbox" in error
    assert said_by(capsys, *compared, "--best-of", "2", "--sandbox", SANDBOX)[0] == 0


def test_nothing_is_run_without_a_sandbox(model, capsys):
    words = ["--model", model, "--prompts", "prompts.jsonl", "--reward", "code:tests", *flags(), "--run-dir", "run"]
    code, _, error = said_by(capsys, "align", *words)
    assert code == 2
    assert "runs programs that the model writes" in error
    assert '--sandbox "bwrap' in error
    for more, said in ((("--sandbox", "true {file}"), "does not work"), (("--sandbox", "nowhere {file}"), "nowhere")):
        code, _, error = said_by(capsys, "align", *words, *more)
        assert code == 2
        assert said in error
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"reward": "code"}, "Name the column of the tests"),
        ({"reward": "code:test"}, r"'test'.* Did you mean code:tests\?"),
        (
            {"reward": lambda prompts, responses: [1.0] * len(responses)},
            "sandbox is given, but no reward runs programs",
        ),
        ({"sandbox_timeout": 0.0}, "sandbox_timeout is 0.0"),
        ({"sandbox": 3}, "sandbox"),
    ],
)
def test_what_does_not_fit_is_refused(model, changed, said):
    named = dict(model=model, reward="code:tests", prompts="prompts.jsonl") | QUIET | changed
    with pytest.raises(UserError, match=said):
        proximo.align(**named)


def test_another_ones_run_runs_no_program_without_leave(model, capsys):
    Path("my_sandbox.sh").write_text(f'#!/bin/sh\necho ran >> {Path.cwd()}/ran\nexec {sys.executable} "$@"\n')
    Path("my_sandbox.sh").chmod(0o755)
    with cut_at_rollout(2):
        proximo.align(model, "code:tests", "prompts.jsonl", **QUIET | {"sandbox": "./my_sandbox.sh {file}"})
    _, config = read_stage_config(RunDirectory(Path("run")))
    assert config.sandbox == f"{Path.cwd()}/my_sandbox.sh {{file}}"
    Path("ran").unlink()
    code, _, error = said_by(capsys, "resume", "run", "--quiet")
    assert code == 2
    assert "programs that the model writes" in error
    assert config.sandbox in error
    assert "--allow-import" in error
    assert not Path("ran").exists()
    assert "--allow-import" in proximo.language.resume_words(Path("run"), "align", config)
    assert said_by(capsys, "resume", "run", "--quiet", "--allow-import")[0] == 0
    assert Path("ran").exists()


def test_a_second_opinion_may_run_programs_and_needs_leave_too(model):
    def length(prompts: list[str], responses: list[str]) -> list[float]:
        return [float(len(text)) for text in responses]

    run = proximo.align(model, length, "prompts.jsonl", gold="code:tests", **QUIET)
    assert run.metrics["gold_mean"] in (0.0, 0.5, 1.0)
    with pytest.raises(UserError, match="programs that the model writes"):
        proximo.resume(run, reward=length, quiet=True)


def test_settings_come_back_from_what_is_written():
    named = {"reward": "code:tests", "sandbox": SANDBOX, "sandbox_timeout": 3.0}
    config = config_of("align", named, where="test")
    assert (config.reward, config.sandbox, config.sandbox_timeout) == (("code:tests",), SANDBOX, 3.0)
    assert "--sandbox" in " ".join(cli_language._next("align", "run", config))
