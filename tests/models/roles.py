"""Policies with every role at hand, rows of prompts and responses, and what a plain model makes of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from proximo.algorithms.adam import FlatAdam
from proximo.algorithms.grpo import GRPO
from proximo.algorithms.ppo import PPO
from proximo.core.batch import Batch
from proximo.core.kl import ReferenceKL
from proximo.models.adapters import LoraConfig, add_adapter
from proximo.models.language import LanguagePolicy
from tests.tiny_language import (
    SPECIAL,
    WORDS,
    tiny_model,
    tiny_scalar_model,
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
