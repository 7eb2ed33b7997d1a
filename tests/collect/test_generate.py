"""Sampling and the batch made of it: the shift by hand, ratios of 1, ends of every kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from proximo.collect import generate as generate_module
from proximo.collect.generate import (
    GenerationConfig,
    Responses,
    _assemble,
    _has_stop,
    draw,
    end_tokens,
    generate,
    response_texts,
    sample,
    token_texts,
)
from proximo.core.advantages import gae
from proximo.errors import UserError
from tests.collect.answering import (
    ENDS,
    HAND,
    PROMPTS,
    SCORED,
    TOKENIZER,
    VOCABULARY,
    Told,
    kinds,
    policy_of,
    rows_of,
    seeded,
)
from tests.tiny_language import WORDS, tiny_model, tiny_tokenizer

# --- the shift, by hand -------------------------------------------------------------------------------------------


def hand_batch(scores: list[float | None], **settings: Any) -> Any:
    config = GenerationConfig(max_new_tokens=3, **settings)
    return _assemble(HAND, SCORED, HAND.log_probs, scores, config, 0.2)


def advantages(batch: Any, gae_lambda: float = 0.5) -> Tensor:
    fields = (batch.rewards, batch.values, batch.next_values, batch.terminated, batch.done, batch.mask)
    return gae(*fields, gamma=1.0, gae_lambda=gae_lambda)


def test_the_score_stands_at_the_last_token_and_the_kl_at_every_one():
    batch = hand_batch([1.0, 2.0, 3.0])
    # log pi - log ref is 0.5, -1, 0.25: times 0.2 and subtracted; the score is on top of the last one
    assert batch.rewards[0].tolist() == pytest.approx([0.0, -0.1, 0.2, -0.05 + 1.0])
    assert batch.rewards[1].tolist() == pytest.approx([0.0, 0.0, -0.2 + 2.0, 0.0])
    assert batch.rewards[2].tolist() == pytest.approx([0.0, 0.0, 0.0, 3.0])
    assert batch.mask.tolist() == [[False, True, True, True], [False, True, True, False], [False, True, True, True]]
    assert batch.terminated.tolist() == batch.done.tolist()
    assert batch.done.tolist() == [[False, False, False, True], [False, False, True, False], [False] * 3 + [True]]
    # a step observes the text so far and acts by the next token
    assert batch.observations["tokens"][0].tolist() == [0, 7, 20, 21]
    assert batch.actions[0].tolist() == [7, 20, 21, 2]
    assert batch.log_probs[0].tolist() == [0.0, -1.0, -2.0, -3.0]


def test_gae_of_the_response_by_hand():
    found = advantages(hand_batch([1.0, 2.0, 3.0]))
    # row 0, V = 0.5, 0.2, 0.4: delta = -0.1 + 0.2 - 0.5, 0.2 + 0.4 - 0.2, 0.95 - 0.4
    # A = 0.55 at the last, 0.4 + 0.55 / 2, -0.4 + 0.675 / 2
    assert found[0].tolist() == pytest.approx([0.0, -0.0625, 0.675, 0.55])
    # row 1, V = 0.5, 0.25: delta = 0 + 0.25 - 0.5, 1.8 - 0.25; the pad after the end adds no further lambda
    assert found[1].tolist() == pytest.approx([0.0, -0.25 + 1.55 / 2, 1.55, 0.0])
    # row 2: delta = -0.3, 0.2, 2.6
    assert found[2].tolist() == pytest.approx([0.0, -0.3 + 1.5 / 2, 0.2 + 1.3, 2.6])


def test_a_response_cut_off_terminates_goes_on_by_the_critic_or_is_left_out():
    scores = [1.0, 2.0, 3.0]
    terminate, bootstrap, mask = (hand_batch(scores, truncation=how) for how in ("terminate", "bootstrap", "mask"))
    assert advantages(terminate)[2, 3].item() == pytest.approx(3.0 - 0.4)
    assert advantages(bootstrap)[2, 3].item() == pytest.approx(3.0 + 0.8 - 0.4)  # V of the whole text is 0.8
    assert bootstrap.done[2, 3]
    assert not bootstrap.terminated[2, 3]
    assert torch.equal(advantages(bootstrap)[:2], advantages(terminate)[:2])
    assert not mask.mask[2].any()
    assert torch.equal(mask.mask[:2], terminate.mask[:2])


def test_a_missing_end_token_costs_the_score():
    batch = hand_batch([1.0, 2.0, 3.0], missing_eos_penalty=1.5)
    plain = hand_batch([1.0, 2.0, 3.0])
    assert (plain.rewards - batch.rewards).tolist() == [[0.0] * 4, [0.0] * 4, [0.0, 0.0, 0.0, 1.5]]


def test_no_score_masks_the_response_and_zero_is_a_score():
    batch = hand_batch([0.0, None, 3.0])
    assert batch.mask.any(1).tolist() == [True, False, True]
    assert batch.rewards[0, 3].item() == pytest.approx(-0.05)
    assert torch.isfinite(advantages(batch)).all()


# --- ratios -------------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("n_per_prompt", [1, 4])
@pytest.mark.parametrize("at_once", [None, 6])
@pytest.mark.parametrize("prompts", [PROMPTS, [[7, 8], [9, 10], [11, 12]]], ids=["padded", "of one length"])
def test_first_ratios_are_one(kind, n_per_prompt, at_once, prompts):
    policy = policy_of(kind, temperature=0.7)
    config = GenerationConfig(max_new_tokens=9, temperature=0.7, generation_batch_size=at_once)
    batch, answers = generate(policy, TOKENIZER, rows_of(prompts), Told(), config, seeded(), n_per_prompt=n_per_prompt)
    assert len(set(answers.n_tokens)) > 1  # rows did leave on the way
    with torch.no_grad():
        new = policy.evaluate(batch)
    assert ((new.log_probs - batch.log_probs).exp() - 1)[batch.mask].abs().max() < 1e-5
    torch.testing.assert_close(new.values[batch.mask], batch.values[batch.mask], rtol=0.0, atol=1e-5)
    kl = torch.where(batch.mask, batch.log_probs - batch.ref_log_probs, 0.0).sum(1)
    assert answers.kl_to_reference == pytest.approx(kl.tolist(), abs=1e-5)


def with_other_attention(kind: str) -> Any:
    if kind == "eager":
        actor = tiny_model()
        actor.set_attn_implementation("eager")
        return actor
    import transformers

    shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.MistralConfig(
        vocab_size=VOCABULARY, num_key_value_heads=1, sliding_window=4, initializer_range=0.2, **shape
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.MistralForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["eager", "sliding window"])
@pytest.mark.parametrize(
    "prompts",
    [
        pytest.param(PROMPTS, id="padded"),
        pytest.param([[7, 8], [9, 10], [11, 12], [13, 14]], id="of one length"),
    ],
)
def test_first_ratios_are_one_with_other_attention(kind, prompts):
    policy = policy_of(actor=with_other_attention(kind))
    config = GenerationConfig(max_new_tokens=9)
    batch, _ = generate(policy, TOKENIZER, rows_of(prompts), Told(), config, seeded(), n_per_prompt=3)
    with torch.no_grad():
        ratio = (policy.evaluate(batch).log_probs - batch.log_probs).exp()
    assert (ratio - 1)[batch.mask].abs().max() < 1e-5


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_from_the_models_distribution_at_the_temperature(temperature):
    policy = policy_of(temperature=temperature)
    config = GenerationConfig(max_new_tokens=1, temperature=temperature)
    n = 3000
    responses = sample(policy, TOKENIZER, [[7, 8, 9], [10]], config, seeded(), n_per_prompt=n)
    for number, prompt in enumerate(([7, 8, 9], [10])):
        drawn = responses.tokens[number * n : (number + 1) * n, 3]
        found = torch.bincount(drawn, minlength=VOCABULARY) / n
        with torch.no_grad():
            exact = (policy.actor(input_ids=torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1)
        assert (found - exact).abs().sum() / 2 < 0.08  # greedy, or another temperature, is further away
        entropy = -(exact * exact.log()).sum()
        sampled = -responses.log_probs[number * n : (number + 1) * n, 3].mean()
        assert sampled.item() == pytest.approx(entropy.item(), abs=0.1)


# --- ends ---------------------------------------------------------------------------------------------------------


def check_rows(responses: Responses, prompts: list[list[int]], n: int, longest: int, ends: list[int]) -> None:
    """What holds of every row, however it was sampled."""
    start = max(map(len, prompts))
    for row in range(len(prompts) * n):
        prompt = prompts[row // n]
        places = responses.response[row].nonzero().squeeze(1).tolist()
        assert places == list(range(start, start + len(places)))
        tokens = responses.tokens[row, places].tolist()
        assert responses.tokens[row, responses.attention[row]].tolist() == prompt + tokens
        assert 1 <= len(tokens) <= longest
        assert not set(tokens[:-1]) & set(ends)
        assert bool(responses.ended[row]) == (tokens[-1] in ends)
        assert responses.ended[row] or len(tokens) == longest
    assert bool((responses.tokens[~responses.attention] == 0).all())
    assert bool((responses.log_probs[~responses.response] == 0).all())
    assert bool((responses.log_probs[responses.response] < 0).all())


@kinds
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("at_once", [None, 1, 4, 100])
def test_rows_hold_together_however_many_are_sampled_at_a_time(kind, n, at_once):
    config = GenerationConfig(max_new_tokens=6, generation_batch_size=at_once)
    responses = sample(policy_of(kind), TOKENIZER, PROMPTS, config, seeded(), n_per_prompt=n)
    check_rows(responses, PROMPTS, n, 6, ENDS)
    assert responses.ended.any()
    assert not responses.ended.all()
    assert responses.tokens.shape[1] <= 5 + 6


def test_the_seed_decides_and_nothing_else():
    policy, config = policy_of(), GenerationConfig(max_new_tokens=6)
    torch.manual_seed(1)
    one = sample(policy, TOKENIZER, PROMPTS, config, seeded(3))
    torch.manual_seed(2)
    other = sample(policy, TOKENIZER, PROMPTS, config, seeded(3))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(one.tokens, sample(policy, TOKENIZER, PROMPTS, config, seeded(4)).tokens)
    grouped = sample(policy, TOKENIZER, [[7, 8]], config, seeded(3), n_per_prompt=6)
    assert len({tuple(row) for row in grouped.tokens.tolist()}) > 3  # the answers of a group differ


def test_end_tokens_are_those_of_the_tokenizer_and_of_the_generation_settings():
    assert end_tokens(policy_of(ends=[5, 6]).actor, TOKENIZER) == [2, 5, 6]
    assert end_tokens(policy_of(ends=9).actor, TOKENIZER) == [2, 9]
    assert end_tokens(policy_of(ends=None).actor, TOKENIZER) == [2]


def test_end_tokens_are_tokens_like_others_where_they_are_not_to_stop():
    config = GenerationConfig(max_new_tokens=8, stop_at_eos=False)
    responses = sample(policy_of(), TOKENIZER, PROMPTS, config, seeded())
    assert responses.response.sum(1).tolist() == [8] * 5
    assert not responses.ended.any()
    assert torch.isin(responses.tokens[responses.response], torch.tensor(ENDS)).any()


def test_an_end_that_nothing_can_write_is_not_waited_for():
    endless = tiny_tokenizer()
    endless.eos_token = None

    def generated(ends: Any, **settings: Any) -> list[bool]:
        config = GenerationConfig(max_new_tokens=4, **settings)
        return generate(policy_of(ends=ends), endless, rows_of(), Told(), config, seeded())[1].ended

    with pytest.raises(UserError, match=r"EOS token, so no response could ever end\. .*stop_at_eos"):
        generated(None)
    assert generated(None, stop_at_eos=False) == [False] * 5
    assert any(generated(None, stop=WORDS[::2]))
    assert any(generated(ENDS))


def test_stop_strings_end_a_response_and_are_left_out_of_its_text():
    stop = (WORDS[0], " ".join(WORDS[1:3]), *WORDS[10:16])  # the second one is two tokens
    config = GenerationConfig(max_new_tokens=12, stop=stop)
    reward = Told()
    policy = policy_of(ends=None)
    batch, answers = generate(policy, TOKENIZER, rows_of(), reward, config, seeded(), n_per_prompt=4)
    assert 0 < sum(answers.ended) < 20
    for row in range(20):
        ids = batch.actions[row, batch.mask[row]].tolist()
        whole = TOKENIZER.decode(ids, skip_special_tokens=True)
        before = TOKENIZER.decode(ids[:-1], skip_special_tokens=True)
        stopped = any(word in whole for word in stop)
        assert answers.ended[row] == (stopped or ids[-1] == 2)
        assert not any(word in before for word in stop)
        assert not any(word in answers.texts[row] for word in stop)
        assert whole.startswith(answers.texts[row])
    assert reward.asked[0][1] == answers.texts


def test_texts_are_without_end_tokens_and_cut_before_a_stop_string():
    texts = response_texts(TOKENIZER, HAND, [2, 26], ())
    assert texts == [f"{WORDS[13]} {WORDS[14]}", WORDS[15], f"{WORDS[17]} {WORDS[18]}"]
    assert response_texts(TOKENIZER, HAND, [2, 26], (WORDS[14], WORDS[17])) == [f"{WORDS[13]} ", WORDS[15], ""]


class Spelling:
    """A tokenizer whose tokens are bytes, or words with a space that is left out at the beginning."""

    def __init__(self, *tokens: bytes) -> None:
        self.tokens = tokens

    def decode(self, ids: list[int]) -> str:
        return b"".join(self.tokens[index] for index in ids).decode(errors="replace").removeprefix(" ")


@pytest.mark.parametrize(
    ("tokens", "texts"),
    [
        ((b" the", b" cat", b"s", b" </s>"), ["the", " cat", "s", " </s>"]),
        ((b" a", b"\xe2", b"\x82", b"\xac", b" b"), ["a", "", "", "\N{EURO SIGN}", " b"]),
        ((b" a", b"\xe2"), ["a", "\N{REPLACEMENT CHARACTER}"]),
        ((b" ", b" "), ["", " "]),
        ((), []),
    ],
)
def test_texts_of_tokens_join_to_the_whole_text(tokens: tuple[bytes, ...], texts: list[str]):
    tokenizer = Spelling(*tokens)
    found = token_texts(tokenizer, range(len(tokens)))
    assert found == texts
    assert "".join(found) == tokenizer.decode(list(range(len(tokens))))


def test_tokens_are_drawn_as_often_as_their_probabilities_say():
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05, 0.0])
    n = 40_000
    rows = probabilities.log().expand(n, -1)
    drawn = draw(rows, torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn, minlength=6)
    assert counts[probabilities == 0].sum() == 0  # what cannot be is never drawn, the first and the last place included
    expected = n * probabilities[probabilities > 0]
    chi_squared = float(((counts[probabilities > 0] - expected) ** 2 / expected).sum())
    assert chi_squared < 16.3  # three degrees of freedom: exceeded once in a thousand times


def test_the_same_seed_draws_the_same_tokens_and_another_seed_others():
    rows = torch.zeros(64, 30).log_softmax(-1)
    one, again, other = (draw(rows, torch.Generator().manual_seed(seed)).tolist() for seed in (1, 1, 2))
    assert one == again != other


def test_a_group_larger_than_the_passes_keeps_its_rows_side_by_side():
    policy, tokenizer = policy_of("llama"), tiny_tokenizer()
    config = GenerationConfig(max_new_tokens=2, generation_batch_size=3)
    prompts = [[7, 8], [9]]
    responses = sample(policy, tokenizer, prompts, config, torch.Generator().manual_seed(0), n_per_prompt=4)
    assert len(responses.tokens) == 8
    found = [row[mask & ~own].tolist() for row, mask, own in zip(*responses[:3], strict=True)]
    assert found == [[7, 8]] * 4 + [[9]] * 4


def test_the_default_bounds_how_many_are_sampled_side_by_side(monkeypatch):
    widths = []
    policy, tokenizer = policy_of("llama"), tiny_tokenizer()
    asked = policy.next_logits

    def noting(tokens, *rest):
        widths.append(len(tokens))
        return asked(tokens, *rest)

    monkeypatch.setattr(policy, "next_logits", noting)
    monkeypatch.setattr(generate_module, "TOKENS_SIDE_BY_SIDE", 10)  # two rows of 3 + 2 tokens
    sample(policy, tokenizer, [[7, 8, 9]] * 5, GenerationConfig(max_new_tokens=2), torch.Generator().manual_seed(0))
    assert max(widths) == 2


def test_a_stop_string_is_found_at_the_end_of_a_long_text():
    tokenizer = tiny_tokenizer()
    long = tokenizer("the cat runs " * 60)["input_ids"]
    rows = torch.tensor([long + tokenizer("dog sees")["input_ids"], long + tokenizer("sees dog")["input_ids"]])
    assert _has_stop(tokenizer, rows, ("dog sees",)).tolist() == [True, False]
