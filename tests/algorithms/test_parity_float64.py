"""PPO for language models against plain loops in float64: estimates, losses and gradients, whatever the settings."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from proximo.algorithms.ppo import PPO
from proximo.collect.generate import GenerationConfig, Responses, _assemble
from proximo.core.batch import Batch
from proximo.core.distributions import Categorical
from proximo.core.kl import ReferenceKL
from proximo.core.policy import Evaluation
from proximo.models.language import Scored
from tests.algorithms.unmoved import Unmoved

# --- plain loops in float64: nothing of Proximo from here to the last section -----------------------------------

N_PROMPT, N_VOCABULARY = 2, 4
LENGTHS, ENDED, RAW_SCORES = (5, 2, 1, 3, 5), (False, True, True, True, False), (0.75, -1.5, 2.0, 0.25, 1.0)
BETA, PENALTY, KL_COEF = 0.3, 0.5, 0.1


def drawn(seed: int, *shape: int) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape)


WIDTH = max(LENGTHS)
OLD, REF, VALUES = drawn(1, 5, WIDTH) * 0.4 - 1.4, drawn(2, 5, WIDTH) * 0.4 - 1.4, drawn(3, 5, WIDTH + 1)
ACTIONS = np.random.RandomState(4).randint(0, N_VOCABULARY, (5, WIDTH))
LOGITS, NEW_VALUES = drawn(5, 5, WIDTH, N_VOCABULARY) * 0.3, VALUES[:, :-1] + drawn(6, 5, WIDTH) * 0.4


def plain_rewards(b: int) -> list[float]:
    rewards = [-BETA * (OLD[b, t] - REF[b, t]) for t in range(LENGTHS[b])]
    rewards[-1] += RAW_SCORES[b] - (0.0 if ENDED[b] else PENALTY)
    return rewards


def plain_advantages(b: int, truncation: str, rules: Any, lam: float) -> list[float]:
    """Every advantage a sum over the whole rest of the response."""
    n, rewards = LENGTHS[b], plain_rewards(b)
    errors = []
    for t in range(n):
        goes_on = t < n - 1 or (truncation == "bootstrap" and not ENDED[b])
        errors.append(rewards[t] + (rules.gamma * VALUES[b, t + 1] if goes_on else 0.0) - VALUES[b, t])
    return [sum((rules.gamma * lam) ** (k - t) * errors[k] for k in range(t, n)) for t in range(n)]


def plain_estimates(truncation: str, rules: Any) -> dict[tuple[int, int], tuple[float, float]]:
    """Whitened advantage and return of every step that counts, by (row, step)."""
    found = {}
    for b in range(5):
        if truncation == "mask" and not ENDED[b]:
            continue
        lam, value_lam = rules.gae_lambda, rules.value_gae_lambda
        if rules.gae_lambda_per_step is not None:
            lam = max(0.0, 1 - 1 / (rules.gae_lambda_per_step * LENGTHS[b]))
        advantages = plain_advantages(b, truncation, rules, lam)
        targets = advantages if value_lam is None else plain_advantages(b, truncation, rules, value_lam)
        for t in range(LENGTHS[b]):
            found[b, t] = (advantages[t], targets[t] + VALUES[b, t])
    mean = sum(a for a, _ in found.values()) / len(found)
    spread = math.sqrt(sum((a - mean) ** 2 for a, _ in found.values()) / (len(found) - 1)) + 1e-8
    return {place: ((a - mean) / spread, r) for place, (a, r) in found.items()}


def plain_losses(logits: Any, values: Any, estimates: dict, rules: Any) -> dict[str, float]:
    sums = dict(policy_loss=0.0, value_loss=0.0, entropy=0.0, kl_loss=0.0)
    high, band = rules.clip_epsilon_high or rules.clip_epsilon, rules.value_clip_epsilon
    for (b, t), (advantage, target) in estimates.items():
        top = math.log(sum(math.exp(logit) for logit in logits[b, t]))
        now = logits[b, t, ACTIONS[b, t]] - top
        ratio = math.exp(now - OLD[b, t])
        gain = min(ratio * advantage, min(max(ratio, 1 - rules.clip_epsilon), 1 + high) * advantage)
        if rules.dual_clip is not None and advantage < 0:
            gain = max(gain, rules.dual_clip * advantage)
        near = VALUES[b, t] + min(max(values[b, t] - VALUES[b, t], -band), band)
        sums["policy_loss"] -= gain
        sums["value_loss"] += max((values[b, t] - target) ** 2, (near - target) ** 2)
        sums["entropy"] -= sum(math.exp(logit - top) * (logit - top) for logit in logits[b, t])
        sums["kl_loss"] += (now - REF[b, t]) ** 2 / 2
    return {name: total / len(estimates) for name, total in sums.items()}


def plain_total(logits: Any, values: Any, estimates: dict, rules: Any) -> float:
    """Policy loss + c_v value loss - c_e entropy + beta KL to the reference."""
    each = plain_losses(logits, values, estimates, rules)
    total = each["policy_loss"] + rules.value_coef * each["value_loss"] - rules.entropy_coef * each["entropy"]
    return total + KL_COEF * each["kl_loss"]


def plain_gradients(estimates: dict, rules: Any, step: float = 5e-4) -> list[np.ndarray]:
    """By logits and by values, from differences of fourth order."""
    at = [LOGITS.copy(), NEW_VALUES.copy()]
    gradients = [np.zeros_like(x) for x in at]
    for x, gradient in zip(at, gradients, strict=True):
        for place in np.ndindex(x.shape):
            start, found = x[place], []
            for factor in (-2, -1, 1, 2):
                x[place] = start + factor * step
                found.append(plain_total(*at, estimates, rules))
            x[place] = start
            gradient[place] = (found[0] - 8 * found[1] + 8 * found[2] - found[3]) / (12 * step)
    return gradients


# --- Proximo in float64 against them ----------------------------------------------------------------------------

PLAIN = PPO(n_epochs=1, gamma=0.9, gae_lambda=0.8, value_clip_epsilon=0.3, value_coef=0.4, entropy_coef=0.02)
EVERYTHING = replace(PLAIN, clip_epsilon_high=0.28, dual_clip=1.2, value_gae_lambda=1.0, microbatch_tokens=6)
PER_STEP = replace(PLAIN, gae_lambda_per_step=0.5)


class Table(nn.Module):
    """Logits and values of every step as weights; the observation is the number of the row."""

    has_memory = True

    def __init__(self) -> None:
        super().__init__()
        room = (0, 0, N_PROMPT - 1, 0)  # the steps before the last token of the prompt
        self.logits = nn.Parameter(nn.functional.pad(torch.tensor(LOGITS), room))
        self.values = nn.Parameter(nn.functional.pad(torch.tensor(NEW_VALUES), room[2:]))

    def evaluate(self, batch: Batch) -> Evaluation:
        rows = batch.observations["tokens"][:, 0]
        distribution = Categorical(self.logits[rows])
        return Evaluation(distribution.log_prob(batch.actions), distribution.entropy(), self.values[rows], None)

    def row_lengths(self, batch: Batch) -> list[int]:
        return batch.mask.sum(1).tolist()

    def plain(self, batch: Batch) -> None:
        return None


def float64_batch(truncation: str) -> Batch:
    tokens = nn.functional.pad(torch.tensor(ACTIONS), (N_PROMPT, 0))
    tokens[:, 0] = torch.arange(5)
    steps = torch.arange(N_PROMPT + WIDTH)
    response = (steps >= N_PROMPT) & (steps < N_PROMPT + torch.tensor(LENGTHS)[:, None])

    def at_tokens(numbers: np.ndarray, first: int) -> Tensor:
        return nn.functional.pad(torch.tensor(numbers), (first, 0))

    scored = Scored(at_tokens(OLD, N_PROMPT), at_tokens(REF, N_PROMPT), at_tokens(VALUES, N_PROMPT - 1))
    responses = Responses(tokens, response | (steps < N_PROMPT), response, scored.log_probs, torch.tensor(ENDED))
    config = GenerationConfig(missing_eos_penalty=PENALTY, truncation=truncation)
    return _assemble(responses, scored, scored.log_probs, list(RAW_SCORES), config, BETA)


@pytest.mark.parametrize("truncation", ["terminate", "bootstrap", "mask"])
@pytest.mark.parametrize("rules", [PLAIN, EVERYTHING, PER_STEP], ids=["plain", "everything", "per step"])
def test_update_agrees_with_plain_loops_in_float64(truncation, rules):
    batch, policy = float64_batch(truncation), Table()
    estimates = plain_estimates(truncation, rules)
    assert sorted(estimates) == [(b, t - N_PROMPT + 1) for b, t in batch.mask.nonzero().tolist()]
    for b in range(5):
        rewards = batch.rewards[b, N_PROMPT - 1 :][: LENGTHS[b]].tolist()
        assert rewards == pytest.approx(plain_rewards(b), rel=0, abs=1e-10)

    generator, penalty = torch.Generator(), ReferenceKL(KL_COEF, "k2")
    metrics = rules.update(policy, Unmoved(policy), batch, generator, reference_kl=penalty)
    for name, number in plain_losses(LOGITS, NEW_VALUES, estimates, rules).items():
        assert metrics[name] == pytest.approx(number, rel=0, abs=1e-10), name
    for weight, gradient in zip((policy.logits, policy.values), plain_gradients(estimates, rules), strict=True):
        ours = weight.grad[:, N_PROMPT - 1 :].numpy()
        np.testing.assert_allclose(ours, gradient, rtol=0, atol=1e-10)
