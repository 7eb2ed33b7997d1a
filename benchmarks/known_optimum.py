"""How near PPO, GRPO and RLOO come to a known optimum: examples/known_optimum.py over seeds, betas and rewards.

    python benchmarks/known_optimum.py              # everything that is not done yet
    python benchmarks/known_optimum.py --table      # only write docs/benchmarks.md from the results

Each finished run is one line of benchmarks/results/known_optimum.jsonl, with the machine, versions and commit.
Required: a fraction of at least 0.98 for beta 0.1 and 0.05, 0.95 for 0.02; J never above J*; the sampled KL within
three standard errors of the exact one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from records import circumstances, in_words, write_between

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "known_optimum.jsonl"
REQUIRED = {0.1: 0.98, 0.05: 0.98, 0.02: 0.95}
ALGORITHMS = ("ppo", "grpo", "rloo")
REWARDS = ("potentials", "distinct")
N_SEEDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="only write the table")
    arguments = parser.parse_args()
    if not arguments.table:
        wanted = itertools.product(REWARDS, range(N_SEEDS), REQUIRED, ALGORITHMS)
        todo = [one for one in wanted if one not in {key(row) for row in rows()}]
        print(f"{len(todo)} runs to do", flush=True)
        with ThreadPoolExecutor(arguments.jobs) as pool:
            list(pool.map(lambda one: run_one(*one), todo))
    write_table()


def rows() -> list[dict]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def key(row: dict) -> tuple[str, int, float, str]:
    return row["reward"], row["seed"], row["beta"], row["algorithm"]


def run_one(reward: str, seed: int, beta: float, algorithm: str) -> None:
    script = HERE.parent / "examples" / "known_optimum.py"
    flags = ["--algorithm", algorithm, "--beta", str(beta), "--seed", str(seed), "--reward", reward]
    ran = subprocess.run([sys.executable, script, *flags], capture_output=True, text=True, check=False)
    if ran.returncode:
        print(ran.stderr[-2000:], flush=True)
        return
    row = {"reward": reward} | json.loads(ran.stdout.splitlines()[-1]) | circumstances("transformers", "numpy")
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(f"{reward} seed {seed} beta {beta} {algorithm}: {row['fraction']:.4f}", flush=True)


def write_table() -> None:
    lines = [
        "| reward | beta | algorithm | at least | worst | mean | per seed | sampled KL off by (s.e., worst) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for reward, beta, algorithm in itertools.product(REWARDS, REQUIRED, ALGORITHMS):
        found = sorted(
            (r for r in rows() if (r["reward"], r["beta"], r["algorithm"]) == (reward, beta, algorithm)),
            key=lambda r: r["seed"],
        )
        if not found:
            lines.append(f"| {reward} | {beta} | {algorithm} | {REQUIRED[beta]} | not run yet | | | |")
            continue
        fractions = [row["fraction"] for row in found]
        errors = [abs(r["kl"] - r["kl_sampled"]) / r["kl_standard_error"] for r in found]
        each = ", ".join(f"{r['seed']}: {r['fraction']:.4f}" for r in found)
        lines.append(
            f"| {reward} | {beta} | {algorithm} | {REQUIRED[beta]} | {min(fractions):.4f} | "
            f"**{sum(fractions) / len(fractions):.4f}** | {each} | {max(errors):.1f} |"
        )
    write_between("known optimum", lines + in_words(rows()))


if __name__ == "__main__":
    main()
