"""The command line as a person meets it: in processes of its own, with kills, and with mistakes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from proximo.cli import main
from proximo.runs.checkpoint import newest_checkpoint
from proximo.runs.directory import RunDirectory
from proximo.runs.metrics import read_metrics
from proximo.training.control import CLOCK_METRICS

BROKEN_ENV = """
import gymnasium, numpy

class Breaks(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), numpy.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, how="fine"):
        self.how, self.steps = how, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return numpy.zeros(2, numpy.float32), {}

    def step(self, action):
        self.steps += 1
        bad = self.steps == 7
        observation = numpy.full(2, 3.0 if bad and self.how == "bounds" else 0.5, numpy.float32)
        reward = float("nan") if bad and self.how == "nan" else 1.0
        if bad and self.how == "raises":
            raise RuntimeError("the motor is on fire")
        return observation, reward, self.steps == 20, False, {}
"""


def proximo(*words: str, cwd: Path | None = None) -> subprocess.Popen[str]:
    """Start a command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "proximo.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "200"},
    )


def said_by(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Run a command in this process; its exit code, standard output and standard error."""
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def outcome(run: Path) -> tuple[dict[str, bytes], list[dict]]:
    """Everything that must be the same in two runs: all tensors of the last checkpoint, and the metrics."""
    checkpoint = newest_checkpoint(RunDirectory(run).checkpoints)
    tensors = {
        f"{file}.{name}": tensor.numpy().tobytes()
        for file, group in checkpoint.tensors.items()
        for name, tensor in group.items()
    }
    rows = read_metrics(RunDirectory(run).metrics_path)
    return tensors, [{k: v for k, v in row.items() if k not in CLOCK_METRICS} for row in rows]


def wait_for_checkpoint(process: subprocess.Popen[str], run: Path) -> None:
    deadline = time.monotonic() + 120
    while not (run / "checkpoints" / "latest").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


NORMALIZED = ["--normalize-observations", "--normalize-rewards"]
TASKS = {
    "CartPole-v1": ["--total-steps", "6144", "--checkpoint-every", "512"],
    "Pendulum-v1": ["--total-steps", "4096", "--rollout-length", "128", "--checkpoint-every", "512", *NORMALIZED],
    "HalfCheetah-v5": ["--total-steps", "4096", "--rollout-length", "32", "--checkpoint-every", "512"],
}


@pytest.mark.parametrize("env_id", TASKS)
def test_a_killed_run_resumes_to_the_very_end_of_the_undisturbed_one(env_id: str, tmp_path: Path) -> None:
    if env_id == "HalfCheetah-v5":
        pytest.importorskip("mujoco")
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    words = ["train", env_id, "--seed", "3", "--quiet", *TASKS[env_id], "--run-dir"]
    victim = proximo(*words, str(killed))
    wait_for_checkpoint(victim, killed)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    reached = newest_checkpoint(RunDirectory(killed).checkpoints).step
    whole = proximo(*words, str(undisturbed))
    assert whole.wait() == 0, whole.communicate()
    assert reached < newest_checkpoint(RunDirectory(undisturbed).checkpoints).step, "it was killed too late to test"
    resumed = proximo("resume", str(killed))
    _, error = resumed.communicate()
    assert resumed.returncode == 0
    assert "exact" in error
    assert outcome(killed) == outcome(undisturbed)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(number: signal.Signals, code: int, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = proximo("train", "CartPole-v1", "--total-steps", "500000", "--run-dir", str(run))
    wait_for_checkpoint_or_metrics(process, run)
    process.send_signal(number)
    _, error = process.communicate(timeout=120)
    assert process.returncode == code
    assert f"proximo resume {run}" in error
    rows = read_metrics(RunDirectory(run).metrics_path)
    assert newest_checkpoint(RunDirectory(run).checkpoints).step == rows[-1]["env_steps"]


def wait_for_checkpoint_or_metrics(process: subprocess.Popen[str], run: Path) -> None:
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_train_evaluate_report_from_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    words = ["train", "CartPole-v1", "--vectorization", "serial", "--total-steps", "1024", "--quiet", "--json"]
    code, out, _ = said_by(capsys, *words, "--run-dir", str(run))
    assert code == 0
    assert json.loads(out)["env_steps"] == 1024
    assert (run / "report" / "index.html").stat().st_size > 60_000
    code, out, _ = said_by(capsys, "evaluate", str(run), "--episodes", "3", "--json")
    assert code == 0
    assert list(json.loads(out)) == [
        "env_id",
        "episodes",
        "return_mean",
        "return_std",
        "return_min",
        "return_max",
        "length_mean",
        "deterministic",
        "seed",
        "step",
    ]
    assert json.loads(out)["step"] == 1024
    code, out, _ = said_by(capsys, "report", str(run), "--json")
    assert code == 0
    assert json.loads(out)["runs"][0]["env_steps"] == 1024


def test_settings_come_from_the_file_and_flags_go_over_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, run = tmp_path / "mine.toml", tmp_path / "run"
    file.write_bytes('\ufeff# für\r\nenv_id = "CartPole-v1"\ntotal_steps = 512\ngamma = 0.9\nn_epochs = 1\n'.encode())
    code, _, error = said_by(capsys, "train", "--config", str(file), "--gamma", "0.8", "--run-dir", str(run), "--quiet")
    assert code == 0, error
    written = (run / "config.toml").read_text()
    assert "gamma = 0.8" in written
    assert "n_epochs = 1" in written
    assert "rollout_length = 32" in written  # of the tuned settings


BAD_INPUT = {
    "no such command": (["trian"], ["Did you mean 'train'"]),
    "misspelt environment": (["train", "CartPoel-v1"], ["Did you mean", "CartPole-v1"]),
    "no environment": (["train"], ["proximo train CartPole-v1"]),
    "clip below 0": (["train", "CartPole-v1", "--clip-epsilon", "-1"], ["clip_epsilon is -1", "0.2"]),
    "batch larger than the rollout": (["train", "CartPole-v1", "--batch-size", "1000"], ["at most 256"]),
    "unknown flag": (["train", "CartPole-v1", "--clip-epsilom", "0.1"], ["--clip-epsilon"]),
    "word for a number": (["train", "CartPole-v1", "--gamma", "high"], ["gamma"]),
    "no such run": (["evaluate", "nowhere"], ["nowhere"]),
    "no episodes": (["evaluate", "RUN", "--episodes", "0"], ["episodes"]),
    "no such checkpoint": (["evaluate", "RUN", "--checkpoint", "77"], ["77"]),
    "run directory exists": (["train", "CartPole-v1", "--run-dir", "RUN"], ["proximo resume"]),
    "file is not TOML": (["train", "CartPole-v1", "--config", "BAD_TOML"], ["TOML"]),
    "unknown key in file": (["train", "CartPole-v1", "--config", "ODD_TOML"], ["learning_rte", "learning_rate"]),
    "kwargs are no JSON": (["train", "CartPole-v1", "--env-kwargs", "{hardcore}"], ["JSON"]),
    "unknown kwargs": (["train", "CartPole-v1", "--env-kwargs", '{"hardcore": true}'], ["hardcore"]),
    "no such device": (["train", "CartPole-v1", "--device", "toaster"], ["toaster", "cpu"]),
    "missing file": (["train", "my_missing_file.py:MyEnv"], ["my_missing_file.py"]),
    "kwargs with an underscore": (["train", "CartPole-v1", "--env_kwargs", '{"hardcore": true}'], ["hardcore"]),
    "the last kwargs": (["train", "CartPole-v1", "--env-kwargs", "{}", "--env_kwargs={hardcore}"], ["JSON"]),
    "the last file": (["train", "CartPole-v1", "--config", "GOOD_TOML", "--config=odd.toml"], ["learning_rte"]),
    "kwargs that no file can hold": (["train", "CartPole-v1", "--env-kwargs", '{"a": "\\ud800"}'], ["env_kwargs"]),
    "threads without end": (["train", "CartPole-v1", "--threads", "99999999999"], ["threads", "1024"]),
    "networks without end": (
        ["train", "CartPole-v1", "--hidden-sizes", "1000000", "1000000"],
        ["not enough memory", "hidden_sizes (now 1000000 1000000)"],
    ),
    "rollouts without end": (
        ["train", "CartPole-v1", "--rollout-length", "1000000000", "--total-steps", "9000000000", "--n-envs", "1000"],
        ["rollout_length"],
    ),
    "steps that are done": (["resume", "RUN", "--total-steps", "300"], ["512", "already done", "300"]),
    "presets of something": (["presets", "CartPole-v1"], ["CartPole-v1"]),
}


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    with pytest.raises(SystemExit):
        main(["train", "CartPole-v1", "--total-steps", "512", "--run-dir", str(run), "--quiet"])
    return run


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_gets_one_readable_message_and_exit_code_2(
    name: str, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.toml").write_text("gamma == 0.9")
    (tmp_path / "odd.toml").write_text("learning_rte = 0.1")
    (tmp_path / "good.toml").write_text("learning_rate = 0.1")
    before = {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")}
    words, expected = BAD_INPUT[name]
    places = {"RUN": str(finished_run), "BAD_TOML": "bad.toml", "ODD_TOML": "odd.toml", "GOOD_TOML": "good.toml"}
    code, out, error = said_by(capsys, *(places.get(word, word) for word in words))
    assert code == 2, (out, error)
    assert "Traceback" not in error
    assert all(part in error for part in expected), error
    assert not (tmp_path / "runs").exists()
    assert before == {path: path.stat().st_mtime_ns for path in finished_run.rglob("*")}


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("bounds", ["observation[0] is 3", "environment 0", "episode 0", "step 7", "--on-space-violation warn"]),
        ("nan", ["the reward is nan", "step 7"]),
        ("raises", ["the motor is on fire", "step 7", "broken.py"]),
    ],
)
def test_an_environment_that_breaks_stops_the_run_with_a_replay(
    how: str, expected: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text(BROKEN_ENV)
    kwargs = json.dumps({"how": how})
    code, _, error = said_by(
        capsys, "train", "broken.py:Breaks", "--env-kwargs", kwargs, "--run-dir", "run", "--n-envs", "2", "--quiet"
    )
    assert code == 2
    for part in expected:
        assert part in error
    (replay,) = Path("run").glob("replay-*.json")
    code, out, error = said_by(capsys, "check-env", "broken.py:Breaks", "--replay", str(replay))
    assert code == 0, error
    assert {"bounds": "3", "nan": "nan", "raises": "the motor is on fire"}[how] in out


def test_a_run_that_names_code_is_not_trusted_by_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text(BROKEN_ENV)
    words = ["train", "broken.py:Breaks", "--total-steps", "2048", "--run-dir", "run", "--quiet"]
    assert said_by(capsys, *words)[0] == 0
    (tmp_path / "broken.py").write_text("from pathlib import Path\nPath('stolen').touch()\n")
    for words in (["resume", "run"], ["evaluate", "run"], ["watch", "run"]):
        code, _, error = said_by(capsys, *words)
        assert code == 2
        assert "--allow-import" in error
    assert not Path("stolen").exists()


def test_watch_refuses_another_environment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(tmp_path / "run")
    assert said_by(capsys, "train", "CartPole-v1", "--total-steps", "256", "--run-dir", run, "--quiet")[0] == 0
    code, _, error = said_by(capsys, "watch", run, "--env", "Acrobot-v1")
    assert code == 2
    assert "it is another environment" in error
