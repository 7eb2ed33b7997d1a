"""How responses are scored: who is asked what, in which order, and what a missing score is."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from proximo.collect import generate as module
from proximo.collect.generate import (
    GenerationConfig,
    generate,
)
from proximo.collect.rewards import CallableReward, Scores, WeightedReward
from proximo.errors import UserError
from proximo.models.language import LanguagePolicy
from tests.collect.answering import (
    PROMPTS,
    TOKENIZER,
    Told,
    policy_of,
    rows_of,
    seeded,
)
from tests.tiny_language import tiny_model


def test_the_reward_is_asked_in_the_order_of_rows_and_groups_are_those_of_a_prompt():
    reward = Told(*range(10))
    config = GenerationConfig(max_new_tokens=4)
    batch, answers = generate(policy_of(), TOKENIZER, rows_of(), reward, config, seeded(), n_per_prompt=2)
    ((prompts, texts, columns),) = reward.asked
    assert columns == {"number": [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]}
    assert batch.group is not None
    assert batch.group.tolist() == columns["number"]
    assert prompts == answers.prompts == [row.prompt for row in rows_of() for _ in range(2)]
    assert texts == answers.texts
    assert batch.rewards.sum(1).tolist() == [float(k) for k in range(10)]
    for row in range(10):
        first = int(batch.mask[row].nonzero()[0])
        seen = batch.observations["tokens"][row, : first + 1][batch.observations["attention"][row, : first + 1]]
        assert seen.tolist() == PROMPTS[row // 2]


def test_nan_and_none_and_what_raises_are_no_score_and_zero_is_one():
    def reward(prompts: list[Any], responses: list[str], number: list[int]) -> list[Any]:
        del prompts, responses
        if 4 in number:
            raise KeyError("four")
        return [[0.0, float("nan"), None, float("inf")][k] for k in number]

    source = CallableReward(reward)
    batch, answers = generate(policy_of(), TOKENIZER, rows_of(), source, GenerationConfig(max_new_tokens=4), seeded())
    assert answers.scores == [0.0, None, None, None, None]
    assert batch.mask.any(1).tolist() == [True, False, False, False, False]
    assert "four" in " ".join(answers.problems)
    source.close()


def test_a_reward_that_reads_the_same_tokens_is_given_them():
    class Reader(Told):
        def same_tokens(self, tokenizer: Any) -> bool:
            return tokenizer is TOKENIZER

        def score_texts(self, prompts: Any, texts: Any, ended: Any, sampled: Any) -> Scores:
            self.told = (prompts, texts, ended)
            sums = [float(sum(prompt) + sum(response)) for prompt, response in sampled]
            return Scores([None if k in (1, 3) else each for k, each in enumerate(sums)], ["no idea"])

    config, reader = GenerationConfig(max_new_tokens=9), Reader()
    batch, answers = generate(policy_of(ends=2), TOKENIZER, rows_of(), reader, config, seeded(1))
    for row in (0, 2, 4):
        ids = PROMPTS[row] + batch.actions[row, batch.mask[row]].tolist()
        assert answers.scores[row] == float(sum(ids))
    assert (answers.scores[1], answers.scores[3], answers.problems) == (None, None, ["no idea"])
    assert reader.told == (answers.prompts, answers.texts, answers.ended)
    assert len(set(answers.ended)) == 2


def test_scoring_in_parts_is_scoring(monkeypatch):
    config = GenerationConfig(max_new_tokens=6)
    whole, _ = generate(policy_of(), TOKENIZER, rows_of(), Told(), config, seeded(), reward_beta=0.1)
    monkeypatch.setattr(module, "TOKENS_AT_ONCE", 25)
    parts, _ = generate(policy_of(), TOKENIZER, rows_of(), Told(), config, seeded(), reward_beta=0.1)
    for name in ("rewards", "values", "next_values", "ref_log_probs"):
        found, expected = (getattr(batch, name)[whole.mask] for batch in (parts, whole))  # elsewhere nobody looks
        torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-5)


def test_without_a_reference_there_is_no_kl():
    policy = policy_of()
    config = GenerationConfig(max_new_tokens=3)
    batch, answers = generate(policy, TOKENIZER, rows_of(), Told(), config, seeded(), with_reference=False)
    assert batch.ref_log_probs is None
    assert answers.kl_to_reference is None
    with pytest.raises(ValueError, match="needs the reference"):
        generate(policy, TOKENIZER, rows_of(), Told(), config, seeded(), with_reference=False, reward_beta=0.1)
    lonely = LanguagePolicy(tiny_model(), sharing="separate")
    with pytest.raises(ValueError, match="no reference in memory"):
        generate(lonely, TOKENIZER, rows_of(), Told(), config, seeded())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", 0.0),
        ("missing_eos_penalty", -1.0),
        ("generation_batch_size", 0),
        ("truncation", "cut"),
    ],
)
def test_an_impossible_setting_is_refused_by_name_with_its_value(name, value):
    with pytest.raises(UserError, match=rf"^{name} is {value!r}"):
        dataclasses.replace(GenerationConfig(), **{name: value})


class Tokens:
    """A reward that reads token ids where it can, and says which way it was asked."""

    name = "tokens"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def same_tokens(self, tokenizer: object) -> bool:
        return tokenizer is TOKENIZER

    def score_texts(self, prompts: Any, texts: Any, ended: Any, sampled: Any) -> Scores:
        self.asked.append("tokens" if sampled else "text")
        return Scores([float(len(prompt) + len(response)) for prompt, response in sampled], [])

    def __call__(self, prompts: list, responses: list[str], columns: dict) -> Scores:
        self.asked.append("text")
        return Scores([0.0] * len(responses), [])

    def close(self) -> None:
        pass


def test_the_parts_of_a_sum_read_token_ids_too():
    first, second = Tokens(), Tokens()
    reward = WeightedReward([first, second], [1.0, 2.0])
    batch, answers = generate(policy_of(), TOKENIZER, rows_of(PROMPTS), reward, GenerationConfig(), seeded())
    assert first.asked == second.asked == ["tokens"]
    lengths = [len(row.token_ids) + n for row, n in zip(rows_of(PROMPTS), answers.n_tokens, strict=True)]
    assert answers.scores == [3.0 * length for length in lengths]
    assert batch.rewards.sum(1).tolist() == answers.scores
