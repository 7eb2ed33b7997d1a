"""Supervised fine-tuning: its loss by hand, what must not change it, resuming, learning, and bad inputs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from proximo.algorithms.adam import FlatAdam
from proximo.errors import UserError
from proximo.models.folders import load_causal_lm
from proximo.runs.checkpoint import newest_checkpoint
from proximo.runs.directory import RunDirectory
from proximo.training import sft, supervised
from proximo.training.config import settings_of, with_settings
from proximo.training.sft import SFTConfig
from proximo.training.texts import Text, in_rows, packed_rows, token_log_probs
from tests.tiny_language import SPECIAL, WORDS, Kind, save_tiny

VOCABULARY = len(SPECIAL + WORDS)
TEXTS = [Text([7, 8, 9, 2], 1), Text([10, 11, 12, 13, 14, 2], 3), Text([15, 2], 0), Text([20, 21, 22, 23, 2], 2)]


def sentences(n: int) -> list[dict[str, str]]:
    """Different prompts, each with words that follow from it by no rule."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for number in range(n):
        words = [WORDS[int(i)] for i in torch.randint(len(WORDS), (4,), generator=generator)]
        rows.append({"prompt": f"{WORDS[number % 20]} {WORDS[20 + number // 20]}", "completion": " ".join(words)})
    return rows


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in sentences(20)))
    return path


def config_with(model: Path, data: Path, **settings: Any) -> SFTConfig:
    common = dict(model=str(model), data=str(data), batch_size=5, n_epochs=2, threads=1, learning_rate=1e-2)
    return with_settings(SFTConfig(), common | settings, where="test")


def run_in(folder: Path) -> RunDirectory:
    folder.mkdir()
    return RunDirectory(folder)


def loss_and_gradient(policy: Any, texts: list[Text], pieces: list[list[list[int]]]) -> tuple[float, torch.Tensor]:
    optimizer = FlatAdam(policy, learning_rate=0.1)
    n_scored = sum(text.n_scored for text in texts)
    sums = supervised.accumulate_gradients(
        optimizer, pieces, lambda piece: sft._shares(policy, texts, n_scored, "cpu", piece)
    )
    return sums["loss"], optimizer.gradient.clone()


def padded(*pieces: list[int]) -> list[list[list[int]]]:
    return [[[number] for number in piece] for piece in pieces]


# --- the loss ---------------------------------------------------------------------------------------------------


