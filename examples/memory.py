"""Memory: a sign at the beginning of a corridor says which way to turn at its end; without memory one has to guess.

    python examples/memory.py

The environment is TMaze in memory_tasks.py. The right turn is worth 1, the wrong one -1.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import proximo

TASK = f"{Path(__file__).parent / 'memory_tasks.py'}:TMaze"


def main(total_steps: int = 40_000, episodes: int = 200) -> dict[str, float]:
    """Train without memory and with it; return the mean return of both policies."""
    settings: dict[str, Any] = dict(
        total_steps=total_steps, n_envs=16, rollout_length=64, batch_size=256, learning_rate=3e-3, seed=1, quiet=True
    )
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for memory in ("none", "gru"):
            run = proximo.train(TASK, memory=memory, run_dir=Path(folder) / memory, **settings)
            result = proximo.evaluate(run, TASK, episodes=episodes, deterministic=False)
            found[memory] = result["return_mean"]
            print(f"memory {memory}: mean return {found[memory]:+.2f} over {episodes} episodes")
    return found


if __name__ == "__main__":
    main()
