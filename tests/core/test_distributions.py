"""Distributions by hand, against torch.distributions, and by sampling."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from proximo.core.distributions import Categorical, DiagonalGaussian

many = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**31)
leading = st.sampled_from([(), (4,), (2, 3)])


def normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def doubles(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


# --- categorical -------------------------------------------------------------------------------------------


def test_categorical_by_hand():
    # p = 1/4, 3/4; the logits are shifted by 5, which changes nothing
    p = Categorical(doubles(0.25, 0.75).log() + 5.0)
    q = Categorical(doubles(0.5, 0.5).log())
    assert p.log_prob(torch.tensor(0)).item() == pytest.approx(math.log(0.25))
    assert p.log_prob(torch.tensor(1)).item() == pytest.approx(math.log(0.75))
    assert p.entropy().item() == pytest.approx(0.25 * math.log(4) + 0.75 * math.log(4 / 3))
    assert q.entropy().item() == pytest.approx(math.log(2))
    assert p.kl(q).item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert q.kl(p).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))  # not the same
    assert p.mode() == 1
    assert q.mode() == 0  # of equals, the first
    assert Categorical.parameter_size(7) == 7


@many
@given(shape=leading, n_actions=st.integers(1, 6), scale=st.sampled_from([0.1, 1.0, 20.0]), seed=seeds)
def test_categorical_against_torch(shape, n_actions, scale, seed):
    logits, others = normal(2, *shape, n_actions, seed=seed, scale=scale)
    p, q = Categorical(logits), Categorical(others)
    expected, other = (torch.distributions.Categorical(logits=x) for x in (logits, others))
    actions = torch.randint(n_actions, shape, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(p.log_prob(actions), expected.log_prob(actions))
    torch.testing.assert_close(p.log_probabilities, expected.logits)
    torch.testing.assert_close(p.entropy(), expected.entropy())
    torch.testing.assert_close(p.kl(q), torch.distributions.kl_divergence(expected, other))
    torch.testing.assert_close(p.kl(p), torch.zeros(shape, dtype=torch.float64))
    assert torch.equal(p.mode(), expected.mode)


def test_categorical_samples_come_as_often_as_their_probability():
    probabilities = doubles(0.05, 0.15, 0.3, 0.5)
    n = 40_000
    p = Categorical(probabilities.log().expand(n, 4))
    actions = p.sample(torch.Generator().manual_seed(0))
    assert actions.shape == (n,)
    # Four standard errors of a share: 4 * sqrt(p (1 - p) / n) <= 0.01
    assert (actions.bincount(minlength=4) / n).tolist() == pytest.approx(probabilities.tolist(), abs=0.01)
    assert float(-p.log_prob(actions).mean()) == pytest.approx(float(p.entropy()[0]), abs=0.02)
    other = Categorical(torch.zeros(n, 4, dtype=torch.float64))
    estimate = (p.log_prob(actions) - other.log_prob(actions)).mean()
    assert float(estimate) == pytest.approx(float(p.kl(other)[0]), abs=0.02)


def test_impossible_actions_are_never_drawn_and_disturb_nothing():
    logits = doubles(0.3, -math.inf, -0.2)
    possible = Categorical(doubles(0.3, -0.2))
    p, q = Categorical(logits), Categorical(doubles(1.0, -math.inf, 0.0))
    assert p.entropy().item() == pytest.approx(possible.entropy().item())
    assert p.kl(q).item() == pytest.approx(possible.kl(Categorical(doubles(1.0, 0.0))).item())
    assert p.kl(Categorical(torch.zeros(3).double())).item() > 0
    assert Categorical(torch.zeros(3).double()).kl(p).item() == math.inf
    draws = Categorical(logits.expand(2000, 3)).sample(torch.Generator().manual_seed(0))
    assert set(draws.tolist()) == {0, 2}


def test_impossible_actions_leave_the_gradients_finite():
    new = doubles(0.3, -math.inf, -0.2).requires_grad_()
    old = Categorical(doubles(1.0, -math.inf, 0.0))
    p = Categorical(new)
    for quantity in (p.entropy(), old.kl(p), p.kl(old), p.log_prob(torch.tensor(2))):
        (gradient,) = torch.autograd.grad(quantity, new)
        assert gradient.isfinite().all()
        assert gradient[1] == 0


def test_noise_that_rounds_to_zero_does_not_choose_the_action(monkeypatch):
    monkeypatch.setattr(Tensor, "exponential_", lambda self, generator=None: self.zero_())
    assert Categorical(torch.tensor([-50.0, 0.0, -math.inf])).sample() == 1


# --- diagonal Gaussian -------------------------------------------------------------------------------------


def test_gaussian_by_hand():
    # std 1 and 2, one standard deviation off in the second: -log(2 pi) - log 2 - 1/2
    p = DiagonalGaussian(doubles(0.0, 1.0), doubles(0.0, math.log(2)))
    assert p.log_prob(doubles(0.0, 3.0)).item() == pytest.approx(-math.log(2 * math.pi) - math.log(2) - 0.5)
    assert p.entropy().item() == pytest.approx(math.log(2 * math.pi * math.e) + math.log(2))
    # N(0, 1) to N(1, 2): log 2 + (1 + 1) / 8 - 1/2; the other way: -log 2 + (4 + 1) / 2 - 1/2
    one, other = DiagonalGaussian(doubles(0.0), doubles(0.0)), DiagonalGaussian(doubles(1.0), doubles(math.log(2)))
    assert one.kl(other).item() == pytest.approx(math.log(2) + 0.25 - 0.5)
    assert other.kl(one).item() == pytest.approx(-math.log(2) + 2.5 - 0.5)
    assert p.mode().tolist() == [0.0, 1.0]
    assert DiagonalGaussian.parameter_size(3) == 3


@many
@given(
    shape=leading,
    n_dimensions=st.integers(1, 4),
    shared=st.booleans(),
    scale=st.sampled_from([0.01, 1.0]),
    seed=seeds,
)
def test_gaussian_against_torch(shape, n_dimensions, shared, scale, seed):
    means = normal(3, *shape, n_dimensions, seed=seed)
    log_stds = normal(2, *(() if shared else shape), n_dimensions, seed=seed + 1, scale=scale)
    p, q = (DiagonalGaussian(mean, log_std) for mean, log_std in zip(means, log_stds, strict=False))
    expected, other = (
        torch.distributions.Independent(torch.distributions.Normal(mean, log_std.exp()), 1)
        for mean, log_std in zip(means, log_stds, strict=False)
    )
    actions = means[2]
    torch.testing.assert_close(p.log_prob(actions), expected.log_prob(actions))
    torch.testing.assert_close(p.entropy(), expected.entropy())
    torch.testing.assert_close(p.kl(q), torch.distributions.kl_divergence(expected, other))
    torch.testing.assert_close(p.kl(p), torch.zeros(shape, dtype=torch.float64))
    assert torch.equal(p.mode(), expected.mean)


def test_gaussian_samples_have_its_mean_spread_and_entropy():
    n = 40_000
    log_std = doubles(-1.0, 0.5)
    p = DiagonalGaussian(doubles(1.0, -2.0).expand(n, 2), log_std)
    q = DiagonalGaussian(doubles(1.3, -1.5).expand(n, 2), log_std + 0.2)
    actions = p.sample(torch.Generator().manual_seed(0))
    assert actions.shape == (n, 2)
    assert actions.mean(0).tolist() == pytest.approx([1.0, -2.0], abs=0.035)  # 4 * 1.65 / sqrt(n)
    assert actions.std(0).tolist() == pytest.approx(log_std.exp().tolist(), rel=0.015)
    assert float(torch.corrcoef(actions.T)[0, 1]) == pytest.approx(0.0, abs=0.02)
    assert float(-p.log_prob(actions).mean()) == pytest.approx(float(p.entropy()[0]), abs=0.02)
    estimate = (p.log_prob(actions) - q.log_prob(actions)).mean()
    assert float(estimate) == pytest.approx(float(p.kl(q)[0]), abs=0.02)


def test_gaussian_kl_of_a_small_step_keeps_its_digits_in_single_precision():
    # std grows by e^0.001: (e^-0.002 + 0.002 - 1) / 2 = 9.99334e-7; rounding of 1 is 6e-8
    old = DiagonalGaussian(torch.zeros(1), torch.zeros(1))
    new = DiagonalGaussian(torch.zeros(1), torch.full((1,), 1e-3))
    assert old.kl(new).item() == pytest.approx(9.99334e-7, rel=1e-4)


# --- both --------------------------------------------------------------------------------------------------

SOME = {
    "categorical": Categorical(normal(4, 3, 5, seed=0)),
    "gaussian, one std": DiagonalGaussian(normal(4, 3, 5, seed=0), normal(5, seed=1)),
    "gaussian, std of each state": DiagonalGaussian(normal(4, 3, 5, seed=0), normal(4, 3, 5, seed=1)),
}


@pytest.mark.parametrize("name", SOME)
def test_selecting_rows_is_selecting_them_in_every_result(name):
    whole, rows = SOME[name], torch.tensor([3, 1])
    part = whole[rows]
    actions = whole.sample(torch.Generator().manual_seed(0))
    torch.testing.assert_close(part.log_prob(actions[rows]), whole.log_prob(actions)[rows])
    torch.testing.assert_close(part.entropy(), whole.entropy()[rows])
    torch.testing.assert_close(part.kl(part), whole.kl(whole)[rows])
    assert torch.equal(part.mode(), whole.mode()[rows])


@pytest.mark.parametrize("name", SOME)
def test_sampling_repeats_with_its_generator_and_leaves_the_global_one_alone(name):
    before = torch.get_rng_state()
    first, second = (SOME[name].sample(torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, SOME[name].sample(torch.Generator().manual_seed(6)))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", SOME)
def test_kl_is_never_negative(name):
    for seed in range(20):
        other = Categorical if name == "categorical" else lambda x: DiagonalGaussian(x, 0.1 * x[0, 0])
        p, q = (other(normal(4, 3, 5, seed=seed + k, scale=0.01).float()) for k in (0, 1000))
        assert (p.kl(q) >= -1e-7).all()
