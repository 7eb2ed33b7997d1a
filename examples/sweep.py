"""A sweep: every pair of some settings, some seeds each, as plain loops; a table and a picture of the curves.

    python examples/sweep.py

For a search that decides by itself where to look, with early stopping: proximo tune CartPole-v1.
"""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path

import proximo

SWEPT = {"clip_epsilon": (0.1, 0.3), "learning_rate": (3e-4, 3e-3)}


def main(
    total_steps: int = 15_000, seeds: tuple[int, ...] = (1, 2), out: Path = Path("runs/sweep")
) -> list[tuple[float, dict[str, float]]]:
    """Train, evaluate, and return mean scores with their settings, the best one first. `out` must be new."""
    found = []
    for values in itertools.product(*SWEPT.values()):
        settings = dict(zip(SWEPT, values, strict=True))
        scores = []
        for seed in seeds:
            place = out / "-".join([*(f"{name}={value:g}" for name, value in settings.items()), f"seed{seed}"])
            run = proximo.train(
                "CartPole-v1", run_dir=place, seed=seed, total_steps=total_steps, quiet=True, **settings
            )
            scores.append(proximo.evaluate(run, episodes=20)["return_mean"])
        found.append((statistics.mean(scores), settings))
        words = "  ".join(f"{name} {value:<6g}" for name, value in settings.items())
        print(f"{words}  {statistics.mean(scores):6.1f}   seeds: {' '.join(f'{score:.0f}' for score in scores)}")
    print(f"best: {max(found, key=lambda one: one[0])[1]}\nThe curves: proximo report {out}/*")
    return sorted(found, key=lambda one: -one[0])


if __name__ == "__main__":
    main()
