"""Several agents, measured: what a central critic is worth, self-play in two games, and where the time goes.

    python benchmarks/agents.py              # everything that is not done yet
    python benchmarks/agents.py --table      # only write docs/agents.md from the results

Each finished run is one line of benchmarks/results/agents.jsonl, with the machine, versions and commit. Sections:

luck           two agents, a common reward that is mostly luck which only the state shows: own against central critic
rps            weighted rock, paper, scissors: the last policy, the average over the pool, and the known equilibrium
connect_four   against a random player and one that looks one step ahead; ratings of past selves
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from records import add_row, in_words, read_rows, write_between

import proximo
from proximo.collect.games import Games, play_match, sampling
from proximo.report.ratings import draw_ratings
from proximo.runs.checkpoint import newest_checkpoint
from proximo.training.selfplay import pool_of

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "agents.jsonl"
sys.path.insert(0, str(HERE.parent))

from examples.connect_four import COLUMNS, ROWS, ConnectFour, is_won  # noqa: E402
from examples.weighted_rps import EQUILIBRIUM, PAYOFF, WeightedRPS  # noqa: E402
from tests.several import Luck  # noqa: E402

LUCK: dict[str, Any] = dict(
    n_envs=4, rollout_length=32, batch_size=64, n_epochs=4, hidden_sizes=[32], learning_rate=3e-3
)
RPS: dict[str, Any] = dict(
    n_envs=32,
    rollout_length=4,
    batch_size=128,
    n_epochs=4,
    total_steps=128 * 300,
    snapshot_every=1,
    pool_size=400,
    learning_rate=3e-3,
    hidden_sizes=[8],
    entropy_coef=0.1,
    normalize_advantages=False,
)
CONNECT_FOUR: dict[str, Any] = dict(
    total_steps=409_600,
    n_envs=128,
    rollout_length=32,
    batch_size=512,
    learning_rate=1e-3,
    learning_rate_schedule="linear",
    hidden_sizes=[128, 128],
    activation="relu",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="only write the tables")
    parser.add_argument("--only", choices=("luck", "spread", "rps", "connect_four"), help="one section")
    arguments = parser.parse_args()
    todo = [
        *(("luck", seed, {"critic": critic}) for seed in range(5) for critic in ("own", "central")),
        *(("rps", seed, {}) for seed in range(4)),
        *(("connect_four", seed, {}) for seed in range(1)),
    ]
    for section, seed, settings in todo if not arguments.table else ():
        done = read_rows(RESULTS, section=section, seed=seed, settings=settings)
        if arguments.only in (None, section) and not done:
            folder = Path(tempfile.mkdtemp())
            began = time.perf_counter()
            found = MEASURED[section](seed, settings, folder / "run")
            seconds = time.perf_counter() - began
            row = {"section": section, "seed": seed, "settings": settings, **found, "seconds": seconds}
            add_row(RESULTS, row, "pettingzoo", "numpy")
            print(row, flush=True)
            shutil.rmtree(folder)
    write_tables()


def luck(seed: int, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    run = proximo.train(
        Luck, run_dir=folder, quiet=True, seed=seed, agent_id=False, total_steps=2048, **LUCK, **settings
    )
    log_probs = [
        run.policy[agent].log_prob(np.array([bit], np.float32), int(bit > 0))
        for agent in ("one", "two")
        for bit in (-1.0, 1.0)
    ]
    return {"wrong": 1.0 - float(np.exp(log_probs).mean())}


def rps(seed: int, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    run = proximo.train(WeightedRPS, run_dir=folder, quiet=True, seed=seed, **RPS, **settings)
    pool = pool_of(newest_checkpoint(folder / "checkpoints"), RPS["n_envs"])
    each = np.array([[float(np.exp(p.log_prob(np.zeros(1), a))) for a in range(3)] for p in pool.values()])
    average = each.mean(0)
    return {
        "average": average.tolist(),
        "average_can_lose": float((PAYOFF @ average).max()),
        "one_can_lose": float(np.median([(PAYOFF @ one).max() for one in each[len(each) // 2 :]])),
        "train_seconds": run.seconds,
    }


def one_step_ahead(games: Games, seed: int) -> Any:
    """A player that wins if it can, else keeps the other one from winning at once, else moves at random."""
    rng = np.random.default_rng(seed)
    space: Any = games.observation_space

    def choose(rows: np.ndarray) -> np.ndarray:
        boards = space.numbers(rows).reshape(-1, 2, ROWS, COLUMNS)
        return np.array([best(board, mask) for board, mask in zip(boards, space.mask(rows), strict=True)])

    def best(board: np.ndarray, possible: np.ndarray) -> int:
        columns = np.flatnonzero(possible)
        for pieces in board:  # its own, then the other's
            for column in columns:
                row = int(board[:, :, column].sum())
                if is_won(pieces, row, int(column)):
                    return int(column)
        return int(rng.choice(columns))

    return choose


def connect_four(seed: int, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    run = proximo.train(ConnectFour, run_dir=folder, quiet=True, seed=seed, **CONNECT_FOUR, **settings)
    return rated_and_matched(run, seed, folder) | {"train_seconds": run.seconds}


def rated_and_matched(run: Any, seed: int, folder: Path) -> dict[str, Any]:
    """Ratings of past selves, and matches of the last policy against players that do not change."""
    rated = proximo.evaluate(run, ConnectFour, episodes=100)
    if seed == 0:
        picture = draw_ratings(rated, "Connect Four", folder / "report")
        shutil.copy(picture, HERE.parent / "docs" / "pictures" / "ratings.png")
    return {"players": rated["players"]} | against_others(run, 1000)


def against_others(run: Any, n_games: int) -> dict[str, Any]:
    """Wins, draws and losses of the last policy, most likely and sampled moves, against two fixed players."""
    from proximo.collect.games import at_random

    games = Games(ConnectFour, 50, name="Connect Four")
    found = {}
    for how in ("most likely", "sampled"):
        generator = torch.Generator().manual_seed(1)
        policy = run.policy
        player = sampling(policy, generator)
        if how == "most likely":
            player = lambda rows, policy=policy: policy.choose(torch.from_numpy(rows), deterministic=True)  # noqa: E731
        for name, other in (
            ("random", at_random(games.observation_space, games.action_space, 2)),
            ("one step ahead", one_step_ahead(games, 3)),
        ):
            found[f"{how} moves, against {name}"] = play_match(games, (player, other), n_games, seed=4)
    return {"matches": found}


MEASURED = {"luck": luck, "rps": rps, "connect_four": connect_four}


def write_tables() -> None:
    every = read_rows(RESULTS)
    lines = ["| critic | probability of the wrong bit after 2,048 steps, per seed | mean |", "|---|---|---|"]
    for critic in ("own", "central"):
        wrong = [row["wrong"] for row in every if row["settings"] == {"critic": critic} and row["section"] == "luck"]
        mean = f"{np.mean(wrong):.4f}" if wrong else "not run yet"
        lines.append(f"| {critic} | {', '.join(f'{x:.4f}' for x in wrong)} | {mean} |")
    write_between("luck", lines, "agents.md")

    lines = [
        "| seed | average over the pool: rock, paper, scissors | it can lose | one policy can lose (median) |",
        "|---|---|---|---|",
        f"| equilibrium | {', '.join(f'{x:.3f}' for x in EQUILIBRIUM)} | 0 | |",
    ]
    for row in (row for row in every if row["section"] == "rps"):
        average = ", ".join(f"{x:.3f}" for x in row["average"])
        lines.append(f"| {row['seed']} | {average} | {row['average_can_lose']:.3f} | {row['one_can_lose']:.3f} |")
    write_between("rps", lines, "agents.md")

    lines = ["| seed | match | won | drawn | lost |", "|---|---|---|---|---|"]
    for row in (row for row in every if row["section"] == "connect_four"):
        for name, (won, drawn, lost) in row["matches"].items():
            lines.append(f"| {row['seed']} | {name} | {won} | {drawn} | {lost} |")
    write_between("connect four", lines + in_words(every), "agents.md")


if __name__ == "__main__":
    main()
