"""Environments that misbehave in every way, in this process and in workers; and what a checkpoint costs.

    python benchmarks/faults.py environments    # each fault many times: named by `raise`, survived by `restart`
    python benchmarks/faults.py checkpoints     # seconds and bytes of a save, beside the time between two
    python benchmarks/faults.py table           # only write docs/reliability.md from the results

Each line of benchmarks/results/faults.jsonl is one kind of fault under one vectorization, or one kind of run.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle  # noqa: TID251
import gymnasium as gym
import numpy as np
import torch
from records import circumstances, in_words, write_between

import proximo
from proximo.collect.envs import EnvironmentFault, episode_seed
from proximo.collect.replay import load_record, replay_record
from proximo.demo.align import DemoConfig, run_demo
from proximo.runs import checkpoint as checkpoints
from proximo.stage_display import StageDisplay
from proximo.training import align, control, supervised
from proximo.training.config import ControlConfig

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "faults.jsonl"
IN_A_STEP = (
    "raises",
    "leaves Python",
    "returns four values",
    "NaN reward",
    "infinite reward",
    "two rewards",
    "no reward",
    "NaN observation",
    "infinite observation",
    "another shape",
    "out of bounds",
    "a word for an observation",
    "no truth value for terminated",
)
IN_A_RESET = ("reset raises", "reset returns no pair", "reset returns another shape", "reset returns NaN")
OF_THE_PROCESS = ("hangs", "kills its process", "hangs in reset")
N_ENVS, N_EPISODES = 4, 12


class Misbehaving(gym.Env):
    """Episodes of eight steps; the fault comes in the third step, or the reset, of episodes with one of these seeds."""

    def __init__(self, fault: str, seeds: frozenset[int]) -> None:
        self.observation_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.action_space = gym.spaces.Discrete(2)
        self.fault, self.seeds = fault, seeds

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.steps, self.bad = 0, seed in self.seeds
        observation = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        match self.fault if self.bad else "":
            case "reset raises":
                raise RuntimeError("the arm is stuck")
            case "reset returns no pair":
                return observation
            case "reset returns another shape":
                return np.zeros(3, np.float32), {}
            case "reset returns NaN":
                return np.full(2, np.nan, np.float32), {}
            case "hangs in reset":
                signal.pause()
        return observation, {}

    def step(self, action: Any) -> Any:
        self.steps += 1
        observation: Any = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        answer = [observation, float(self.np_random.random()), False, self.steps == 8, {}]
        if self.bad and self.steps == 3:
            return self.misbehave(answer)
        return tuple(answer)

    def misbehave(self, answer: list[Any]) -> Any:
        match self.fault:
            case "raises":
                raise ZeroDivisionError("the arm is stuck")
            case "leaves Python":
                sys.exit(3)
            case "returns four values":
                return answer[:4]
            case "hangs":
                signal.pause()
            case "kills its process":
                os.kill(os.getpid(), signal.SIGKILL)
        put = {
            "NaN reward": (1, float("nan")),
            "infinite reward": (1, float("-inf")),
            "two rewards": (1, np.ones(2)),
            "no reward": (1, None),
            "NaN observation": (0, np.array([np.nan, 0.0], np.float32)),
            "infinite observation": (0, np.array([np.inf, 0.0], np.float32)),
            "another shape": (0, np.zeros((1, 2), np.float32)),
            "out of bounds": (0, np.array([0.0, 2.5], np.float32)),
            "a word for an observation": (0, "nowhere"),
            "no truth value for terminated": (2, np.array([True, False])),
        }
        place, value = put.get(self.fault, (0, answer[0]))
        answer[place] = value
        return tuple(answer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["environments", "checkpoints", "table"])
    command = parser.parse_args().command
    cloudpickle.register_pickle_by_value(sys.modules["__main__"])
    if command == "environments":
        for vectorization in ("serial", "workers"):
            kinds = IN_A_STEP + IN_A_RESET + (OF_THE_PROCESS if vectorization == "workers" else ())
            for fault in kinds:
                inject(fault, vectorization)
    if command == "checkpoints":
        for name in ("CartPole-v1", "HalfCheetah-v5"):
            cost(name)
        cost_of_the_demo()
    write_tables()


def rows(kind: str) -> list[dict]:
    found = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    return [row for row in found if row["test"] == kind]


def keep(row: dict) -> None:
    with RESULTS.open("a") as file:
        file.write(json.dumps(row | circumstances("numpy", "gymnasium")) + "\n")
    print(json.dumps(row), flush=True)


# --- environments ---------------------------------------------------------------------------------------------------


def inject(fault: str, vectorization: str) -> None:
    """One run that stops at the fault, and one that goes on past each of them."""
    if (fault, vectorization) in {(row["fault"], row["vectorization"]) for row in rows("environments")}:
        return
    seeds = frozenset(episode_seed(0, index, episode) for index in range(N_ENVS) for episode in range(1, N_EPISODES, 3))

    def make() -> gym.Env:
        return Misbehaving(fault, seeds)

    settings: dict[str, Any] = dict(
        n_envs=N_ENVS,
        vectorization=vectorization,
        n_workers=2 if vectorization == "workers" else None,
        rollout_length=32,
        batch_size=64,
        total_steps=N_ENVS * 8 * N_EPISODES,
        step_timeout=1.0,
        quiet=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        said, replayed = stopped(make, settings, Path(folder) / "raise")
        run = proximo.train(
            make, run_dir=Path(folder) / "restart", on_environment_fault="restart", max_restarts=1000, **settings
        )
        policy = proximo.load(run)
        lines = (run.path / "metrics.jsonl").read_text().splitlines()
        injected = json.loads(lines[-1])["env_restarts"]
        finite = all(bool(torch.isfinite(p).all()) for p in policy.state_dict().values())
    keep(
        {
            "test": "environments",
            "fault": fault,
            "vectorization": vectorization,
            "named": said,
            "replayed": replayed,
            "injected": injected,
            "survived": finite and injected > 0,
        }
    )


def stopped(make: Any, settings: dict[str, Any], folder: Path) -> tuple[bool, bool | None]:
    """Whether the message has environment, episode, step and seed; and whether the replay shows the fault again."""
    try:
        proximo.train(make, run_dir=folder, **settings)
    except EnvironmentFault as error:
        record = error.record
        wanted = f"environment {record['env_index']}, episode {record['episode']}, step {record['step']} (seed "
        file = folder / f"replay-env{record['env_index']}-episode{record['episode']}.json"
        replayed = None
        if "process" not in record["problem"] and "did not return" not in record["problem"]:
            replayed = "same" in replay_record(make, load_record(file)).lower()
        return wanted in str(error) and file.exists(), replayed
    return False, None


# --- checkpoints ----------------------------------------------------------------------------------------------------


@contextmanager
def timed(module: ModuleType, name: str, taken: list[float]) -> Iterator[None]:
    """Note the seconds of each call of a function of a module."""
    function = getattr(module, name)

    def call(*arguments: Any) -> None:
        began = time.perf_counter()
        function(*arguments)
        taken.append(time.perf_counter() - began)

    setattr(module, name, call)
    try:
        yield
    finally:
        setattr(module, name, function)


def cost(name: str) -> None:
    """Seconds of saving, over the seconds of a run at its default interval of checkpoints."""
    taken: list[float] = []
    config = ControlConfig() if name == "CartPole-v1" else None
    total = {"CartPole-v1": 200_000, "HalfCheetah-v5": 100_000}[name]
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        with timed(control, "save", taken):
            run = proximo.train(name, config, run_dir=Path(folder) / "run", total_steps=total, quiet=True)
        keep_cost(f"{name}, {total:,} steps", taken, time.perf_counter() - began, run.path)


def cost_of_the_demo() -> None:
    """The same of `proximo demo align`: fine-tuning, a reward model and PPO, each at its default interval."""
    taken: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        with timed(align, "save", taken), timed(supervised, "save_progress", taken):
            run_demo(Path(folder), DemoConfig(threads=0), StageDisplay.choose(quiet=True))
        keep_cost("demo align", taken, time.perf_counter() - began, Path(folder) / "ppo")


def keep_cost(name: str, taken: list[float], seconds: float, run: Path) -> None:
    newest = checkpoints.names.all_in(run / "checkpoints")[0]
    size = sum(file.stat().st_size for file in (run / "checkpoints" / newest).iterdir())
    row = {"run": name, "seconds": seconds, "saves": len(taken), "seconds_per_save": float(np.median(taken))}
    keep({"test": "checkpoints", **row, "bytes": size, "share": sum(taken) / seconds})


# --- tables ---------------------------------------------------------------------------------------------------------


def write_tables() -> None:
    found = rows("environments")
    lines = [
        "| fault | environments | named with its place and seed | the same when replayed | injected | survived |",
        "|---|---|---|---|---|---|",
    ]
    yes = {True: "yes", False: "**no**", None: "-"}
    for row in found:
        survived = row["injected"] if row["survived"] else 0
        lines.append(
            f"| {row['fault']} | {row['vectorization']} | {yes[row['named']]} | {yes[row['replayed']]} | "
            f"{row['injected']} | {survived} |"
        )
    write_between("environment faults", lines + (in_words(found) if found else []), "reliability.md")
    saved = rows("checkpoints")
    lines = ["| run | seconds | saves | ms per save | KiB | share of the run's time |", "|---|---|---|---|---|---|"]
    for row in saved:
        lines.append(
            f"| {row['run']} | {row['seconds']:.0f} | {row['saves']} | {1000 * row['seconds_per_save']:.1f} | "
            f"{row['bytes'] / 1024:.0f} | {100 * row['share']:.2f} % |"
        )
    write_between("checkpoint cost", lines + (in_words(saved) if saved else []), "reliability.md")


if __name__ == "__main__":
    main()
