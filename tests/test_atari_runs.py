"""A run on an Atari game, from the command's own function to the score of whole games."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import proximo

pytest.importorskip("ale_py", reason="ale-py is not installed: the extra atari")

SMALL = dict(n_envs=2, rollout_length=8, batch_size=8, n_epochs=1, threads=1, quiet=True)


def test_a_game_is_learned_from_pixels_resumed_and_evaluated(tmp_path: Path) -> None:
    run = proximo.train(
        "ALE/Pong-v5", run_dir=tmp_path / "run", total_steps=48, max_episode_steps=12, debug=True, **SMALL
    )
    assert run.env_steps == 48
    assert run.config.environment.vectorization == "native"
    more = proximo.resume(run, total_steps=64, quiet=True)
    assert more.env_steps == 64
    policy = proximo.load(run)
    assert policy.encoder is not None
    scores = proximo.evaluate(run, episodes=2)
    assert scores["length_mean"] == 12


def test_games_in_this_process_are_resumed_exactly(tmp_path: Path) -> None:
    constant = dict(learning_rate_schedule="constant", clip_schedule="constant")  # schedules follow total_steps
    settings = dict(vectorization="serial", episodic_life=False, **constant, **SMALL)
    whole = proximo.train("ALE/Breakout-v5", run_dir=tmp_path / "whole", total_steps=32, **settings)
    part = proximo.train("ALE/Breakout-v5", run_dir=tmp_path / "part", total_steps=16, **settings)
    resumed = proximo.resume(part, total_steps=32, quiet=True)
    ours, theirs = (proximo.load(run).state_dict() for run in (whole, resumed))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
