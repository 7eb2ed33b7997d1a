"""A reward model as a source of reward: it reads prompt and response, and its last token's number is the score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from proximo.collect.data import Prompt, encode_completion, encode_prompt, pieces_within, right_padded
from proximo.collect.rewards import Scores
from proximo.errors import UserError
from proximo.models.adapters import has_reward_adapter, put_on_reward_adapter
from proximo.models.folders import REWARD_SCALE, context_length, load_scalar_model, load_tokenizer
from proximo.models.language import scalar_values

TOKENS_AT_ONCE = 16384
"""Tokens scored at a time, padding counted, where nothing else is said."""


class RewardModel:
    """A reward model from a folder or hub id, with its own tokenizer; its scores are normalized, where it says how."""

    def __init__(
        self,
        place: str | Path,
        device: str = "cpu",
        *,
        autocast: bool = False,
        tokens_at_once: int = TOKENS_AT_ONCE,
        base: Any = None,
    ) -> None:
        """Load the model.

        Args:
            place: what `proximo reward` made, or any model for sequence classification with one output.
            device: where the model is.
            autocast: compute in bfloat16 over float32 weights.
            tokens_at_once: tokens of responses scored at a time, padding counted.
            base: a causal model; where `place` holds an adapter for this very base, it is put on it and no other
                weights are loaded.

        Raises:
            UserError: if there is no such model, or its scale is damaged.
        """
        self.name = f"reward-model:{Path(place).name}"
        self.tokenizer = load_tokenizer(place)
        adapted = None
        if base is not None and has_reward_adapter(str(place)):
            adapted = put_on_reward_adapter(base, str(place))
        self.on_base = adapted is not None
        """Whether it is an adapter on `base`."""
        self.lora_alpha = adapted.lora_alpha if adapted is not None else None
        self.model: Any = adapted or load_scalar_model(place, device=device).requires_grad_(False)
        self.mean, self.std = scale_of(self.model.config, place)
        self._limit = context_length(self.model)
        self._known = int(self.model.config.get_text_config().vocab_size)
        self._autocast = autocast
        self._tokens_at_once = tokens_at_once

    def __call__(self, prompts: list[Prompt], responses: list[str], columns: dict[str, list[Any]]) -> Scores:
        """Score texts, by the model's own tokenizer and chat template.

        Raises:
            UserError: if prompts are messages and the model's tokenizer has no chat template.
        """
        del columns
        rows = [
            encode_prompt(self.tokenizer, prompt) + encode_completion(self.tokenizer, prompt, response)
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        values = self._score(rows).tolist()
        return Scores.of(
            (value, "") if math.isfinite(value) else (None, self._problem(row))
            for value, row in zip(values, rows, strict=True)
        )

    def score_tokens(self, tokens: Tensor, attention: Tensor) -> Tensor:
        """Score texts in the model's own token ids `[B, L]`, padded however; return `[B]`, NaN where there is none."""
        rows = [row[real].tolist() for row, real in zip(tokens, attention, strict=True)]
        return self._score(rows).to(tokens.device)

    def same_tokens(self, tokenizer: Any) -> bool:
        """Whether another tokenizer makes the same tokens of the same text and messages."""
        ours, probe = self.tokenizer, "a word"
        return (
            ours.get_vocab() == tokenizer.get_vocab()
            and ours.chat_template == tokenizer.chat_template
            and list(ours(probe).input_ids) == list(tokenizer(probe).input_ids)
        )

    def close(self) -> None:
        """Nothing is open."""

    def _score(self, rows: list[list[int]]) -> Tensor:
        fits = [number for number, row in enumerate(rows) if not self._too_long(row) and max(row) < self._known]
        scores = torch.full((len(rows),), torch.nan)
        found = score_rows(
            self.model, [rows[number] for number in fits], budget=self._tokens_at_once, autocast=self._autocast
        )
        scores[fits] = (found - self.mean) / self.std
        return scores

    def _too_long(self, row: Sequence[int]) -> bool:
        return self._limit is not None and len(row) > self._limit

    def _problem(self, row: Sequence[int]) -> str:
        if self._too_long(row):
            return f"{len(row)} tokens with its prompt, more than the {self._limit} that the reward model can read"
        if max(row) >= self._known:
            return f"its tokenizer gives the token id {max(row)}, and the reward model knows only {self._known}"
        return "the reward model gave NaN or infinity"


@torch.no_grad()
def score_rows(model: Any, rows: Sequence[Sequence[int]], *, budget: int | None, autocast: bool = False) -> Tensor:
    """Raw scores `[N]`, float32 on the CPU, of whole texts, in pieces of at most `budget` tokens, padding counted."""
    device = next(model.parameters()).device
    scores = torch.zeros(len(rows))
    for piece in pieces_within([len(row) for row in rows], budget):
        tokens, attention = (tensor.to(device) for tensor in right_padded([rows[number] for number in piece]))
        with torch.autocast(device.type, torch.bfloat16) if autocast else nullcontext():
            scores[piece] = last_scores(model, tokens, attention).cpu()
    return scores


def last_scores(model: Any, tokens: Tensor, attention: Tensor) -> Tensor:
    """The number at the last real token `[B]` of right-padded rows `[B, L]`, float32, with gradient."""
    last = attention.sum(1, keepdim=True) - 1
    return scalar_values(model, tokens, attention).gather(1, last).squeeze(1)


def scale_of(config: Any, place: str | Path) -> tuple[float, float]:
    """Mean and standard deviation of the raw scores, as the config has them; 0 and 1 where it has none."""
    scale = getattr(config, REWARD_SCALE, None)
    if scale is None:
        return 0.0, 1.0
    try:
        mean, std = float(scale["mean"]), float(scale["std"])
        if math.isfinite(mean) and 0.0 < std < math.inf:
            return mean, std
    except (KeyError, TypeError, ValueError):
        pass
    raise UserError(
        f"{REWARD_SCALE} in the config.json of {place} is {scale!r}; it must have a mean and a std above 0. Mend "
        "it, or delete it for raw scores."
    )
