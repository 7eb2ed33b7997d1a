"""Train every preset on its seeds, evaluate each final policy, and write tables and curves of docs/benchmarks.md.

    python benchmarks/control_scores.py                     # everything that is not done yet, two runs at a time
    python benchmarks/control_scores.py --only CartPole-v1  # one task
    python benchmarks/control_scores.py --table             # only write docs/benchmarks.md from the results

Each finished (task, seed) is one line of benchmarks/results/control_scores.jsonl, with the machine, the
versions and the commit. What is there with the preset's settings is not run again; what was interrupted is resumed
exactly. The score is the mean return of 100 deterministic episodes of the final policy (seed 0 of evaluation).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from records import add_row, in_words, read_rows, write_between

from proximo.report.intervals import bootstrap_interval, interquartile_mean

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "control_scores.jsonl"
PICTURE = HERE.parent / "docs" / "pictures" / "scores.png"

# task: (seeds, what must be reached). Budgets are the presets' total_steps.
REQUIRED: dict[str, tuple[int, float]] = {
    "CartPole-v1": (10, 475.0),
    "Pendulum-v1": (5, -200.0),
    "MountainCarContinuous-v0": (5, 90.0),
    "Acrobot-v1": (5, -85.0),
    "LunarLander-v3": (5, 250.0),
    "BipedalWalker-v3": (5, 290.0),
    "HalfCheetah-v5": (10, 5800.0),
    "Hopper-v5": (10, 2650.0),
    "Walker2d-v5": (10, 3600.0),
    "Ant-v5": (10, 3300.0),
    "Swimmer-v5": (10, 110.0),
    "InvertedDoublePendulum-v5": (10, 9200.0),
}
SHOWN: dict[str, int] = {
    "InvertedPendulum-v5": 1,
    "MountainCar-v0": 1,
    "LunarLanderContinuous-v3": 1,
    "Reacher-v5": 1,
    "Humanoid-v5": 1,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="tasks to run")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--table", action="store_true", help="only write the table and the picture")
    parser.add_argument("--one", nargs=2, metavar=("TASK", "SEED"), help="run one in this process")
    arguments = parser.parse_args()
    if arguments.one:
        run_one(arguments.one[0], int(arguments.one[1]), arguments.runs)
        return
    if not arguments.table:
        tasks = [(env_id, count) for env_id, (count, _) in REQUIRED.items()] + list(SHOWN.items())
        wanted = [(e, s) for e, count in tasks for s in range(count) if not arguments.only or e in arguments.only]
        todo = [(env_id, seed) for env_id, seed in wanted if (env_id, seed) not in finished()]
        print(f"{len(todo)} of {len(wanted)} runs to do", flush=True)
        with ThreadPoolExecutor(arguments.jobs) as pool:
            list(pool.map(lambda pair: run_in_subprocess(pair[0], pair[1], arguments.runs), todo))
    write_page()


def rows() -> list[dict]:
    """The results of the presets as they are now; of a seed that was run again, the last one."""
    from proximo.presets import PRESETS

    def is_current(row: dict) -> bool:
        settings = json.loads(json.dumps(PRESETS[row["env_id"]].settings))
        return all(row["settings"].get(name) == value for name, value in settings.items())

    return list({(row["env_id"], row["seed"]): row for row in read_rows(RESULTS) if is_current(row)}.values())


def finished() -> set[tuple[str, int]]:
    """What need not be run: results of other paths or environments than `auto` takes now count on the page alone."""
    found = [row for row in rows() if row["settings"]["update_path"] != "auto"]
    return {
        (row["env_id"], row["seed"])
        for row in found
        if row["settings"]["vectorization"] == vectorization_of(row["env_id"])
    }


def vectorization_of(env_id: str) -> str:
    from proximo.collect.make import find_factory
    from proximo.presets import PRESETS
    from proximo.training.choices import with_environments_chosen
    from proximo.training.config import ControlConfig, with_settings

    settings = {"env_id": env_id, **PRESETS[env_id].settings}
    config = with_settings(ControlConfig(), settings, where="the presets")
    return with_environments_chosen(config, find_factory(env_id)).environment.vectorization


def run_in_subprocess(env_id: str, seed: int, runs: Path) -> None:
    """A process of its own for each run: it may be killed, and the next call resumes it."""
    began = time.monotonic()
    command = [sys.executable, __file__, "--one", env_id, str(seed), "--runs", str(runs)]
    code = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False).returncode
    print(f"{env_id} seed {seed}: exit {code} after {time.monotonic() - began:.0f} s", flush=True)


def run_one(env_id: str, seed: int, runs: Path) -> None:
    import proximo
    from proximo.runs.directory import RunDirectory
    from proximo.runs.metrics import read_metrics
    from proximo.training.config import settings_of

    path = runs / f"{env_id}-seed{seed}"
    if (path / "checkpoints" / "latest").exists() and has_preset(path, env_id):
        run = proximo.resume(path, quiet=True)
    else:
        if path.exists():
            path.rename(path.with_name(f"{path.name}-unfinished-{time.time():.0f}"))
        run = proximo.train(env_id, seed=seed, run_dir=path, quiet=True)
    assert not run.interrupted_by
    scores = proximo.evaluate(run, episodes=100, seed=0)
    metrics = read_metrics(RunDirectory(path).metrics_path)
    picked = [metrics[round(i)] for i in np.linspace(0, len(metrics) - 1, 50)]
    row = {
        "env_id": env_id,
        "seed": seed,
        "env_steps": run.env_steps,
        "seconds": round(run.seconds, 1),
        **{name: round(scores[name], 3) for name in ("return_mean", "return_std", "return_min", "return_max")},
        "best_in_training": round(max(float(m["return_mean"]) for m in metrics if m["return_mean"] is not None), 3),
        "curve": [(m["env_steps"], None if m["return_mean"] is None else round(m["return_mean"], 2)) for m in picked],
        "settings": {k: v for k, v in settings_of(run.config).items() if k not in ("env_id", "seed")},
    }
    RESULTS.parent.mkdir(exist_ok=True)
    add_row(RESULTS, row, "numpy", "gymnasium", *(["mujoco"] if env_id.endswith("-v5") else []))


def has_preset(path: Path, env_id: str) -> bool:
    """Whether an interrupted run has the settings of the preset as it is now."""
    from proximo.presets import PRESETS
    from proximo.runs.directory import RunDirectory, read_config

    had, wanted = read_config(RunDirectory(path)), json.loads(json.dumps(PRESETS[env_id].settings))
    return all(had.get(name) == value for name, value in wanted.items())


def write_page() -> None:
    """Write the table of docs/benchmarks.md, between its two markers, and the picture, from the results."""
    by_task: dict[str, list[dict]] = {}
    for row in rows():
        by_task.setdefault(row["env_id"], []).append(row)
    lines = [
        "| task | steps | wanted | mean | interquartile mean (95 % interval) | maximum in training | per seed | "
        "seconds per run |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [line_of(env_id, sorted(by_task.get(env_id, []), key=seed_of)) for env_id in [*REQUIRED, *SHOWN]]
    lines += in_words(rows())
    write_between("scores", lines)
    draw({env_id: by_task[env_id] for env_id in REQUIRED if env_id in by_task})


def seed_of(row: dict) -> int:
    return row["seed"]


def line_of(env_id: str, done: list[dict]) -> str:
    wanted = f">= {REQUIRED[env_id][1]:,g}" if env_id in REQUIRED else "-"
    count = REQUIRED[env_id][0] if env_id in REQUIRED else SHOWN[env_id]
    if not done:
        return f"| {env_id} | - | {wanted} | not run yet | - | - | {count} seeds planned | - |"
    scores = np.array([row["return_mean"] for row in done])
    missing = "" if len(done) == count else f" ({len(done)} of {count} seeds)"
    middle = f"{interquartile_mean(scores):,.1f}"
    if len(done) > 2:
        low, high = bootstrap_interval(scores)
        middle += f" ({low:,.1f} to {high:,.1f})"
    # Runs of before it was noted have it from the fifty points of their curve.
    best = [row.get("best_in_training") or max(value for _, value in row["curve"] if value is not None) for row in done]
    each = ", ".join(f"{row['seed']}: {row['return_mean']:,.1f}" for row in done)
    seconds = sorted(row["seconds"] for row in done)[len(done) // 2]
    return (
        f"| {env_id} | {done[0]['env_steps']:,} | {wanted} | **{scores.mean():,.1f}**{missing} | {middle} | "
        f"{np.mean(best):,.1f} | {each} | {seconds:.0f} |"
    )


def draw(by_task: dict[str, list[dict]]) -> None:
    """Returns in training over steps: interquartile mean over seeds, and the band of its 95 % intervals."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    n_columns = 4
    n_rows = -(-len(by_task) // n_columns)
    figure = Figure(figsize=(3.2 * n_columns, 2.5 * n_rows), layout="constrained")
    axes = list(figure.subplots(n_rows, n_columns, squeeze=False).flat)
    for axis in axes[len(by_task) :]:
        axis.remove()
    for axis, (env_id, done) in zip(axes, by_task.items(), strict=False):
        steps = np.array([point[0] for point in done[0]["curve"]])
        curves = np.array([np.interp(steps, *_known(row["curve"])) for row in done])
        axis.plot(steps, [interquartile_mean(column) for column in curves.T], color="#0072B2")
        if len(done) > 2:
            bands = np.array([bootstrap_interval(column, n_resamples=2000) for column in curves.T])
            axis.fill_between(steps, *bands.T, color="#0072B2", alpha=0.25, linewidth=0)
        axis.axhline(REQUIRED[env_id][1], color="#D55E00", linewidth=0.8, linestyle="--")
        axis.set_title(f"{env_id}, {len(done)} seed{'s' * (len(done) != 1)}", fontsize=9)
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g}M" if value >= 1e5 else f"{value / 1e3:g}k")
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in list(axes)[len(by_task) :]:
        axis.axis("off")
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=110)


def _known(curve: list) -> tuple[list[float], list[float]]:
    """Steps and returns of the points where an episode had ended."""
    known = [point for point in curve if point[1] is not None]
    return [point[0] for point in known], [point[1] for point in known]


if __name__ == "__main__":
    main()
