"""A sparse grid with and without an intrinsic reward: examples/key_and_door.py over seeds.

    python benchmarks/exploration.py              # everything that is not done yet
    python benchmarks/exploration.py --table      # only write docs/exploration.md and its picture from the results

Each finished run is one line of benchmarks/results/exploration.jsonl, with its returns, how often it was in each cell,
and the machine, versions and commit. Settings are the defaults for such an environment but for what VARIANTS names.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import gymnasium as gym
import matplotlib
import matplotlib.patheffects
import numpy as np
from records import add_row, in_words, read_rows, write_between

import proximo

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples"))
from key_and_door import MAP, KeyAndDoor  # noqa: E402  # pyright: ignore[reportMissingImports]

RESULTS = HERE / "results" / "exploration.jsonl"
PICTURE = HERE.parent / "docs" / "pictures" / "exploration.png"
TOTAL_STEPS = 150_000
N_SEEDS = 5
VARIANTS = {
    "PPO": {},
    "PPO, entropy_coef 0.05": {"entropy_coef": 0.05},
    "RND": {"exploration": "rnd"},
    "RND, intrinsic_episodic": {"exploration": "rnd", "intrinsic_episodic": True},
}
VISITS: Counter[tuple[int, int, int]] = Counter()
"""How often the run that goes on was at (row, column, has the key)."""


class Counted(KeyAndDoor):
    """Counts where it is."""

    def step(self, action):
        told = super().step(action)
        VISITS[(*self.place, int(self.has_key))] += 1
        return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="only write the page and the picture")
    parser.add_argument("--only", choices=list(VARIANTS), help="only this one")
    arguments = parser.parse_args()
    if not arguments.table:
        for variant in [arguments.only] if arguments.only else VARIANTS:
            for seed in range(N_SEEDS):
                if not read_rows(RESULTS, variant=variant, seed=seed, total_steps=TOTAL_STEPS):
                    add_row(RESULTS, run_one(variant, seed), "numpy", "gymnasium")
    write_table()
    draw()


def run_one(variant: str, seed: int) -> dict:
    if "KeyAndDoor-v0" not in gym.registry:
        gym.register("KeyAndDoor-v0", lambda **kwargs: Counted(**kwargs))
    VISITS.clear()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        run = proximo.train(
            "KeyAndDoor-v0", seed=seed, total_steps=TOTAL_STEPS, run_dir=path, quiet=True, **VARIANTS[variant]
        )
        metrics = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    curve = [(row["env_steps"], row["return_mean"]) for row in metrics if row["return_mean"] is not None]
    found = {
        "first_reward": next((steps for steps, mean in curve if mean > 0), None),
        "solved": next((steps for steps, mean in curve if mean >= 0.9), None),
        "final": run.return_mean,
        "seconds": round(run.seconds, 1),
    }
    print(time.strftime("%X"), variant, seed, found, flush=True)
    visits = [[*place, count] for place, count in sorted(VISITS.items())]
    return {"variant": variant, "seed": seed, "total_steps": TOTAL_STEPS} | found | {"curve": curve, "visits": visits}


def rows_of(variant: str) -> list[dict]:
    return sorted(read_rows(RESULTS, variant=variant, total_steps=TOTAL_STEPS), key=lambda row: row["seed"])


def write_table() -> None:
    lines = [
        f"| {TOTAL_STEPS:,} steps | solved | steps until solved, per seed | final return, per seed | "
        "cells seen of all | seconds per run |",
        "|---|---|---|---|---|---|",
    ]
    every = []
    n_states = 2 * sum(letter != "#" for row in MAP for letter in row)
    for variant in VARIANTS:
        rows = rows_of(variant)
        every += rows
        if not rows:
            lines.append(f"| {variant} | not run yet | | | | |")
            continue
        solved = [row["solved"] for row in rows]
        each = ", ".join("-" if steps is None else f"{steps:,}" for steps in solved)
        final = ", ".join(f"{row['final']:.2f}" for row in rows)
        seen = np.mean([len(row["visits"]) for row in rows])
        seconds = np.mean([row["seconds"] for row in rows])
        lines.append(
            f"| {variant} | **{sum(steps is not None for steps in solved)} of {len(rows)}** | {each} | {final} | "
            f"{seen:.0f} of {n_states} | {seconds:.0f} |"
        )
    write_between("key and door", lines + in_words(every), "exploration.md")


def draw() -> None:
    figure, axes = plt.subplots(1, 3, figsize=(14, 3.9), width_ratios=(1.25, 1, 1), layout="constrained")
    for variant, color in (("PPO", "#8c8c8c"), ("PPO, entropy_coef 0.05", "#d08a2e"), ("RND", "#2a6fb0")):
        rows = rows_of(variant)
        if not rows:
            continue
        for row in rows:
            axes[0].plot(*zip(*row["curve"], strict=True), color=color, alpha=0.35, linewidth=1)
        steps = np.linspace(0, TOTAL_STEPS, 300)
        means = [np.interp(steps, *np.array(row["curve"]).T) for row in rows]
        axes[0].plot(steps, np.mean(means, 0), color=color, linewidth=2.5, label=f"{variant} ({len(rows)} seeds)")
    axes[0].set(xlabel="environment steps", ylabel="return, mean of 100 episodes", ylim=(-0.05, 1.05))
    axes[0].set_xticks(range(0, TOTAL_STEPS + 1, 50_000), ["0", "50,000", "100,000", "150,000"])
    axes[0].set_title("Key and door: thin lines are seeds")
    axes[0].legend(loc="upper left", frameon=False)
    axes[0].spines[["top", "right"]].set_visible(False)
    for axis, variant in zip(axes[1:], ("PPO", "RND"), strict=True):
        if rows := rows_of(variant):
            draw_visits(axis, rows[0])
            axis.set_title(f"{variant}: visits of each cell, seed 0")
    figure.savefig(PICTURE, dpi=110)


def draw_visits(axis, row: dict) -> None:
    counts = np.zeros((len(MAP), len(MAP[0])))
    for y, x, _, count in row["visits"]:
        counts[y, x] += count
    walls = np.array([[letter == "#" for letter in line] for line in MAP])
    colors = matplotlib.colormaps["viridis"].copy()
    colors.set_bad("#3a3a3a")
    colors.set_under("white")
    shown = np.ma.masked_array(np.log10(np.maximum(counts, 0.1)), walls)
    image = axis.imshow(shown, cmap=colors, vmin=0, vmax=4.5)
    for y, line in enumerate(MAP):
        for x, letter in enumerate(line):
            if letter in "SKDG":
                axis.text(
                    x, y, letter, ha="center", va="center", color="white", weight="bold", size=12
                ).set_path_effects([matplotlib.patheffects.withStroke(linewidth=2.5, foreground="black")])
    axis.set(xticks=[], yticks=[])
    bar = axis.figure.colorbar(image, ax=axis, shrink=0.7)
    bar.set_ticks([0, 1, 2, 3, 4], labels=["1", "10", "100", "1,000", "10,000"])
    bar.set_label("visits (white: never)")


if __name__ == "__main__":
    main()
