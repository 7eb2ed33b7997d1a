"""Direct preference optimization: its loss by hand, its reference, resuming and learning."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from proximo.algorithms.adam import FlatAdam
from proximo.collect.data import Pair
from proximo.errors import UserError
from proximo.models.folders import load_causal_lm
from proximo.runs.checkpoint import newest_checkpoint
from proximo.runs.directory import RunDirectory
from proximo.training import dpo, supervised
from proximo.training.config import with_settings
from proximo.training.dpo import DPOConfig
from proximo.training.sft import causal_policy
from tests.tiny_language import Kind, save_tiny

PAIRS = [
    Pair([7, 8, 9, 2], [7, 10, 2], 1, 0.0),
    Pair([11, 12, 13, 2], [11, 12, 14, 15, 16, 2], 2, 0.0),
    Pair([17, 18, 19, 2], [17, 20, 2], 1, 0.0),
    Pair([21, 22, 23, 24, 2], [21, 22, 25, 2], 2, 0.0),
]
REFERENCE = torch.tensor([[-9.0, -8.0], [-7.5, -15.0], [-10.0, -6.0], [-11.0, -9.5]])
NOUNS = ("cat", "dog", "bird", "fish", "tree", "house", "sun", "moon")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Answers that say good are better than those that say bad."""
    rows = [
        {"prompt": f"the {noun}", "chosen": f"is good {extra}", "rejected": f"is bad {extra}"}
        for noun in NOUNS
        for extra in ("now", "then .", "here and there")
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config_with(model: Path, data: Path, **settings: Any) -> DPOConfig:
    common = dict(
        model=str(model), data=str(data), batch_size=6, n_epochs=4, threads=1, learning_rate=3e-3, hold_out=0.2
    )
    return with_settings(DPOConfig(), common | settings, where="test")


def run_in(folder: Path) -> RunDirectory:
    folder.mkdir()
    return RunDirectory(folder)


def by_hand(model: Any, ids: list[int], n_prompt: int) -> float:
    """The log-probability of an answer, one by one and without padding."""
    log_p = model(torch.tensor([ids])).logits[0].detach().log_softmax(-1)
    return sum(float(log_p[t - 1, ids[t]]) for t in range(n_prompt, len(ids)))


def metrics_and_gradient(
    policy: Any, pieces: list[list[int]], **settings: Any
) -> tuple[dict[str, float], torch.Tensor]:
    optimizer = FlatAdam(policy, learning_rate=0.1)
    config = DPOConfig(**settings)
    sums = supervised.accumulate_gradients(
        optimizer, pieces, lambda piece: dpo._shares(config, policy, PAIRS, REFERENCE, piece)
    )
    return sums, optimizer.gradient.clone()


# --- the loss ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_metrics_by_hand(tmp_path: Path, data: Path, kind: Kind, smoothing: float):
    place = save_tiny(tmp_path / "m", kind)
    metrics, _ = metrics_and_gradient(
        causal_policy(config_with(place, data)), [[0, 1, 2, 3]], beta=0.3, label_smoothing=smoothing
    )
    plain, losses, ratios = load_causal_lm(place), [], []
    for pair, (ref_chosen, ref_rejected) in zip(PAIRS, REFERENCE.tolist(), strict=True):
        chosen = by_hand(plain, pair.chosen, pair.n_prompt) - ref_chosen
        rejected = by_hand(plain, pair.rejected, pair.n_prompt) - ref_rejected
        h = 0.3 * (chosen - rejected)
        losses.append((1 - smoothing) * math.log(1 + math.exp(-h)) + smoothing * math.log(1 + math.exp(h)))
        ratios.append((chosen, rejected))
    assert metrics["loss"] == pytest.approx(sum(losses) / 4, abs=1e-5)
    assert metrics["accuracy"] == sum(c > r for c, r in ratios) / 4
    assert metrics["chosen_log_ratio"] == pytest.approx(sum(c for c, _ in ratios) / 4, abs=1e-5)
    assert metrics["rejected_log_ratio"] == pytest.approx(sum(r for _, r in ratios) / 4, abs=1e-5)
    assert metrics["margin_mean"] == pytest.approx(0.3 * sum(c - r for c, r in ratios) / 4, abs=1e-5)


def test_microbatches_change_nothing(tmp_path: Path, data: Path):
    policy = causal_policy(config_with(save_tiny(tmp_path / "m"), data))
    whole, gradient = metrics_and_gradient(policy, [[0, 1, 2, 3]])
    assert float(gradient.abs().max()) > 1e-3
    for pieces in ([[0, 1], [2, 3]], [[3, 1, 0], [2]], [[0], [1], [2], [3]]):
        metrics, other = metrics_and_gradient(policy, pieces)
        assert metrics == pytest.approx(whole, abs=1e-5)
        assert torch.allclose(gradient, other, atol=1e-6, rtol=0)


@pytest.mark.parametrize("settings", [{}, {"lora": True}])
def test_the_reference_is_the_model_as_it_begins_and_the_first_loss_log_2(
    tmp_path: Path, data: Path, settings: dict[str, Any]
):
    config = config_with(save_tiny(tmp_path / "m"), data, microbatch_tokens=64, **settings)
    state, plain = dpo.start(config), load_causal_lm(tmp_path / "m")
    for pairs, reference in ((state.pairs, state.reference), (state.held_out, state.held_out_reference)):
        for pair, found in zip(pairs, reference.tolist(), strict=True):
            wanted = [by_hand(plain, pair.chosen, pair.n_prompt), by_hand(plain, pair.rejected, pair.n_prompt)]
            assert found == pytest.approx(wanted, abs=1e-4)
    before = state.reference.clone()
    rows = list(dpo.iterate(config, run_in(tmp_path / "run"), state))
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert rows[-1]["loss"] < 0.9 * math.log(2)
    assert torch.equal(state.reference, before)


def test_poisoned_padding_changes_nothing(tmp_path: Path, data: Path, monkeypatch: Any):
    config = config_with(save_tiny(tmp_path / "m"), data)
    policy = causal_policy(config)
    clean = dpo.score_pairs(config, policy, PAIRS)
    plain = dpo.in_rows

    def poisoned(*arguments: Any) -> Any:
        rows = plain(*arguments)
        assert bool((rows.text < 0).any())
        return rows._replace(tokens=torch.where(rows.text < 0, 33, rows.tokens))

    monkeypatch.setattr(dpo, "in_rows", poisoned)
    assert torch.equal(dpo.score_pairs(config, policy, PAIRS), clean)


# --- whole runs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"lora": True, "lora_rank": 4}])
def test_resuming_is_exact(tmp_path: Path, data: Path, settings: dict[str, Any]):
    config = config_with(save_tiny(tmp_path / "m"), data, checkpoint_every=5, **settings)
    whole, halves = run_in(tmp_path / "whole"), run_in(tmp_path / "halves")
    state = dpo.start(config)
    rows = list(dpo.iterate(config, whole, state))
    first = dpo.start(config)
    part = [row for row, _ in zip(dpo.iterate(config, halves, first), range(5), strict=False)]
    second = dpo.restore(config, newest_checkpoint(halves.checkpoints))
    assert torch.equal(second.reference, state.reference)
    part += list(dpo.iterate(config, halves, second))
    for name in ("loss", "grad_norm", "margin_mean", "held_out_loss", "held_out_accuracy"):
        assert [row[name] for row in part] == [row[name] for row in rows]
    ours, theirs = (dict(each.policy.named_parameters()) for each in (state, second))
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("llama", {}), ("gpt2", {"lora": True, "learning_rate": 1e-2, "gradient_checkpointing": True})],
)
def test_chosen_answers_rise_over_rejected_ones(tmp_path: Path, data: Path, kind: Kind, settings: dict[str, Any]):
    config = config_with(save_tiny(tmp_path / "m", kind), data, n_epochs=8, beta=0.5, **settings)
    run, state = run_in(tmp_path / "run"), dpo.start(config)
    assert "not kept in memory" in dpo.plan(config, state)["reference"]
    rows = list(dpo.iterate(config, run, state))
    assert rows[-1]["accuracy"] == rows[-1]["held_out_accuracy"] == 1.0
    assert rows[-1]["chosen_log_ratio"] > rows[-1]["rejected_log_ratio"] + 1.0
    facts = dpo.finish(config, run, state)
    assert facts["held-out accuracy"].startswith("100.0 %")
    saved, before = load_causal_lm(run.path), load_causal_lm(tmp_path / "m")
    pair = state.held_out[0]
    gaps = [
        by_hand(model, pair.chosen, pair.n_prompt) - by_hand(model, pair.rejected, pair.n_prompt)
        for model in (before, saved)
    ]
    assert gaps[1] > gaps[0] + 1.0


