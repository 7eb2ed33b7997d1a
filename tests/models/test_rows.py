"""Rows moved to the left give what a mask and positions give, for fewer tokens."""

from __future__ import annotations

import pytest
import torch

from proximo.models.rows import position_ids, rows_of
from tests.tiny_language import Kind, tiny_model

TOKENS = torch.tensor([[9, 9, 5, 6, 7, 8, 9], [4, 5, 6, 7, 9, 9, 9], [9, 9, 9, 8, 4, 9, 9]])
ATTENTION = torch.tensor([[0, 0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0, 0]]).bool()


def by_mask(model, tokens, attention):
    return model.base_model(
        input_ids=tokens, attention_mask=attention.long(), position_ids=position_ids(attention), use_cache=False
    ).last_hidden_state


def by_rows(model, tokens, attention):
    rows = rows_of(tokens, attention)
    output = model.base_model(
        input_ids=rows.tokens, attention_mask=rows.mask, position_ids=rows.positions, use_cache=False
    )
    return rows.back(output.last_hidden_state)


def test_rows_by_hand():
    rows = rows_of(TOKENS, ATTENTION)
    assert rows.tokens.tolist() == [[5, 6, 7, 8], [4, 5, 6, 7], [8, 4, 0, 0]]
    assert rows.mask is None
    assert rows.positions is None
    states = rows.tokens.unsqueeze(-1).float()
    back = rows.back(states).squeeze(-1)
    assert back[ATTENTION].tolist() == TOKENS[ATTENTION].tolist()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_hidden_states_and_gradients_are_those_of_a_mask(kind: Kind):
    found = []
    for way in (by_mask, by_rows):
        model = tiny_model(kind)
        hidden = way(model, TOKENS, ATTENTION)[ATTENTION]
        (hidden * torch.arange(hidden.numel()).view_as(hidden)).sum().backward()
        found.append([hidden, *(p.grad for p in model.parameters() if p.grad is not None)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "attention",
    [
        torch.ones_like(ATTENTION),  # nothing to move
        torch.tensor([[1, 1, 0, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0, 0], [0, 1, 1, 0, 1, 0, 0]]).bool(),  # holes
        torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]]).bool(),  # on the right
    ],
    ids=["full", "holes", "right"],
)
def test_other_rows_are_scored_alike(kind: Kind, attention: torch.Tensor):
    model = tiny_model(kind)
    with torch.no_grad():
        expected, found = by_mask(model, TOKENS, attention), by_rows(model, TOKENS, attention)
    torch.testing.assert_close(found[attention], expected[attention], rtol=1e-4, atol=1e-5)


def test_a_row_without_tokens_harms_nobody():
    attention = ATTENTION.clone()
    attention[2] = False
    model = tiny_model("llama")
    with torch.no_grad():
        found = by_rows(model, TOKENS, attention)
    assert bool(torch.isfinite(found).all())
    torch.testing.assert_close(found[:2][attention[:2]], by_rows(model, TOKENS, ATTENTION)[:2][attention[:2]])


def test_padding_may_hold_anything():
    model = tiny_model("llama")
    with torch.no_grad():
        beyond = by_rows(model, TOKENS.masked_fill(~ATTENTION, 10**9), ATTENTION)
        clean = by_rows(model, TOKENS, ATTENTION)
    assert torch.equal(beyond[ATTENTION], clean[ATTENTION])
