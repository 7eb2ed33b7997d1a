"""A reward model as a source of reward: it reads prompt and response, and its last token's number is the score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from proximo.collect.rewards import Reward, Scores, WeightedReward
from proximo.collect.tokens import Prompt, encode_completion, encode_prompt, pieces_within, right_padded
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
        dtype: torch.dtype = torch.float32,
        autocast: bool = False,
        tokens_at_once: int = TOKENS_AT_ONCE,
        base: Any = None,
    ) -> None:
        """Load the model.

        Args:
            place: what `proximo reward` made, or any model for sequence classification with one output.
            device: where the model is.
            dtype: what the weights are held in.
            autocast: compute in bfloat16.
            tokens_at_once: tokens of responses scored at a time, padding counted.
            base: a causal model; where `place` holds an adapter for this very base, it is put on it and no other
                weights are loaded.

        Raises:
            UserError: if there is no such model, or its scale is damaged.
        """
        self.place = str(place)
        self.name = f"reward-model:{Path(place).name}"
        self.tokenizer = load_tokenizer(place)
        adapted = None
        if base is not None and has_reward_adapter(str(place)):
            adapted = put_on_reward_adapter(base, str(place))
        self.on_base = adapted is not None
        """Whether it is an adapter on `base`."""
        self.lora_alpha = adapted.lora_alpha if adapted is not None else None
        self.model: Any = adapted or load_scalar_model(place, dtype=dtype, device=device).requires_grad_(False)
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
        return self.score_texts(prompts, responses, [True] * len(responses))

    def score_texts(
        self,
        prompts: Sequence[Prompt],
        texts: Sequence[str],
        ended: Sequence[bool],
        sampled: Sequence[tuple[list[int], list[int]]] | None = None,
    ) -> Scores:
        """Score responses as the model has learned to read them: with what ends an answer exactly where one ended.

        Args:
            prompts: texts or messages.
            texts: the responses, without an end token, cut before a stop string.
            ended: whether each ended by itself: neither at the limit nor at a stop string.
            sampled: the token ids of each prompt and of its response, end token included, where they are the model's
                own; so a text is read as it was written, however else its tokenizer would have cut it up.

        Raises:
            UserError: if prompts are messages and the model's tokenizer has no chat template.
        """
        rows = [
            self._row(prompt, text, over, None if sampled is None else sampled[number])
            for number, (prompt, text, over) in enumerate(zip(prompts, texts, ended, strict=True))
        ]
        values = self._score(rows).tolist()
        return Scores.of(
            (value, "") if math.isfinite(value) else (None, self._problem(row))
            for value, row in zip(values, rows, strict=True)
        )

    def same_tokens(self, tokenizer: Any) -> bool:
        """Whether another tokenizer makes the same tokens of the same text and messages."""
        return same_tokens(self.tokenizer, tokenizer)

    def close(self) -> None:
        """Nothing is open."""

    def _row(self, prompt: Prompt, text: str, ended: bool, sampled: tuple[list[int], list[int]] | None) -> list[int]:
        """The token ids to be scored for one response."""
        ids = encode_prompt(self.tokenizer, prompt)
        completion = encode_completion(self.tokenizer, prompt, text) if ended else []
        if sampled is not None:
            said = _cut(self.tokenizer, sampled[1][:-1] if ended else sampled[1], text)
            if said is not None:
                return sampled[0] + said + _ending(completion, sampled[1][-1])
        if ended:
            return ids + completion
        plain = list(self.tokenizer(text, add_special_tokens=False).input_ids)
        if isinstance(prompt, str):
            return ids + plain
        before = self.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        whole = list(self.tokenizer(before + text, add_special_tokens=False).input_ids)
        return whole if whole[: len(ids)] == ids else ids + plain  # no token reaches over the seam

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


def same_tokens(one: Any, other: Any) -> bool:
    """Whether two tokenizers make the same tokens of the same text and messages."""
    probe = "a word"
    return (
        one.get_vocab() == other.get_vocab()
        and one.chat_template == other.chat_template
        and list(one(probe).input_ids) == list(other(probe).input_ids)
    )


def score_responses(
    reward: Reward,
    prompts: list[Prompt],
    texts: list[str],
    columns: dict[str, list[Any]],
    ended: Sequence[bool],
) -> Scores:
    """Scores of texts; the reward models among the sources are told which of them ended by themselves."""
    if isinstance(reward, WeightedReward):
        return reward.summed([score_responses(part, prompts, texts, columns, ended) for part in reward.rewards])
    if isinstance(reward, RewardModel):
        return reward.score_texts(prompts, texts, ended)
    return reward(prompts, texts, columns)


def _cut(tokenizer: Any, ids: list[int], text: str) -> list[int] | None:
    """The longest beginning of sampled tokens that reads as `text`; None where there is none, or EOS is in it."""
    if tokenizer.eos_token_id in ids:
        return None
    for length in range(len(ids), -1, -1):
        read = tokenizer.decode(ids[:length], skip_special_tokens=True)
        if read == text:
            return ids[:length]
        if len(read) < len(text):
            break
    return None


def _ending(completion: list[int], end: int) -> list[int]:
    """What a training text has from the sampled end token on, or only its EOS; nothing where nothing ended."""
    if end not in completion:
        return completion[-1:]
    return completion[len(completion) - 1 - completion[::-1].index(end) :]


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
