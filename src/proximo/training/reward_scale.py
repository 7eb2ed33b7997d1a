"""The scale of reward models: mean 0 and standard deviation 1 on what the reference says, before training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from proximo.collect.data import PromptRow
from proximo.collect.generate import generate
from proximo.collect.reward_model import RewardModel
from proximo.models.language import LanguagePolicy
from proximo.training.align_config import AlignConfig
from proximo.training.roles import Roles, models_of


@torch.no_grad()
def normalize_rewards(config: AlignConfig, roles: Roles, tokenizer: Any, rows: Sequence[PromptRow]) -> dict[str, str]:
    """Bring each reward model to mean 0 and standard deviation 1 on samples of the reference (Ziegler et al. 2019, 2).

    The policy is the reference as long as nothing was learned. A critic that began as the first reward model is
    brought along. Models whose scores of these samples are all alike keep the scale they came with.

    Args:
        config: the settings.
        roles: as they begin.
        tokenizer: the policy's.
        rows: prompts to answer, one response each.

    Returns:
        What was done, for people to read; nothing where no reward is a model.
    """
    said = []
    for model in models_of(roles.reward):
        before = model.mean, model.std
        said.append(_normalize(config, roles.policy, tokenizer, rows, model))
        if model is roles.began:
            _bring_along(roles.policy, before, (model.mean, model.std))
    return {"reward's scale": "; ".join(said)} if said else {}


def _normalize(
    config: AlignConfig, policy: LanguagePolicy, tokenizer: Any, rows: Sequence[PromptRow], model: RewardModel
) -> str:
    device = next(policy.parameters()).device
    seeded = torch.Generator(device).manual_seed(config.seed)
    _, answers = generate(policy, tokenizer, rows, model, config.generation, seeded, with_reference=False)
    scores = torch.tensor([score for score in answers.scores if score is not None], dtype=torch.float64)
    mean, std = (float(scores.mean()), float(scores.std(correction=0))) if len(scores) > 1 else (0.0, 0.0)
    if not math.isfinite(std) or std < 1e-6:
        return f"{model.name}: as it came, for its scores of {len(rows)} responses do not differ"
    model.mean, model.std = model.mean + mean * model.std, std * model.std
    return f"{model.name}: mean {model.mean:.4g}, standard deviation {model.std:.4g} on {len(scores)} responses"


def _bring_along(policy: LanguagePolicy, before: tuple[float, float], after: tuple[float, float]) -> None:
    """Let a critic that says scores in one unit say them in another; a head without a bias keeps its zero."""
    head: Any = policy.critic.score if policy.critic is not None else policy.value_head
    head.weight *= before[1] / after[1]
    if head.bias is not None:
        head.bias.copy_((head.bias * before[1] + before[0] - after[0]) / after[1])
