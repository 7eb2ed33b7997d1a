"""Train one environment with settings given on the command line and print its deterministic evaluation.

python benchmarks/try_settings.py Pendulum-v1 learning_rate=5e-4 n_envs=8 --seeds 0,1
"""

from __future__ import annotations

import argparse
import ast
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import proximo
from proximo.runs.directory import RunDirectory
from proximo.runs.metrics import read_metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("env_id")
    parser.add_argument("--seeds", default="0", help="separated by commas")
    parser.add_argument("settings", nargs="*", help="name=value")
    arguments = parser.parse_args()
    changes = {name: _literal(value) for name, value in (pair.split("=", 1) for pair in arguments.settings)}
    for seed in map(int, arguments.seeds.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "run"
            run = proximo.train(arguments.env_id, seed=seed, run_dir=path, quiet=True, **changes)
            scores = proximo.evaluate(run, episodes=100, seed=0)
            curve = [row["return_mean"] for row in read_metrics(RunDirectory(path).metrics_path)]
        picked = [curve[int(i)] for i in np.linspace(0, len(curve) - 1, 8)]
        row = {
            "env_id": arguments.env_id,
            "seed": seed,
            "changes": changes,
            "return_mean": round(scores["return_mean"], 2),
            "return_std": round(scores["return_std"], 2),
            "curve": [None if value is None else round(float(value), 1) for value in picked],
            "seconds": round(run.seconds, 1),
        }
        print(json.dumps(row), flush=True)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


if __name__ == "__main__":
    main()
