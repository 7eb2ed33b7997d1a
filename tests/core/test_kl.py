"""KL estimates by hand and in exact expectation; the adaptive coefficient at its edges."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proximo.core.kl import AdaptiveKL, ProportionalKL, k1, k2, k3


def test_estimates_by_hand():
    # p = 1/2 and q = 1/4: log p - log q = log 2 = 0.693147, q / p = 1/2
    log_p, log_q = torch.tensor([0.5, 0.25], dtype=torch.float64).log()[:, None]
    assert k1(log_p, log_q).item() == pytest.approx(0.6931471805599453)
    assert k2(log_p, log_q).item() == pytest.approx(0.2402265069591007)  # 0.693147^2 / 2
    assert k3(log_p, log_q).item() == pytest.approx(0.1931471805599453)  # 1/2 - 1 + 0.693147
    # and the other way round: q / p = 2
    assert k1(log_q, log_p).item() == pytest.approx(-0.6931471805599453)
    assert k3(log_q, log_p).item() == pytest.approx(0.3068528194400547)  # 2 - 1 - 0.693147


def test_k3_of_tiny_steps_keeps_its_digits():
    # x = log(q/p) = 1e-6 in float64: e^x - 1 - x = x^2/2 + ..., lost without expm1 (relative error 1e-4)
    assert k3(torch.tensor(0.0).double(), torch.tensor(1e-6).double()).item() == pytest.approx(5e-13, rel=1e-3)


logits = st.lists(st.floats(-4, 4), min_size=2, max_size=6)


@settings(max_examples=80, deadline=None)
@given(logits=logits, shifts=st.lists(st.floats(-2, 2), min_size=6, max_size=6))
def test_k1_and_k3_are_unbiased_and_k2_and_k3_never_negative(logits, shifts):
    p = torch.tensor(logits, dtype=torch.float64)
    q = p + torch.tensor(shifts[: len(logits)], dtype=torch.float64)
    p, q = torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
    exact = float(torch.distributions.kl_divergence(p, q))
    log_p, log_q = p.logits, q.logits
    assert float((p.probs * k1(log_p, log_q)).sum()) == pytest.approx(exact, abs=1e-12)
    assert float((p.probs * k3(log_p, log_q)).sum()) == pytest.approx(exact, abs=1e-12)
    assert (k2(log_p, log_q) >= 0).all()
    assert (k3(log_p, log_q) >= 0).all()


@pytest.mark.parametrize(
    ("kl", "coef"),
    [
        (6.0, 0.1),
        (6.6, 0.1 * (1 + 0.1 * 512 / 10_000)),
        (60.0, 0.1 * (1 + 0.2 * 512 / 10_000)),  # the error is clipped at a fifth
        (0.0, 0.1 * (1 - 0.2 * 512 / 10_000)),
        (-3.0, 0.1 * (1 - 0.2 * 512 / 10_000)),  # an estimate may be negative
    ],
)
def test_proportional_control_moves_towards_the_target(kl, coef):
    assert ProportionalKL(0.1, target=6.0).updated(kl, 512).coef == pytest.approx(coef, rel=1e-12)


def test_a_huge_batch_does_not_turn_the_coefficient_negative():
    assert ProportionalKL(0.1, target=6.0, horizon=100.0).updated(0.0, 100_000).coef > 0


@pytest.mark.parametrize(
    ("kl", "coef"),
    [
        (0.0, 2.0),
        (math.nextafter(1 / 1.5, 0), 2.0),  # just outside, below: halved
        (1 / 1.5, 4.0),  # at the bound
        (math.nextafter(1 / 1.5, 1), 4.0),  # just inside
        (1.0, 4.0),
        (math.nextafter(1.5, 0), 4.0),  # just inside
        (1.5, 4.0),  # at the bound
        (math.nextafter(1.5, 2), 8.0),  # just outside, above: doubled
        (math.inf, 8.0),
    ],
)
def test_adaptive_around_a_target_of_one(kl, coef):
    assert AdaptiveKL(4.0, target=1.0).updated(kl) == AdaptiveKL(coef, target=1.0)


def test_adaptive_follows_its_target():
    assert AdaptiveKL(4.0, target=0.01).updated(0.0151).coef == 8.0
    assert AdaptiveKL(4.0, target=0.01).updated(0.0066).coef == 2.0
    assert AdaptiveKL(4.0, target=0.01).updated(0.0100).coef == 4.0


@pytest.mark.parametrize(
    ("coef", "kl", "expected"),
    [(1e-6, 0.0, 1e-6), (1.5e-6, 0.0, 1e-6), (1e6, 9.0, 1e6), (0.6e6, 9.0, 1e6), (1e6, 0.0, 0.5e6)],
)
def test_adaptive_stays_within_its_clamps(coef, kl, expected):
    assert AdaptiveKL(coef, target=1.0).updated(kl).coef == expected


def test_adaptive_never_leaves_the_clamps_however_long():
    low = high = AdaptiveKL(1.0, target=1.0)
    for _ in range(2000):
        low, high = low.updated(0.0), high.updated(10.0)
    assert (low.coef, high.coef) == (1e-6, 1e6)
    for _ in range(20):
        low = low.updated(10.0)
    assert low.coef == pytest.approx(2**20 * 1e-6)  # and finds its way back
