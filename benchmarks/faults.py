"""Environments that misbehave in every way, in this process and in workers; and what a checkpoint costs.

    python benchmarks/faults.py environments    # each fault many times: named by `raise`, survived by `restart`
    python benchmarks/faults.py checkpoints     # seconds and bytes of a save, beside the time between two
    python benchmarks/faults.py table           # only write docs/reliability.md from the results

Each line of benchmarks/results/faults.jsonl is one kind of fault under one vectorization, or one kind of run.
"""

from __future__ import annotations

import argparse
import json
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
from records import add_row, in_words, read_rows, write_between

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import proximo  # noqa: E402
from proximo.collect.envs import EnvironmentFault, episode_seed  # noqa: E402
from proximo.collect.replay import load_record, replay_record  # noqa: E402
from proximo.demo.align import DemoConfig, run_demo  # noqa: E402
from proximo.runs import checkpoint as checkpoints  # noqa: E402
from proximo.stage_display import StageDisplay  # noqa: E402
from proximo.training import align, control, supervised  # noqa: E402
from proximo.training.config import ControlConfig  # noqa: E402
from tests.environments import FAULTS_IN_A_RESET, FAULTS_IN_A_STEP, FAULTS_OF_THE_PROCESS, Faulty  # noqa: E402

RESULTS = HERE / "results" / "faults.jsonl"
N_ENVS, N_EPISODES = 4, 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["environments", "checkpoints", "table"])
    command = parser.parse_args().command
    cloudpickle.register_pickle_by_value(sys.modules["tests.environments"])
    if command == "environments":
        for vectorization in ("serial", "workers"):
            kinds = FAULTS_IN_A_STEP + FAULTS_IN_A_RESET + (FAULTS_OF_THE_PROCESS if vectorization == "workers" else ())
            for fault in kinds:
                inject(fault, vectorization)
    if command == "checkpoints":
        for name in ("CartPole-v1", "HalfCheetah-v5"):
            cost(name)
        cost_of_the_demo()
    write_tables()


def rows(kind: str) -> list[dict]:
    return read_rows(RESULTS, test=kind)


def keep(row: dict) -> None:
    add_row(RESULTS, row, "numpy", "gymnasium")
    print(json.dumps(row), flush=True)


# --- environments ---------------------------------------------------------------------------------------------------


def inject(fault: str, vectorization: str) -> None:
    """One run that stops at the fault, and one that goes on past each of them."""
    if (fault, vectorization) in {(row["fault"], row["vectorization"]) for row in rows("environments")}:
        return
    seeds = frozenset(episode_seed(0, index, episode) for index in range(N_ENVS) for episode in range(1, N_EPISODES, 3))

    def make() -> gym.Env:
        return Faulty(fault, seeds=seeds, length=8)

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
