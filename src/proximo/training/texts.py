"""Texts that are learned from, laid out in rows of tokens, and the log-probabilities of their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from proximo.collect.tokens import right_padded
from proximo.models.adapters import in_use
from proximo.models.language import LanguagePolicy


class Text(NamedTuple):
    """Token ids, and from which one on they are scored (the first is never: nothing stands before it)."""

    token_ids: Sequence[int]
    scored_from: int

    @property
    def n_scored(self) -> int:
        """How many tokens are scored."""
        return max(0, len(self.token_ids) - max(1, self.scored_from))


class Rows(NamedTuple):
    """Texts in rows of tokens `[R, L]`, padded on the right; a row may hold several texts, one after the other."""

    tokens: Tensor
    text: Tensor
    """The number of the text that each token belongs to; -1 at padding."""
    positions: Tensor
    """The place of each token in its text."""
    scored: Tensor
    """True at tokens that are scored."""
    packed: bool
    """Whether any row holds several texts."""


def in_rows(texts: Sequence[Text], rows: Sequence[Sequence[int]], device: str) -> Rows:
    """Lay texts out in rows: each of `rows` has the numbers of its texts."""
    ids, owners, positions, scored = [], [], [], []
    for numbers in rows:
        chosen = [(number, texts[number], len(texts[number].token_ids)) for number in numbers]
        ids.append([token for _, text, _ in chosen for token in text.token_ids])
        owners.append([number for number, _, length in chosen for _ in range(length)])
        positions.append([place for _, _, length in chosen for place in range(length)])
        scored.append([place >= max(1, text.scored_from) for _, text, length in chosen for place in range(length)])
    tokens, attention = right_padded(ids)
    return Rows(
        tokens.to(device),
        right_padded(owners, pad=-1)[0].to(device),
        # Padding counts on, or transformers would take it for another text in the row.
        torch.where(attention, right_padded(positions)[0], torch.arange(tokens.shape[1])).to(device),
        right_padded(scored)[0].bool().to(device),
        any(len(numbers) > 1 for numbers in rows),
    )


def packed_rows(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Put texts of these lengths into rows of at most `room` tokens: longest first, each where it first fits."""
    rows: list[list[int]] = []
    left: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        place = next((place for place, free in enumerate(left) if free >= lengths[number]), len(rows))
        if place == len(rows):
            rows.append([])
            left.append(room)
        rows[place].append(number)
        left[place] -= lengths[number]
    return rows


def token_log_probs(policy: LanguagePolicy, rows: Rows) -> Tensor:
    """Log-probability `[R, L]` of each scored token given those before it in its text; 0 elsewhere."""
    policy_model = policy.actor
    inputs = dict(input_ids=rows.tokens, attention_mask=_mask(policy_model, rows), position_ids=rows.positions)
    with in_use(policy._adapted, "policy"), policy.precision():
        if policy._plain_head:
            hidden = policy_model.base_model(**inputs, use_cache=False).last_hidden_state
        else:
            hidden = policy_model(**inputs, use_cache=False).logits
    states = hidden[:, :-1][rows.scored[:, 1:]]
    scores, _ = policy._token_scores(states, rows.tokens[rows.scored], with_entropy=False)
    return torch.zeros(rows.tokens.shape, device=scores.device).masked_scatter(rows.scored, scores)


def sums_of_texts(log_probs: Tensor, rows: Rows, n_texts: int) -> Tensor:
    """Log-probability of each text `[n_texts]`: the sum over its scored tokens."""
    own = torch.zeros(n_texts, device=log_probs.device)
    return own.index_add(0, rows.text[rows.scored], log_probs[rows.scored])


def _mask(model: Any, rows: Rows) -> Tensor | None:
    """Which token may look at which `[R, 1, L, L]`; None where being causal is enough: padding comes last."""
    if not rows.packed:
        return None
    length = rows.tokens.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=rows.tokens.device).tril()
    mask = ((rows.text.unsqueeze(2) == rows.text.unsqueeze(1)) & causal).unsqueeze(1)
    if model.config._attn_implementation == "sdpa":
        return mask
    smallest = torch.finfo(torch.float32).min  # other implementations add the mask
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, smallest)
