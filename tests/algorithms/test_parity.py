"""PPO for language models against TRL 1.8.

TRL's numbers are in parity_trl.json, written by benchmarks/parity_trl.py. Where TRL differs by design, its numbers
are reached by a formula, never by a wider tolerance:

- TRL gives a response that leaves room a step more, after its last token: the score is its reward, and the critic
  learns there too. Ours has the score at the last token. `with_step_after`, `on_the_policy`.
- TRL whitens by sqrt(variance + 1e-8), over the whole rollout; we by (deviation + 1e-8), over a minibatch. `whitener`.
- TRL's value loss has a factor 1/2; ours has none: value_coef.
- TRL divides logits by temperature + 1e-7.
- TRL's micro-batches are means of their own tokens, and the gradient is the mean of those means.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from proximo.algorithms.ppo import PPO
from proximo.algorithms.update import Minibatch
from proximo.collect.generate import GenerationConfig, Responses, _assemble
from proximo.core.advantages import gae
from proximo.core.batch import Batch
from proximo.core.masked import whiten
from proximo.models.language import LanguagePolicy, Scored
from tests.algorithms.unmoved import Unmoved

CLOSE = dict(rtol=1e-5, atol=1e-5)
TRL = json.loads(Path(__file__).with_name("parity_trl.json").read_text())
SETTINGS, COLLECTED = TRL["settings"], {name: torch.tensor(rows) for name, rows in TRL["collected"].items()}
FIRST = TRL["prompt_width"] - 1
"""The step whose action is the first token of the responses."""


def make_model(kind: str, role: str, step: str | None = None) -> Any:
    """The weights that TRL had: drawn by name, and a step away from them."""
    transformers = pytest.importorskip("transformers")
    model = getattr(transformers, kind)(transformers.LlamaConfig(**TRL["model"], num_labels=1)).eval()
    draws = [(TRL["seeds"][role], TRL["scales"]["weights"])]
    if step is not None:
        draws.append((TRL["seeds"][step], TRL["scales"][step]))
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name in weights:
            weights[name].fill_(1.0 if "norm" in name else 0.0)
        for seed, scale in draws:
            stream = np.random.RandomState(seed)
            for name in sorted(weights):
                weights[name] += torch.from_numpy(stream.standard_normal(weights[name].shape) * scale).float()
    return model


class Case(NamedTuple):
    old: LanguagePolicy
    new: LanguagePolicy
    scored: Scored
    batch: Batch


@pytest.fixture(scope="module")
def case() -> Case:
    lm, scalar = "LlamaForCausalLM", "LlamaForSequenceClassification"
    reference = make_model(lm, "reference")
    temperature = SETTINGS["temperature"] + 1e-7
    old, new = (
        LanguagePolicy(actor, sharing="separate", critic=critic, reference=reference, temperature=temperature)
        for actor, critic in (
            (make_model(lm, "old_policy"), make_model(scalar, "old_critic")),
            (make_model(lm, "old_policy", "policy_step"), make_model(scalar, "old_critic", "critic_step")),
        )
    )
    tokens = torch.tensor(TRL["tokens"])
    attention, response = tokens != 0, tokens != 0
    response[:, : FIRST + 1] = False
    scored = old.score(tokens, attention, response, with_reference=True)
    ended = (tokens == TRL["model"]["eos_token_id"]).any(1)
    responses = Responses(tokens, attention, response, scored.log_probs, ended)
    config = GenerationConfig(
        temperature=SETTINGS["temperature"], missing_eos_penalty=SETTINGS["missing_eos_penalty"], truncation="terminate"
    )
    batch = _assemble(responses, scored, scored.log_probs, TRL["scores"], config, SETTINGS["kl_coef"])
    return Case(old, new, scored, batch)


def estimated(batch: Batch) -> Tensor:
    """GAE at TRL's settings."""
    fields = (getattr(batch, name) for name in ("rewards", "values", "next_values", "terminated", "done", "mask"))
    return gae(*fields, gamma=SETTINGS["gamma"], gae_lambda=SETTINGS["lam"])