# --- bad inputs -------------------------------------------------------------------------------------------------


def test_data_is_checked_before_weights_are_loaded(tmp_path: Path, data: Path):
    model = save_tiny(tmp_path / "m")
    (model / "model.safetensors").unlink()
    with pytest.raises(UserError, match="dpo needs model"):
        dpo.start(DPOConfig(data=str(data)))
    with pytest.raises(UserError, match="rows have more than max_length = 5"):
        dpo.start(config_with(model, data, max_length=5))
    data.write_text('{"prompt": "the", "chosen": "cat"}\n')
    with pytest.raises(UserError, match="no column 'rejected'"):
        dpo.start(config_with(model, data))


def test_bad_settings():
    with pytest.raises(UserError, match="beta is 0"):
        DPOConfig(beta=0.0)
    with pytest.raises(UserError, match=r"label_smoothing is 0\.5"):
        DPOConfig(label_smoothing=0.5)


def test_a_model_that_gives_nan_is_told_before_training(tmp_path: Path, data: Path):
    config = config_with(save_tiny(tmp_path / "m"), data)
    policy = causal_policy(config)
    with torch.no_grad():
        policy.actor.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match="4 of 4 pairs a probability of 0 or NaN"):
        dpo.score_pairs(config, policy, PAIRS)
