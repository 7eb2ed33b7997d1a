"""What must not change a score or a gradient: padding, order, cuts; and adapters that keep out of each other's way."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from proximo.algorithms.adam import FlatAdam
from proximo.collect.generate import GenerationConfig, sample
from proximo.errors import UserError
from proximo.models.adapters import LoraConfig, adapter_state, add_adapter, merged_state
from proximo.models.folders import load_causal_lm, load_tokenizer, save_model
from proximo.models.language import LanguagePolicy, enable_gradient_checkpointing
from tests.models.roles import (
    GRPO_ONCE,
    PPO_ONCE,
    PROMPTS,
    RESPONSES,
    WIDTH,
    batch_of,
    drawn,
    gradient_and_metrics,
    kinds,
    policy_of,
    rows_of,
    sharings,
)
from tests.tiny_language import (
    tiny_model,
    tiny_tokenizer,
)

# --- padding and order --------------------------------------------------------------------------------------------


@kinds
@sharings
@pytest.mark.parametrize("algorithm", [PPO_ONCE, GRPO_ONCE], ids=["ppo", "grpo"])
def test_whatever_stands_behind_the_masks_is_nothing(kind, sharing, algorithm):
    results = []
    for poison in (0.0, 1e6, float("nan")):
        policy = policy_of(kind, sharing)
        batch = batch_of(policy, left=1, right=1)
        if poison != 0.0:
            names = ("rewards", "log_probs", "values", "next_values", "ref_log_probs")
            fields = {name: getattr(batch, name).masked_fill(~batch.mask, poison) for name in names}
            attention = batch.observations["attention"]
            beyond = {"tokens": batch.observations["tokens"].masked_fill(~attention, 10**9), "attention": attention}
            actions = batch.actions.masked_fill(~batch.mask, -(10**9))
            batch = dataclasses.replace(batch, observations=beyond, actions=actions, **fields)
        with torch.no_grad():
            new = policy.evaluate(batch)
        results.append((new, *gradient_and_metrics(policy, batch, algorithm)))
    for new, gradient, metrics in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(new[:3], results[0][0][:3], strict=True))
        assert torch.equal(gradient, results[0][1])
        assert metrics == results[0][2]


def test_scoring_is_blind_to_the_tokens_of_padding():
    policy = policy_of("gpt2")
    tokens, attention, response = rows_of(2, 2)
    clean = policy.score(tokens, attention, response, with_reference=True)
    beyond = policy.score(tokens.masked_fill(~attention, 10**9), attention, response, with_reference=True)
    assert torch.equal(clean.log_probs, beyond.log_probs)
    assert torch.equal(clean.ref_log_probs, beyond.ref_log_probs)
    assert torch.equal(clean.values[attention], beyond.values[attention])


@kinds
@sharings
def test_more_padding_and_another_order_change_nothing_beyond_rounding(kind, sharing):
    policy = policy_of(kind, sharing)
    plain = gradient_and_metrics(policy, batch_of(policy), PPO_ONCE)
    order = torch.tensor([2, 0, 3, 1])
    for left, right in ((7, 0), (0, 6), (3, 3)):
        policy = policy_of(kind, sharing)
        gradient, metrics = gradient_and_metrics(policy, batch_of(policy, left, right)[order], PPO_ONCE)
        torch.testing.assert_close(gradient, plain[0], rtol=1e-4, atol=1e-6)
        assert metrics == pytest.approx(plain[1], rel=1e-4, abs=1e-5)


@sharings
@pytest.mark.parametrize(
    "algorithm",
    [PPO_ONCE, *(dataclasses.replace(GRPO_ONCE, weighing=weighing) for weighing in ("rows", "steps", "longest"))],
    ids=["ppo", "rows", "steps", "longest"],
)
def test_however_a_minibatch_is_cut_the_gradient_is_the_same(sharing, algorithm):
    policy = policy_of("llama", sharing)
    whole, metrics = gradient_and_metrics(policy, batch_of(policy), algorithm)
    assert whole.norm() > 1e-2
    for cut in ({"microbatch_size": 1}, {"microbatch_size": 2}, {"microbatch_tokens": 8}):
        policy = policy_of("llama", sharing)
        gradient, found = gradient_and_metrics(policy, batch_of(policy), dataclasses.replace(algorithm, **cut))
        torch.testing.assert_close(gradient, whole, rtol=1e-5, atol=1e-6)
        assert found == pytest.approx(metrics, rel=1e-5, abs=1e-6)


def test_the_length_of_a_row_is_that_of_its_prompt_and_response():
    policy = policy_of("llama")
    # of what is observed: the last column is a token of the longest response alone, and is no observation
    assert policy.row_lengths(batch_of(policy)) == [6, 4, 7, 3]


# --- adapters -----------------------------------------------------------------------------------------------------


@kinds
def test_the_reference_of_adapters_is_the_base_bit_for_bit_before_and_after_learning(kind):
    base = LanguagePolicy(tiny_model(kind), sharing="separate")
    expected = base.score(*rows_of(), with_reference=False).log_probs
    policy = policy_of(kind, "lora")
    batch = batch_of(policy)
    before = policy.score(*rows_of(), with_reference=True)
    assert torch.equal(before.ref_log_probs, expected)
    assert not torch.allclose(before.log_probs, expected, atol=1e-2)
    PPO_ONCE.update(policy, FlatAdam(policy, learning_rate=0.1), batch, torch.Generator())
    after = policy.score(*rows_of(), with_reference=True)
    assert torch.equal(after.ref_log_probs, expected)
    assert not torch.allclose(after.log_probs, before.log_probs, atol=1e-3)
    assert not torch.allclose(after.values, before.values, atol=1e-3)


def test_no_adapter_leaks_into_another_role():
    policy = policy_of("llama", "lora")
    clean = policy.score(*rows_of(), with_reference=True)

    def changed(name: str) -> Any:
        own = [p for key, p in policy.actor.named_parameters() if f".{name}." in key]
        kept = [p.detach().clone() for p in own]
        drawn(nn.ParameterList(own), 99)
        found = policy.score(*rows_of(), with_reference=True)
        with torch.no_grad():
            for parameter, value in zip(own, kept, strict=True):
                parameter.copy_(value)
        return found

    other = changed("policy")
    assert torch.equal(other.values, clean.values)
    assert not torch.allclose(other.log_probs, clean.log_probs, atol=1e-2)
    other = changed("value")
    assert torch.equal(other.log_probs, clean.log_probs)
    assert not torch.allclose(other.values, clean.values, atol=1e-2)
    assert torch.equal(other.ref_log_probs, clean.ref_log_probs)


def test_only_adapters_and_the_head_learn_and_a_fresh_adapter_is_the_base():
    actor = tiny_model("llama")
    for name in ("policy", "value"):
        add_adapter(actor, name, LoraConfig(lora_rank=3))
    policy = LanguagePolicy(actor, sharing="lora", value_head=nn.Linear(WIDTH, 1))
    learning = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert {name for name in learning if "lora_" not in name} == {"value_head.weight", "value_head.bias"}
    for name in ("policy", "value"):
        # q, k, v, o, gate, up, down of two layers, two matrices each
        assert sum(f".{name}." in key for key in learning) == len(adapter_state(actor, name)) == 2 * 7 * 2
    scored = policy.score(*rows_of(), with_reference=True)
    assert torch.equal(scored.log_probs, scored.ref_log_probs)


@kinds
def test_merged_weights_are_a_plain_model_with_the_policys_logits(kind, tmp_path: Path):
    policy = policy_of(kind, "lora")
    tokens = torch.tensor([PROMPTS[2] + RESPONSES[2]])
    positions = torch.arange(tokens.shape[1])[None]
    with torch.no_grad():
        expected = policy.next_logits(tokens, None, positions, None)
    state = merged_state(policy.actor, "policy")
    plain = tiny_model(kind, seed=77)
    plain.load_state_dict(state)
    save_model(tmp_path / "merged", policy.actor, tiny_tokenizer(), state)
    loaded = load_causal_lm(tmp_path / "merged")
    for model in (plain, loaded):
        with torch.no_grad():
            logits = model(input_ids=tokens).logits[:, -1]
        torch.testing.assert_close(logits, expected, rtol=0.0, atol=1e-5)
    with torch.no_grad():  # and the model itself stayed as it was
        assert torch.equal(policy.next_logits(tokens, None, positions, None), expected)
    assert load_tokenizer(tmp_path / "merged").eos_token_id == 2


@kinds
@sharings
def test_gradient_checkpointing_gives_the_same_gradient(kind, sharing):
    policy = policy_of(kind, sharing)
    expected, _ = gradient_and_metrics(policy, batch_of(policy), PPO_ONCE)
    policy = policy_of(kind, sharing)
    batch = batch_of(policy)
    calls = []
    enable_gradient_checkpointing(policy)
    for module in policy.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            inner = module._gradient_checkpointing_func
            module._gradient_checkpointing_func = lambda *a, inner=inner, **k: (calls.append(1), inner(*a, **k))[1]
    found, _ = gradient_and_metrics(policy, batch, PPO_ONCE)
    assert calls  # it really recomputes
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_adapters_that_fit_nowhere_are_refused():
    with pytest.raises(UserError, match="Adapters do not fit"):
        add_adapter(nn.Sequential(nn.ReLU()), "policy", LoraConfig())


@kinds
@sharings
@pytest.mark.parametrize("prompts", [PROMPTS, [PROMPTS[0], PROMPTS[0]]], ids=["padded", "of one length"])
def test_sampling_is_the_same_with_gradient_checkpointing(kind, sharing, prompts):
    """In training mode transformers would drop the cache, and each token would see only itself."""
    found = []
    for checkpointing in (False, True):
        policy = policy_of(kind, sharing)
        if checkpointing:
            enable_gradient_checkpointing(policy)
            gradient_and_metrics(policy, batch_of(policy), PPO_ONCE)  # an update in between
            policy = policy_of(kind, sharing)
            enable_gradient_checkpointing(policy)
        config = GenerationConfig(max_new_tokens=6)
        generator = torch.Generator().manual_seed(0)
        responses = sample(policy, tiny_tokenizer(), prompts, config, generator, n_per_prompt=2)
        scored = policy.score(*responses[:3], with_reference=False)
        torch.testing.assert_close(scored.log_probs, responses.log_probs, rtol=1e-4, atol=1e-5)
        found.append(responses)
    for plain, checkpointed in zip(*found, strict=True):
        assert torch.equal(plain, checkpointed)
