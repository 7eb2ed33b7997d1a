"""What the command line says, where it says it, and that nobody has to be there to read it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from proximo.cli import _result_facts
from proximo.report import report
from proximo.runs.checkpoint import newest_checkpoint
from proximo.runs.directory import RunDirectory
from tests.test_cli import BROKEN_ENV, proximo, said_by, wait_for_checkpoint_or_metrics

SMALL = ["train", "CartPole-v1", "--vectorization", "serial", "--total-steps", "512", "--checkpoint-every", "256"]
SMALL += ["--quiet", "--run-dir"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("words") / "my run"
    process = proximo(*SMALL, str(path))
    assert process.wait() == 0, process.communicate()
    return path


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "my run"))


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "draw_records", lambda records, folder, **how: [])


def damage_newest(run: Path) -> str:
    newest = newest_checkpoint(RunDirectory(run).checkpoints).path
    (newest / "state.json").write_text("{}")
    return newest.name


def test_a_damaged_checkpoint_is_told_on_standard_error(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = damage_newest(run)
    code, out, error = said_by(capsys, "evaluate", str(run), "--episodes", "1", "--json")
    assert (code, json.loads(out)["step"]) == (0, 256)
    assert f"Step 256 is used instead of what was damaged: {name}" in error
    code, out, _ = said_by(capsys, "evaluate", str(run), "--episodes", "1")
    assert "policy of step 256" in out
    code, _, error = said_by(capsys, "resume", str(run), "--quiet")
    assert code == 0
    assert name in error


def test_a_finished_run_says_so_and_how_to_go_on(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = said_by(capsys, "resume", str(run))
    assert code == 0
    assert "This run is finished: 512 of 512 steps are done" in error
    assert f"proximo resume '{run}' --total-steps 1024" in error
    assert f"proximo evaluate '{run}'" in error


def test_settings_that_were_changed_are_named_where_a_run_goes_on(run: Path, capsys) -> None:
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(re.sub(r"(?m)^learning_rate = .*", "learning_rate = 0.1", text))
    code, _, error = said_by(capsys, "resume", str(run), "--total-steps", "1024")
    said = " ".join(error.split())
    assert code == 0
    assert re.search(r"with other settings it goes another way: learning_rate was [0-9.e-]+ and is 0.1", said)
    assert "exact:" not in said
    code, _, error = said_by(capsys, "resume", str(run), "--total-steps", "1536")
    assert "exact: every open episode" in " ".join(error.split())


@pytest.mark.parametrize("text", ["", 'env_id = "CartPole-v1"\ngamma = 0.9\n'])
def test_an_emptied_config_is_not_taken_for_defaults(text: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "config.toml").write_text(text)
    code, _, error = said_by(capsys, "evaluate", str(run), "--episodes", "1")
    assert code == 2
    assert "was emptied or damaged" in error


def test_a_page_that_fails_hides_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("no ink")

    monkeypatch.setattr(report, "page_bytes", fail)
    words = [word for word in SMALL if word != "--quiet"]
    code, out, error = said_by(capsys, *words, str(tmp_path / "run"), "--json")
    assert (code, json.loads(out)["env_steps"]) == (0, 512)
    assert "no ink" in error
    assert "mean return" in error


def test_json_is_alone_on_standard_output(tmp_path: Path) -> None:
    talkative = "import os\nprint('imported')\n" + BROKEN_ENV.replace(
        "super().reset(seed=seed)", "super().reset(seed=seed); print('reset'); os.system('echo echoed')"
    )
    (tmp_path / "talks.py").write_text(talkative)
    process = proximo("check-env", "talks.py:Breaks", "--steps", "30", "--json", cwd=tmp_path)
    out, error = process.communicate()
    assert "env_id" in json.loads(out)
    assert all(word in error for word in ("imported", "reset", "echoed"))


def test_an_interrupt_is_answered_at_once_and_a_second_one_says_what_is_saved(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(BROKEN_ENV.replace("self.steps += 1", "self.steps += 1; time.sleep(0.01)"))
    text = (tmp_path / "slow.py").read_text()
    (tmp_path / "slow.py").write_text("import time\n" + text)
    words = ["--n-envs", "1", "--rollout-length", "64", "--batch-size", "64", "--quiet", "--run-dir", "my run"]
    process = proximo("train", "slow.py:Breaks", *words, cwd=tmp_path)
    wait_for_checkpoint_or_metrics(process, tmp_path / "my run")
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    line = process.stderr.readline() + process.stderr.readline()
    assert "finishing this iteration, then saving; Ctrl-C again stops at once" in line
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the last checkpoint is of step" in error
    assert "proximo resume 'my run' --allow-import" in error


@pytest.mark.parametrize(
    ("redirect", "code"), [(">&-", 0), (">&- 2>&-", 0), ("> /dev/full", 2), ("2> /dev/full", 0), ("| true", 0)]
)
def test_streams_that_are_closed_or_full(redirect: str, code: int, run: Path) -> None:
    command = f"set -o pipefail; {sys.executable} -m proximo.cli report '{run}' {redirect}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == code, done
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
    if code:
        assert "Standard output could not be written: No space left on device" in done.stderr


def test_training_goes_on_when_nobody_reads_what_it_shows(tmp_path: Path) -> None:
    words = " ".join(word for word in SMALL if word != "--quiet")
    command = f"({sys.executable} -m proximo.cli {words} '{tmp_path}/run' --json; echo $? >code) 2>&1 >out | true"
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    assert json.loads((tmp_path / "out").read_text())["env_steps"] == 512
    assert (tmp_path / "code").read_text() == "0\n"


def test_a_terminal_without_unicode_gets_all_the_same(run: Path) -> None:
    renamed = run.rename(run.with_name("laufen für übung"))
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    words = [sys.executable, "-m", "proximo.cli", "report", str(renamed)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "laufen f\\xfcr" in done.stdout


def test_presets_have_help_and_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said_by(capsys, "presets", "--help")
    assert code == 0
    assert "usage: proximo presets" in out
    assert "CartPole-v1" in said_by(capsys, "presets")[1]


@pytest.mark.parametrize(
    ("count", "mean", "says"),
    [
        (100, 480.0, ": solved"),
        (3, 480.0, "too few"),
        (3, 20.0, "not solved yet"),
        (1, 20.0, "training episode:"),
    ],
)
def test_the_result_counts_its_episodes(count: int, mean: float, says: str) -> None:
    from proximo.api import Run
    from proximo.training.config import ControlConfig

    result = _result_facts(Run(Path("run"), ControlConfig(), 512, mean, 1.0, None, count))["result"]
    assert f"over the last {count} training" in result
    assert says in result
