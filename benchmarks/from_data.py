"""What beginning from data is worth: cloned policies, and PPO from them and from nothing, on the same small budget.

    python benchmarks/from_data.py            # everything that is not done yet
    python benchmarks/from_data.py --table    # only write docs/from-data.md from the results

For each task an expert is trained by its preset (seed 0) and some of its episodes are recorded with sampled actions.
Then, over seeds: the clone's return, and the return after a small budget of PPO from the clone, from it with a tenth of
the preset's learning rate, so from a clone whose critic was not fitted, and from nothing; each the mean of 20
evaluation episodes of the most likely actions.
Each finished run is one line of benchmarks/results/from_data.jsonl, with the machine, versions and commit.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from records import add_row, in_words, read_rows, write_between

import proximo
from proximo.presets import resolve_settings

RESULTS = Path(__file__).parent / "results" / "from_data.jsonl"
TASKS = {"CartPole-v1": (4_096, 16_384, 20), "Pendulum-v1": (12_288, None, 30)}
"""Steps of PPO afterwards; those that the expert is trained for, None: its preset's; and episodes that are recorded."""
SEEDS = range(4)
N_EPISODES = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="only write the table")
    parser.add_argument("--only", choices=list(TASKS), help="one task alone")
    given = parser.parse_args()
    if not given.table:
        for env_id in [given.only] if given.only else TASKS:
            measure(env_id)
    write_table()


def measure(env_id: str) -> None:
    todo = [seed for seed in SEEDS if not read_rows(RESULTS, env_id=env_id, seed=seed)]
    if not todo:
        return
    folder = Path(tempfile.mkdtemp())
    budget, expert_steps, n_recorded = TASKS[env_id]
    steps = {} if expert_steps is None else {"total_steps": expert_steps}
    expert = proximo.train(env_id, run_dir=folder / "expert", quiet=True, **steps)
    data = proximo.record(expert, folder / "data.npz", episodes=n_recorded, deterministic=False)
    for seed in todo:
        row = {"env_id": env_id, "seed": seed, "budget": budget, "data_return": data["return_mean"]}
        row |= {"data_steps": data["steps"]} | one_seed(env_id, folder, seed, budget)
        print(row, flush=True)
        add_row(RESULTS, row, "gymnasium", "numpy")
    shutil.rmtree(folder)


def one_seed(env_id: str, folder: Path, seed: int, budget: int) -> dict[str, float]:
    gentle = {"learning_rate": resolve_settings(env_id, lambda: gym.make(env_id))[0].algorithm.learning_rate / 10}
    found: dict[str, float] = {}
    ways: dict[str, tuple[str | None, dict[str, Any]]] = {
        "ppo_from_clone": ("clone", {}),
        "gentle_from_clone": ("clone", gentle),
        "gentle_from_clone_without_critic": ("clone_without_critic", gentle),
        "ppo_from_nothing": (None, {}),
    }
    for name, fit_critic in (("clone", True), ("clone_without_critic", False)):
        place = folder / f"{name}{seed}"
        clone = proximo.clone(
            env_id, folder / "data.npz", run_dir=place, seed=seed, fit_critic=fit_critic, eval_episodes=0, quiet=True
        )
        found[name] = score(clone.path)
        found[f"{name}_seconds"] = clone.measured["seconds"]
    for name, (begun_from, settings) in ways.items():
        begin: dict[str, Any] = {} if begun_from is None else {"init_from": folder / f"{begun_from}{seed}"}
        place = folder / f"{name}{seed}"
        run = proximo.train(env_id, run_dir=place, seed=seed, total_steps=budget, quiet=True, **begin, **settings)
        found[name] = score(run.path)
        if run.return_mean is not None:
            found[f"{name}_training"] = run.return_mean
    return found


def score(run: Path) -> float:
    return proximo.evaluate(run, episodes=N_EPISODES)["return_mean"]


def write_table() -> None:
    heads = (
        "task",
        "seeds",
        "data",
        "clone",
        "steps of PPO",
        "from the clone",
        "gently",
        "gently, no critic",
        "from nothing",
    )
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    every = read_rows(RESULTS)
    names = ("clone", "ppo_from_clone", "gentle_from_clone", "gentle_from_clone_without_critic", "ppo_from_nothing")
    for env_id in TASKS:
        rows = [row for row in every if row["env_id"] == env_id]
        if not rows:
            continue
        cells = {name: in_cell([row[name] for row in rows]) for name in names}
        data = f"{rows[0]['data_return']:.0f} ({rows[0]['data_steps']:,} steps)"
        after = " | ".join(cells[name] for name in names[1:])
        lines.append(f"| {env_id} | {len(rows)} | {data} | {cells['clone']} | {rows[0]['budget']:,} | {after} |")
    lines += [
        "",
        f"Mean return (lowest, highest) over the seeds, {N_EPISODES} episodes each.",
        "*Gently*: with a tenth of the preset's learning rate.",
    ]
    write_between("from data", lines + in_words(every), "from-data.md")


def in_cell(returns: list[float]) -> str:
    return f"**{np.mean(returns):.0f}** ({min(returns):.0f}, {max(returns):.0f})"


if __name__ == "__main__":
    main()
