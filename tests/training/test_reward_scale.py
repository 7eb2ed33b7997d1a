"""Reward models have mean 0 and standard deviation 1 on what the reference says, before anything is learned."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from proximo.collect.data import PromptRow
from proximo.collect.generate import Answers, generate
from proximo.core.batch import Batch
from proximo.models.folders import REWARD_SCALE, load_scalar_model
from proximo.runs.checkpoint import newest_checkpoint
from proximo.training import align, reward_scale
from proximo.training.align_config import AlignConfig
from proximo.training.roles import models_of
from tests.tiny_language import save_tiny_scalar, tiny_tokenizer
from tests.training.aligning import GENERATION, everything_of, run_in

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


@pytest.fixture
def config(config_with: Callable[..., AlignConfig], tmp_path: Path) -> AlignConfig:
    """A run with a reward model whose raw scores are nowhere near mean 0 and standard deviation 1."""
    place = save_tiny_scalar(tmp_path / "rm", seed=3)
    model: Any = load_scalar_model(place)
    with torch.no_grad():
        model.score.weight *= 40.0
    model.save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return config_with(reward=(str(place),), normalize_rewards_on=600)


def answered(state: align.AlignState, n: int, seed: int) -> tuple[Batch, Answers]:
    rows: list[PromptRow] = [state.prompts[number % len(state.prompts)] for number in range(n)]
    seeded = torch.Generator().manual_seed(seed)
    return generate(state.policy, state.tokenizer, rows, state.reward, GENERATION, seeded)


def test_scores_of_other_samples_of_the_reference_have_mean_0_and_std_1(config: AlignConfig) -> None:
    for normalized in (True, False):
        state = align.start(config if normalized else dataclasses.replace(config, normalize_rewards_on=0))
        scores = torch.tensor(answered(state, 600, seed=5)[1].scores)
        near = abs(float(scores.mean())) < 0.15 and abs(float(scores.std()) - 1) < 0.15
        assert near is normalized
    assert "(on 600 responses)" in align.plan(config, align.start(config))["raw scores"]


@pytest.mark.parametrize("normalize_on", [0, 64])
@pytest.mark.parametrize("weights", [(), (0.1,)])
def test_a_critic_that_begins_as_the_reward_says_what_it_says(
    normalize_on: int, weights: tuple[float, ...], config: AlignConfig
) -> None:
    """The reward model's folder has a scale of its own, far from 0 and 1, and the head has no bias."""
    place = Path(config.reward[0])
    read = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(read | {REWARD_SCALE: {"mean": 30.0, "std": 7.0}}))
    config = dataclasses.replace(config, normalize_rewards_on=normalize_on, reward_weights=weights)
    batch, answers = answered(align.start(config), 8, seed=1)
    assert batch.next_values is not None
    assert batch.next_values[batch.done].tolist() == pytest.approx(answers.scores, abs=1e-3)


def test_two_reward_models_are_scaled_each_by_itself_on_the_same_samples(
    config: AlignConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = save_tiny_scalar(tmp_path / "other", seed=8)
    alone = [
        models_of(align.start(dataclasses.replace(config, reward=(place,))).reward)[0]
        for place in (config.reward[0], str(other))
    ]
    asked: list[int] = []
    sampled = reward_scale.sample

    def counted(policy: Any, tokenizer: Any, prompts: Any, generation: Any, generator: Any) -> Any:
        asked.append(generation.generation_batch_size)
        return sampled(policy, tokenizer, prompts, generation, generator)

    monkeypatch.setattr(reward_scale, "sample", counted)
    both = dataclasses.replace(config, reward=(config.reward[0], str(other)), reward_weights=(0.5, 2.0))
    state = align.start(both)
    assert [(each.mean, each.std) for each in models_of(state.reward)] == [(each.mean, each.std) for each in alone]
    assert asked == [both.responses_per_iteration]  # once, and no wider than training
    run = run_in(tmp_path / "run")
    list(align.iterate(both, run, state))
    resumed = align.restore(both, newest_checkpoint(run.checkpoints))
    assert [(each.mean, each.std) for each in models_of(resumed.reward)] == [(each.mean, each.std) for each in alone]


def test_a_critic_on_the_base_begins_as_the_normalized_reward(
    config_with: Callable[..., AlignConfig], tmp_path: Path
) -> None:
    from tests.training.test_reward_adapter import reward_of_kind

    base, rm = reward_of_kind("llama", tmp_path)
    config = config_with(sharing="lora", model=str(base), reward=(str(rm),))
    came = models_of(align.start(dataclasses.replace(config, normalize_rewards_on=0)).reward)[0]
    state = align.start(config)
    (model,) = models_of(state.reward)
    assert (model.mean, model.std) != (came.mean, came.std)
    batch, answers = answered(state, 8, seed=1)
    assert batch.next_values is not None
    assert batch.next_values[batch.done].tolist() == pytest.approx(answers.scores, abs=1e-3)


def test_a_model_that_scores_all_alike_keeps_its_scale(config: AlignConfig) -> None:
    place = config.reward[0]
    model: Any = load_scalar_model(place)
    with torch.no_grad():
        model.score.weight.zero_()
    model.save_pretrained(place)
    state = align.start(config)
    assert [(each.mean, each.std) for each in models_of(state.reward)] == [(0.0, 1.0)]


def test_a_run_goes_on_with_the_scale_it_began_with(
    config: AlignConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(config, checkpoint_every=2)
    whole = align.start(config)
    expected = list(align.iterate(config, run_in(tmp_path / "whole"), whole))
    halves = run_in(tmp_path / "halves")
    rows = align.iterate(config, halves, align.start(config))
    next(rows), next(rows)
    monkeypatch.setattr(align, "normalize_rewards", lambda *_: pytest.fail("measured anew"))
    resumed = align.restore(config, newest_checkpoint(halves.checkpoints))
    found = list(align.iterate(config, halves, resumed))
    assert [row["reward_mean"] for row in found] == [row["reward_mean"] for row in expected[2:]]
    ours, theirs = everything_of(resumed), everything_of(whole)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
