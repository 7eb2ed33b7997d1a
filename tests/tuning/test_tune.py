"""`proximo.tune` and its command: whole searches, small ones, in processes, with faults and kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from multiprocessing import parent_process
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from PIL import Image

import proximo
from proximo.errors import UserError
from proximo.runs.metrics import read_metrics
from proximo.training.config import settings_of
from tests.commands import said_by

SMALL = dict(steps=1024, episodes=4, settings=["learning_rate", "gamma", "hidden_sizes"], quiet=True)
RUNS_OWN = ("seed", "checkpoint_every", "keep_checkpoints", "keep_every", "debug")


def told(records):
    """What does not hang on the clock."""
    return [(record.settings, record.score, record.state, record.reached) for record in records]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return proximo.tune("CartPole-v1", trials=3, run_dir=tmp_path_factory.mktemp("tune") / "study", seed=5, **SMALL)


def test_the_first_trial_is_the_preset_and_the_best_one_has_the_highest_score(found):
    assert found.trials[0].settings == {"learning_rate": 1e-3, "gamma": 0.98, "hidden_sizes": [64, 64]}
    assert [record.state for record in found.trials] == ["finished"] * 3
    assert found.score == max(record.score for record in found.trials)
    assert found.config.environment.n_envs == 8


def test_a_score_is_what_evaluate_says_of_the_run_that_was_left(found):
    for record in found.trials:
        said = proximo.evaluate(found.path / "trials" / f"{record.number:04d}-seed5", episodes=4, seed=5)
        assert said["return_mean"] == record.score


def test_train_takes_the_best_settings_as_they_are(found, tmp_path, capsys):
    best = found.path / "best.toml"
    code, _, _ = said_by(
        capsys,
        "train",
        "CartPole-v1",
        "--config",
        str(best),
        "--seed",
        "5",
        "--run-dir",
        str(tmp_path / "run"),
        "--quiet",
    )
    assert code == 0
    trial = found.path / "trials" / f"{found.best.number:04d}-seed5"
    trained, tried = (tomllib.loads((run / "config.toml").read_text()) for run in (tmp_path / "run", trial))
    for name in RUNS_OWN:
        trained.pop(name, None), tried.pop(name, None)
    assert trained == tried
    # And so the very same run: what it learned from is the same to the last digit.
    rows = [read_metrics(run / "metrics.jsonl") for run in (tmp_path / "run", trial)]
    assert [row["return_mean"] for row in rows[0]] == [row["return_mean"] for row in rows[1]]
    assert f"score {found.score:g}"[:9] in best.read_text()
    as_given = {name: value for name, value in settings_of(found.config).items() if name not in RUNS_OWN}
    assert tomllib.loads(best.read_text()) == {name: value for name, value in as_given.items() if value is not None}


def test_files_of_a_study(found):
    rows = [json.loads(line) for line in (found.path / "trials.jsonl").read_text().splitlines()]
    assert [(row["number"], row["score"]) for row in rows] == [(r.number, r.score) for r in found.trials]
    with Image.open(found.path / "tuning.png") as picture:
        assert picture.width >= 1000


def test_the_same_seed_gives_the_same_trials_and_more_of_them_go_on_from_there(found, tmp_path):
    first = proximo.tune("CartPole-v1", trials=1, run_dir=tmp_path, seed=5, **SMALL)
    assert told(first.trials) == told(found.trials[:1])
    more = proximo.tune("CartPole-v1", trials=3, run_dir=tmp_path, seed=5, **SMALL)
    assert told(more.trials) == told(found.trials)
    again = proximo.tune("CartPole-v1", trials=3, run_dir=tmp_path, seed=5, **SMALL)
    assert again.trials == more.trials
    with pytest.raises(UserError, match="episodes was 4 and is 5"):
        proximo.tune("CartPole-v1", trials=4, run_dir=tmp_path, seed=5, **{**SMALL, "episodes": 5})


def test_jobs_side_by_side_and_several_seeds(tmp_path):
    found = proximo.tune("CartPole-v1", trials=3, jobs=2, seeds=2, run_dir=tmp_path, **SMALL)
    assert [record.state for record in found.trials] == ["finished"] * 3
    assert all(record.score == pytest.approx(np.mean(record.scores)) for record in found.trials)
    assert all(len(record.scores) == 2 for record in found.trials)
    runs = sorted(path.name for path in (tmp_path / "trials").iterdir())
    assert runs == [f"{number:04d}-seed{seed}" for number in range(3) for seed in range(2)]


def breaking(marker, how):
    """CartPole, but the first one that a trial makes goes wrong."""

    class Breaks(gymnasium.Wrapper):
        def __init__(self):
            super().__init__(gymnasium.make("CartPole-v1"))
            self.is_broken = parent_process() is not None and marker.exists()
            if self.is_broken:
                marker.unlink()

        def step(self, action):
            if self.is_broken and how == "exits":
                os._exit(7)
            if self.is_broken:
                raise RuntimeError("the motor is on fire")
            return super().step(action)

    return Breaks


@pytest.mark.parametrize(("how", "said"), [("raises", "the motor is on fire"), ("exits", "ended with exit code 7")])
def test_a_trial_that_fails_is_not_the_end(tmp_path, how, said, capfd):
    (tmp_path / "marker").touch()
    settings = {**SMALL, "quiet": False}
    found = proximo.tune(breaking(tmp_path / "marker", how), trials=2, run_dir=tmp_path / "study", **settings)
    assert [record.state for record in found.trials] == ["failed", "finished"]
    assert said in found.trials[0].reason
    assert "trial 0 (1/2)  failed: " in capfd.readouterr().err
    assert found.best.number == 1


def test_where_every_trial_fails_the_last_reason_is_told(tmp_path):
    class Burns(gymnasium.Wrapper):
        def __init__(self):
            super().__init__(gymnasium.make("CartPole-v1"))

        def step(self, action):
            raise RuntimeError("the motor is on fire")

    with pytest.raises(UserError, match=r"All 1 trials have failed(.|\n)*the motor is on fire"):
        proximo.tune(Burns, trials=1, run_dir=tmp_path / "study", **SMALL)


# ----------------------------------------------------------------------------------------------- the command

WORDS = ("tune", "CartPole-v1", "--steps", "1024", "--episodes", "2", "--settings", "gamma,batch-size")


def begun(folder, trials):
    """A search in a process of its own, once its first trial has ended and the next one runs."""
    words = [sys.executable, "-m", "proximo.cli", *WORDS, "--trials", str(trials), "--run-dir", str(folder)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (folder / "trials" / "0001-seed0").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    return process


def children_of(pid):
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in listed.read_text().split()] if listed.exists() else []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_search_that_was_stopped_goes_on(tmp_path, number, capsys):
    folder = tmp_path / "study"
    process = begun(folder, 300)
    children = children_of(process.pid)
    process.send_signal(number)
    out, error = process.communicate(timeout=60)
    assert "Traceback" not in out + error
    assert (folder / "best.toml").exists()
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert "best settings" in out
        assert (folder / "tuning.png").exists()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{child}").exists() for child in children)

    before = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    n_done = sum(row["state"] in ("finished", "pruned") for row in before)
    code, out, _ = said_by(capsys, *WORDS, "--trials", str(n_done + 2), "--run-dir", str(folder), "--json", "--quiet")
    assert code == 0
    trials = json.loads(out)["trials"]
    assert sum(trial["state"] in ("finished", "pruned") for trial in trials) == n_done + 2
    lost = [trial["settings"] for trial in trials if trial["state"] == "interrupted"]
    assert len(lost) == 1
    assert lost[0] in [trial["settings"] for trial in trials if trial["state"] != "interrupted"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--trials", "0"), "trials is 0"),
        (("--settings", "gama"), "Did you mean 'gamma'"),
        (("--gamma", "0.9", "--settings", "gamma"), "Leave one of them out"),
        (("--no-normalize-rewards", "--settings", "normalize_rewards"), "Leave one of them out"),
        (("--steps", "1024", "--total-steps", "2048"), "mean the same"),
        (("--steps", "10"), "one iteration alone takes 256"),
        (("--device", "moon"), "device is 'moon'"),
        (("--init-from", "nope"), "begins each trial from nothing"),
    ],
)
def test_bad_input_ends_in_one_message(tmp_path, capsys, words, said):
    code, out, error = said_by(capsys, "tune", "CartPole-v1", "--run-dir", str(tmp_path / "new"), *words)
    assert (code, out) == (2, "")
    assert said in error
    assert not (tmp_path / "new").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    code, _, error = said_by(capsys, *WORDS, "--run-dir", str(tmp_path))
    assert code == 2
    assert "not empty" in error
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_folder_of_a_study_is_no_environment(found, capsys):
    code, _, error = said_by(capsys, "tune", str(found.path))
    assert code == 2
    assert "the command that began it" in error
