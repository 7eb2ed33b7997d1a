"""Proving tasks for language models: addition with a verifiable reward, stories with a gold judge, and controls.

    python benchmarks/language_tasks.py                     # everything that is not done yet
    python benchmarks/language_tasks.py --only addition
    python benchmarks/language_tasks.py --table             # only write docs/benchmarks.md from the results

Each finished run is one line of benchmarks/results/language_tasks.jsonl, with the machine, versions and commit.
Addition: SFT to about 40 %, then at least 90 % on unseen pairs. Stories (`proximo demo align`, and with --long): win
rate over SFT of at least 80 %, KL below 10 nats, 98 % of responses end by themselves, more gold than best of 4, a
reward model within 2 points of what label noise allows. Controls must fail: shuffled labels, a constant reward, a huge
beta; and a reward model of 200 pairs with beta 0 must be over-optimized, and the report must say so.
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
ADDITION = [("ppo", "trunk", 40), ("grpo", "trunk", 60), ("ppo", "lora", 60)]
N_SEEDS = 3
TASKS = ["addition", "stories", "stories-long", "controls"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=N_SEEDS)
    parser.add_argument("--table", action="store_true", help="only write the tables")
    given = parser.parse_args()
    if not given.table:
        for seed in range(given.seeds):
            for task in given.only:
                {
                    "addition": run_additions,
                    "stories": run_stories,
                    "stories-long": run_long_stories,
                    "controls": run_controls,
                }[task](seed, given.threads)
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


def run_additions(seed: int, threads: int) -> None:
    """All ways to learn from one SFT model, which is trained once per seed."""
    done = {(row["seed"], row["algorithm"], row["sharing"]) for row in rows("addition")}
    todo = [one for one in ADDITION if (seed, one[0], one[1]) not in done]
    with tempfile.TemporaryDirectory() as folder:
        for algorithm, sharing, iterations in todo:
            script = HERE.parent / "examples" / "addition.py"
            flags = ["--algorithm", algorithm, "--sharing", sharing, "--iterations", str(iterations)]
            more = ["--seed", str(seed), "--folder", folder, "--traces", "200000", "--quiet", "--threads", str(threads)]
            keep("addition", output_of([str(script), *flags, *more]))


def run_stories(seed: int, threads: int, task: str = "stories", *flags: str) -> None:
    """The demo's default setting."""
    if seed in {row["seed"] for row in rows(task)}:
        return
    with tempfile.TemporaryDirectory() as folder:
        words = ["demo", "align", "--seed", str(seed), "--run-dir", f"{folder}/demo", "--quiet", "--json", *flags]
        keep(task, output_of(["-m", "proximo", *words, "--threads", str(threads)]))


def run_long_stories(seed: int, threads: int) -> None:
    """The demo's longer setting: four betas, and best-of-n."""
    run_stories(seed, threads, "stories-long", "--long")


def run_controls(seed: int, threads: int) -> None:
    """What must fail, and the reward model that must be exploited."""
    if seed not in {row["seed"] for row in rows("controls")}:
        keep("controls", output_of([str(HERE / "story_controls.py"), str(seed), str(threads)]))


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
    write_stories("stories")
    write_stories("stories-long")
    write_controls()


def write_stories(task: str) -> None:
    lines = [
        "| seed | win rate | gold, PPO | gold, SFT | best of 4 | KL | ended | reward model | its ceiling | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows(task):
        lines.append(
            f"| {row['seed']} | {100 * row['win_rate']:.1f} % | {row['reward_mean']:+.2f} | "
            f"{row['reward_mean_against']:+.2f} | {row['best_of_reward_mean']:+.2f} | {row['kl_to_against']:.1f} | "
            f"{100 * row['eos_fraction']:.1f} % | {100 * row['reward_accuracy']:.1f} % | "
            f"{100 * row['reward_accuracy_ceiling']:.1f} % | {row['seconds']:.0f} |"
        )
    frontiers = [row for row in rows(task) if "frontier" in row]
    if frontiers:
        lines += ["", "| seed | beta | KL | gold | win rate |", "|---|---|---|---|---|"]
    for row in frontiers:
        for point in sorted(row["frontier"], key=lambda one: one["beta"]):
            lines.append(
                f"| {row['seed']} | {point['beta']} | {point['kl_to_against']:.2f} | {point['reward_mean']:+.2f} | "
                f"{100 * point['win_rate']:.1f} % |"
            )
    if frontiers:
        lines += ["", "| seed | best of n by the reward model: n, KL, gold |", "|---|---|"]
    for row in frontiers:
        best = "; ".join(f"{one['n']}, {one['kl']:.2f}, {one['reward_mean']:+.2f}" for one in row["best_of_n"])
        lines.append(f"| {row['seed']} | {best} |")
    write_between(task, lines + (in_words(rows(task)) if rows(task) else []))


def write_controls() -> None:
    lines = [
        "| seed | control | reward model, held out | win rate | gold | KL | what was said |",
        "|---|---|---|---|---|---|---|",
    ]

    def number(value: float | None, form: str) -> str:
        return "" if value is None else form.format(value)

    for row in rows("controls"):
        for one in row["controls"]:
            numbers = (
                number(one.get("reward_accuracy"), "{:.3f}"),
                number(one.get("win_rate"), "{:.3f}"),
                number(one.get("gold"), "{:+.2f}"),
                number(one.get("kl"), "{:.2f}"),
            )
            lines.append(f"| {row['seed']} | {one['control']} | {' | '.join(numbers)} | {one.get('said', '')} |")
    write_between("controls", lines + (in_words(rows("controls")) if rows("controls") else []))


if __name__ == "__main__":
    main()
