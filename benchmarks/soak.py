"""A long run: does memory grow, does speed fall, is anything left open or alive at the end?

    python benchmarks/soak.py --task control --minutes 30     # CartPole in two workers, one of which is killed at times
    python benchmarks/soak.py --task language --minutes 30    # PPO on a tiny Llama with a reward function's process
    python benchmarks/soak.py --table                         # only write docs/reliability.md from the results

A child process trains; this one looks at it every few seconds through /proc (Linux): its resident memory with that of
its children, open files, processes, and the processor time that an iteration takes the training process itself, which
does not depend on what else the machine does. Each soak is one line of benchmarks/results/soak.jsonl. The slopes are
least squares over the run without its first fifth, in which caches fill.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
from records import add_row, in_words, read_rows, write_between

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "soak.jsonl"
LOOK_EVERY = 5.0
"""Seconds between two looks."""
KILL_EVERY = 120.0
"""Seconds between two kills of a worker process."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=["control", "language"], default="control")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--table", action="store_true", help="only write the table")
    given = parser.parse_args()
    if not given.table:
        with tempfile.TemporaryDirectory() as folder:
            row = soak(given.task, 60.0 * given.minutes, Path(folder))
        add_row(RESULTS, row, "transformers", "numpy", "gymnasium")
        print(json.dumps(row))
    write_table()


def command(task: str, folder: Path) -> list[str]:
    """A run that is far from its end when the soak is over."""
    shared = ["--run-dir", str(folder / "run"), "--quiet", "--threads", "1"]
    if task == "control":
        own = ["train", "CartPole-v1", "--total-steps", "1000000000", "--vectorization", "workers", "--n-workers", "2"]
        own += ["--checkpoint-every", "100000", "--on-environment-fault", "restart", "--max-restarts", "1000"]
    else:
        sys.path.insert(0, str(HERE.parent))
        from tests.tiny_language import WORDS, save_tiny

        save_tiny(folder / "model")
        prompts = folder / "prompts.jsonl"
        prompts.write_text("".join(json.dumps({"prompt": word}) + "\n" for word in WORDS))
        reward = folder / "reward.py"
        reward.write_text("def score(prompts, responses):\n    return [float(len(text)) for text in responses]\n")
        own = ["align", "--model", str(folder / "model"), "--prompts", str(prompts), "--reward", f"{reward}:score"]
        own += ["--n-iterations", "1000000", "--checkpoint-every", "200", "--max-new-tokens", "16"]
    return [sys.executable, "-m", "proximo", *own, *shared]


def soak(task: str, seconds: float, folder: Path) -> dict:
    """Let a run go on for so long, look at it, end it by SIGTERM, and count what is left."""
    process = subprocess.Popen(command(task, folder))
    looks: list[tuple[float, int, int, int]] = []
    work: list[tuple[float, float, int]] = []  # when, processor seconds so far, iterations so far
    metrics = folder / "run" / "metrics.jsonl"
    n_kills, began = 0, time.monotonic()
    while (now := time.monotonic() - began) < seconds and process.poll() is None:
        time.sleep(LOOK_EVERY)
        looks.append((now, *look(process.pid)))
        work.append((now, processor_seconds(process.pid), metrics.read_bytes().count(b"\n") if metrics.exists() else 0))
        if task == "control" and now > (n_kills + 1) * KILL_EVERY:
            workers = [pid for pid in family(process.pid) if "multiprocessing.spawn" in words_of(pid)]
            if workers:
                os.kill(workers[n_kills % len(workers)], signal.SIGKILL)
                n_kills += 1
    before = family(process.pid)
    process.send_signal(signal.SIGTERM)
    code = process.wait(120)
    time.sleep(2.0)
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    costs = [(late[1] - early[1]) / max(late[2] - early[2], 1) for early, late in pairwise(work)]
    speed = "steps_per_second" if task == "control" else "tokens_per_second"
    return {
        "task": task,
        "seconds": now,
        "iterations": len(rows),
        "exit_code": code,
        "workers_killed": n_kills,
        "mebibytes": median(looks, 1) / 2**20,
        "mebibytes_per_hour": slope([t for t, *_ in looks], [m for _, m, *_ in looks]) * 3600 / 2**20,
        "files": [looks[len(looks) // 5][2], looks[-1][2]],
        "processes": [looks[len(looks) // 5][3], looks[-1][3]],
        "left_alive": sum(Path(f"/proc/{pid}").exists() for pid in before),
        "speed": float(np.median([row[speed] for row in rows])),
        "processor_ms_per_iteration": 1000 * float(np.median(costs)),
        "processor_change_per_hour": slope([now for now, *_ in work[1:]], costs) * 3600 / float(np.median(costs)),
    }


def family(pid: int) -> list[int]:
    """A process, its children, and theirs."""
    found = [pid]
    for each in found:
        for path in Path(f"/proc/{each}/task").glob("*/children"):
            with suppress(OSError):  # a thread that has ended meanwhile
                found += [int(child) for child in path.read_text().split()]
    return found


def words_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def look(pid: int) -> tuple[int, int, int]:
    """Resident bytes, open files and processes of a process and its children; shared pages count for each."""
    memory = files = processes = 0
    for each in family(pid):
        try:
            memory += int(Path(f"/proc/{each}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            files += len(list(Path(f"/proc/{each}/fd").iterdir()))
            processes += 1
        except OSError:  # it has ended meanwhile
            continue
    return memory, files, processes


def processor_seconds(pid: int) -> float:
    """What a process has used of the processor, its children not counted."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def median(looks: list[tuple[float, int, int, int]], column: int) -> float:
    return float(np.median([one[column] for one in looks]))


def slope(times: list[float], values: list[float]) -> float:
    """Least squares, without the first fifth."""
    first = len(times) // 5
    return float(np.polyfit(times[first:], values[first:], 1)[0])


def write_table() -> None:
    rows = read_rows(RESULTS)
    lines = [
        "| run | minutes | iterations | memory, MiB | MiB per hour | processor ms per iteration | "
        "its change per hour | open files | processes | workers killed | left alive | exit code |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        files, processes = (" to ".join(map(str, row[name])) for name in ("files", "processes"))
        lines.append(
            f"| {row['task']} | {row['seconds'] / 60:.0f} | {row['iterations']:,} | {row['mebibytes']:.0f} | "
            f"{row['mebibytes_per_hour']:+.1f} | {row['processor_ms_per_iteration']:.1f} | "
            f"{100 * row['processor_change_per_hour']:+.1f} % | {files} | {processes} | "
            f"{row['workers_killed']} | {row['left_alive']} | {row['exit_code']} |"
        )
    write_between("soak", lines + (in_words(rows) if rows else []), "reliability.md")


if __name__ == "__main__":
    main()
