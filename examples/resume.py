"""Nothing is lost: a run is killed in the middle, resumed, and ends bit for bit where an undisturbed one ends.

python examples/resume.py
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import proximo
from proximo.runs.metrics import read_metrics


def main(total_steps: int = 30_000, rows_before_kill: int = 30) -> bool:
    """Train twice, once with a kill; return whether both ended with the very same weights."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        proximo.train("CartPole-v1", seed=1, total_steps=total_steps, run_dir=folder / "undisturbed", quiet=True)

        words = ["train", "CartPole-v1", "--seed", "1", "--total-steps", str(total_steps), "--quiet"]
        process = subprocess.Popen([sys.executable, "-m", "proximo", *words, "--run-dir", str(folder / "killed")])
        while process.poll() is None and n_rows(folder / "killed") < rows_before_kill:
            time.sleep(0.01)
        process.kill()
        process.wait()
        print(f"killed after {n_rows(folder / 'killed')} of {n_rows(folder / 'undisturbed')} iterations")

        proximo.resume(folder / "killed")
        one, other = digest(folder / "undisturbed"), digest(folder / "killed")
    print(f"undisturbed:        {one}\nkilled and resumed: {other}")
    print("the same, bit for bit" if one == other else "NOT the same")
    return one == other


def n_rows(run: Path) -> int:
    """Iterations that are done: one line of metrics.jsonl each."""
    return len(read_metrics(run / "metrics.jsonl"))


def digest(run: Path) -> str:
    """A fingerprint of all weights of the policy."""
    weights = proximo.load(run).state_dict()
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in weights.values())).hexdigest()[:32]


if __name__ == "__main__":
    main()
