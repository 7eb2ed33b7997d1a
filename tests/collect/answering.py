"""Policies, prompts and rewards for tests of sampling, and three responses whose batch is known by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from proximo.collect.data import PromptRow
from proximo.collect.generate import (
    Responses,
)
from proximo.collect.rewards import Scores
from proximo.models.language import LanguagePolicy, Scored
from tests.tiny_language import SPECIAL, WORDS, tiny_model, tiny_scalar_model, tiny_tokenizer

VOCABULARY = len(SPECIAL + WORDS)
PROMPTS = [[7, 8, 9], [10], [11, 12, 13, 14, 15], [16, 17], [18]]
ENDS = [2, *range(40, VOCABULARY)]  # about one token in five ends a response, so that they end at all lengths
TOKENIZER = tiny_tokenizer()
kinds = pytest.mark.parametrize("kind", ["llama", "gpt2"])


def rows_of(prompts: list[list[int]] = PROMPTS) -> list[PromptRow]:
    return [PromptRow(TOKENIZER.decode(ids), ids, {"number": k}) for k, ids in enumerate(prompts)]


def policy_of(kind: Any = "llama", *, temperature: float = 1.0, actor: Any = None, ends: Any = ENDS) -> LanguagePolicy:
    actor = actor or tiny_model(kind)
    actor.generation_config.eos_token_id = ends
    return LanguagePolicy(
        actor,
        sharing="separate",
        critic=tiny_scalar_model(kind, seed=1),
        reference=tiny_model(kind, seed=2),
        temperature=temperature,
    )


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Told:
    """A reward that gives scores told beforehand (over and over) and remembers what it was asked."""

    name = "told"

    def __init__(self, *scores: float | None) -> None:
        self.scores = scores or (1.0,)
        self.asked: list[tuple[list[Any], list[str], dict[str, list[Any]]]] = []

    def __call__(self, prompts: list[Any], responses: list[str], columns: dict[str, list[Any]]) -> Scores:
        self.asked.append((prompts, responses, columns))
        return Scores([self.scores[k % len(self.scores)] for k in range(len(responses))], [])

    def close(self) -> None:
        pass


# Prompts of one, two and one token; responses of three (ended), two (ended) and three tokens (cut off).
HAND = Responses(
    tokens=torch.tensor([[0, 7, 20, 21, 2], [8, 9, 22, 2, 0], [0, 10, 24, 25, 26]]),
    attention=torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0], [0, 1, 1, 1, 1]], dtype=torch.bool),
    response=torch.tensor([[0, 0, 1, 1, 1], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]], dtype=torch.bool),
    log_probs=torch.tensor([[0.0, 0, -1, -2, -3], [0, 0, -1, -1, 0], [0, 0, -2, -2, -2]]),
    ended=torch.tensor([True, True, False]),
)
NAN = float("nan")
SCORED = Scored(
    log_probs=torch.full((3, 5), NAN),  # those of sampling count
    ref_log_probs=torch.tensor([[NAN, NAN, -1.5, -1, -3.25], [NAN, NAN, -1, -2, NAN], [NAN, NAN, -2, -2, -2]]),
    values=torch.tensor([[NAN, 0.5, 0.2, 0.4, NAN], [NAN, 0.5, 0.25, NAN, NAN], [NAN, 0.5, 0.2, 0.4, 0.8]]),
)
