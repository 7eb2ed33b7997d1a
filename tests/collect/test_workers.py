"""Worker processes: the same numbers as in this process, and a readable end when something misbehaves."""

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from multiprocessing.resource_tracker import ensure_running
from pathlib import Path

import cloudpickle  # noqa: TID251
import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from proximo.collect import workers
from proximo.collect.envs import EnvironmentFault, Snapshot, VectorEnvs, episode_seed
from proximo.collect.make import find_factory, make_env
from proximo.collect.serial_envs import SerialEnvs
from proximo.collect.workers import WorkerEnvs
from proximo.errors import UserError
from tests.environments import Forever

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers need not import pytest then


class Walk(gym.Env):
    """A random walk that ends by itself now and then; `fault` happens in one episode, on its third step."""

    observation_space = spaces.Box(-100, 100, (2,))
    action_space = spaces.Discrete(2)

    def __init__(self, fault: str = "", seed_of_fault: int | None = None):
        self.fault, self.seed_of_fault = fault, seed_of_fault

    def reset(self, *, seed: int):  # as people write it: without options
        super().reset(seed=seed)
        self.seed, self.steps, self.place = seed, 0, 0.0
        if self.fault == "hang in reset" and seed == self.seed_of_fault:
            time.sleep(60)
        return np.array([self.place, 0]), {}

    def step(self, action):
        self.steps += 1
        self.place += self.np_random.normal() + int(action)
        if self.steps == 3 and self.seed == self.seed_of_fault:
            self.misbehave()
        reward = float("nan") if self.fault == "nan" and self.seed == self.seed_of_fault else self.place
        return (
            np.array([self.place, action]),
            reward,
            bool(self.np_random.random() < 0.1),
            self.steps == 12,
            {},
        )

    def misbehave(self):
        if self.fault == "raise":
            raise ZeroDivisionError("the wheel came off")
        if self.fault == "exit":
            sys.exit("the wheel came off")
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "hang":
            time.sleep(60)
        if self.fault == "leave":
            self.place = 1e6


def seed_of(env_index: int, episode: int) -> int:
    return episode_seed(7, env_index, episode)


def play(envs: VectorEnvs, n_steps: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Copies of everything that a number of random steps give."""
    seen = []
    for _ in range(n_steps):
        if isinstance(envs.action_space, spaces.Discrete):
            actions = rng.integers(envs.action_space.n, size=envs.n_envs)
        else:
            shape = (envs.n_envs, *(envs.action_space.shape or ()))
            actions = rng.uniform(-2, 2, shape).astype(np.float32)
        seen += [array.copy() for array in envs.step(actions)]
    return seen


def assert_same(one: list[np.ndarray], other: list[np.ndarray]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert a.tobytes() == b.tobytes()


def assert_same_snapshot(one: Snapshot, other: Snapshot) -> None:
    assert list(one.arrays) == list(other.arrays)
    assert one.values == other.values
    assert_same(list(one.arrays.values()), list(other.arrays.values()))


def children() -> list[int]:
    """Processes that this one has started to be workers, zombies among them."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(status.read_text().rpartition(")")[2].split()[1]) != os.getpid():
                continue
            command = (status.parent / "cmdline").read_text()
        except (OSError, ValueError):
            continue
        if "resource_tracker" not in command:
            found.append(int(status.parent.name))
    return found


def listed(folder: str) -> set[str]:
    return {path.name for path in Path(folder).iterdir()}


def gone(pid: int) -> bool:
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True


@pytest.fixture(autouse=True)
def nothing_is_left():
    ensure_running()  # multiprocessing starts it once, with a pipe to it
    processes, shared = children(), listed("/dev/shm")
    descriptors = len(listed("/proc/self/fd"))
    yield
    gc.collect()  # a traceback holds the shared memory for as long as it is looked at
    assert children() == processes
    assert listed("/dev/shm") == shared
    assert len(listed("/proc/self/fd")) == descriptors


