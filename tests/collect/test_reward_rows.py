"""What a reward model is given to read, token by token: the same by the ids that were sampled and by the text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models

from proximo.collect.data import PromptRow
from proximo.collect.generate import Responses, _rewarded, end_tokens, response_texts
from proximo.collect.reward_model import RewardModel, score_responses
from proximo.collect.rewards import WeightedReward
from proximo.collect.tokens import encode_completion
from tests.collect.answering import Told
from tests.tiny_language import save_tiny_scalar, tiny_model, tiny_tokenizer

EOS = 2


@pytest.fixture
def rows_read(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The rows that are scored; a score is the length of its row."""
    read: list[list[int]] = []

    def score(self: RewardModel, rows: list[list[int]]) -> torch.Tensor:
        read.extend(rows)
        return torch.tensor([float(len(row)) for row in rows])

    monkeypatch.setattr(RewardModel, "_score", score)
    return read


def responses_of(prompt: list[int], *sampled: tuple[list[int], bool]) -> Responses:
    """Responses to one prompt, and whether each ended before the limit."""
    longest = max(len(ids) for ids, _ in sampled)
    tokens = torch.tensor([prompt + ids + [0] * (longest - len(ids)) for ids, _ in sampled])
    response = torch.zeros_like(tokens, dtype=torch.bool)
    for row, (ids, _) in enumerate(sampled):
        response[row, len(prompt) : len(prompt) + len(ids)] = True
    attention = response.clone()
    attention[:, : len(prompt)] = True
    ended = torch.tensor([over for _, over in sampled])
    return Responses(tokens, attention, response, torch.zeros(tokens.shape), ended)


def both_ways(
    model: RewardModel, tokenizer: Any, prompt: Any, ids: list[int], responses: Responses, ends: list[int], stop: Any
) -> None:
    """Have responses scored from the sampled ids, then from their text alone."""
    texts = response_texts(tokenizer, responses, ends, stop)
    asked = [PromptRow(prompt, ids, {})] * len(texts)
    _rewarded(model, tokenizer, asked, texts, responses, ends)
    model.same_tokens = lambda other: False  # type: ignore[method-assign]
    _rewarded(model, tokenizer, asked, texts, responses, ends)


def test_eos_is_read_exactly_where_a_response_ended_by_itself(rows_read, tmp_path: Path):
    tokenizer = tiny_tokenizer()
    model = RewardModel(save_tiny_scalar(tmp_path / "r"))
    stop = tokenizer.decode([30])
    responses = responses_of([8, 9], ([20, 21, EOS], True), ([22, 23, 24], False), ([25, 26, 30], True))
    both_ways(model, tokenizer, tokenizer.decode([8, 9]), [8, 9], responses, [EOS], (stop,))
    assert rows_read == 2 * [[8, 9, 20, 21, EOS], [8, 9, 22, 23, 24], [8, 9, 25, 26]]


def test_a_response_that_is_nothing_but_a_stop_string_leaves_the_prompt(rows_read, tmp_path: Path):
    tokenizer = tiny_tokenizer()
    model = RewardModel(save_tiny_scalar(tmp_path / "r"))
    responses = responses_of([8, 9], ([30], True), ([EOS], True))
    both_ways(model, tokenizer, tokenizer.decode([8, 9]), [8, 9], responses, [EOS], (tokenizer.decode([30]),))
    assert rows_read == 2 * [[8, 9], [8, 9, EOS]]


def letters() -> Any:
    """A token per letter, and "b" with "c" in one token, which its own rules never make of a text."""
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE({letter: number for number, letter in enumerate("abcde")} | {"bc": 5}, []))
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", padding_side="left")


def test_a_stop_string_that_ends_within_a_token_is_cut_in_the_text(rows_read, tmp_path: Path):
    place = save_tiny_scalar(tmp_path / "r")
    letters().save_pretrained(place)
    model = RewardModel(place)
    tokenizer = model.tokenizer
    responses = responses_of([3], ([0, 5], True), ([4, 5, 2], True))
    both_ways(model, tokenizer, "d", [3], responses, [6], ("c",))
    # "abc" is cut to "ab", although "bc" is one token: there is no way but to write a and b anew
    assert rows_read == 2 * [[3, 0, 1], [3, 4, 1]]


