"""What the pieces of an iteration cost, one by one: the rules of `auto` (training/choices.py) rest on these.

    python benchmarks/update_paths.py             # about two minutes, alone on the machine; then the page
    python benchmarks/update_paths.py --table     # only the page

Microseconds, each the least of several blocks in which the ways take turns: the machine can only hold them up.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
from gymnasium import spaces
from records import add_row, in_words, read_rows, write_between

from proximo.algorithms.adam import FlatAdam
from proximo.algorithms.ppo import PPO, UpdatePath
from proximo.collect.acting import NumpyNetwork
from proximo.collect.envs import VectorEnvs
from proximo.collect.make import find_factory
from proximo.core.batch import Batch
from proximo.models.control import ActorCritic, NetworkConfig
from proximo.process import training_threads
from proximo.training.choices import MINIBATCHES_THAT_PAY, NATIVE_FROM
from proximo.training.config import ControlConfig, with_settings
from proximo.training.environments import make_envs

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "update_paths.jsonl"
TASKS: dict[str, tuple[spaces.Box, spaces.Space]] = {
    "CartPole-v1": (spaces.Box(-5, 5, (4,)), spaces.Discrete(2)),
    "HalfCheetah-v5": (spaces.Box(-9, 9, (17,)), spaces.Box(-1, 1, (6,))),
}
BATCH_SIZES = (64, 256, 1024)
WAYS: dict[str, tuple[UpdatePath, int]] = {
    "eager": ("eager", 1),
    "fused": ("fused", 1),
    "compiled": ("compiled", 1),
    "compiled, 2 threads": ("compiled", 2),
}
COUNTS = (2, 4, 8, 16, 64)
N_BLOCKS = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="only write the page")
    if not parser.parse_args().table:
        row = {
            "minibatches": [minibatches(name, size) for name in TASKS for size in BATCH_SIZES],
            "compiling": compiling(),
            "acting": [acting(count) for count in (1, 8, 64)],
            "environments": [environments(count) for count in COUNTS],
        }
        add_row(RESULTS, row, "numpy", "gymnasium", "numba", "scipy")
    write_page(read_rows(RESULTS)[-1])


def least(ways: dict[str, Callable[[], object]], repeat: int) -> dict[str, float]:
    """Microseconds of one call of each, the ways taking turns; the first block of each warms up."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for block in range(N_BLOCKS + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            for _ in range(repeat):
                way()
            if block:
                found[name].append(1e6 * (time.perf_counter() - began) / repeat)
    return {name: round(min(times), 1) for name, times in found.items()}


def minibatches(task: str, batch_size: int) -> dict:
    """Of actor and critic with 64-64 tanh units each; eight minibatches an epoch, ten epochs."""
    n, n_epochs = 8 * batch_size, 10
    generator = torch.Generator().manual_seed(0)
    ways = {}
    for name, (path, threads) in WAYS.items():
        observed, acted_on = TASKS[task]
        policy = ActorCritic(observed, acted_on, NetworkConfig(), torch.Generator().manual_seed(0))
        optimizer = FlatAdam(policy, learning_rate=3e-4)
        observations = torch.randn(1, n, *observed.shape, generator=generator)
        acted = policy.act(observations[0], generator)
        flags = torch.zeros(1, n, dtype=torch.bool)
        numbers = torch.randn(3, 1, n, generator=generator)
        batch = Batch(
            observations=observations,
            actions=acted.actions[None],
            mask=~flags,
            rewards=numbers[0],
            log_probs=acted.log_probs[None],
            values=numbers[1],
            next_values=numbers[2],
            terminated=flags,
            done=flags,
        )
        algorithm = PPO(update_path=path, batch_size=batch_size, n_epochs=n_epochs)
        config = with_settings(ControlConfig(), {"update_path": path, "threads": threads}, where="this benchmark")
        ways[name] = partial(update, config, algorithm, policy, optimizer, batch, generator)
    return {"task": task, "batch_size": batch_size} | {
        name: round(spent / (8 * n_epochs), 1) for name, spent in least(ways, 1).items()
    }


def update(config: ControlConfig, algorithm: PPO, policy: ActorCritic, optimizer: FlatAdam, *rest: object) -> None:
    with training_threads(config):
        optimizer.pace = optimizer.pace or Always(config.threads)
        algorithm.update(policy, optimizer, *rest)  # pyright: ignore[reportArgumentType]


class Always:
    """In the place of `compiled.Pace`: no choice between one thread and two."""

    def __init__(self, count: int) -> None:
        self.count = count

    def n_threads(self) -> int:
        return self.count

    def took(self, n_threads: int, seconds: float) -> None:
        pass


def compiling() -> dict[str, float]:
    """Seconds from the start of a process to its first update, by path; compiled with nothing cached, and all."""
    with tempfile.TemporaryDirectory() as cache:
        return {
            name: round(min(seconds_to_first_update(path, cache) for _ in range(repeat)), 1)
            for name, path, repeat in (
                ("compiled, nothing in the cache", "compiled", 1),
                ("compiled, from the cache", "compiled", 3),
                ("fused", "fused", 3),
            )
        }


