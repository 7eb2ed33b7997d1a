"""Two proving tasks for language models: addition with a verifiable reward, and stories with a gold judge.

    python benchmarks/language_tasks.py                     # everything that is not done yet
    python benchmarks/language_tasks.py --only addition
    python benchmarks/language_tasks.py --table             # only write docs/benchmarks.md from the results

Each finished run is one line of benchmarks/results/language_tasks.jsonl, with the machine, versions and commit.
Addition: SFT to about 40 %, then at least 90 % on unseen pairs. Stories (`proximo demo align`): win rate over SFT of at
least 80 %, KL below 10 nats, 98 % of responses end by themselves, more gold than best of 4.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from records import circumstances, in_words, write_between

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "language_tasks.jsonl"
ADDITION = [("ppo", "trunk", 40), ("grpo", "trunk", 60), ("ppo", "lora", 150)]
N_SEEDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["addition", "stories"])
    parser.add_argument("--seeds", type=int, default=N_SEEDS)
    parser.add_argument("--table", action="store_true", help="only write the tables")
    given = parser.parse_args()
    if not given.table:
        for seed in range(given.seeds):
            if given.only != "stories":
                run_additions(seed)
            if given.only != "addition":
                run_stories(seed)
    write_tables()


def rows(task: str) -> list[dict]:
    if not RESULTS.exists():
        return []
    return [row for line in RESULTS.read_text().splitlines() if (row := json.loads(line))["task"] == task]


def keep(task: str, said: str) -> None:
    row = {"task": task} | json.loads(said.splitlines()[-1]) | circumstances("transformers", "peft", "numpy")
    row.pop("folder", None)
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def run_additions(seed: int) -> None:
    """All ways to learn from one SFT model, which is trained once per seed."""
    done = {(row["seed"], row["algorithm"], row["sharing"]) for row in rows("addition")}
    todo = [one for one in ADDITION if (seed, one[0], one[1]) not in done]
    with tempfile.TemporaryDirectory() as folder:
        for algorithm, sharing, iterations in todo:
            script = HERE.parent / "examples" / "addition.py"
            flags = ["--algorithm", algorithm, "--sharing", sharing, "--iterations", str(iterations)]
            more = ["--seed", str(seed), "--folder", folder, "--traces", "100000", "--quiet", "--threads", "1"]
            keep("addition", output_of([str(script), *flags, *more]))


def run_stories(seed: int) -> None:
    """The demo's default setting."""
    if seed in {row["seed"] for row in rows("stories")}:
        return
    with tempfile.TemporaryDirectory() as folder:
        words = ["demo", "align", "--seed", str(seed), "--run-dir", f"{folder}/demo", "--quiet", "--json"]
        keep("stories", output_of(["-m", "proximo", *words]))


def output_of(words: list[str]) -> str:
    ran = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(ran.stderr[-3000:])
    return ran.stdout


def write_tables() -> None:
    lines = [
        "| algorithm | sharing | iterations | seed | SFT, sampled | SFT, greedy | aligned, sampled | aligned, greedy |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows("addition"):
        numbers = " | ".join(
            f"{100 * row[name]:.1f} %" for name in ("sft_accuracy", "sft_greedy", "accuracy", "greedy")
        )
        lines.append(f"| {row['algorithm']} | {row['sharing']} | {row['iterations']} | {row['seed']} | {numbers} |")
    write_between("addition", lines + (in_words(rows("addition")) if rows("addition") else []))
    lines = [
        "| seed | win rate | gold, PPO | gold, SFT | best of 4 | KL | ended | reward model | its ceiling | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows("stories"):
        lines.append(
            f"| {row['seed']} | {100 * row['win_rate']:.1f} % | {row['reward_mean']:+.2f} | "
            f"{row['reward_mean_against']:+.2f} | {row['best_of_reward_mean']:+.2f} | {row['kl_to_against']:.1f} | "
            f"{100 * row['eos_fraction']:.1f} % | {100 * row['reward_accuracy']:.1f} % | "
            f"{100 * row['reward_accuracy_ceiling']:.1f} % | {row['seconds']:.0f} |"
        )
    write_between("stories", lines + (in_words(rows("stories")) if rows("stories") else []))


if __name__ == "__main__":
    main()
