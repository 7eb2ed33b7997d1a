"""Self-play: one policy learns Connect Four against its own past, and its past selves are rated.

    python examples/self_play.py

The game is in connect_four.py, as PettingZoo has games. After so short a training it is no master, but it beats the
random player that it was, and the ratings show it becoming better.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import proximo

GAME = f"{Path(__file__).parent / 'connect_four.py'}:ConnectFour"


def main(total_steps: int = 40_000, games: int = 20) -> dict[str, Any]:
    """Train, rate the past selves by games of each pair, and return what `proximo.evaluate` says."""
    with tempfile.TemporaryDirectory() as folder:
        run = proximo.train(
            GAME,
            run_dir=Path(folder) / "run",
            total_steps=total_steps,
            n_envs=32,
            rollout_length=32,
            batch_size=256,
            learning_rate=1e-3,
            snapshot_every=max(1, total_steps // 1024 // 4),
            seed=1,
        )
        rated = proximo.evaluate(run, GAME, episodes=games)
    for player in rated["players"]:
        print(f"{player['name']:<22} {player['rating']:6.0f} +- {player['standard_error']:.0f} (Elo)")
    print(f"against a random player: {rated['wins']} won, {rated['draws']} drawn, {rated['losses']} lost")
    return rated


if __name__ == "__main__":
    main()
