"""How much a response repeats itself."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proximo.collect.repetition import repetition


def share(*responses, before=2, width=12):
    """The measured share of responses that stand after a prompt of some tokens, with other tokens around them."""
    tokens = torch.full((len(responses), width), 7)
    last = torch.zeros_like(tokens, dtype=torch.bool)
    for row, response in enumerate(responses):
        tokens[row, before : before + len(response)] = torch.tensor(response, dtype=tokens.dtype)
        if response:
            last[row, before + len(response) - 1] = True
    return repetition(tokens, last, [len(response) for response in responses])


def test_counts_by_hand():
    assert share([1, 2, 3, 4, 5]) == 0.0
    assert share([1, 1, 1, 1, 1]) == pytest.approx(2 / 3)  # three pieces, two of which stood before
    assert share([1, 2, 3, 1, 2, 3]) == pytest.approx(1 / 4)  # 123 231 312 123
    assert share([1, 2, 3, 1, 2, 3], [4, 5, 6, 1]) == pytest.approx(1 / 6)  # over all pieces of all responses


def test_what_another_response_said_is_no_repetition():
    assert share([1, 2, 3, 4], [1, 2, 3, 4]) == 0.0


def test_what_is_around_a_response_does_not_count():
    assert share([7, 7], before=4) == 0.0  # everything around is 7 as well
    assert share([1, 2], [], before=0) == 0.0
    assert repetition(torch.ones(2, 2, dtype=torch.int64), torch.tensor([[False, True]] * 2), [2, 2]) == 0.0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=0, max_size=10), min_size=1, max_size=4))
def test_is_what_counting_one_by_one_gives(responses):
    pieces = [Counter(tuple(r[i : i + 3]) for i in range(len(r) - 2)) for r in responses]
    total = sum(sum(count.values()) for count in pieces)
    again = sum(sum(count.values()) - len(count) for count in pieces)
    assert share(*responses) == pytest.approx(again / total if total else 0.0)


def test_large_vocabularies_are_told_apart():
    far = 1_999_999
    assert share([far, far - 1, far - 2, far, far - 1, far - 2]) == pytest.approx(1 / 4)
    assert share([far, 0, 0, 0, far, 0, far]) == 0.0  # five pieces of the same two tokens
