"""Advantages of answers against each other, by hand and by what must hold of them; and GAE as language has it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from proximo.core.advantages import gae, group_relative, leave_one_out

POISON = (math.nan, math.inf, -math.inf, 1e30)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def valid_but(n: int, *missing: int) -> Tensor:
    return torch.tensor([row not in missing for row in range(n)])


FUNCTIONS = {
    "group_std": group_relative,
    "group_mean": lambda *arguments: group_relative(*arguments, divide_by_std=False),
    "leave_one_out": leave_one_out,
}
function = pytest.mark.parametrize("name", list(FUNCTIONS))

# --- by hand ------------------------------------------------------------------------------------------------------

SCORES, GROUPS = numbers(1.0, 10.0, 2.0, 10.0, 6.0, 14.0), torch.tensor([7, 3, 7, 3, 7, 3])
# group 7 has 1, 2, 6: mean 3, squares 4 + 1 + 9 = 14, standard deviation sqrt(14 / 2) = sqrt(7)
# group 3 has 10, 10, 14: mean 34/3, squares 2 * (4/3)^2 + (8/3)^2 = 96/9, standard deviation sqrt(48/9) = 4 / sqrt(3)
STD_7, STD_3 = math.sqrt(7) + 1e-4, 4 / math.sqrt(3) + 1e-4
BY_HAND = {
    "group_std": [-2 / STD_7, -4 / 3 / STD_3, -1 / STD_7, -4 / 3 / STD_3, 3 / STD_7, 8 / 3 / STD_3],
    "group_mean": [-2.0, -4 / 3, -1.0, -4 / 3, 3.0, 8 / 3],
    # each less the mean of the other two: 1 - 4, 10 - 12, 2 - 3.5, 10 - 12, 6 - 1.5, 14 - 10
    "leave_one_out": [-3.0, -2.0, -1.5, -2.0, 4.5, 4.0],
}


@function
def test_two_groups_by_hand(name):
    found = FUNCTIONS[name](SCORES, valid_but(6), GROUPS)
    assert found.tolist() == pytest.approx(BY_HAND[name], rel=1e-12)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # without the middle one, group 7 has 1 and 6: mean 3.5, standard deviation 5 / sqrt(2); group 3 as before
        ("group_std", [-2.5 / (5 / math.sqrt(2) + 1e-4), 2.5 / (5 / math.sqrt(2) + 1e-4)]),
        ("group_mean", [-2.5, 2.5]),
        ("leave_one_out", [-5.0, 5.0]),
    ],
)
@pytest.mark.parametrize("poison", POISON)
def test_a_row_without_a_score_is_nobody_to_its_group(name, expected, poison):
    scores = SCORES.clone()
    scores[2] = poison
    found = FUNCTIONS[name](scores, valid_but(6, 2), GROUPS).tolist()
    assert [found[0], found[4]] == pytest.approx(expected, rel=1e-12)
    assert found[2] == 0.0
    assert [found[1], found[3], found[5]] == pytest.approx(BY_HAND[name][1::2], rel=1e-12)


@function
def test_a_row_alone_in_its_group_has_nothing_to_be_compared_with(name):
    alone = FUNCTIONS[name](numbers(5.0, 1.0, 3.0), valid_but(3), torch.tensor([0, 1, 1]))
    assert alone[0] == 0.0
    assert alone[1] < 0 < alone[2]
    left_over = FUNCTIONS[name](numbers(5.0, 9.0, 1.0, 3.0), valid_but(4, 1), torch.tensor([0, 0, 1, 1]))
    assert left_over.tolist() == [0.0, 0.0, *alone[1:].tolist()]
    nobody = FUNCTIONS[name](numbers(5.0, 9.0), valid_but(2, 0, 1), torch.tensor([0, 0]))
    assert nobody.tolist() == [0.0, 0.0]


@function
def test_a_score_of_zero_is_a_score(name):
    found = FUNCTIONS[name](numbers(0.0, 1.0), valid_but(2), torch.tensor([0, 0]))
    half = {"group_std": 0.5 / (math.sqrt(0.5) + 1e-4), "group_mean": 0.5, "leave_one_out": 1.0}[name]
    assert found.tolist() == pytest.approx([-half, half])


@pytest.mark.parametrize("score", [0.0, 0.1, 1 / 3, -7.3, 1e4])
@pytest.mark.parametrize("n", [2, 3, 7, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_scores_are_no_signal_also_when_they_differ_by_rounding(score, n, dtype):
    scores = torch.full((n,), score, dtype=dtype)
    for divide in (True, False):
        found = group_relative(scores, valid_but(n), torch.zeros(n, dtype=torch.long), divide_by_std=divide)
        assert found.tolist() == [0.0] * n
    found = leave_one_out(scores, valid_but(n), torch.zeros(n, dtype=torch.long))
    assert found.abs().max() <= 8 * torch.finfo(dtype).eps * abs(score)


def test_equal_scores_of_one_group_do_not_hide_the_differences_of_another():
    found = group_relative(numbers(1e6, 1e6, 0.001, 0.002), valid_but(4), torch.tensor([0, 0, 1, 1]))
    std = 0.001 / math.sqrt(2)
    assert found.tolist() == pytest.approx([0.0, 0.0, -0.0005 / (std + 1e-4), 0.0005 / (std + 1e-4)])


# --- what must hold -----------------------------------------------------------------------------------------------

row = st.tuples(st.floats(-10, 10).map(lambda x: round(x, 2)), st.booleans(), st.integers(0, 3))


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(row, min_size=1, max_size=12), random=st.randoms(use_true_random=False))
@function
def test_order_and_the_numbers_of_groups_are_nothing(name, rows, random):
    scores, valid, group = (torch.tensor(column) for column in zip(*rows, strict=True))
    found = FUNCTIONS[name](scores.double(), valid, group)
    order = list(range(len(rows)))
    random.shuffle(order)
    shuffled = FUNCTIONS[name](scores.double()[order], valid[order], 100 - 7 * group[order])
    torch.testing.assert_close(shuffled, found[order], rtol=1e-9, atol=1e-9)
    # What is compared has no level: over the valid rows of a group the advantages add up to nothing.
    for number in group.unique():
        assert float(found[group == number].sum()) == pytest.approx(0.0, abs=1e-9)
    assert bool((found[~valid] == 0).all())


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(row, min_size=2, max_size=10), shift=st.integers(-50, 50))
@function
def test_adding_a_number_to_every_score_changes_nothing(name, rows, shift):
    scores, valid, group = (torch.tensor(column) for column in zip(*rows, strict=True))
    found = FUNCTIONS[name](scores.double(), valid, group)
    torch.testing.assert_close(FUNCTIONS[name](scores.double() + shift, valid, group), found, rtol=1e-6, atol=1e-8)


def test_the_standard_deviation_takes_the_scale_away():
    one = group_relative(SCORES, valid_but(6), GROUPS)
    hundred = group_relative(100 * SCORES, valid_but(6), GROUPS)
    torch.testing.assert_close(one, hundred, rtol=1e-3, atol=0.0)


# --- GAE of responses ---------------------------------------------------------------------------------------------


def test_lambda_may_be_one_per_row():
    generator = torch.Generator().manual_seed(0)
    rewards, values, next_values = torch.randn(3, 2, 5, generator=generator, dtype=torch.float64)
    terminated = torch.tensor([[False] * 4 + [True]] * 2)
    mask = torch.ones_like(terminated)
    lambdas = [0.3, 0.9]

    def estimate(rows: slice, gae_lambda: float | Tensor) -> Tensor:
        parts = (each[rows] for each in (rewards, values, next_values, terminated, terminated, mask))
        return gae(*parts, gamma=0.9, gae_lambda=gae_lambda)

    together = estimate(slice(None), torch.tensor(lambdas, dtype=torch.float64))
    apart = torch.cat([estimate(slice(k, k + 1), value) for k, value in enumerate(lambdas)])
    torch.testing.assert_close(together, apart, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("poison", [100.0, *POISON])
def test_tokens_of_a_tool_between_those_of_a_response_change_nothing(poison):
    # Five tokens of a response, then the same with two foreign ones in the middle (ROLL #447, verl #2337, miles #1827).
    rewards, values = numbers(-0.1, 0.2, 0.0, -0.3, 1.0)[None], numbers(0.5, -0.5, 1.0, 2.0, 0.25)[None]
    following = numbers(-0.5, 1.0, 2.0, 0.25, 9.0)[None]
    last = torch.tensor([[False] * 4 + [True]])
    plain = gae(rewards, values, following, last, last, torch.ones_like(last), gamma=1.0, gae_lambda=0.5)
    places = [0, 1, 4, 5, 6]

    def inserted(tensor: Tensor, filling: float) -> Tensor:
        wide = torch.full((1, 7), filling, dtype=tensor.dtype)
        wide[:, places] = tensor
        return wide

    mask = inserted(torch.ones_like(last), False)
    wide = [inserted(each, poison) for each in (rewards, values, following)]
    found = gae(*wide, inserted(last, True), inserted(last, True), mask, gamma=1.0, gae_lambda=0.5)
    assert torch.equal(found[:, places], plain)
    assert found[0, 2:4].tolist() == [0.0, 0.0]