def scores_of(batch: Batch) -> Tensor:
    """The score at the last step of each response, 0 elsewhere: the reward without its KL."""
    kl = SETTINGS["kl_coef"] * (batch.log_probs - batch.ref_log_probs)
    return torch.where(batch.terminated, batch.rewards + kl, 0.0)


def leaving_room(batch: Batch) -> Tensor:
    """The last steps `[B, T]` of the responses that end before the batch does."""
    return batch.terminated & ~batch.terminated[:, -1:]


def with_step_after(batch: Batch) -> Batch:
    """As TRL has it: after the last token, where there is room, one step more, and the score is its reward."""
    moved = leaving_room(batch)
    after = moved.roll(1, 1)
    scores = torch.where(moved, scores_of(batch), 0.0)
    end = (batch.terminated & ~moved) | after
    rewards = batch.rewards - scores + scores.roll(1, 1)
    return replace(batch, mask=batch.mask | after, rewards=rewards, terminated=end, done=end)


def on_the_policy(batch: Batch) -> Batch:
    """What TRL's step more does to the others, as a reward.

    With V the value of the text with its last token and s the score, the last token's TD error has gamma V in
    place of s, and gamma lambda (s - V) comes back from the step after: a reward of
    gamma (1 - lambda) V - (1 - gamma lambda) s more, and nothing with gamma = lambda = 1.
    """
    gamma, lam = SETTINGS["gamma"], SETTINGS["lam"]
    more = gamma * (1 - lam) * batch.next_values - (1 - gamma * lam) * scores_of(batch)
    return replace(batch, rewards=batch.rewards + torch.where(leaving_room(batch), more, 0.0))


def whitener(advantages: Tensor, mask: Tensor) -> float:
    """What TRL's whitened advantages are of ours."""
    variance = float(advantages[mask].double().var())
    return (math.sqrt(variance) + 1e-8) / math.sqrt(variance + 1e-8)


def assert_same_gradients(policy: LanguagePolicy, expected: dict[str, Any], scales: dict[str, float]) -> None:
    """Sum and norm of every weight's gradient, and the norm of all; `scales` for ours, by role."""
    roles = {"policy": policy.actor, "critic": policy.critic}
    ours = {
        f"{role}.{name}": scales[role] * weight.grad.double()
        for role, model in roles.items()
        for name, weight in model.named_parameters()
    }
    assert ours.keys() == expected["weights"].keys()
    for name, numbers in expected["weights"].items():
        assert [float(ours[name].sum()), float(ours[name].norm())] == pytest.approx(numbers, rel=1e-5, abs=1e-5), name
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in ours.values()))
    assert norm == pytest.approx(expected["norm"], rel=1e-5)


def test_the_weights_are_those_that_trl_had(case):
    roles = {"old_policy": case.old.actor, "reference": case.old.reference, "old_critic": case.old.critic}
    roles |= {"policy": case.new.actor, "critic": case.new.critic}
    sums = {role: sum(float(p.detach().double().sum()) for p in model.parameters()) for role, model in roles.items()}
    assert sums == pytest.approx(TRL["weight_sums"], abs=1e-6)


def test_scores_of_tokens_are_those_of_trl(case):
    known = ~COLLECTED["padding"]
    for name in ("log_probs", "ref_log_probs"):
        ours = getattr(case.scored, name)[:, FIRST + 1 :]
        torch.testing.assert_close(ours[known], COLLECTED[name][known], **CLOSE)
    known = ~COLLECTED["padding_p1"]  # with the value of the text that has its last token
    torch.testing.assert_close(case.scored.values[:, FIRST:-1][known], COLLECTED["values"][known], **CLOSE)


