"""Train every preset on its seeds, evaluate each final policy, and write the table of docs/benchmarks.md.

    python benchmarks/control_scores.py                     # everything that is not done yet, two runs at a time
    python benchmarks/control_scores.py --only CartPole-v1  # one task
    python benchmarks/control_scores.py --table             # only write docs/benchmarks.md from the results

Each finished (task, seed) is one line of benchmarks/results/control_scores.jsonl, with the machine, the
versions and the commit. What is there already is not run again; what was interrupted is resumed exactly.
The score is the mean return of 100 deterministic episodes of the final policy (seed 0 of evaluation).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "control_scores.jsonl"

# task: (seeds, what must be reached, how it is judged). Budgets are the presets' total_steps.
REQUIRED: dict[str, tuple[int, float]] = {
    "CartPole-v1": (10, 475.0),
    "Pendulum-v1": (5, -200.0),
    "MountainCarContinuous-v0": (5, 90.0),
    "Acrobot-v1": (5, -85.0),
    "LunarLander-v3": (5, 240.0),
    "HalfCheetah-v5": (3, 3000.0),
    "InvertedDoublePendulum-v5": (3, 8500.0),
}
SHOWN: dict[str, int] = {
    "InvertedPendulum-v5": 1,
    "MountainCar-v0": 1,
    "LunarLanderContinuous-v3": 1,
    "Reacher-v5": 1,
    "Swimmer-v5": 1,
    "Hopper-v5": 1,
    "Walker2d-v5": 1,
    "Ant-v5": 1,
    "BipedalWalker-v3": 1,
    "Humanoid-v5": 1,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="tasks to run")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--table", action="store_true", help="only write the table")
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
    write_table()


def rows() -> list[dict]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def finished() -> set[tuple[str, int]]:
    return {(row["env_id"], row["seed"]) for row in rows()}


def run_in_subprocess(env_id: str, seed: int, runs: Path) -> None:
    """A process of its own for each run: it may be killed, and the next call resumes it."""
    began = time.monotonic()
    command = [sys.executable, __file__, "--one", env_id, str(seed), "--runs", str(runs)]
    code = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False).returncode
    print(f"{env_id} seed {seed}: exit {code} after {time.monotonic() - began:.0f} s", flush=True)


def run_one(env_id: str, seed: int, runs: Path) -> None:
    import gymnasium
    import numpy
    import torch

    import proximo
    from proximo.runs.directory import RunDirectory
    from proximo.runs.metrics import read_metrics
    from proximo.training.config import settings_of

    path = runs / f"{env_id}-seed{seed}"
    if (path / "checkpoints" / "latest").exists():
        run = proximo.resume(path, quiet=True)
    else:
        if path.exists():
            path.rename(path.with_name(f"{path.name}-unfinished-{time.time():.0f}"))
        run = proximo.train(env_id, seed=seed, run_dir=path, quiet=True)
    assert not run.interrupted_by
    scores = proximo.evaluate(run, episodes=100, seed=0)
    metrics = read_metrics(RunDirectory(path).metrics_path)
    picked = [metrics[round(i)] for i in numpy.linspace(0, len(metrics) - 1, 50)]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE, check=False
    )
    versions = {"proximo": proximo.__version__, "torch": torch.__version__, "numpy": numpy.__version__}
    versions |= {"gymnasium": gymnasium.__version__, "python": platform.python_version()}
    if env_id.endswith("-v5"):
        import mujoco

        versions["mujoco"] = mujoco.__version__
    row = {
        "env_id": env_id,
        "seed": seed,
        "env_steps": run.env_steps,
        "seconds": round(run.seconds, 1),
        **{name: round(scores[name], 3) for name in ("return_mean", "return_std", "return_min", "return_max")},
        "curve": [(m["env_steps"], None if m["return_mean"] is None else round(m["return_mean"], 2)) for m in picked],
        "settings": {k: v for k, v in settings_of(run.config).items() if k not in ("env_id", "seed")},
        "commit": commit.stdout.strip(),
        "machine": f"{os.cpu_count()} x {processor()}",
        "versions": versions,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def write_table() -> None:
    """Write the tables of docs/benchmarks.md, between its two markers, from the results."""
    by_task: dict[str, list[dict]] = {}
    for row in rows():
        by_task.setdefault(row["env_id"], []).append(row)
    lines = [
        "| task | steps | wanted | reached (mean over seeds) | per seed | seconds per run |",
        "|---|---|---|---|---|---|",
    ]
    for env_id in [*REQUIRED, *SHOWN]:
        done = sorted(by_task.get(env_id, []), key=lambda row: row["seed"])
        wanted = f">= {REQUIRED[env_id][1]:g}" if env_id in REQUIRED else "-"
        count = REQUIRED[env_id][0] if env_id in REQUIRED else SHOWN[env_id]
        if not done:
            lines.append(f"| {env_id} | - | {wanted} | not run yet | {count} seeds planned | - |")
            continue
        scores = [row["return_mean"] for row in done]
        reached = sum(score >= REQUIRED[env_id][1] for score in scores) if env_id in REQUIRED else 0
        each = ", ".join(f"{row['seed']}: {row['return_mean']:.1f}" for row in done)
        seconds = sorted(row["seconds"] for row in done)[len(done) // 2]
        mean = f"**{sum(scores) / len(scores):.1f}**" + (
            "" if len(done) == count else f" ({len(done)} of {count} seeds)"
        )
        wanted += f" ({reached} of {len(done)} seeds)" if env_id in REQUIRED else ""
        lines.append(f"| {env_id} | {done[0]['env_steps']:,} | {wanted} | {mean} | {each} | {seconds:.0f} |")
    machines = sorted({row["machine"] for row in rows()})
    versions = sorted({", ".join(f"{k} {v}" for k, v in row["versions"].items() if k != "mujoco") for row in rows()})
    mujoco = sorted({row["versions"]["mujoco"] for row in rows() if "mujoco" in row["versions"]})
    commits = sorted({row["commit"] for row in rows()})
    lines += [
        "",
        f"Machine: {'; '.join(machines)}. Versions: {'; '.join(versions)}; mujoco {', '.join(mujoco) or '-'}.",
    ]
    lines += [f"Commits: {', '.join(commits)}."]
    page = HERE.parent / "docs" / "benchmarks.md"
    before, rest = page.read_text().split("<!-- scores -->\n")
    _, after = rest.split("<!-- end of scores -->\n")
    page.write_text(before + "<!-- scores -->\n" + "\n".join(lines) + "\n<!-- end of scores -->\n" + after)


if __name__ == "__main__":
    main()
