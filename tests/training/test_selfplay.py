"""Self-play runs: what is learned, exact resume, ratings, and the commands."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("pettingzoo")

import proximo
from examples.connect_four import ConnectFour
from examples.weighted_rps import EQUILIBRIUM, PAYOFF, WeightedRPS
from proximo.errors import UserError
from proximo.runs.checkpoint import newest_checkpoint
from proximo.runs.directory import RunDirectory
from proximo.training import selfplay
from proximo.training.selfplay import pool_of
from tests.collect.test_games import Race
from tests.commands import said_by

QUICK: dict[str, Any] = dict(
    n_envs=4, rollout_length=16, batch_size=32, n_epochs=4, total_steps=256, hidden_sizes=[8], snapshot_every=1,
    quiet=True, debug=True,
)  # fmt: skip
EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def quick(env: Any, folder: Path, **settings: Any) -> Any:
    return proximo.train(env, run_dir=folder, **QUICK | settings)


def test_the_pool_begins_with_what_the_learner_begins_with(tmp_path):
    run = quick(Race, tmp_path / "run", total_steps=64)
    first = proximo.load(run.path, checkpoint="0")
    pool = pool_of(newest_checkpoint(RunDirectory(run.path).checkpoints), 4)
    assert list(pool) == [0]
    for one, other in zip(first.parameters(), pool[0].parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_snapshot_is_the_policy_of_its_step(tmp_path):
    run = quick(Race, tmp_path / "run", checkpoint_every=64, keep_checkpoints=10)
    pool = pool_of(newest_checkpoint(RunDirectory(run.path).checkpoints), 4)
    assert list(pool) == [0, 64, 128, 192]
    for step, snapshot in pool.items():
        for one, other in zip(
            proximo.load(run.path, checkpoint=str(step)).parameters(), snapshot.parameters(), strict=True
        ):
            assert torch.equal(one, other)


def test_an_interrupted_run_ends_where_an_undisturbed_one_does(tmp_path):
    def tensors(path: Path) -> dict[str, torch.Tensor]:
        found = newest_checkpoint(RunDirectory(path).checkpoints)
        return {f"{part}/{name}": tensor for part, group in found.tensors.items() for name, tensor in group.items()}

    settings = dict(checkpoint_every=64, pool_size=3, rollout_length=15)
    whole = quick(ConnectFour, tmp_path / "whole", **settings)
    iterate = selfplay.iterate
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(selfplay, "iterate", lambda *arguments: islice(iterate(*arguments), 2))
        cut = quick(ConnectFour, tmp_path / "cut", **settings)
    proximo.resume(cut, ConnectFour, quiet=True)
    one, other = tensors(whole.path), tensors(cut.path)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_race_is_solved(tmp_path):
    """Whoever brings the number to 2 wins: with 3 to go, 1 leaves 2 and 2 leaves 1, and either is the other's win."""
    settings = dict(n_envs=16, rollout_length=16, batch_size=64, total_steps=12_288, learning_rate=5e-3)
    policy = quick(Race, tmp_path / "run", debug=False, gamma=1.0, entropy_coef=0.01, **settings).policy
    seen = np.array([[0.0, 0.0], [1.0, 1.0], [3.0, 0.0]], np.float32)
    assert policy(seen).tolist() == [1, 0, 1]  # to 2, to 2, and to 5


@pytest.mark.slow
def test_the_average_over_the_pool_is_near_the_equilibrium_and_single_policies_are_not(tmp_path):
    """Weighted rock, paper, scissors: an equilibrium of (1/4, 1/2, 1/4); benchmarks/agents.py has more seeds."""
    settings = dict(n_envs=32, rollout_length=4, batch_size=128, total_steps=128 * 300, pool_size=400)
    settings |= dict(learning_rate=3e-3, entropy_coef=0.1, normalize_advantages=False, debug=False)
    run = quick(WeightedRPS, tmp_path / "run", **settings)
    pool = pool_of(newest_checkpoint(RunDirectory(run.path).checkpoints), 32)
    each = np.array([[np.exp(p.log_prob(np.zeros(1), action)) for action in range(3)] for p in pool.values()])
    assert np.abs(each.mean(0) - EQUILIBRIUM).max() < 0.1
    can_lose = (each @ PAYOFF.T).max(1)
    assert (PAYOFF @ each.mean(0)).max() < 0.5 * np.median(can_lose[150:])


def test_ratings_grow_and_beat_random_moves(tmp_path):
    settings = dict(n_envs=16, rollout_length=16, batch_size=64, total_steps=4096, learning_rate=5e-3)
    run = quick(Race, tmp_path / "run", debug=False, snapshot_every=4, **settings)
    rated = proximo.evaluate(run, Race, episodes=40)
    players = rated["players"]
    assert (players[0]["name"], players[0]["rating"], players[0]["standard_error"]) == ("random", 0.0, 0.0)
    assert players[-1]["rating"] > players[1]["rating"] > -200  # the first snapshot is nearly a random player
    assert rated["wins"] + rated["draws"] + rated["losses"] == 40
    results = np.array(rated["results"])
    assert (results + results.T)[~np.eye(len(results), dtype=bool)].tolist() == [40.0] * (
        len(results) ** 2 - len(results)
    )
    assert rated["score_mean"] > 0.5


def test_the_commands(tmp_path, capsys):
    folder = str(tmp_path / "run")
    flags = ["--n-envs", "4", "--rollout-length", "16", "--batch-size", "32", "--total-steps", "128"]
    env = f"{EXAMPLES}/connect_four.py:ConnectFour"
    code, out, error = said_by(capsys, "train", env, *flags, "--snapshot-every", "1", "--run-dir", folder, "--json")
    assert code == 0, error
    assert "defaults for self-play" in error
    code, out, error = said_by(capsys, "evaluate", folder, "--allow-import", "--episodes", "4")
    assert code == 0, error
    assert "Elo ratings" in out
    assert (tmp_path / "run" / "report" / "ratings.png").stat().st_size > 5000
    code, out, error = said_by(capsys, "evaluate", folder, "--allow-import", "--episodes", "4", "--json")
    assert len(json.loads(out)["players"]) == 4  # random, steps 0 and 64, and the latest
    code, out, error = said_by(capsys, "resume", folder, "--allow-import", "--total-steps", "256")
    assert code == 0, error
    assert "exact" in error
    policy = proximo.load(folder)
    board = np.zeros((2, 6, 7), np.float32)
    assert policy({"observation": board, "action_mask": np.array([0, 0, 0, 1, 0, 0, 0])}) == 3
    pytest.importorskip("imageio_ffmpeg")
    code, out, error = said_by(capsys, "watch", folder, "--allow-import")
    assert code == 0, error
    assert Path(out.strip()).stat().st_size > 1000


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (dict(latest_share=2.0), "latest_share is 2.0; it must be a number >= 0 and <= 1"),
        (dict(pool_size=1), "pool_size is 1"),
        (dict(snapshot_every=0), "snapshot_every is 0"),
        (dict(max_episode_steps=5), "let the game truncate itself"),
        (dict(agents="shared"), "there is no setting 'agents'"),
    ],
)
def test_bad_settings(tmp_path, settings, told):
    with pytest.raises(UserError, match=told):
        quick(Race, tmp_path / "run", **settings)


@pytest.mark.slow
def test_connect_four_of_pettingzoo(tmp_path):
    pytest.importorskip("pygame")
    run = quick("pettingzoo.classic.connect_four_v3:env", tmp_path / "run")
    rated = proximo.evaluate(run, episodes=4, allow_import=True)
    assert len(rated["players"]) > 2
