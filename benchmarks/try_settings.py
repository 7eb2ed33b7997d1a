"""Train one environment with settings given on the command line and print its deterministic evaluation.

python benchmarks/try_settings.py Pendulum-v1 learning_rate=5e-4 n_envs=8 --seeds 0,1
"""

from __future__ import annotations

import argparse
import ast
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from proximo.collect.make import find_factory, make_env
from proximo.presets import PRESETS
from proximo.runs.directory import new_run
from proximo.training import control
from proximo.training.config import ControlConfig, with_settings
from proximo.training.evaluate import evaluate_policy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("env_id")
    parser.add_argument("--seeds", default="0", help="separated by commas")
    parser.add_argument("settings", nargs="*", help="name=value")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    changes = dict(pair.split("=", 1) for pair in arguments.settings)
    changes = {name: _literal(value) for name, value in changes.items()}
    base = PRESETS[arguments.env_id].settings if arguments.env_id in PRESETS else {}
    factory = find_factory(arguments.env_id)
    for seed in map(int, arguments.seeds.split(",")):
        settings = {"env_id": arguments.env_id, **base, **changes, "seed": seed}
        config = with_settings(ControlConfig(), settings, where="command line")
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            run = new_run(arguments.env_id, seed, Path(folder) / "run")
            envs = control.make_envs(config, factory)
            state = control.start(config, envs)
            curve = [row["return_mean"] for row in control.iterate(config, run, state, envs)]
        scores = evaluate_policy(state.policy, lambda: make_env(factory, arguments.env_id, {}), n_episodes=100, seed=0)
        picked = [curve[int(i)] for i in np.linspace(0, len(curve) - 1, 8)]
        print(
            json.dumps(
                {
                    "env_id": arguments.env_id,
                    "seed": seed,
                    "changes": changes,
                    "return_mean": round(float(np.mean(scores.returns)), 2),
                    "return_std": round(float(np.std(scores.returns)), 2),
                    "curve": [None if value is None else round(value, 1) for value in picked],
                    "seconds": round(time.perf_counter() - began, 1),
                }
            ),
            flush=True,
        )


def _literal(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


if __name__ == "__main__":
    main()
