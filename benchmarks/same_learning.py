"""Whether the fast paths of the update learn what the reference learns: returns over seeds, path by path.

    python benchmarks/same_learning.py                    # everything that is not done yet, then picture and page
    python benchmarks/same_learning.py --seeds 10 --only CartPole-v1
    python benchmarks/same_learning.py --table            # only the picture, the page and the verdict

Each (task, path, seed) is a run of its own; a run that was interrupted is resumed, and one that is finished is a line
of benchmarks/results/same_learning.jsonl with its curve: the mean return of the last 100 episodes of training at 50
points. Interquartile means over the seeds have 95 % bootstrap intervals (intervals.py). The paths agree on a task
where, at the end of training, each one's interquartile mean lies within the other's interval.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from records import add_row, in_words, read_rows, write_between

from proximo.report.intervals import bootstrap_interval, interquartile_mean

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "same_learning.jsonl"
PICTURE = HERE.parent / "docs" / "pictures" / "same_learning.png"
STEPS = {"CartPole-v1": 100_000, "HalfCheetah-v5": 200_000}
REFERENCE, FAST = "eager", ("fused", "compiled")
N_POINTS = 50
COLOURS = ("#4D4D4D", "#0072B2", "#D55E00")


def finished_rows(results: Path, env_id: str, path: str, steps: int) -> list[dict]:
    rows = read_rows(results, env_id=env_id, update_path=path, total_steps=steps)
    return sorted(rows, key=lambda row: row["seed"])


def command_for(folder: Path, env_id: str, path: str, seed: int, steps: int) -> list[str]:
    """To begin a run, or to go on with one that has a checkpoint."""
    if (folder / "checkpoints" / "latest").exists():
        return ["resume", str(folder), "--quiet", "--json"]
    if folder.exists():
        folder.rename(folder.with_name(f"{folder.name}-unfinished-{time.time():.0f}"))
    words = ["train", env_id, "--update-path", path, "--seed", str(seed), "--total-steps", str(steps)]
    return [*words, "--run-dir", str(folder), "--quiet", "--json"]


def train_one(env_id: str, path: str, seed: int, steps: int, runs: Path, results: Path) -> str:
    """Train, or go on, and write the curve down; return what to say."""
    folder = runs / f"{env_id}-{path}-{steps}-seed{seed}"
    command = [sys.executable, "-m", "proximo", *command_for(folder, env_id, path, seed, steps)]
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    began = time.monotonic()
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    seconds = time.monotonic() - began
    if ran.returncode:
        return f"{env_id} {path} seed {seed}: exit {ran.returncode}: {ran.stderr.strip()[-500:]}"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    config = tomllib.loads((folder / "config.toml").read_text())
    row: dict[str, Any] = dict(
        env_id=env_id, update_path=config["update_path"], seed=seed, total_steps=steps, curve=curve_of(rows, steps)
    )
    row |= {name: config[name] for name in ("vectorization", "threads")}
    add_row(results, row | {"seconds": round(rows[-1]["seconds"], 1)}, "numpy", "gymnasium", "mujoco")
    return f"{env_id} {path} seed {seed}: return {row['curve'][-1]:.1f} after {seconds:.0f} s"


def grid(steps: int) -> np.ndarray:
    return np.linspace(steps / N_POINTS, steps, N_POINTS)


def curve_of(rows: list[dict], steps: int) -> list[float]:
    """The mean return at the points of the grid, straight lines in between; before the first episode, the first."""
    known = [(row["env_steps"], row["return_mean"]) for row in rows if row["return_mean"] is not None]
    at, returns = zip(*known, strict=True)
    return [round(float(value), 3) for value in np.interp(grid(steps), at, returns)]


@dataclass(frozen=True)
class Band:
    """Of one task and path: interquartile mean `[points]` and interval `[points]` over the seeds."""

    path: str
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    n_seeds: int

    @staticmethod
    def of(path: str, rows: list[dict]) -> Band:
        curves = np.array([row["curve"] for row in rows])
        low, high = zip(*(bootstrap_interval(point) for point in curves.T), strict=True)
        return Band(path, interquartile_mean(curves.T), np.array(low), np.array(high), len(rows))


def within(one: Band, other: Band) -> np.ndarray:
    """At which points each interquartile mean lies within the other's interval."""
    first = (other.low <= one.mean) & (one.mean <= other.high)
    second = (one.low <= other.mean) & (other.mean <= one.high)
    return first & second


