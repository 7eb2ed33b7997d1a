"""What policies with and without memory learn of tasks that need it, and what memory costs.

    python benchmarks/memory.py           # everything that is not done yet, then the tables and the picture
    python benchmarks/memory.py --only TMaze
    python benchmarks/memory.py --cost    # the cost of an update alone
    python benchmarks/memory.py --table   # only docs/memory.md and its picture

The tasks are those of examples/memory_tasks.py. Each finished (task, memory, seed) is a line of
benchmarks/results/memory.jsonl with its curve; the score is the mean return of 100 deterministic episodes of the final
policy (seed 0 of evaluation). The cost is processor time per update of one and the same rollout.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from records import add_row, in_words, read_rows, write_between

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "memory.jsonl"
PICTURE = HERE.parent / "docs" / "pictures" / "memory.png"
sys.path.insert(0, str(HERE.parent / "examples"))

COMMON: dict[str, Any] = dict(
    n_envs=16, rollout_length=128, batch_size=512, n_epochs=8, learning_rate=1e-3, learning_rate_schedule="linear"
)
TASKS: dict[str, dict[str, Any]] = {
    "TMaze": dict(total_steps=51_200, gamma=0.95, rollout_length=64, batch_size=256),
    "Repeat": dict(total_steps=102_400, gamma=0.9, rollout_length=64, batch_size=256),
    "CartPoleWithoutVelocities": dict(total_steps=307_200, gamma=0.98),
    "PendulumWithoutVelocity": dict(total_steps=307_200, gamma=0.9),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "none": {},
    "gru": {"memory": "gru"},
    "lstm": {"memory": "lstm"},
    "gru, shared": {"memory": "gru", "shared_memory": True},
    "lstm, shared": {"memory": "lstm", "shared_memory": True},
}
SEEDS = 3
BEST = {"TMaze": "1", "Repeat": "30", "CartPoleWithoutVelocities": "500", "PendulumWithoutVelocity": "about -150"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--cost", action="store_true")
    arguments = parser.parse_args()
    if arguments.cost or not (arguments.table or read_rows(RESULTS, kind="cost")):
        add_row(RESULTS, {"kind": "cost", **costs()}, "numpy")
    if not (arguments.table or arguments.cost):
        for task in arguments.only:
            for seed in range(SEEDS):
                for variant in VARIANTS:
                    if not read_rows(RESULTS, kind="run", task=task, variant=variant, seed=seed):
                        run_one(task, variant, seed)
    write_page()


def run_one(task: str, variant: str, seed: int) -> None:
    import memory_tasks  # pyright: ignore[reportMissingImports]

    import proximo
    from proximo.runs.metrics import read_metrics

    make, settings = getattr(memory_tasks, task), COMMON | TASKS[task] | VARIANTS[variant]
    with tempfile.TemporaryDirectory() as folder:
        run = proximo.train(make, seed=seed, run_dir=Path(folder) / "run", quiet=True, **settings)
        scores = proximo.evaluate(run, make, episodes=100, seed=0)
        rows = [row for row in read_metrics(run.path / "metrics.jsonl") if row["return_mean"] is not None]
    picked = [rows[round(i)] for i in np.linspace(0, len(rows) - 1, 40)]
    row = {
        "kind": "run",
        "task": task,
        "variant": variant,
        "seed": seed,
        "return_mean": round(scores["return_mean"], 3),
        "seconds": round(run.seconds, 1),
        "curve": [(row["env_steps"], round(float(str(row["return_mean"])), 3)) for row in picked],
        "settings": settings,
    }
    print({name: row[name] for name in ("task", "variant", "seed", "return_mean", "seconds")}, flush=True)
    add_row(RESULTS, row, "numpy", "gymnasium")


def costs() -> dict[str, float]:
    """Milliseconds of processor time per update with each memory, at the same width and on the same rollout.

    CartPole without velocities, 16 environments and 128 steps, 4 epochs of 4 minibatches, one thread, by the plain
    path (`eager`), and with the loops over time in machine code (`compiled`); medians of 15, taken in turns.
    """
    import memory_tasks  # pyright: ignore[reportMissingImports]

    from proximo.algorithms.adam import FlatAdam
    from proximo.algorithms.ppo import PPO
    from proximo.collect.rollout import Carry, rollout
    from proximo.collect.serial_envs import SerialEnvs
    from proximo.models.control import ActorCritic, NetworkConfig

    torch.set_num_threads(1)
    ppo = PPO(n_epochs=4, batch_size=512, update_path="eager")
    updates: dict[str, Any] = {}
    cases = [
        (f"{name}{', compiled' if compiled else ''}", settings, compiled)
        for name, settings in VARIANTS.items()
        for compiled in (False, True)
        if settings or not compiled
    ]
    for variant, settings, compiled in cases:
        envs = SerialEnvs(memory_tasks.CartPoleWithoutVelocities, 16, 0, name="CartPole")
        generator = torch.Generator().manual_seed(0)
        policy = ActorCritic(envs.observation_space, envs.action_space, NetworkConfig(**settings), generator)
        if policy.memory is not None:
            policy.memory.compiled = compiled
        carry = Carry.start(envs.reset(), policy.blank_memory(16).numpy())
        batch, _ = rollout(policy, envs, carry, 128, generator, gamma=0.99)
        updates[variant] = (policy, FlatAdam(policy, learning_rate=3e-4), batch, generator)
    seconds: dict[str, list[float]] = {variant: [] for variant in updates}
    for _ in range(16):
        for variant, given in updates.items():
            began = time.process_time()
            ppo.update(*given)
            seconds[variant].append(time.process_time() - began)
    return {variant: round(1e3 * statistics.median(times[1:]), 1) for variant, times in seconds.items()}


def write_page() -> None:
    rows = read_rows(RESULTS, kind="run")
    lines = ["| task | best | " + " | ".join(VARIANTS) + " |", "|---|---|" + "---|" * len(VARIANTS)]
    for task in TASKS:
        cells = []
        for variant in VARIANTS:
            scores = [row["return_mean"] for row in rows if (row["task"], row["variant"]) == (task, variant)]
            cells.append(f"**{np.mean(scores):,.2f}** ({', '.join(f'{x:,.1f}' for x in scores)})" if scores else "-")
        lines.append(f"| {task} | {BEST[task]} | " + " | ".join(cells) + " |")
    if rows:
        lines += in_words(rows)
    write_between("learned", lines, "memory.md")
    measured = read_rows(RESULTS, kind="cost")
    if measured:
        last = measured[-1]
        lines = ["| memory | ms per update, `eager` | times that without | `compiled` | times that without |"]
        lines += ["|---|---|---|---|---|", f"| none | {last['none']:.0f} | 1.0 | | |"]
        for name in list(VARIANTS)[1:]:
            eager, compiled = last[name], last[f"{name}, compiled"]
            ratios = [f"{x:.0f} | {x / last['none']:.1f}" for x in (eager, compiled)]
            lines.append(f"| {name} | {ratios[0]} | {ratios[1]} |")
        write_between("cost", lines + in_words([last]), "memory.md")
    if rows:
        draw(rows)


def draw(rows: list[dict]) -> None:
    """A panel per task: the returns of every seed thin, their mean bold."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    axes = list(figure.subplots(1, len(TASKS), squeeze=False).flat)
    colours = dict(zip(VARIANTS, ("#4D4D4D", "#0072B2", "#D55E00", "#009E73", "#CC79A7"), strict=True))
    for axis, task in zip(axes, TASKS, strict=True):
        for variant, colour in colours.items():
            curves = [row["curve"] for row in rows if (row["task"], row["variant"]) == (task, variant)]
            if not curves:
                continue
            steps = np.linspace(max(c[0][0] for c in curves), min(c[-1][0] for c in curves), 60)
            lines = np.array([np.interp(steps, *np.array(curve).T) for curve in curves])
            for line in lines:
                axis.plot(steps / 1e3, line, color=colour, alpha=0.25, linewidth=0.8)
            axis.plot(steps / 1e3, lines.mean(0), color=colour, label=variant, linewidth=1.8)
        axis.set_title(task, fontsize=9)
        axis.set_xlabel("thousand steps", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("return in training", fontsize=8)
    axes[0].legend(fontsize=8, title="memory", title_fontsize=8)
    figure.savefig(PICTURE, dpi=150)


if __name__ == "__main__":
    main()
