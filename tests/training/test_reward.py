"""The reward model: its loss by hand, its scale, saving, and how it scores."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from proximo.algorithms.adam import FlatAdam
from proximo.collect.data import Pair
from proximo.collect.reward_model import RewardModel, last_scores, score_rows
from proximo.collect.tokens import right_padded
from proximo.errors import UserError
from proximo.models.folders import REWARD_SCALE, load_scalar_model
from proximo.runs.checkpoint import newest_checkpoint
from proximo.runs.directory import RunDirectory
from proximo.training import reward, supervised
from proximo.training.config import with_settings
from proximo.training.reward import RewardConfig
from tests.tiny_language import Kind, save_tiny, save_tiny_scalar, tiny_scalar_model, tiny_tokenizer

PAIRS = [
    Pair([7, 8, 9, 2], [7, 10, 2], 1, 0.0),
    Pair([11, 12, 2], [11, 13, 14, 15, 16, 2], 1, 0.5),
    Pair([17, 18, 19, 2], [17, 20, 2], 1, 0.0),
    Pair([21, 22, 23, 24, 2], [21, 25, 26, 2], 1, 2.0),
]
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


def config_with(model: Path, data: Path, **settings: Any) -> RewardConfig:
    common = dict(
        model=str(model), data=str(data), batch_size=6, n_epochs=4, threads=1, learning_rate=1e-2, hold_out=0.2
    )
    return with_settings(RewardConfig(), common | settings, where="test")


def run_in(folder: Path) -> RunDirectory:
    folder.mkdir()
    return RunDirectory(folder)


def metrics_and_gradient(model: Any, pieces: list[list[int]]) -> tuple[dict[str, float], torch.Tensor]:
    optimizer = FlatAdam(model, learning_rate=0.1)
    config = RewardConfig(centring_coef=0.1)
    sums = supervised.accumulate_gradients(optimizer, pieces, lambda piece: reward._shares(config, model, PAIRS, piece))
    return sums, optimizer.gradient.clone()


# --- the loss ---------------------------------------------------------------------------------------------------


def test_a_head_of_zeros_gives_the_loss_log_2_and_margins_add_to_it():
    model = tiny_scalar_model()
    with torch.no_grad():
        model.score.weight.zero_()
    metrics, _ = metrics_and_gradient(model, [[0, 1, 2, 3]])
    wanted = (2 * math.log(2) + math.log(1 + math.exp(0.5)) + math.log(1 + math.exp(2.0))) / 4
    assert metrics["loss"] == pytest.approx(wanted, abs=1e-6)
    assert (metrics["accuracy"], metrics["score_mean"], metrics["margin_mean"]) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_metrics_are_those_of_the_scores_at_the_last_tokens(kind: Kind):
    model = tiny_scalar_model(kind)

    def score(ids: list[int]) -> float:  # as transformers itself does it, one by one
        return float(model(torch.tensor([ids])).logits.detach())

    scores = [(score(pair.chosen), score(pair.rejected)) for pair in PAIRS]
    metrics, _ = metrics_and_gradient(model, [[0, 1, 2, 3]])
    losses = [
        math.log(1 + math.exp(-(c - r - pair.margin))) + 0.1 * (c + r) ** 2
        for (c, r), pair in zip(scores, PAIRS, strict=True)
    ]
    assert metrics["loss"] == pytest.approx(sum(losses) / 4, abs=1e-5)
    assert metrics["accuracy"] == sum(c > r for c, r in scores) / 4
    assert metrics["score_mean"] == pytest.approx(sum(c + r for c, r in scores) / 8, abs=1e-5)
    assert metrics["margin_mean"] == pytest.approx(sum(c - r for c, r in scores) / 4, abs=1e-5)


def test_microbatches_change_nothing():
    model = tiny_scalar_model()
    whole, gradient = metrics_and_gradient(model, [[0, 1, 2, 3]])
    for pieces in ([[0, 1], [2, 3]], [[3, 1, 0], [2]], [[0], [1], [2], [3]]):
        metrics, other = metrics_and_gradient(model, pieces)
        assert metrics == pytest.approx(whole, abs=1e-6)
        assert torch.allclose(gradient, other, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_poisoned_padding_changes_nothing(kind: Kind):
    model = tiny_scalar_model(kind)
    rows = reward.texts_of(PAIRS)
    clean, poisoned = (last_scores(model, *right_padded(rows, pad=pad)) for pad in (0, 33))
    assert torch.equal(clean, poisoned)
    alone = torch.cat([last_scores(model, *right_padded([row])) for row in rows])
    assert torch.allclose(clean, alone, atol=1e-5)


# --- whole runs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"lora": True, "lora_rank": 4}])
def test_resuming_is_exact(tmp_path: Path, data: Path, settings: dict[str, Any]):
    config = config_with(save_tiny(tmp_path / "m"), data, checkpoint_every=5, **settings)
    whole, halves = run_in(tmp_path / "whole"), run_in(tmp_path / "halves")
    state = reward.start(config)
    rows = list(reward.iterate(config, whole, state))
    first = reward.start(config)
    part = [row for row, _ in zip(reward.iterate(config, halves, first), range(5), strict=False)]
    second = reward.restore(config, newest_checkpoint(halves.checkpoints))
    part += list(reward.iterate(config, halves, second))
    for name in ("loss", "grad_norm", "held_out_loss", "held_out_accuracy"):
        assert [row[name] for row in part] == [row[name] for row in rows]
    ours, theirs = (dict(each.model.named_parameters()) for each in (state, second))
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {}),
        ("gpt2", {"lora": True, "lora_rank": 4, "gradient_checkpointing": True}),
        ("llama", {"lora": True}),
    ],
)
def test_pairs_are_told_apart_and_the_model_is_saved(tmp_path: Path, data: Path, kind: Kind, settings: dict[str, Any]):
    config = config_with(save_tiny(tmp_path / "m", kind), data, n_epochs=8, **settings)
    run, state = run_in(tmp_path / "run"), reward.start(config)
    assert reward.plan(config, state)["loss"].startswith("Bradley-Terry, no pairs with margins")
    rows = list(reward.iterate(config, run, state))
    assert rows[-1]["accuracy"] == rows[-1]["held_out_accuracy"] == 1.0
    assert rows[-1]["loss"] < 0.3 < rows[0]["loss"]
    facts = reward.finish(config, run, state)
    assert facts["held-out accuracy"].startswith("100.0 %")

    saved = load_file(run.path / "model.safetensors")
    assert torch.equal(saved["score.weight"], state.model.score.weight.detach())
    assert not any("lora" in name or "base_layer" in name for name in saved)
    assert json.loads((run.path / "config.json").read_text())["pad_token_id"] == 0
    loaded = RewardModel(run.path)
    pairs = state.held_out + state.pairs
    raw = score_rows(state.model, reward.texts_of(pairs), budget=None)
    assert torch.allclose(score_rows(loaded.model, reward.texts_of(pairs), budget=None), raw, atol=1e-5)
    scores = (score_rows(loaded.model, reward.texts_of(pairs), budget=None) - loaded.mean) / loaded.std
    assert float(scores.mean()) == pytest.approx(0.0, abs=1e-4)
    assert float(scores.std(correction=0)) == pytest.approx(1.0, abs=1e-4)


def test_without_adapters_everything_survives_bit_for_bit(tmp_path: Path, data: Path):
    config = config_with(save_tiny(tmp_path / "m"), data, n_epochs=1)
    run, state = run_in(tmp_path / "run"), reward.start(config)
    list(reward.iterate(config, run, state))
    reward.finish(config, run, state)
    loaded = dict(load_scalar_model(run.path).named_parameters())
    ours = dict(state.model.named_parameters())
    assert ours.keys() == loaded.keys()
    assert [name for name in ours if not torch.equal(ours[name], loaded[name])] == []


def test_a_fresh_head_comes_from_the_seed_and_a_reward_model_is_gone_on_with(tmp_path: Path, data: Path):
    model = save_tiny(tmp_path / "m")
    heads = [reward.start(config_with(model, data, seed=seed)).model.score.weight.detach() for seed in (1, 1, 2)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    trained = save_tiny_scalar(tmp_path / "r")
    state = reward.start(config_with(trained, data))
    assert torch.equal(state.model.score.weight.detach(), load_file(trained / "model.safetensors")["score.weight"])


def test_normalizing_on_other_answers_or_none(tmp_path: Path, data: Path):
    run = run_in(tmp_path / "run")
    config = config_with(save_tiny(tmp_path / "m"), data, normalize_on="chosen")
    state = reward.start(config)
    reward.finish(config, run, state)
    chosen = score_rows(state.model, [pair.chosen for pair in state.held_out + state.pairs], budget=None)
    assert RewardModel(run.path).mean == pytest.approx(float(chosen.mean()), abs=1e-5)
    reward.finish(config_with(tmp_path / "m", data, normalize_on="none"), run, state)
    assert (RewardModel(run.path).mean, RewardModel(run.path).std) == (0.0, 1.0)


# --- RewardModel ------------------------------------------------------------------------------------------------


def scaled(folder: Path, scale: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {REWARD_SCALE: scale}))
    return folder


def test_text_and_tokens_get_the_same_scores_whatever_the_pieces(tmp_path: Path):
    place = scaled(save_tiny_scalar(tmp_path / "r", chat=True), {"mean": 2.0, "std": 0.5})
    model, in_pieces = RewardModel(place), RewardModel(place, tokens_at_once=8)
    prompts: list[Any] = ["the cat", [{"role": "user", "content": "why ?"}]]
    rows = [[8, 9, 25, 2], [4, model.tokenizer.get_vocab()["why"], model.tokenizer.get_vocab()["?"], 5, 10, 2]]
    responses = [model.tokenizer.decode([25]), "dog"]
    values, problems = model(prompts, responses, {})
    assert problems == []
    raw = [float(model.model(torch.tensor([row])).logits.detach()) for row in rows]
    assert values == pytest.approx([(score - 2.0) / 0.5 for score in raw], abs=1e-5)
    assert in_pieces(prompts, responses, {}).values == pytest.approx(values, abs=1e-5)
    sampled = [(rows[0][:2], rows[0][2:]), (rows[1][:4], rows[1][4:])]
    assert model.score_texts(prompts, responses, [True, True], sampled).values == pytest.approx(values, abs=1e-5)
    assert model([], [], {}).values == []


def test_what_cannot_be_scored_is_none_and_told(tmp_path: Path):
    model = RewardModel(save_tiny_scalar(tmp_path / "r", "gpt2"))
    values, problems = model(["the", "the"], ["cat", "cat " * 70], {})
    assert values[0] is not None
    assert values[1] is None
    assert problems == ["response 1: 72 tokens with its prompt, more than the 64 that the reward model can read"]
    model.model.score.weight.fill_(torch.nan)
    assert model(["the"], ["cat"], {}).values == [None]
    assert "NaN" in model(["the"], ["cat"], {}).problems[0]
    with pytest.raises(UserError, match="no chat template"):
        model([[{"role": "user", "content": "the"}]], ["cat"], {})


def test_a_token_that_the_reward_model_does_not_know_costs_that_score_alone(tmp_path: Path):
    place, tokenizer = save_tiny_scalar(tmp_path / "r"), tiny_tokenizer()
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(place)
    model = RewardModel(place)
    values, problems = model(["the", "the"], ["zebra", "cat"], {})
    assert values[0] is None
    assert values[1] == pytest.approx(RewardModel(save_tiny_scalar(tmp_path / "s"))(["the"], ["cat"], {}).values[0])
    known = len(tokenizer) - 1
    said = f"its tokenizer gives the token id {known}, and the reward model knows only {known}"
    assert problems == [f"response 0: {said}"]


def test_same_tokens(tmp_path: Path):
    model = RewardModel(save_tiny_scalar(tmp_path / "r"))
    assert model.same_tokens(tiny_tokenizer())
    assert not model.same_tokens(tiny_tokenizer(chat=True))
    other = tiny_tokenizer()
    other.add_tokens(["another"])
    assert not model.same_tokens(other)


@pytest.mark.parametrize("scale", [{"mean": 0.0}, {"mean": 0.0, "std": 0.0}, {"mean": "a", "std": 1}, 3])
def test_a_damaged_scale_is_refused(tmp_path: Path, scale: Any):
    with pytest.raises(UserError, match=rf"{REWARD_SCALE} in the config\.json"):
        RewardModel(scaled(save_tiny_scalar(tmp_path / "r"), scale))


def test_recomputing_activations_gives_the_same_gradient_and_no_warning(tmp_path: Path, data: Path):
    def gradient(checkpointing: bool) -> tuple[torch.Tensor, int]:
        config = config_with(save_tiny(tmp_path / "m"), data, gradient_checkpointing=checkpointing)
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)  # of transformers, that the method is on its way out
            state = reward.start(config)
        entered: list[Any] = []
        layer = state.model.model.layers[0].self_attn
        layer.register_forward_hook(lambda *_: entered.append(1))
        reward._shares(config, state.model, state.pairs, range(len(state.pairs)))["loss"].backward()
        return torch.cat([p.grad.flatten() for p in state.model.parameters() if p.grad is not None]), len(entered)

    (plain, once), (again, twice) = gradient(False), gradient(True)
    torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-7)
    assert (once, twice) == (1, 2)


# --- bad inputs -------------------------------------------------------------------------------------------------


def test_data_is_checked_before_weights_are_loaded(tmp_path: Path, data: Path):
    model = save_tiny(tmp_path / "m")
    (model / "model.safetensors").unlink()
    with pytest.raises(UserError, match="reward needs data"):
        reward.start(RewardConfig(model=str(model)))
    with pytest.raises(UserError, match="rows have more than max_length = 5"):
        reward.start(config_with(model, data, max_length=5))
    data.write_text('{"prompt": "the", "chosen": "cat", "rejected": "cat"}\n')
    with pytest.raises(UserError, match="in all 1 rows chosen and rejected are the same"):
        reward.start(config_with(model, data))
    with pytest.raises(UserError, match="normalize_on is 'all'"):
        RewardConfig(normalize_on="all")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="centring_coef"):
        RewardConfig(centring_coef=-1.0)