def verdict(env_id: str, reference: Band, fast: Band) -> list[str]:
    """The cells of the row of a task and a fast path."""

    def ending(band: Band) -> str:
        return f"{band.mean[-1]:,.1f} [{band.low[-1]:,.1f}, {band.high[-1]:,.1f}] ({band.n_seeds})"

    agree = within(reference, fast)
    agrees = "yes" if agree[-1] else "NO"
    return [env_id, fast.path, ending(reference), ending(fast), agrees, f"{100 * agree.mean():.0f} %"]


def bands(results: Path, env_id: str, paths: list[str], steps: int) -> list[Band]:
    found = [(path, finished_rows(results, env_id, path, steps)) for path in paths]
    return [Band.of(path, rows) for path, rows in found if rows]


def draw(drawn: dict[str, list[Band]], path: Path) -> None:
    """A panel per task: the curves of the paths with their bands."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(drawn), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (env_id, of_task) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn.items(), strict=True):
        x = grid(STEPS[env_id])
        for band, colour in zip(of_task, COLOURS, strict=False):
            name = f"{band.path} (reference)" if band.path == REFERENCE else band.path
            axes.plot(x, band.mean, color=colour, label=name)
            axes.fill_between(x, band.low, band.high, color=colour, alpha=0.18, linewidth=0)
        axes.set_title(f"{env_id}, {of_task[0].n_seeds} seeds", fontsize=10)
        axes.set_xlabel("environment steps")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if value else "0")
        axes.grid(color="#E6E6E6", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="best")
    figure.supylabel("return: interquartile mean, 95 % interval", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def tell(results: Path, paths: list[str], *, write: bool) -> bool:
    """Print the verdicts, write picture and page; return whether all tasks agree."""
    drawn = {env_id: bands(results, env_id, paths, steps) for env_id, steps in STEPS.items()}
    drawn = {env_id: of_task for env_id, of_task in drawn.items() if len(of_task) > 1 and of_task[0].path == REFERENCE}
    if not drawn:
        print("No task has runs of the reference and a fast path yet.")
        return False
    head = ["task", "path", "reference (seeds)", "path (seeds)", "each within the other's interval", "points so"]
    rows = [verdict(env_id, of_task[0], fast) for env_id, of_task in drawn.items() for fast in of_task[1:]]
    table = ["| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows]]
    print("\n".join(table))
    if write:
        draw(drawn, PICTURE)
        lines = [*table, "", "![returns of the paths over training](pictures/same_learning.png)"]
        write_between("same learning", lines + in_words(read_rows(results)), "performance.md")
    return all(row[4] == "yes" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(STEPS), help="tasks to run")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--fast", nargs="+", choices=FAST, default=list(FAST), help="paths to compare (both)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--runs", type=Path, default=Path("runs/same_learning"))
    parser.add_argument("--table", action="store_true", help="only the picture, the page and the verdict")
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    paths = [REFERENCE, *arguments.fast]
    if not arguments.table:
        todo = [
            (env_id, path, seed, steps)
            for seed in range(arguments.seeds)
            for env_id, steps in STEPS.items()
            if not arguments.only or env_id in arguments.only
            for path in paths
            if seed not in [row["seed"] for row in finished_rows(arguments.results, env_id, path, steps)]
        ]
        run_all(todo, arguments.jobs, arguments.runs, arguments.results)
    sys.exit(0 if tell(arguments.results, paths, write=arguments.results == RESULTS) else 1)


def run_all(todo: list[tuple[str, str, int, int]], jobs: int, runs: Path, results: Path) -> None:
    """Some runs at a time, with the time left on standard error."""
    done: list[tuple[tuple[str, str], float]] = []

    def one(wanted: tuple[str, str, int, int]) -> None:
        began = time.monotonic()
        said = train_one(*wanted, runs, results)
        done.append((wanted[:2], time.monotonic() - began))
        took = {kind: [seconds for k, seconds in done if k == kind] for kind, _ in done}
        usual = statistics.mean(seconds for _, seconds in done)
        left = sum(statistics.mean(took.get(w[:2], [usual])) for w in todo) - sum(seconds for _, seconds in done)
        minutes = max(0.0, left) / jobs / 60
        print(f"[{len(done)}/{len(todo)}] {said}; about {minutes:.0f} min left", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, todo))


if __name__ == "__main__":
    main()