@pytest.mark.parametrize(
    ("env_id", "n_envs", "n_workers", "n_steps"), [("CartPole-v1", 5, 2, 300), ("Pendulum-v1", 3, 1, 450)]
)
def test_numbers_and_snapshots_are_those_of_serial_environments(env_id, n_envs, n_workers, n_steps):
    def make() -> gym.Env:
        return gym.make(env_id, disable_env_checker=True)

    serial, parallel = SerialEnvs(make, n_envs, 7), WorkerEnvs(make, n_envs, 7, n_workers=n_workers)
    assert parallel.observation_space == serial.observation_space
    assert parallel.action_space == serial.action_space
    assert_same([serial.reset()], [parallel.reset()])
    a = play(serial, n_steps, np.random.default_rng(0))
    b = play(parallel, n_steps, np.random.default_rng(0))
    assert sum(step.sum() for step in a[2::6] + a[3::6]) > 0, "no episode has ended"
    assert_same(a, b)
    assert_same_snapshot(serial.snapshot(), parallel.snapshot())
    parallel.close()


def test_snapshots_go_across_kinds_and_numbers_of_workers():
    def make() -> gym.Env:
        return Walk()

    kinds = [
        SerialEnvs(make, 5, 7),
        WorkerEnvs(make, 5, 7, n_workers=2),
        WorkerEnvs(make, 5, 7, n_workers=1),
    ]
    kinds[0].reset()
    rng = np.random.default_rng(0)
    for source in kinds:
        play(source, 20, rng)
        moment = source.snapshot()
        after = play(source, 30, np.random.default_rng(1))
        for other in kinds:
            observations, fresh = other.restore(moment)
            assert fresh == []
            assert_same([observations.copy()], [moment.arrays["observations"]])
            assert_same_snapshot(other.snapshot(), moment)
            assert_same(play(other, 30, np.random.default_rng(1)), after)
    for envs in kinds:
        envs.close()


class Unrepeatable(Walk):
    """Environment 3 (by its first seed) draws on something that no seed fixes."""

    def step(self, action):
        result = super().step(action)
        if self.seed == seed_of(3, 0):
            result[0][0] += time.time() % 1e-2
        return (result[0], 0.0, False, False, {})


def test_an_environment_that_cannot_be_replayed_begins_afresh_in_both_kinds():
    serial, parallel = SerialEnvs(Unrepeatable, 4, 7), WorkerEnvs(Unrepeatable, 4, 7, n_workers=2)
    serial.reset()
    play(serial, 5, np.random.default_rng(0))
    moment = serial.snapshot()
    assert serial.restore(moment)[1] == [3]
    assert parallel.restore(moment)[1] == [3]
    assert_same_snapshot(serial.snapshot(), parallel.snapshot())
    assert parallel.snapshot().arrays["episodes"].tolist() == [0, 0, 0, 1]
    parallel.close()


def test_an_episode_without_an_end_is_forgotten_and_begun_afresh(monkeypatch):
    monkeypatch.setattr(workers, "LONGEST_REPLAY", 3)
    envs = WorkerEnvs(Forever, 3, 7, n_workers=1)
    envs.reset()
    play(envs, 2, np.random.default_rng(0))
    assert envs.restore(envs.snapshot())[1] == []
    for _ in range(3):
        play(envs, 1, np.random.default_rng(0))
    moment = envs.snapshot()
    assert moment.arrays["lengths"].tolist() == [-1, -1, -1]
    assert "open_actions" not in moment.arrays
    moment.arrays["lengths"][1] = 1  # as if it had begun later
    moment.arrays["reward_sums"][1] = 1.0
    moment.arrays["open_actions"] = np.zeros(1, np.int64)
    assert envs.restore(moment)[1] == [0, 2]
    assert envs.snapshot().arrays["lengths"].tolist() == [0, 1, 0]
    assert envs.snapshot().arrays["episodes"].tolist() == [1, 0, 1]
    envs.close()


def test_environments_that_fail_to_close_are_told_of(capfd):
    class Stuck(Walk):
        def close(self):
            raise RuntimeError("the door is stuck")

    WorkerEnvs(Stuck, 3, 7, n_workers=1, name="Walk").close()
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert "closing Walk failed: RuntimeError: the door is stuck (and 2 more)" in said


def fault_of(envs: VectorEnvs, n_steps: int = 100) -> EnvironmentFault:
    envs.reset()
    with pytest.raises(EnvironmentFault) as raised:
        play(envs, n_steps, np.random.default_rng(0))
    return raised.value


