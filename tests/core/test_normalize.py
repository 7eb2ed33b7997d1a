"""Running moments against NumPy over everything at once."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from proximo.core.normalize import RunningMoments


def merged(*chunks: Tensor) -> RunningMoments:
    moments = RunningMoments.empty(tuple(chunks[0].shape[1:]))
    for chunk in chunks:
        moments = moments.updated(chunk)
    return moments


def test_by_hand():
    # 1 2 3: mean 2, variance (1 + 0 + 1) / 3.  With 6 and 8: mean 20 / 5 = 4, squares 9 + 4 + 1 + 4 + 16 = 34
    once = merged(torch.tensor([1.0, 2.0, 3.0]))
    assert (once.mean, once.variance, once.count) == (2.0, pytest.approx(2 / 3), 3.0)
    twice = once.updated(torch.tensor([6.0, 8.0]))
    assert (twice.mean, twice.variance, twice.count) == (4.0, pytest.approx(34 / 5), 5.0)


def test_nothing_seen_is_mean_zero_and_variance_one():
    empty = RunningMoments.empty((2,))
    assert empty.mean.tolist() == [0.0, 0.0]
    assert empty.variance.tolist() == [1.0, 1.0]
    assert empty.count == 0.0


def test_no_samples_change_nothing():
    moments = merged(torch.tensor([1.0, 2.0, 3.0]))
    assert moments.updated(torch.empty(0)) is moments


def test_it_is_a_value_and_not_a_mutator():
    moments = merged(torch.tensor([[1.0, 5.0], [3.0, 9.0]]))
    before = [tensor.clone() for tensor in vars(moments).values()]
    moments.updated(torch.tensor([[100.0, 100.0]]))
    assert all(torch.equal(a, b) for a, b in zip(before, vars(moments).values(), strict=True))
    with pytest.raises(dataclasses.FrozenInstanceError):
        moments.count = moments.count  # type: ignore[misc]


def test_a_single_sample_has_no_variance():
    moments = merged(torch.tensor([[7.0, -1.0]]))
    assert moments.mean.tolist() == [7.0, -1.0]
    assert moments.variance.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int64])
def test_it_counts_in_float64_whatever_the_samples_are(dtype):
    samples = torch.arange(200).to(dtype)
    moments = merged(samples, samples)
    assert {tensor.dtype for tensor in vars(moments).values()} == {torch.float64}
    assert float(moments.mean) == pytest.approx(99.5, rel=1e-14)
    assert float(moments.variance) == pytest.approx((200**2 - 1) / 12, rel=1e-13)


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(any),
    features=st.sampled_from([(), (3,), (2, 2)]),
    offset=st.sampled_from([0.0, -5.0, 1e6]),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    seed=st.integers(0, 2**31),
)
def test_chunk_by_chunk_is_all_at_once(sizes, features, offset, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    chunks = [torch.randn(n, *features, generator=generator, dtype=torch.float64) * scale + offset for n in sizes]
    moments, everything = merged(*chunks), torch.cat(chunks).numpy()
    np.testing.assert_allclose(moments.mean.numpy(), everything.mean(0), rtol=1e-12, atol=1e-12 * scale)
    # What float64 leaves of a variance that stands beside the square of an offset.
    slack = 1e-12 * scale**2 + 1e-15 * abs(offset) * scale
    np.testing.assert_allclose(moments.variance.numpy(), everything.var(0), rtol=1e-9, atol=slack)
    assert moments.count == len(everything)
    backwards = merged(*reversed(chunks))
    np.testing.assert_allclose(moments.variance.numpy(), backwards.variance.numpy(), rtol=1e-9, atol=slack)
