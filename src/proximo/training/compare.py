"""Language models against each other: mean score, win rates, KL, best-of-n; and plain sampling from one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from proximo.collect.data import PromptRow
from proximo.collect.generate import Answers, GenerationConfig, end_tokens, generate
from proximo.collect.judge import JudgeReward
from proximo.collect.reward_model import same_tokens
from proximo.collect.rewards import Reward, Scores
from proximo.errors import UserError, in_range
from proximo.models.folders import check_token_ids, load_causal_lm, load_tokenizer
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


class WinRate(NamedTuple):
    """How often one of two wins."""

    mean: float
    """Share of comparisons won; a tie is half a win."""
    standard_error: float
    missing: int
    """Comparisons without a verdict, which are left out."""


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
    """Sample and score `n_per_prompt` responses to each prompt; fixed by `seed`.

    Raises:
        UserError: if the model does not know a token of the prompts.
    """
    check_token_ids(max(max(row.token_ids) for row in rows), policy.actor.config, "The tokenizer")
    if not end_tokens(policy.actor, tokenizer):  # nothing is learned here: answers may all be as long as they can
        generation = replace(generation, stop_at_eos=False)
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
    reward: Reward | None,
    generation: GenerationConfig,
    *,
    judge: JudgeReward | None = None,
    best_of: int = 4,
    seed: int = 0,
    device: str = "cpu",
) -> dict[str, Any]:
    """Let two models answer the same prompts; score both, or show both answers to a judge, or do either.

    Returns:
        With a reward, else None: `reward_mean`, `reward_mean_against`; `win_rate`, the share of prompts on which the
        first scores higher (ties count half); `win_rate_standard_error`; `missing` scores; `best_of_reward_mean`: the
        mean of the best score of `best_of` responses of the other.
        With a judge, else None: `judge_win_rate`, the share of prompts on which it finds the first answer better,
        asked in both orders (ties, and verdicts that contradict each other, count half);
        `judge_win_rate_standard_error`; `judge_missing` verdicts.
        Always: `kl_to_against` (nats per response, at the first model's samples); `eos_fraction`,
        `response_length_mean` and those of the other; `n_prompts`, `best_of`, `seed`.

    Raises:
        UserError: if a model cannot be loaded, the two read different tokens, or not one prompt got a score from both
            or a verdict.
    """
    in_range("best_of", best_of, at_least=1, whole=True, usual="4")
    _check_tokenizer_of(against, tokenizer, model)
    n_theirs = best_of if reward is not None else 1
    source = NoReward() if reward is None else reward
    other = load_for_sampling(against, temperature=generation.temperature, device=device)
    policy = load_for_sampling(model, temperature=generation.temperature, device=device, reference=other.actor)
    ours = answers_of(policy, tokenizer, rows, source, generation, n_per_prompt=1, seed=seed)
    theirs = answers_of(other, tokenizer, rows, source, generation, n_per_prompt=n_theirs, seed=seed + 1)
    first = range(0, len(theirs.texts), n_theirs)
    scored: dict[str, Any] = dict.fromkeys(_SCORED)
    if reward is not None:
        groups = [theirs.scores[k : k + n_theirs] for k in first]
        scored = compared_scores(ours.scores, groups, ours.problems + theirs.problems)
    judged: dict[str, Any] = dict.fromkeys(_JUDGED)
    if judge is not None:
        verdicts = judge.compare(ours.prompts, ours.texts, [theirs.texts[k] for k in first])
        rate = win_rate_of(verdicts.values, verdicts.problems, "verdict of the judge")
        judged = dict(zip(_JUDGED, rate, strict=True))
    return {
        "n_prompts": len(rows),
        **scored,
        **judged,
        "kl_to_against": _mean(ours.kl_to_reference or []),
        "eos_fraction": _mean([float(e) for e in ours.ended]),
        "eos_fraction_against": _mean([float(theirs.ended[k]) for k in first]),
        "response_length_mean": _mean([float(n) for n in ours.n_tokens]),
        "response_length_mean_against": _mean([float(theirs.n_tokens[k]) for k in first]),
        "best_of": best_of,
        "seed": seed,
    }


def _check_tokenizer_of(against: str, tokenizer: Any, model: str) -> None:
    """Refuse a model that other tokens were made for: prompts and KL would mean nothing to it."""
    theirs = load_tokenizer(against)
    theirs.chat_template = tokenizer.chat_template  # prompts are written by one template, for both
    if not same_tokens(theirs, tokenizer):
        raise UserError(
            f"{against} has another tokenizer than {model}: both are given the same token ids, and the KL between them "
            "is of one vocabulary. Compare models that were made from the same one."
        )


_SCORED = (
    "reward_mean",
    "reward_mean_against",
    "win_rate",
    "win_rate_standard_error",
    "missing",
    "best_of_reward_mean",
)
_JUDGED = ("judge_win_rate", "judge_win_rate_standard_error", "judge_missing")


def compared_scores(
    ours: Sequence[float | None], theirs: Sequence[Sequence[float | None]], problems: Sequence[str]
) -> dict[str, Any]:
    """Compare scores, one of ours and a group of theirs per prompt: our one with their first one, and their best.

    Means and win rate are over the prompts that have a score from both.

    Raises:
        UserError: if there is no such prompt, with the problems.
    """
    pairs = [(a, group[0]) for a, group in zip(ours, theirs, strict=True)]
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    wins = [None if a is None or b is None else 1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs]
    rate = win_rate_of(wins, problems, "score for both models")
    best = [max(scores) for group in theirs if (scores := [score for score in group if score is not None])]
    means = (_mean([a for a, _ in known]), _mean([b for _, b in known]))
    return dict(zip(_SCORED, (*means, *rate, _mean(best)), strict=True))


def win_rate_of(shares: Sequence[float | None], problems: Sequence[str], what: str) -> WinRate:
    """The win rate in comparisons that gave 1 (won), 0.5 (a tie), 0 (lost) or None.

    Raises:
        UserError: if all are None; `what` says what is missing, `problems` why.
    """
    known = torch.tensor([share for share in shares if share is not None])
    if not len(known):
        raise UserError(f"No prompt got a {what}. " + "; ".join(problems[:3]))
    error = float(known.std(correction=0)) / len(known) ** 0.5
    return WinRate(float(known.mean()), error, len(shares) - len(known))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)