@pytest.mark.parametrize(("kind", "n_workers"), [("raise", 2), ("nan", 1), ("exit", 1)])
def test_what_an_environment_does_wrong_is_told_as_serial_environments_tell_it(kind, n_workers):
    def make() -> gym.Env:
        return Walk(kind, seed_of(2, 2))

    envs = WorkerEnvs(make, 4, 7, n_workers=n_workers, name="Walk")
    fault, expected = fault_of(envs), fault_of(SerialEnvs(make, 4, 7, name="Walk"))
    for key in ("env_index", "episode", "step", "seed", "actions"):
        assert fault.record[key] == expected.record[key]
    assert (fault.record["env_index"], fault.record["episode"]) == (2, 2)
    assert f"The action was {fault.record['actions'][-1]}." in str(fault)
    if kind != "nan":
        assert ("SystemExit" if kind == "exit" else "ZeroDivisionError") + ": the wheel came off" in str(fault)
        assert "in misbehave" in str(fault), "the worker's own traceback"
        assert fault.record["step"] == 3
    else:
        assert "the reward is nan" in str(fault)
    envs.reset()  # the workers are alive, and no reply is left over
    assert_same_snapshot(envs.snapshot(), _fresh_snapshot(make))
    envs.close()


def _fresh_snapshot(make) -> Snapshot:
    serial = SerialEnvs(make, 4, 7)
    serial.reset()
    return serial.snapshot()


@pytest.mark.parametrize(
    ("kind", "n_workers", "said"),
    [
        ("kill", 1, "worker 0 (environments 0 to 3) was ended by SIGKILL"),
        ("hang", 2, "worker 1 (environments 2 to 3) was not back after 1 s"),
        ("hang in reset", 1, "reset() did not return: worker 0 (environments 0 to 3) was not back after 1 s"),
    ],
)
def test_a_lost_worker_is_named_with_what_it_takes_to_play_it_again(kind, n_workers, said):
    def make() -> gym.Env:
        return Walk(kind, seed_of(3, 1))

    envs = WorkerEnvs(make, 4, 7, n_workers=n_workers, name="Walk", timeout=1.0)
    began = time.monotonic()
    fault = fault_of(envs)
    assert time.monotonic() - began < 5
    assert said in str(fault)
    assert "Walk, environment 3, episode 1" in str(fault)
    assert ("--step-timeout" in str(fault)) == kind.startswith("hang")
    record = fault.record
    assert (record["env_index"], record["episode"], record["seed"]) == (3, 1, seed_of(3, 1))
    assert record["step"] == len(record["actions"]) == (0 if kind == "hang in reset" else 3)
    if kind != "hang in reset":
        replayed = Walk("raise", record["seed"])  # the third step is where it happened
        replayed.reset(seed=record["seed"])
        for action in record["actions"][:-1]:
            replayed.step(action)
        with pytest.raises(ZeroDivisionError):
            replayed.step(record["actions"][-1])
    with pytest.raises(RuntimeError, match="can only be closed"):
        envs.step(np.zeros(4, int))
    began = time.monotonic()
    envs.close()
    envs.close()
    assert time.monotonic() - began < 4
    with pytest.raises(RuntimeError, match="closed"):
        envs.reset()


def test_signals_of_the_group_leave_workers_alone_and_sigkill_between_steps_blames_no_environment():
    envs = WorkerEnvs(Walk, 3, 7, n_workers=2, name="Walk")
    envs.reset()
    for worker in envs._workers:
        for sent in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(worker.process.pid or 0, sent)
    play(envs, 5, np.random.default_rng(0))
    moment = envs.snapshot()
    victim = envs._workers[1].process
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    assert_same_snapshot(envs.snapshot(), moment)  # a checkpoint can still be saved
    with pytest.raises(UserError, match=r"worker 1 \(environment 2\) was ended by SIGKILL while none") as raised:
        play(envs, 1, np.random.default_rng(0))
    assert not isinstance(raised.value, EnvironmentFault)
    assert "memory" in str(raised.value)
    envs.close()


def test_a_long_restore_does_not_count_as_a_hang():
    class Slow(Walk):
        def step(self, action):
            time.sleep(0.02)
            observation = super().step(action)[0]
            return observation, 0.0, False, False, {}

    envs = WorkerEnvs(Slow, 1, 7, timeout=0.3)
    envs.reset()
    play(envs, 30, np.random.default_rng(0))
    moment = envs.snapshot()
    assert envs.restore(moment)[1] == []  # 0.6 s of calls that take 0.02 s each
    envs.close()


def test_a_value_out_of_bounds_is_noted_once_where_asked_for():
    def make() -> gym.Env:
        return Walk("leave", episode_one[0])

    episode_one = [seed_of(0, 0)]
    envs = WorkerEnvs(make, 2, 7, n_workers=1, on_space_violation="warn")
    envs.reset()
    play(envs, 20, np.random.default_rng(0))
    assert len(envs.warnings) == 1
    assert "environment 0, episode 0, step 3" in envs.warnings[0]
    envs.close()