def test_a_model_that_knows_nothing_has_the_loss_log_v(tmp_path: Path, data: Path):
    policy = sft.causal_policy(config_with(save_tiny(tmp_path / "m"), data))
    with torch.no_grad():
        policy.actor.lm_head.weight.zero_()
    loss, _ = loss_and_gradient(policy, TEXTS, padded([0, 1, 2, 3]))
    assert loss == pytest.approx(math.log(VOCABULARY), abs=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_loss_is_the_mean_over_all_tokens_of_completions(tmp_path: Path, data: Path, kind: Kind):
    policy = sft.causal_policy(config_with(save_tiny(tmp_path / "m", kind), data))
    plain = load_causal_lm(tmp_path / "m")
    found = []
    for text in TEXTS:  # one by one, without padding
        log_p = plain(torch.tensor([list(text.token_ids)])).logits[0].detach().log_softmax(-1)
        found += [float(log_p[t - 1, text.token_ids[t]]) for t in range(max(1, text.scored_from), len(text.token_ids))]
    assert len(found) == 3 + 3 + 1 + 3
    loss, _ = loss_and_gradient(policy, TEXTS, padded([0, 1, 2, 3]))
    assert loss == pytest.approx(-sum(found) / len(found), abs=1e-5)


def test_completion_only_or_everything(tmp_path: Path, data: Path):
    model = save_tiny(tmp_path / "m")
    examples = sft.start(config_with(model, data, hold_out=0.0)).examples[:1]  # two of prompt, four, EOS
    assert sft._texts(config_with(model, data), examples)[0].n_scored == 5
    assert sft._texts(config_with(model, data, completion_only=False), examples)[0].n_scored == 6


def test_microbatches_change_nothing(tmp_path: Path, data: Path):
    policy = sft.causal_policy(config_with(save_tiny(tmp_path / "m"), data))
    whole, gradient = loss_and_gradient(policy, TEXTS, padded([0, 1, 2, 3]))
    for pieces in ([[0, 1], [2, 3]], [[0], [1], [2], [3]]):
        loss, other = loss_and_gradient(policy, TEXTS, padded(*pieces))
        assert loss == pytest.approx(whole, abs=1e-6)
        assert torch.allclose(gradient, other, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_and_padded_agree(tmp_path: Path, data: Path, kind: Kind, attention: str):
    policy = sft.causal_policy(config_with(save_tiny(tmp_path / "m", kind), data))
    policy.actor.set_attn_implementation(attention)
    loss, gradient = loss_and_gradient(policy, TEXTS, padded([0, 1, 2, 3]))
    for rows in ([[0, 1, 2, 3]], [[3, 0], [2, 1]]):
        packed_loss, packed_gradient = loss_and_gradient(policy, TEXTS, [rows])
        assert packed_loss == pytest.approx(loss, abs=1e-5)
        assert torch.allclose(gradient, packed_gradient, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rows", [[[0], [1], [2], [3]], [[0, 1], [3, 2]]])
def test_poisoned_padding_changes_nothing(tmp_path: Path, data: Path, rows: list[list[int]]):
    policy = sft.causal_policy(config_with(save_tiny(tmp_path / "m"), data))
    laid = in_rows(TEXTS, rows, "cpu")
    assert bool((laid.text < 0).any())
    poisoned = laid._replace(tokens=torch.where(laid.text < 0, 33, laid.tokens))
    assert torch.equal(token_log_probs(policy, laid), token_log_probs(policy, poisoned))


def test_packing_fills_rows():
    assert packed_rows([5, 3, 2, 4, 1], 6) == [[0, 4], [3, 2], [1]]


# --- the order of rows and the learning rate --------------------------------------------------------------------


def test_every_row_once_per_epoch_in_another_order():
    config = SFTConfig(batch_size=3)
    epochs = [[row for i in range(3) for row in supervised.rows_of(config, 3 * e + i, 10)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert epochs[0] != epochs[1]


def test_learning_rates():
    def rates(schedule: str, warmup: float) -> list[float]:
        settings = dict(learning_rate=1.0, learning_rate_schedule=schedule, warmup_fraction=warmup)
        config = with_settings(SFTConfig(), settings, where="test")
        return [supervised.learning_rate_at(config, i, 4) for i in range(4)]

    assert rates("constant", 0.0) == [1, 1, 1, 1]
    assert rates("linear", 0.0) == [1, 0.75, 0.5, 0.25]
    assert rates("linear", 0.25) == pytest.approx([1 / 2, 1, 2 / 3, 1 / 3])
    assert rates("cosine", 0.0) == pytest.approx([1, 0.5 + math.sqrt(2) / 4, 0.5, 0.5 - math.sqrt(2) / 4])


def test_rows_of_one_prompt_are_held_out_together():
    rows = list(range(20))
    learned, kept_out = supervised.held_out(rows, [row // 2 for row in rows], 0.3, seed=1)
    assert sorted(learned + kept_out) == rows
    assert len(kept_out) == 6
    assert not {row // 2 for row in learned} & {row // 2 for row in kept_out}
    assert supervised.held_out([1, 2], ["a", "a"], 0.5, seed=0) == ([1, 2], [])
    assert supervised.held_out([1, 2], ["a", "b"], 0.0, seed=0) == ([1, 2], [])


# --- whole runs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"packing": True, "max_length": 16}, {"lora": True, "lora_rank": 4}])
def test_resuming_is_exact(tmp_path: Path, data: Path, settings: dict[str, Any]):
    config = config_with(save_tiny(tmp_path / "m", "gpt2"), data, checkpoint_every=3, **settings)
    whole, halves = run_in(tmp_path / "whole"), run_in(tmp_path / "halves")
    state = sft.start(config)
    rows = list(sft.iterate(config, whole, state))
    assert len(rows) == 8

    first = sft.start(config)
    part = [row for row, _ in zip(sft.iterate(config, halves, first), range(3), strict=False)]
    second = sft.restore(config, newest_checkpoint(halves.checkpoints))
    assert second.iteration == 3
    part += list(sft.iterate(config, halves, second))
    assert [row["loss"] for row in part] == [row["loss"] for row in rows]
    assert [row["held_out_loss"] for row in part] == [row["held_out_loss"] for row in rows]
    ours, theirs = (dict(each.policy.named_parameters()) for each in (state, second))
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("settings", [{}, {"lora": True, "gradient_checkpointing": True, "n_epochs": 60}])
def test_twenty_sentences_are_memorized_and_saved(tmp_path: Path, data: Path, settings: dict[str, Any]):
    model = save_tiny(tmp_path / "m", width=32)
    common = dict(n_epochs=50, hold_out=0.0, batch_size=20, learning_rate=3e-2)
    config = config_with(model, data, **(common | settings))
    run, state = run_in(tmp_path / "run"), sft.start(config)
    assert "20 rows" in sft.plan(config, state)["data"]
    rows = list(sft.iterate(config, run, state))
    assert rows[0]["loss"] > 3.0
    assert rows[-1]["loss"] < 0.2
    assert rows[-1]["held_out_loss"] is None
    assert len((run.metrics_path).read_text().splitlines()) == len(rows) == rows[-1]["n_iterations"] == config.n_epochs

    facts = sft.finish(config, run, state)
    assert facts["model"] == str(run.path)
    again, example = load_causal_lm(run.path), state.examples[0]
    with torch.no_grad():
        said = again(torch.tensor([example.token_ids])).logits[0].argmax(-1).tolist()
    assert said[example.n_prompt - 1 : -1] == example.token_ids[example.n_prompt :]


# --- bad inputs -------------------------------------------------------------------------------------------------


def test_data_and_model_are_checked_before_weights_are_loaded(tmp_path: Path, data: Path, monkeypatch: Any):
    model = save_tiny(tmp_path / "m")
    (model / "model.safetensors").unlink()  # whoever gets to the weights says so
    with pytest.raises(UserError, match="sft needs model"):
        sft.start(SFTConfig())
    with pytest.raises(UserError, match=r"max_length is 100, but .* at most 64"):
        sft.start(config_with(model, data, max_length=100))
    with pytest.raises(UserError, match="20 of 20 rows have more than max_length = 3"):
        sft.start(config_with(model, data, max_length=3))
    (tmp_path / "bad.jsonl").write_text('{"prompts": "a", "completion": "b"}\n')
    with pytest.raises(UserError, match="no column 'prompt'"):
        sft.start(config_with(model, tmp_path / "bad.jsonl"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 20}))
    with pytest.raises(UserError, match="knows only 20"):
        sft.start(config_with(model, data))


def test_bad_settings():
    with pytest.raises(UserError, match="packing needs max_length"):
        SFTConfig(packing=True)
    with pytest.raises(UserError, match="hold_out is 1"):
        SFTConfig(hold_out=1)
    with pytest.raises(UserError, match="batch_size is 0"):
        SFTConfig(batch_size=0)
    assert {"model", "lora_rank", "packing"} <= settings_of(SFTConfig()).keys()


def test_other_data_is_not_resumed_with(tmp_path: Path, data: Path):
    config = config_with(save_tiny(tmp_path / "m"), data)
    run, state = run_in(tmp_path / "run"), sft.start(config)
    sft.save(config, run, state)
    data.write_text(data.read_text().replace("cat", "dog"))
    with pytest.raises(UserError, match="other data"):
        sft.restore(config, newest_checkpoint(run.checkpoints))


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path: Path, data: Path):
    config = config_with(save_tiny(tmp_path / "m"), data)
    state = sft.start(config)
    with torch.no_grad():
        state.policy.actor.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"in iteration 4, 4 times in a row: (.|\n)*lower learning_rate"):
        list(sft.iterate(config, run_in(tmp_path / "run"), state))
