"""Games from pixels on the CPU: Pong to the end, and ten minutes of Breakout.

    python benchmarks/atari.py                 # what is not done yet; a run that was interrupted goes on
    python benchmarks/atari.py --only Breakout
    python benchmarks/atari.py --table         # only the table and the picture of docs/atari.md

Pong has 3 million steps (12 million frames), once with the preset's settings, its schedules ending there, and once
with a larger learning rate and a clip range that stays. Breakout has as many steps as are done in ten minutes. Scores
are of 20 whole games with the game's own rewards, by the final policy with sampled actions: its most likely ones may
play on for ever. One seed each: this shows that they learn, not how well they do.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from records import add_row, in_words, processor_flags, read_rows, write_between

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "atari.jsonl"
PICTURE = HERE.parent / "docs" / "pictures" / "atari.png"
GAMES: dict[str, dict[str, Any]] = {
    "Pong": dict(total_steps=3_000_000),
    # The preset is for 10 million steps: with schedules that end at 3, it stops learning before it is done.
    "Pong, larger steps": dict(total_steps=3_000_000, learning_rate=5e-4, clip_schedule="constant"),
    "Breakout": dict(total_steps=10_000_000),
}
MINUTES = {"Breakout": 10.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(GAMES), default=list(GAMES))
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if not arguments.table:
        for game in arguments.only:
            if not read_rows(RESULTS, game=game):
                run_one(game, arguments.runs / f"atari-{game.replace(', ', '-').replace(' ', '-')}")
    write_page()


def run_one(game: str, path: Path) -> None:
    """Train, or go on; a game with a limit in minutes is stopped then."""
    import proximo
    from proximo.runs.directory import RunDirectory
    from proximo.runs.metrics import read_metrics

    precision = "bfloat16" if "amx_bf16" in processor_flags() else "float32"
    settings = GAMES[game] | {"precision": precision, "seed": 0, "checkpoint_every": 100_000}
    if game in MINUTES:
        settings["total_steps"] = steps_within(game, settings, MINUTES[game])
    if (path / "checkpoints" / "latest").exists():
        run = proximo.resume(path, quiet=True)
    else:
        run = proximo.train(env_id(game), run_dir=path, quiet=True, **settings)
    scores = proximo.evaluate(run, episodes=20, seed=0, deterministic=False)
    rows = [row for row in read_metrics(RunDirectory(path).metrics_path) if row["return_mean"] is not None]
    picked = [rows[round(i)] for i in np.linspace(0, len(rows) - 1, 100)]
    row = {
        "game": game,
        "env_steps": run.env_steps,
        "seconds": round(run.seconds),
        "return_mean": round(scores["return_mean"], 2),
        "return_min": scores["return_min"],
        "in_training": round(float(str(rows[-1]["return_mean"])), 2),
        "curve": [(row["env_steps"], round(float(str(row["return_mean"])), 2)) for row in picked],
        "settings": settings,
    }
    add_row(RESULTS, row, "numpy", "gymnasium", "ale-py")


def env_id(game: str) -> str:
    return f"ALE/{game.partition(',')[0]}-v5"


def steps_within(game: str, settings: dict[str, Any], minutes: float) -> int:
    """How many steps fit, by the speed of 20,000 of them."""
    import tempfile

    import proximo

    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        short: dict[str, Any] = settings | {"total_steps": 20_480}
        run = proximo.train(env_id(game), run_dir=Path(folder) / "run", quiet=True, **short)
        speed = run.env_steps / (time.perf_counter() - began)
    return int(speed * 60 * minutes)


def write_page() -> None:
    rows = read_rows(RESULTS)
    lines = ["| game | steps | seconds | last 100 games of training | 20 whole games | the worst of them |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        cells = (f"{row['env_steps']:,}", f"{row['seconds']:,}", row["in_training"], row["return_mean"])
        lines.append(f"| {row['game']} | {' | '.join(map(str, cells))} | {row['return_min']} |")
    picture = ["", "![Returns of Pong and Breakout](pictures/atari.png)"]
    write_between("played", lines + (in_words(rows) + picture if rows else []), "atari.md")
    if rows:
        draw(rows)


def draw(rows: list[dict]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(rows), 3), layout="constrained")
    for axis, row in zip(figure.subplots(1, len(rows), squeeze=False).flat, rows, strict=True):
        steps, returns = np.array(row["curve"]).T
        axis.plot(steps / 1e6, returns, color="#0072B2")
        axis.set_title(row["game"], fontsize=10)
        axis.set_xlabel("million steps (four frames each)", fontsize=8)
        axis.set_ylabel("mean return of 100 games", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURE, dpi=150)


if __name__ == "__main__":
    main()