def test_what_cannot_be_made_or_sent_is_a_user_error():
    with pytest.raises(UserError, match=r"could not be made in a worker process: ZeroDivisionError(.|\n)*1 / 0"):
        WorkerEnvs(lambda: 1 / 0, 2, 7, n_workers=1)  # pyright: ignore
    held = threading.Lock()
    with pytest.raises(UserError, match="cannot be sent to a worker process: TypeError"):
        WorkerEnvs(lambda: Walk(str(held)), 2, 7, n_workers=2)
    with pytest.raises(UserError, match="n_workers"):
        WorkerEnvs(Walk, 2, 7, n_workers=0)
    with pytest.raises(UserError, match=r"could not be made in a worker process: SystemExit: 3"):
        WorkerEnvs(lambda: sys.exit(3), 1, 7)  # pyright: ignore
    with pytest.raises(UserError, match=r"worker 0 .* ended with exit code 3 while it made"):
        WorkerEnvs(lambda: os._exit(3), 1, 7)  # pyright: ignore


def test_environments_from_a_file_and_from_our_registry_are_found_in_workers_without_torch(tmp_path):
    (tmp_path / "its_helper.py").write_text("LIMIT = 4\n")
    (tmp_path / "mine.py").write_text(
        textwrap.dedent("""
            import gymnasium as gym, numpy as np
            import its_helper

            class Mine(gym.Env):
                observation_space = gym.spaces.Box(-1, 1, (1,))
                action_space = gym.spaces.Box(-1, 1, (1,))
                def reset(self, seed=None, options=None):
                    self.n = 0
                    return np.zeros(1), {}
                def step(self, action):
                    self.n += 1
                    return np.clip(action, -1, 1), 1.0, self.n == its_helper.LIMIT, False, {}
        """)
    )
    env_id = f"{tmp_path / 'mine.py'}:Mine"
    factory = find_factory(env_id)
    gym.register("MineToo-v0", entry_point=lambda: make_env(factory, env_id, {}))
    kinds = [
        lambda: make_env(factory, env_id, {}),
        lambda: gym.make("MineToo-v0", disable_env_checker=True),
    ]

    def make() -> gym.Env:
        assert "torch" not in sys.modules, "a worker has imported torch"
        kinds.reverse()
        return kinds[0]()

    envs = WorkerEnvs(make, 3, 7, n_workers=1)
    envs.reset()
    flags = play(envs, 4, np.random.default_rng(0))[2::6]
    assert [bool(flag.all()) for flag in flags] == [False, False, False, True]
    envs.close()
    del gym.registry["MineToo-v0"]


SCRIPT = """
print("main", flush=True)
import gymnasium as gym, os, sys, time
import numpy as np
from proximo.collect.workers import WorkerEnvs

class Mine(gym.Wrapper):
    def step(self, action):
        if os.path.exists(STOP):
            time.sleep(60)
        return self.env.step(action)

STOP = sys.argv[1]
envs = WorkerEnvs(lambda: Mine(gym.make("CartPole-v1")), 2, 0, n_workers=1)
envs.reset()
print(*(w.process.pid for w in envs._workers), flush=True)
envs.step(np.zeros(2, int))
print("stepped", flush=True)
if STOP != "none":
    open(STOP, "w").close()
    envs.step(np.zeros(2, int))
"""


def test_a_script_without_a_guard_runs_once_and_leaves_without_a_word():
    done = subprocess.run(
        [sys.executable, "-", "none"], input=SCRIPT, capture_output=True, text=True, timeout=60, check=True
    )
    main, pids, stepped = done.stdout.splitlines()
    assert (main, stepped) == ("main", "stepped")
    assert done.stderr == ""
    assert all(gone(int(pid)) for pid in pids.split())


def test_workers_leave_when_the_main_process_is_killed_even_from_a_hang(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    stop = tmp_path / "stop"
    process = subprocess.Popen([sys.executable, tmp_path / "script.py", stop], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout as out:
        assert out.readline() == "main\n"
        pids = [int(pid) for pid in out.readline().split()]
        assert out.readline() == "stepped\n"
    while not stop.exists():
        time.sleep(0.01)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 5
    while not all(gone(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)