def seconds_to_first_update(path: str, cache: str) -> float:
    code = f"import update_paths, sys; update_paths.first_update({path!r})"
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], cwd=HERE, env={**os.environ, "NUMBA_CACHE_DIR": cache}, check=True)
    return time.perf_counter() - began


def first_update(path: UpdatePath) -> None:
    global N_BLOCKS
    N_BLOCKS = 1
    for other in [name for name in WAYS if name != path]:
        del WAYS[other]
    minibatches("HalfCheetah-v5", 64)


def acting(n_envs: int) -> dict:
    """An actor of 17-64-64-6 at `n_envs` observations."""
    observed, acted_on = TASKS["HalfCheetah-v5"]
    policy = ActorCritic(observed, acted_on, NetworkConfig(), torch.Generator().manual_seed(0))
    seen = np.random.default_rng(0).normal(size=(n_envs, 17)).astype(np.float32)
    network = NumpyNetwork(policy, policy.actor)

    def in_torch() -> None:
        with torch.no_grad():
            policy.actor(torch.from_numpy(seen)).numpy()

    with training_threads(with_settings(ControlConfig(), {"update_path": "fused"}, where="this benchmark")):
        return {"n_envs": n_envs} | least({"torch": in_torch, "NumPy": lambda: network(seen)}, 500)


def environments(n_envs: int) -> dict:
    """CartPole-v1 one by one and its own vector version, with all of our checks, per step of one environment."""
    ways = {}
    for kind in ("serial", "native"):
        settings = {"env_id": "CartPole-v1", "n_envs": n_envs, "vectorization": kind, "rollout_length": 64}
        config = with_settings(ControlConfig(), settings, where="this benchmark")
        envs = cast(VectorEnvs, make_envs(config, find_factory("CartPole-v1")))
        envs.reset()
        ways[kind] = partial(some_steps, envs, np.random.default_rng(0))
    shares = {kind: np.mean([way() for _ in range(20)]) for kind, way in ways.items()}
    return {"n_envs": n_envs} | {
        kind: round(float(spent / (200 * n_envs * shares[kind])), 1) for kind, spent in least(ways, 1).items()
    }


def some_steps(envs: VectorEnvs, random: np.random.Generator) -> float:
    """The share of steps that are more than a reset."""
    valid = [envs.step(actions).valid for actions in random.integers(2, size=(200, envs.n_envs))]
    return sum(int(row.sum()) for row in valid) / (200 * envs.n_envs)


def break_even(row: dict, task: str) -> int:
    """Minibatches of 64 after which compiled with nothing in the cache has caught up with fused; to a thousand."""
    found = next(one for one in row["minibatches"] if (one["task"], one["batch_size"]) == (task, 64))
    spent = row["compiling"]["compiled, nothing in the cache"] - row["compiling"]["fused"]
    return 1000 * round(1000 * spent / (found["fused"] - found["compiled"]))


def write_page(row: dict) -> None:
    lines = [
        "One minibatch, gather to Adam, of two 64-64 networks, in microseconds:",
        "",
        f"| task | minibatch | {' | '.join(WAYS)} |",
        f"|---|---|{'---|' * len(WAYS)}",
        *(
            f"| {found['task']} | {found['batch_size']:,} | {' | '.join(f'{found[name]:,.0f}' for name in WAYS)} |"
            for found in row["minibatches"]
        ),
        "",
        "A process from its start to the end of its first update took "
        + ", ".join(f"{spent} s ({name})" for name, spent in row["compiling"].items())
        + ". At 64 steps a minibatch compiling for the first time is repaid after "
        + " and ".join(f"{break_even(row, task):,} minibatches of {task}" for task in TASKS)
        + f", from the disk at once or nearly. `auto` takes compiled from {MINIBATCHES_THAT_PAY:,} minibatches on.",
        "",
        "One forward pass of an actor of 17-64-64-6: "
        + "; ".join(
            f"{found['n_envs']} {'observation' if found['n_envs'] == 1 else 'observations'} "
            f"{found['torch']:.0f} us in torch, {found['NumPy']:.0f} us in NumPy"
            for found in row["acting"]
        )
        + ".",
        "",
        "CartPole-v1, microseconds per step of one environment, with the checks of what it returns:",
        "",
        f"| environments | {' | '.join(str(found['n_envs']) for found in row['environments'])} |",
        f"|---|{'---|' * len(row['environments'])}",
        *(
            f"| {kind} | {' | '.join(f'{found[kind]:.1f}' for found in row['environments'])} |"
            for kind in ("serial", "native")
        ),
        "",
        f"`auto` takes its vector version from {NATIVE_FROM} environments on; a step that only resets counts as none.",
    ]
    write_between("pieces", lines + in_words([row]), "performance.md")


if __name__ == "__main__":
    main()
