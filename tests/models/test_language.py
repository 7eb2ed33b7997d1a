"""Language models as policies: against the plain model, one row at a time."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from proximo.models import vocabulary
from proximo.models.folders import without_dropout
from proximo.models.rows import position_ids
from tests.models.roles import (
    PPO_ONCE,
    PROMPTS,
    RESPONSES,
    VOCABULARY,
    WIDTH,
    alone,
    batch_of,
    gradient_and_metrics,
    kinds,
    policy_of,
    rows_of,
    sharings,
)
from tests.tiny_language import (
    tiny_model,
)


@kinds
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_padded_batch_scores_as_the_plain_model_does_one_row_at_a_time(kind, temperature):
    policy = policy_of(kind, temperature=temperature)
    batch = batch_of(policy)
    scored = policy.score(*rows_of(), with_reference=True)
    response = rows_of()[2]
    with torch.no_grad():
        new = policy.evaluate(batch)
    for row in range(4):
        log_probs, entropy = alone(policy.actor, row, temperature)
        reference, _ = alone(policy.reference, row, temperature)
        assert scored.log_probs[row, response[row]] == pytest.approx(log_probs, abs=1e-5)
        assert scored.ref_log_probs[row, response[row]] == pytest.approx(reference, abs=1e-5)
        assert new.log_probs[row, batch.mask[row]] == pytest.approx(log_probs, abs=1e-5)
        assert new.entropy[row, batch.mask[row]] == pytest.approx(entropy, abs=1e-5)
    assert bool((scored.log_probs[~response] == 0).all())


@kinds
def test_the_critic_values_the_text_up_to_each_token_at_any_temperature(kind):
    for temperature in (1.0, 0.5):
        policy = policy_of(kind, temperature=temperature)
        batch = batch_of(policy)
        with torch.no_grad():
            values = policy.evaluate(batch).values
        for row in range(4):
            text = torch.tensor([PROMPTS[row] + RESPONSES[row]])
            with torch.no_grad():
                hidden = policy.critic.base_model(input_ids=text).last_hidden_state
                found = policy.critic.score(hidden)[0, :, 0]
            first = len(PROMPTS[row]) - 1  # the value before the first token of the response, after the prompt
            expected = found[first : first + len(RESPONSES[row])]
            assert values[row, batch.mask[row]] == pytest.approx(expected, abs=1e-5)
            assert batch.values[row, batch.mask[row]] == pytest.approx(expected, abs=1e-5)
            assert batch.next_values[row, batch.mask[row]] == pytest.approx(found[first + 1 :], abs=1e-5)


@sharings
def test_the_temperature_is_nothing_to_the_critic(sharing):
    warm, cool = (policy_of("llama", sharing, temperature=t).score(*rows_of(), with_reference=True) for t in (1.0, 0.5))
    assert torch.equal(warm.values, cool.values)
    for name in ("log_probs", "ref_log_probs"):  # but the policy and the reference both have it
        assert not torch.allclose(getattr(warm, name), getattr(cool, name), atol=1e-2)


def test_positions_count_the_real_tokens():
    attention = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0]], dtype=torch.bool)
    found = position_ids(attention)
    assert found[0, 2:5].tolist() == [0, 1, 2]
    assert found[1, :4].tolist() == [0, 1, 2, 3]
    assert found.min() == 0


@kinds
@sharings
def test_first_ratios_are_one_also_in_training_mode(kind, sharing):
    policy = policy_of(kind, sharing, temperature=0.7)
    batch = dataclasses.replace(batch_of(policy), log_probs=policy.score(*rows_of(), with_reference=False)[0][:, 1:])
    for mode in (True, False):
        policy.train(mode)
        with torch.no_grad():
            ratio = (policy.evaluate(batch).log_probs - batch.log_probs).exp()
        assert (ratio - 1).abs().max() < 1e-5


@kinds
def test_a_model_built_with_dropout_scores_the_same_in_any_mode(kind):
    def built() -> Any:
        model = tiny_model(kind)
        names = ("attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop")
        for name in names:
            if hasattr(model.config, name):
                setattr(model.config, name, 0.5)
        with torch.random.fork_rng():
            return type(model)(model.config)

    dropping = built()
    differs = [
        policy_of(kind, actor=dropping.train(mode)).score(*rows_of(), with_reference=False)[0] for mode in (False, True)
    ]
    assert not torch.allclose(*differs, atol=1e-3)  # the model really has dropout
    policy = policy_of(kind, actor=without_dropout(dropping))
    found = [policy.train(mode).score(*rows_of(), with_reference=False)[0] for mode in (False, True)]
    torch.testing.assert_close(found[1], found[0], rtol=0.0, atol=0.0)
    torch.testing.assert_close(found[0], differs[0], rtol=0.0, atol=1e-6)


def test_the_vocabulary_in_pieces_gives_the_same_scores_and_gradients(monkeypatch):
    whole = gradient_and_metrics(policy := policy_of("llama"), batch_of(policy), PPO_ONCE)
    monkeypatch.setattr(vocabulary, "KEPT_LOGITS", 0)
    monkeypatch.setitem(vocabulary.LOGITS_AT_ONCE, "cpu", 3 * VOCABULARY)  # three tokens of ten at a time
    pieces = gradient_and_metrics(policy := policy_of("llama"), batch_of(policy), PPO_ONCE)
    torch.testing.assert_close(pieces[0], whole[0], rtol=1e-5, atol=1e-7)
    assert pieces[1] == pytest.approx(whole[1], rel=1e-5, abs=1e-6)


def test_bfloat16_stays_near_float32():
    policy = policy_of("llama")
    exact = policy.score(*rows_of(), with_reference=True)
    policy.autocast = True
    rounded = policy.score(*rows_of(), with_reference=True)
    assert rounded.log_probs.dtype == torch.float32
    assert 0 < (rounded.log_probs - exact.log_probs).abs().max() < 0.1
    kl, rounded_kl = (each.log_probs - each.ref_log_probs for each in (exact, rounded))
    assert (kl - rounded_kl).abs().max() < 0.1


def granite() -> Any:
    import transformers

    small = dict(hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.GraniteConfig(
        vocab_size=VOCABULARY, num_key_value_heads=1, logits_scaling=4.0, initializer_range=0.2, **small
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.GraniteForCausalLM(config).eval()


def test_a_model_whose_logits_are_scaled_is_scored_by_its_own_logits():
    policy = policy_of("llama", actor=granite())
    response = rows_of()[2]
    scored = policy.score(*rows_of(), with_reference=False)
    for row in range(4):
        assert scored.log_probs[row, response[row]] == pytest.approx(alone(policy.actor, row)[0], abs=1e-5)


@pytest.mark.parametrize("sharing", ["trunk", "lora"])
def test_and_a_value_head_on_it_sees_hidden_states(sharing):
    policy = policy_of("llama", sharing, actor=granite())
    assert policy.score(*rows_of(), with_reference=False).values.shape == rows_of()[0].shape


def test_a_soft_cap_is_seen_also_where_untrained_logits_are_small():
    import transformers

    small = dict(hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=8)
    config = transformers.Gemma2Config(
        vocab_size=VOCABULARY, num_key_value_heads=1, final_logit_softcapping=30.0, initializer_range=0.05, **small
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = policy_of("llama", actor=transformers.Gemma2ForCausalLM(config).eval())
    with torch.no_grad():
        policy.actor.model.norm.weight += 30.0  # learning makes the logits large
    response = rows_of()[2]
    scored = policy.score(*rows_of(), with_reference=False)
    for row in range(4):
        assert scored.log_probs[row, response[row]] == pytest.approx(alone(policy.actor, row)[0], abs=1e-4)


def test_values_and_scores_are_float32_numbers_also_under_autocast():
    """In bfloat16 numbers between 2 and 4 are 0.016 apart: groups of responses would have false ties."""
    policy = policy_of("llama")
    policy.autocast = True
    values = policy.score(*rows_of(), with_reference=False).values
    assert values.dtype == torch.float32
    assert not torch.equal(values, values.bfloat16().float())
