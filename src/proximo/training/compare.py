"""Language models against each other: mean score, win rate, KL, best-of-n; and plain sampling from one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from proximo.collect.data import PromptRow
from proximo.collect.generate import Answers, GenerationConfig, generate
from proximo.collect.rewards import Reward, Scores
from proximo.errors import UserError, in_range
from proximo.models.folders import load_causal_lm
from proximo.models.language import LanguagePolicy


class NoReward:
    """Scores nothing: for sampling alone."""

    name = "none"

    def __call__(self, prompts: list[Any], responses: list[str], columns: dict[str, list[Any]]) -> Scores:
        """Give every response 0."""
        del prompts, columns
        return Scores([0.0] * len(responses), [])

    def close(self) -> None:
        """Nothing is open."""


def load_for_sampling(place: str, *, temperature: float, device: str = "cpu", reference: Any = None) -> LanguagePolicy:
    """A model of a folder or hub id that only acts, and a reference to measure it against."""
    actor = load_causal_lm(place, device=device).requires_grad_(False)
    return LanguagePolicy(actor, sharing="separate", reference=reference, temperature=temperature)


def answers_of(
    policy: LanguagePolicy,
    tokenizer: Any,
    rows: Sequence[PromptRow],
    reward: Reward,
    generation: GenerationConfig,
    *,
    n_per_prompt: int,
    seed: int,
) -> Answers:
    """Sample and score `n_per_prompt` responses to each prompt; fixed by `seed`."""
    device = next(policy.parameters()).device
    _, answers = generate(
        policy,
        tokenizer,
        rows,
        reward,
        generation,
        torch.Generator(device).manual_seed(seed),
        n_per_prompt=n_per_prompt,
        with_reference=policy.reference is not None,
    )
    return answers


def compare(
    model: str,
    against: str,
    tokenizer: Any,
    rows: Sequence[PromptRow],
    reward: Reward,
    generation: GenerationConfig,
    *,
    best_of: int = 4,
    seed: int = 0,
    device: str = "cpu",
) -> dict[str, Any]:
    """Let two models answer the same prompts, and score both.

    Returns:
        `reward_mean`, `reward_mean_against`; `win_rate`, the share of prompts on which the first scores higher (ties
        count half); `win_rate_standard_error`; `kl_to_against` (nats per response, at the first model's samples);
        `eos_fraction`, `response_length_mean` and those of the other; `best_of`, `best_of_reward_mean`: the mean
        of the best score of so many responses of the other; `n_prompts`, `missing` scores, `seed`.

    Raises:
        UserError: if a model cannot be loaded, or no prompt got a score from both.
    """
    in_range("best_of", best_of, at_least=1, whole=True, usual="4")
    other = load_for_sampling(against, temperature=generation.temperature, device=device)
    policy = load_for_sampling(model, temperature=generation.temperature, device=device, reference=other.actor)
    ours = answers_of(policy, tokenizer, rows, reward, generation, n_per_prompt=1, seed=seed)
    theirs = answers_of(other, tokenizer, rows, reward, generation, n_per_prompt=best_of, seed=seed + 1)
    groups = [theirs.scores[first : first + best_of] for first in range(0, len(theirs.scores), best_of)]
    first_ones = zip(ours.scores, (group[0] for group in groups), strict=True)
    pairs = [(a, b) for a, b in first_ones if a is not None and b is not None]
    if not pairs:
        raise UserError("No prompt got a score for both models. " + "; ".join((ours.problems + theirs.problems)[:3]))
    wins = torch.tensor([1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs])
    best = [max(scores) for group in groups if (scores := [s for s in group if s is not None])]
    first = range(0, len(theirs.scores), best_of)
    kl = ours.kl_to_reference or []
    return {
        "n_prompts": len(rows),
        "reward_mean": _mean([a for a, _ in pairs]),
        "reward_mean_against": _mean([b for _, b in pairs]),
        "win_rate": float(wins.mean()),
        "win_rate_standard_error": float(wins.std(correction=0) / len(wins) ** 0.5),
        "kl_to_against": _mean(kl),
        "eos_fraction": _mean([float(e) for e in ours.ended]),
        "eos_fraction_against": _mean([float(theirs.ended[k]) for k in first]),
        "response_length_mean": _mean([float(n) for n in ours.n_tokens]),
        "response_length_mean_against": _mean([float(theirs.n_tokens[k]) for k in first]),
        "best_of": best_of,
        "best_of_reward_mean": _mean(best),
        "missing": len(rows) - len(pairs),
        "seed": seed,
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)
