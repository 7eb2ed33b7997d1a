"""Language models as policies: against the plain model, one row at a time; and what must not change a score."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from proximo.algorithms.adam import FlatAdam
from proximo.algorithms.grpo import GRPO
from proximo.algorithms.ppo import PPO
from proximo.core.batch import Batch
from proximo.core.kl import ReferenceKL
from proximo.errors import UserError
from proximo.models import language
from proximo.models.folders import load_causal_lm, load_scalar_model, load_tokenizer, save_model, without_dropout
from proximo.models.language import (
    LanguagePolicy,
    LoraConfig,
    adapter_state,
    add_adapter,
    enable_gradient_checkpointing,
    merged_state,
    position_ids,
)
from tests.tiny_language import (
    SPECIAL,
    WORDS,
    save_tiny,
    save_tiny_scalar,
    tiny_model,
    tiny_scalar_model,
    tiny_tokenizer,
)

VOCABULARY, WIDTH = len(SPECIAL + WORDS), 16
PROMPTS = [[7, 8, 9], [10], [11, 12, 13, 14, 15], [16, 17]]
RESPONSES = [[20, 21, 2], [22, 23, 24, 25], [26, 2], [27]]
kinds = pytest.mark.parametrize("kind", ["llama", "gpt2"])
sharings = pytest.mark.parametrize("sharing", ["separate", "trunk", "lora"])


def drawn(module: nn.Module, seed: int, std: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=std, generator=generator)


def policy_of(kind: Any, sharing: Any = "separate", *, temperature: float = 1.0, actor: Any = None) -> LanguagePolicy:
    """Every role is there, and no two are alike: adapters and heads are drawn at random."""
    actor = actor or tiny_model(kind, seed=0)
    if sharing == "lora":
        for seed, name in enumerate(("policy", "value")):
            add_adapter(actor, name, LoraConfig(lora_rank=2, lora_alpha=4.0))
            fresh = [p for key, p in actor.named_parameters() if f".{name}." in key]
            drawn(nn.ParameterList(fresh), 10 + seed)
    head = None if sharing == "separate" else nn.Linear(WIDTH, 1)
    if head is not None:
        drawn(head, 5)
    return LanguagePolicy(
        actor,
        sharing=sharing,
        critic=tiny_scalar_model(kind, seed=1) if sharing == "separate" else None,
        value_head=head,
        reference=None if sharing == "lora" else tiny_model(kind, seed=2).requires_grad_(False),
        temperature=temperature,
    )


def rows_of(left: int = 0, right: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, attention and the mask of responses `[B, L]`, with so many more columns of padding than needed."""
    before, after = max(map(len, PROMPTS)) + left, max(map(len, RESPONSES)) + right
    tokens = torch.zeros(len(PROMPTS), before + after, dtype=torch.long)
    attention, response = torch.zeros_like(tokens, dtype=torch.bool), torch.zeros_like(tokens, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        tokens[row, before - len(prompt) : before + len(answer)] = torch.tensor(prompt + answer)
        attention[row, before - len(prompt) : before + len(answer)] = True
        response[row, before : before + len(answer)] = True
    return tokens, attention, response


def batch_of(policy: LanguagePolicy, left: int = 0, right: int = 0) -> Batch:
    """What collecting would have made of the rows, with rewards that are one number per place of a response."""
    tokens, attention, response = rows_of(left, right)
    scored = policy.score(tokens, attention, response, with_reference=True)
    mask = response[:, 1:]
    order = torch.cat([torch.arange(len(answer)) + 3.0 * row for row, answer in enumerate(RESPONSES)])
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    return Batch(
        observations={"tokens": tokens[:, :-1], "attention": attention[:, :-1]},
        actions=tokens[:, 1:],
        mask=mask,
        rewards=torch.zeros(mask.shape).masked_scatter(mask, (order * 0.7).sin()),
        log_probs=scored.log_probs[:, 1:] + torch.where(mask, 0.05, 0.0),  # collected a little elsewhere
        values=None if scored.values is None else scored.values[:, :-1],
        next_values=None if scored.values is None else scored.values[:, 1:],
        terminated=last,
        done=last,
        ref_log_probs=None if scored.ref_log_probs is None else scored.ref_log_probs[:, 1:],
        group=torch.tensor([0, 0, 1, 1]),
    )


def alone(model: Any, row: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The plain model on one row without padding: log-probabilities and entropies of the response's tokens."""
    text = torch.tensor([PROMPTS[row] + RESPONSES[row]])
    with torch.no_grad():
        log_p = (model(input_ids=text).logits[0] / temperature).log_softmax(-1)
    places = range(len(PROMPTS[row]) - 1, text.shape[1] - 1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return torch.stack([log_p[t, text[0, t + 1]] for t in places]), torch.stack([entropy[t] for t in places])


def gradient_and_metrics(
    policy: LanguagePolicy, batch: Batch, algorithm: PPO | GRPO
) -> tuple[Tensor, dict[str, float]]:
    """The gradient of the first step, all weights in one vector."""
    optimizer = FlatAdam(policy, learning_rate=1e-30)
    common = (policy, optimizer, batch, torch.Generator().manual_seed(0))
    kl = ReferenceKL(0.1, "k3")
    if isinstance(algorithm, PPO):
        metrics = algorithm.update(*common, reference_kl=kl)
    else:
        metrics = algorithm.update(*common, longest=6, reference_kl=kl)
    return optimizer.gradient.clone(), metrics


PPO_ONCE = PPO(n_epochs=1, batch_size=4, gamma=1.0, max_grad_norm=1e9, entropy_coef=0.01)
GRPO_ONCE = GRPO(n_epochs=1, batch_size=4, max_grad_norm=1e9, entropy_coef=0.01)

# --- scores -------------------------------------------------------------------------------------------------------


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
    monkeypatch.setattr(language, "LOGITS_AT_ONCE", 3 * VOCABULARY)  # three tokens of ten at a time
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


# --- folders ------------------------------------------------------------------------------------------------------


def test_a_folder_with_another_head_is_refused(tmp_path: Path):
    causal, scalar = save_tiny(tmp_path / "causal"), save_tiny_scalar(tmp_path / "scalar")
    with pytest.raises(UserError, match="not a causal language model"):
        load_causal_lm(scalar)
    with pytest.raises(UserError, match="not a reward model"):
        load_scalar_model(causal)
    fresh: Any = load_scalar_model(causal, fresh_head=True)
    assert fresh.score.out_features == 1
    torch.testing.assert_close(fresh.model.embed_tokens.weight, tiny_model().model.embed_tokens.weight)


def test_a_folder_that_is_not_there_or_no_model_is_told_by_name(tmp_path: Path):
    save_tiny(tmp_path / "first-model")
    with pytest.raises(UserError, match=r"no model folder .*frist-model.* Did you mean .*first-model"):
        load_causal_lm(tmp_path / "frist-model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty is no model folder: it has no config\.json"):
        load_causal_lm(tmp_path / "empty")