def turns(*, special: bool) -> Any:
    """A tokenizer whose turns end with a token of their own, and EOS after a further one, as Gemma's and Phi-3's do."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<end>", special=True)])
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>", "<system>", "<end>"]})
    tokenizer.chat_template = (
        "{% for message in messages %}{{ '<' + message['role'] + '> ' + message['content'] + ' <end> . ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant> ' }}{% else %}{{ eos_token }}{% endif %}"
    )
    return tokenizer


@pytest.mark.parametrize("special", [True, False])
def test_what_follows_the_end_of_a_turn_in_training_is_there_to_be_read(rows_read, tmp_path: Path, special: bool):
    tokenizer = turns(special=special)
    end, dot = tokenizer.get_vocab()["<end>"], tokenizer.get_vocab()["."]
    place = save_tiny_scalar(tmp_path / "r")
    tokenizer.save_pretrained(place)
    prompt = [{"role": "user", "content": tokenizer.decode([20])}]
    ids = [4, 20, end, dot, 5]
    actor = tiny_model()
    actor.generation_config.eos_token_id = [end]
    responses = responses_of(ids, ([21, 22, end], True), ([23, 24, 25], False), ([26, 30], True))
    ends = end_tokens(actor, tokenizer)
    both_ways(RewardModel(place), tokenizer, prompt, ids, responses, ends, (tokenizer.decode([30]),))
    learned = ids + encode_completion(tokenizer, prompt, tokenizer.decode([21, 22]))
    assert learned == [*ids, 21, 22, end, dot, EOS]
    assert rows_read[::3] == 2 * [learned]
    assert rows_read[1::3] == 2 * [[*ids, 23, 24, 25]]
    assert rows_read[2::3] == 2 * [[*ids, 26]]


def test_after_a_text_the_end_of_a_turn_is_read_as_eos(rows_read, tmp_path: Path):
    tokenizer = turns(special=True)
    end = tokenizer.get_vocab()["<end>"]
    place = save_tiny_scalar(tmp_path / "r")
    tokenizer.save_pretrained(place)
    responses = responses_of([8], ([20, end], True))
    both_ways(RewardModel(place), tokenizer, tokenizer.decode([8]), [8], responses, [EOS, end], ())
    assert rows_read == 2 * [[8, 20, EOS]]


def test_tokens_are_read_as_they_were_sampled(rows_read, tmp_path: Path):
    place = save_tiny_scalar(tmp_path / "r")
    letters().save_pretrained(place)
    model = RewardModel(place)
    end = model.tokenizer.eos_token_id
    responses = responses_of([3], ([0, 5, end], True), ([5, 5], False))
    texts = response_texts(model.tokenizer, responses, [end], ())
    _rewarded(model, model.tokenizer, [PromptRow("d", [3], {})] * 2, texts, responses, [end])
    assert rows_read == [[3, 0, 5, end], [3, 5, 5]]


def test_an_eos_that_ends_nothing_is_not_read(rows_read, tmp_path: Path):
    tokenizer = tiny_tokenizer()
    model = RewardModel(save_tiny_scalar(tmp_path / "r"))
    responses = responses_of([8], ([20, EOS, 21, EOS], False))  # stop_at_eos is false
    both_ways(model, tokenizer, tokenizer.decode([8]), [8], responses, [EOS], ())
    assert rows_read == 2 * [[8, 20, 21]]


def test_the_models_of_a_sum_are_told_which_ended_and_others_need_not_know(rows_read, tmp_path: Path):
    tokenizer = tiny_tokenizer()
    reward = WeightedReward([RewardModel(save_tiny_scalar(tmp_path / "r")), Told(10.0)], [1.0, 1.0])
    texts = [tokenizer.decode([20]), tokenizer.decode([21])]
    found = score_responses(reward, [tokenizer.decode([8])] * 2, texts, {}, [True, False])
    assert rows_read == [[8, 20, EOS], [8, 21]]
    assert found.values == [13.0, 12.0]