def test_masks_rewards_advantages_and_returns_are_those_of_trl_with_a_step_after(case):
    batch = with_step_after(case.batch)
    advantages = estimated(batch)
    torch.testing.assert_close(case.batch.mask[:, FIRST:], ~COLLECTED["padding"])
    torch.testing.assert_close(batch.mask[:, FIRST:], ~COLLECTED["padding_p1"])
    torch.testing.assert_close(batch.rewards[:, FIRST:], COLLECTED["rewards"], **CLOSE)
    torch.testing.assert_close(advantages[:, FIRST:], COLLECTED["advantages"], **CLOSE)
    returns = torch.where(batch.mask, advantages + batch.values, 0.0)
    torch.testing.assert_close(returns[:, FIRST:], COLLECTED["returns"], **CLOSE)


def test_advantages_of_the_tokens_are_those_of_trl_by_the_formula(case):
    mask, advantages = case.batch.mask, estimated(on_the_policy(case.batch))
    expected = torch.where(COLLECTED["padding"], 0.0, COLLECTED["advantages"])
    torch.testing.assert_close(advantages[:, FIRST:], expected, **CLOSE)
    ours = whitener(advantages, mask) * whiten(advantages, mask)
    torch.testing.assert_close(ours[:, FIRST:], COLLECTED["whitened"], **CLOSE)


def ppo(value_coef: float) -> PPO:
    return PPO(
        n_epochs=1,
        batch_size=len(TRL["tokens"]),
        gamma=SETTINGS["gamma"],
        gae_lambda=SETTINGS["lam"],
        clip_epsilon=SETTINGS["cliprange"],
        value_clip_epsilon=SETTINGS["cliprange_value"],
        value_coef=value_coef,
    )


def test_losses_and_gradients_of_an_update_are_those_of_trl(case):
    optimizer, order = Unmoved(case.new), torch.Generator()
    batch = on_the_policy(case.batch)
    metrics = ppo(0.0).update(case.new, optimizer, batch, order)
    scale = whitener(estimated(batch), batch.mask)
    assert scale * metrics["policy_loss"] == pytest.approx(TRL["policy_loss"], rel=1e-5, abs=1e-6)
    policy_gradients = {name: p.grad.clone() for name, p in case.new.actor.named_parameters()}

    batch = with_step_after(case.batch)
    critic_alone = replace(ppo(SETTINGS["vf_coef"] / 2), value_gae_lambda=SETTINGS["lam"])
    critic = critic_alone.update(case.new, optimizer, batch, order, learn_policy=False)
    assert critic["value_loss"] / 2 == pytest.approx(TRL["value_loss"], rel=1e-5)
    for name, weight in case.new.actor.named_parameters():
        assert not weight.grad.any()
        weight.grad = policy_gradients[name]
    total = scale * metrics["policy_loss"] + SETTINGS["vf_coef"] * critic["value_loss"] / 2
    assert total == pytest.approx(TRL["total_loss"], rel=1e-5)
    assert_same_gradients(case.new, TRL["gradients"], {"policy": scale, "critic": 1.0})


def test_the_gradient_of_trls_micro_batches_is_the_mean_of_the_gradients_of_minibatches(case):
    narrow, wide = on_the_policy(case.batch), with_step_after(case.batch)
    advantages, returns = estimated(narrow), estimated(wide) + wide.values
    whitened = whitener(advantages, narrow.mask) * whiten(advantages, narrow.mask)
    pieces = [torch.tensor(rows) for rows in TRL["micro_batches"]]
    case.new.zero_grad()
    for rows in pieces:
        policy_loss = ppo(0.0)._loss(None, case.new, Minibatch(narrow, whitened, returns)[rows]).total
        critic = ppo(SETTINGS["vf_coef"] / 2)
        value_loss = critic._loss(None, case.new, Minibatch(wide, torch.zeros_like(whitened), returns)[rows]).total
        ((policy_loss + value_loss) / len(pieces)).backward()
    assert_same_gradients(case.new, TRL["micro_batch_gradients"], {"policy": 1.0, "critic": 1.0})
    # Ours is the gradient of the whole, however it is cut. TRL's is another one: tokens of short responses weigh more.
    assert TRL["micro_batch_gradients"]["norm"] != pytest.approx(TRL["gradients"]["norm"], rel=1e-2)
