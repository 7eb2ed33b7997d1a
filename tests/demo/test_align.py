"""`proximo demo align`, so small that it shows nothing but that every stage follows the other."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from proximo.collect.rewards import Scores
from proximo.demo import align
from proximo.demo.align import DemoConfig, GoldJudge, run_demo, smaller
from proximo.demo.stories import noise_ceiling
from proximo.stage_display import StageDisplay


def test_every_stage_runs_and_the_judge_has_the_last_word(tmp_path):
    result = run_demo(tmp_path, smaller(DemoConfig(threads=1)), StageDisplay.choose(quiet=True))
    assert json.loads((tmp_path / "result.json").read_text()) == result
    for stage in ("sft", "ppo"):
        assert AutoModelForCausalLM.from_pretrained(tmp_path / stage).num_parameters() > 1_000_000
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").config.num_labels == 1
    assert result["n_judged"] == 8
    assert "frontier" not in result
    rows = [json.loads(line) for line in (tmp_path / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert all(isinstance(row["gold_mean"], float) for row in rows)
    assert 0 <= result["win_rate"] <= 1
    assert 0.5 < result["reward_accuracy_ceiling"] < 1
    assert (tmp_path / "ppo" / "samples.jsonl").exists()


def test_labels_are_as_noisy_as_the_ceiling_says():
    from proximo.demo.stories import generate_pairs, gold_score, label_preferences

    pairs = generate_pairs(2000, 3)
    rows = label_preferences(pairs, 0, 0.5)
    right = [gold_score(row["prompt"], row["chosen"]) >= gold_score(row["prompt"], row["rejected"]) for row in rows]
    ceiling = noise_ceiling(pairs, 0.5)
    assert abs(sum(right) / len(right) - ceiling) < 3 * (ceiling * (1 - ceiling) / len(right)) ** 0.5


def test_several_betas_make_a_frontier_beside_best_of_n(tmp_path):
    config = replace(smaller(DemoConfig(threads=1)), betas=(0.05, 0.5), n_iterations=1, n_judged=8)
    result = run_demo(tmp_path, config, StageDisplay.choose(quiet=True))
    assert [one["beta"] for one in result["frontier"]] == [0.05, 0.5]
    assert [one["n"] for one in result["best_of_n"]] == [1, 2, 4, 8, 16, 32, 64]
    assert result["best_of_n"][0]["kl"] == 0.0
    assert result["best_of_n"][2]["kl"] == pytest.approx(math.log(4) - 0.75)
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "ppo-beta-0.5" / "model.safetensors").exists()


def test_the_accuracy_of_the_judge_itself_is_the_ceiling_and_that_of_its_opposite_what_is_left(monkeypatch):
    class Opposite(GoldJudge):
        def __call__(self, *given):
            return Scores([-(score or 0.0) for score in super().__call__(*given).values], [])

    config = smaller(DemoConfig())
    monkeypatch.setattr(align, "RewardModel", lambda place: GoldJudge())
    accuracy, ceiling = align.reward_accuracy(Path("anywhere"), config)
    assert accuracy == pytest.approx(ceiling)
    monkeypatch.setattr(align, "RewardModel", lambda place: Opposite())
    assert align.reward_accuracy(Path("anywhere"), config)[0] == pytest.approx(1 - ceiling)
