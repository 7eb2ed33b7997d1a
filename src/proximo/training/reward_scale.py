"""The scale of reward models: mean 0 and standard deviation 1 on what the reference says, before training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from proximo.collect.data import PromptRow
from proximo.collect.generate import sample, scores_of
from proximo.collect.reward_model import RewardModel
from proximo.training.align_config import AlignConfig
from proximo.training.roles import Roles, models_of, value_head_of, weight_of


@torch.no_grad()
def normalize_rewards(config: AlignConfig, roles: Roles, tokenizer: Any, rows: Sequence[PromptRow]) -> None:
    """Bring each reward model to mean 0 and standard deviation 1 on samples of the reference (Ziegler et al. 2019, 2).

    The policy is the reference as long as nothing was learned. A critic that began as one of the models is brought
    along. A model that scores all samples alike keeps the scale it came with.

    Args:
        config: the settings.
        roles: as they begin; the scale of the reward models, and the critic's head, change in place.
        tokenizer: the policy's.
        rows: prompts to answer, one response each, at most as many side by side as in training.
    """
    models = models_of(roles.reward)
    if not models:
        return
    at_once = min(config.generation.generation_batch_size or math.inf, config.responses_per_iteration)
    generation = replace(config.generation, generation_batch_size=int(at_once))
    seeded = torch.Generator(next(roles.policy.parameters()).device).manual_seed(config.seed)
    prompts = [row.token_ids for row in rows]
    responses = sample(roles.policy, tokenizer, prompts, generation, seeded)
    for model in models:
        before = model.mean, model.std
        found = scores_of(model, roles.policy, tokenizer, rows, responses, generation).values
        scores = torch.tensor([score for score in found if score is not None], dtype=torch.float64)
        mean, std = float(scores.mean()), float(scores.std(correction=0))
        if not math.isfinite(std) or std < 1e-6:  # nothing was scored, or all alike
            continue
        model.mean, model.std = model.mean + mean * model.std, std * model.std
        if model is roles.began:
            _bring_along(config, roles, before)


def scales_in_words(config: AlignConfig, models: Sequence[RewardModel]) -> dict[str, str]:
    """The scales in use, for people to read; nothing where no reward is a model."""
    where = f"on {config.normalize_rewards_on} responses" if config.normalize_rewards_on else "as they came"
    said = [f"{model.place}: mean {model.mean:.4g}, standard deviation {model.std:.4g}" for model in models]
    return {"raw scores": f"{'; '.join(said)} ({where})"} if said else {}


def _bring_along(config: AlignConfig, roles: Roles, before: tuple[float, float]) -> None:
    """Let a critic that says scores in one unit say them in another."""
    model, head = roles.began, value_head_of(roles.policy)
    assert model is not None
    head.weight *= before[1] / model.std
    head.bias.copy_((head.bias * before[1] + weight_of(config, model.place) * (before[0] - model.mean)) / model.std)
