"""Masked reductions by hand, against NumPy, and blind to whatever stands at masked places."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from proximo.core.masked import explained_variance, masked_mean, masked_sum, masked_variance, whiten

POISON = (math.nan, math.inf, -math.inf)
X = torch.tensor([[1.0, 2.0, 100.0], [6.0, 100.0, 100.0]])
MASK = torch.tensor([[True, True, False], [True, False, False]])


def test_sum_mean_and_variance_by_hand():
    # valid: 1, 2, 6; sum 9, mean 3, squares of the deviations 4 + 1 + 9 = 14 over 3
    assert masked_sum(X, MASK) == 9.0
    assert masked_mean(X, MASK) == 3.0
    assert masked_variance(X, MASK) == pytest.approx(14 / 3)


@pytest.mark.parametrize("denominator", [4.5, torch.tensor(4.5)])
def test_mean_over_a_denominator_of_the_caller(denominator):
    assert masked_mean(X, MASK, denominator=denominator) == 2.0  # 9 / 4.5


def test_nothing_valid_is_zero_and_not_nan():
    nothing = torch.zeros_like(MASK)
    assert masked_mean(X, nothing) == 0.0
    assert masked_variance(X, nothing) == 0.0
    assert whiten(X, nothing).tolist() == [[0.0] * 3] * 2


def test_whiten_one_step_is_left_as_it_is():
    one = torch.tensor([[False, False, False], [True, False, False]])
    assert whiten(X, one).tolist() == [[0.0, 0.0, 0.0], [6.0, 0.0, 0.0]]


def test_whiten_two_steps_uses_n_minus_one():
    # 1 and 3: mean 2, squares 1 + 1 over (2 - 1) = 2, so -1 / sqrt(2) and 1 / sqrt(2)
    result = whiten(torch.tensor([[1.0, 3.0]]), torch.tensor([[True, True]]))
    assert result[0].tolist() == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)], rel=1e-6)


@pytest.mark.parametrize("n", [3, 7, 64, 65])
@pytest.mark.parametrize("constant", [0.0, 0.1, -1.1, 10.1, 1000.1])
def test_whiten_of_equal_values_is_zero_for_all(n, constant):
    # The rounding of the mean must not be blown up to -1 or 1 everywhere.
    result = whiten(torch.full((1, n), constant), torch.ones(1, n, dtype=torch.bool))
    assert result.abs().max() < 1e-3


def test_explained_variance_by_hand():
    targets, everywhere = torch.tensor([[1.0, 2.0, 3.0]]), torch.ones(1, 3, dtype=torch.bool)

    def of(*predictions: float) -> float:
        return float(explained_variance(torch.tensor([predictions], dtype=targets.dtype), targets, everywhere))

    assert of(1, 2, 3) == 1.0
    assert of(6, 7, 8) == 1.0  # a constant offset leaves no variance
    assert of(2, 2, 2) == 0.0  # no better than the mean; with the arguments swapped: NaN
    assert of(3, 2, 1) == pytest.approx(-3.0)  # residuals -2 0 2: 1 - (8/3) / (2/3)
    assert of(1, 2, 1) == pytest.approx(-1 / 3)  # residuals 0 0 2: 1 - (8/9) / (2/3); swapped: 1 - 4 = -3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 3, 6, 64])
@pytest.mark.parametrize("constant", [0.0, 0.1, 1.1, -10.1])
def test_explained_variance_of_constant_targets_is_nan(constant, n, dtype):
    targets = torch.full((1, n), constant, dtype=dtype)
    predictions = torch.linspace(0.0, 1.0, n, dtype=dtype)[None]
    assert math.isnan(explained_variance(predictions, targets, torch.ones(1, n, dtype=torch.bool)))


# --- any values --------------------------------------------------------------------------------------------

many = settings(max_examples=40, deadline=None)
numbers = st.floats(-100, 100, allow_subnormal=False)


@st.composite
def masked_values(draw) -> tuple[Tensor, Tensor, Tensor]:
    """Two tensors and a mask with one valid step or more, float64 `[B, T]`."""
    shape = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    size = shape[0] * shape[1]
    x, y = (draw(st.lists(numbers, min_size=size, max_size=size)) for _ in range(2))
    mask = draw(st.lists(st.booleans(), min_size=size, max_size=size).filter(any))
    floats = (torch.tensor(values, dtype=torch.float64).view(shape) for values in (x, y))
    return *floats, torch.tensor(mask).view(shape)


@many
@given(case=masked_values())
def test_against_numpy_on_the_valid_values(case):
    x, y, mask = case
    valid, other = x[mask].numpy(), y[mask].numpy()
    assert float(masked_sum(x, mask)) == pytest.approx(valid.sum(), abs=1e-9)
    assert float(masked_mean(x, mask)) == pytest.approx(valid.mean(), abs=1e-9)
    assert float(masked_variance(x, mask)) == pytest.approx(valid.var(), abs=1e-8)
    if len(valid) > 1 and valid.std() > 1e-3:
        expected = (valid - valid.mean()) / (valid.std(ddof=1) + 1e-8)
        np.testing.assert_allclose(whiten(x, mask)[mask].numpy(), expected, atol=1e-8)
        explained = 1 - (valid - other).var() / valid.var()
        assert float(explained_variance(y, x, mask)) == pytest.approx(explained, rel=1e-6, abs=1e-6)


@many
@given(case=masked_values(), poison=st.sampled_from(POISON))
def test_nothing_masked_reaches_a_result_or_a_gradient(case, poison):
    x, y, mask = case
    for reduce in (
        lambda x, y: masked_sum(x, mask),
        lambda x, y: masked_mean(x, mask),
        lambda x, y: masked_mean(x, mask, denominator=7.0),
        lambda x, y: masked_variance(x, mask),
        lambda x, y: whiten(x, mask),
        lambda x, y: explained_variance(x, y, mask),
    ):
        poisoned = reduce(x.masked_fill(~mask, poison), y.masked_fill(~mask, poison))
        assert torch.equal(reduce(x, y).nan_to_num(12345.0), poisoned.nan_to_num(12345.0))
    leaf = x.masked_fill(~mask, poison).requires_grad_()
    (gradient,) = torch.autograd.grad(masked_mean(leaf, mask), leaf)
    assert torch.equal(gradient, mask / mask.sum(dtype=torch.float64))


@many
@given(case=masked_values(), n_parts=st.integers(1, 4))
def test_parts_over_the_count_of_the_whole_add_up_to_its_mean(case, n_parts):
    x, _, mask = case
    parts = zip(x.tensor_split(n_parts), mask.tensor_split(n_parts), strict=True)
    total = sum(masked_mean(part, valid, denominator=mask.sum()) for part, valid in parts)
    assert float(total) == pytest.approx(float(masked_mean(x, mask)), abs=1e-10)


def spread(x: Tensor, mask: Tensor) -> bool:
    return mask.sum() > 1 and float(x[mask].std()) > 0.1


@many
@given(case=masked_values().filter(lambda case: spread(case[0], case[2])), data=st.data())
def test_whitening_forgets_shift_scale_order_and_padding(case, data):
    x, _, mask = case
    plain = whiten(x, mask)
    assert float(plain[mask].mean()) == pytest.approx(0.0, abs=1e-9)
    assert float(plain[mask].std()) == pytest.approx(1.0, abs=1e-6)
    scale, shift = data.draw(st.floats(0.1, 10)), data.draw(numbers)
    torch.testing.assert_close(whiten(scale * x + shift, mask), plain, rtol=0, atol=2e-6)
    torch.testing.assert_close(whiten(-scale * x, mask), -plain, rtol=0, atol=2e-6)
    order = torch.tensor(data.draw(st.permutations(range(len(x)))))
    torch.testing.assert_close(whiten(x[order], mask[order]), plain[order], rtol=0, atol=1e-9)
    padding = torch.full((len(x), data.draw(st.integers(1, 3))), math.nan, dtype=x.dtype)
    wide = whiten(torch.cat([padding, x], 1), torch.cat([torch.zeros_like(padding, dtype=torch.bool), mask], 1))
    torch.testing.assert_close(wide[:, padding.shape[1] :], plain, rtol=0, atol=1e-9)
