"""Worker and reward processes among the system's: groups, signals, forks, and an end with the main process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import cloudpickle  # noqa: TID251
import numpy as np
import pytest

from proximo.collect import child_process
from proximo.collect.worker_handle import Worker
from proximo.collect.workers import WorkerEnvs
from tests.collect.test_workers import gone
from tests.environments import Faulty, Forever

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
cloudpickle.register_pickle_by_value(sys.modules[__name__])
cloudpickle.register_pickle_by_value(sys.modules["tests.environments"])

RUNS_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def soon(condition) -> bool:
    deadline = time.monotonic() + 8
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


@pytest.fixture
def kept():
    """Processes that must be gone in the end, whatever a test has found."""
    pids: list[int] = []
    yield pids
    for pid in pids:
        if not gone(pid):
            os.kill(pid, signal.SIGKILL)


def test_a_worker_that_still_starts_hears_no_signal_and_later_all(monkeypatch):
    begun = Worker.begin

    def begin_among_signals(*place):
        worker = begun(*place)
        for sent in RUNS_SIGNALS:
            os.kill(worker.process.pid or 0, sent)  # Python itself has hardly begun
        return worker

    monkeypatch.setattr(Worker, "begin", staticmethod(begin_among_signals))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGUSR2})
    try:
        envs = WorkerEnvs(Forever, 1, 3)
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before | {signal.SIGUSR1, signal.SIGUSR2}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    envs.reset()
    pid = envs._workers[0].process.pid or 0
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    blocked = int(status["SigBlk"], 16)
    assert not any(blocked >> sent - 1 & 1 for sent in RUNS_SIGNALS)
    assert os.getpgid(pid) == pid  # Ctrl-C in a terminal does not reach it
    envs.close()


class WithSimulator(Faulty):
    """Starts a process and writes down its number; does not end it."""

    def __init__(self, folder: str, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        simulator = subprocess.Popen(["sleep", "100"])
        Path(folder, str(simulator.pid)).touch()


def started(folder: Path) -> list[int]:
    return [int(path.name) for path in folder.iterdir()]


@pytest.mark.parametrize("fault", ["hangs", "kills its process", ""])
def test_nothing_is_left_of_what_environments_have_started(fault, tmp_path, kept):
    folder = str(tmp_path)
    envs = WorkerEnvs(lambda: WithSimulator(folder, fault, at=1, episode=0), 1, 3, timeout=0.5, max_restarts=1)
    envs.reset()
    kept += started(tmp_path)
    envs.step(np.zeros((1, 1), np.float32))
    everyone = started(tmp_path)
    kept += everyone
    assert len(everyone) == (2 if fault else 1)
    assert soon(lambda: sum(not gone(pid) for pid in everyone) == 1)
    envs.close()
    assert soon(lambda: all(gone(pid) for pid in everyone))


def test_only_a_group_of_its_own_is_killed(kept):
    beside = subprocess.Popen(["sleep", "100"])
    kept.append(beside.pid)
    child_process.kill_group(beside.pid)  # it is in our group
    child_process.kill_group(2**22 + 1)  # there is no such process
    assert beside.poll() is None
    beside.kill()
    beside.wait()


class Forking(Forever):
    """Every step forks, and the child comes back from it too, and first."""

    def step(self, action):
        child = os.fork()
        time.sleep(0.1 if child else 0.0)
        return np.ones(1, np.float32), float(child > 0), False, False, {}


def test_a_fork_that_comes_back_from_a_step_does_not_answer_too():
    envs = WorkerEnvs(Forking, 2, 3, n_workers=1, timeout=2.0)
    envs.reset()
    assert [envs.step(np.zeros(2, int)).rewards.tolist() for _ in range(3)] == [[1.0, 1.0]] * 3
    envs.close()


BACKTRACKS = 're.match("(a+)+$", "a" * 60 + "b")'
"""Does not return, and lets no other thread run."""
MAIN_OF_WORKERS = f"""
import re, sys
import numpy as np
from proximo.collect.workers import WorkerEnvs
from tests.environments import Forever

class Stuck(Forever):
    def step(self, action):
        print("stuck", flush=True)
        {BACKTRACKS}

envs = WorkerEnvs(Stuck, 1, 0)
envs.reset()
print(envs._workers[0].process.pid, flush=True)
envs.step(np.zeros(1, int))
"""
MAIN_OF_A_REWARD = """
import sys
from proximo.collect.rewards import FunctionReward

reward = FunctionReward(sys.argv[1])
print(reward._process._process.pid, flush=True)
print("stuck", flush=True)
reward(["a"], ["b"], {})
"""


@pytest.mark.parametrize("script", [MAIN_OF_WORKERS, MAIN_OF_A_REWARD])
def test_a_child_that_lets_no_thread_run_ends_with_the_main_process(script, tmp_path, kept):
    place = tmp_path / "stuck.py"
    place.write_text(f"import re\ndef score(prompts, responses):\n    {BACKTRACKS}\n")
    command = [sys.executable, "-c", script, f"{place}:score"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout as out:
        pid = int(out.readline())
        kept.append(pid)
        assert out.readline() == "stuck\n"
        time.sleep(0.2)
        process.kill()
        process.wait()
    assert not gone(pid)
    assert soon(lambda: gone(pid))


def test_a_child_started_in_a_thread_does_not_end_with_the_thread():
    given: list[WorkerEnvs] = []
    thread = threading.Thread(target=lambda: given.append(WorkerEnvs(Forever, 1, 3)))
    thread.start()
    thread.join()
    time.sleep(0.2)
    given[0].reset()
    status = Path(f"/proc/{given[0]._workers[0].process.pid}/status").read_text()
    caught = int(status.partition("SigCgt:\t")[2].split()[0], 16)
    assert not caught >> signal.SIGQUIT - 1 & 1
    given[0].close()


def test_what_an_environment_started_is_gone_with_a_main_process_that_was_killed(tmp_path, kept):
    script = (
        "import sys\n"
        "from proximo.collect.workers import WorkerEnvs\n"
        "from tests.collect.test_child_processes import WithSimulator\n"
        "folder = sys.argv[1]\n"
        "envs = WorkerEnvs(lambda: WithSimulator(folder, ''), 1, 0)\n"
        "print('made', flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "made\n"
        kept += started(tmp_path)
        process.kill()
    assert len(kept) == 1
    assert soon(lambda: gone(kept[0]))


def test_what_a_reward_function_started_is_gone_with_a_main_process_that_was_killed(tmp_path, kept):
    place = tmp_path / "serves.py"
    place.write_text(
        "import subprocess\nfrom pathlib import Path\nserver = subprocess.Popen(['sleep', '100'])\n"
        f"Path({str(tmp_path / 'pid')!r}).write_text(str(server.pid))\n"
        "def score(prompts, responses):\n    return [0.0]\n"
    )
    command = [sys.executable, "-c", MAIN_OF_A_REWARD + "sys.stdin.read()", f"{place}:score"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        kept.append(int(process.stdout.readline()))
        process.stdout.readline()
        kept.append(int((tmp_path / "pid").read_text()))
        process.kill()
    assert soon(lambda: all(gone(pid) for pid in kept))
