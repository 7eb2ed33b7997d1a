"""Distributions by hand, against torch.distributions, and by sampling."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from proximo.core.distributions import (
    GSDE,
    Beta,
    Categorical,
    DiagonalGaussian,
    Joint,
    MultiCategorical,
    SquashedGaussian,
    allow,
)

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


# --- masks -------------------------------------------------------------------------------------------------


def test_what_is_not_allowed_has_no_probability_and_the_rest_shares_it():
    # p = 1/2, 1/4, 1/4; without the first: 1/2 and 1/2
    p = Categorical(allow(doubles(0.5, 0.25, 0.25).log(), torch.tensor([False, True, True])))
    assert p.log_probabilities.exp().tolist() == pytest.approx([0.0, 0.5, 0.5])
    assert p.entropy().item() == pytest.approx(math.log(2))


def test_what_is_not_allowed_gets_no_gradient():
    logits = doubles(3.0, 0.1, -0.2).requires_grad_()
    p = Categorical(allow(logits, torch.tensor([False, True, True])))
    for quantity in (p.entropy(), p.log_prob(torch.tensor(2))):
        (gradient,) = torch.autograd.grad(quantity, logits, retain_graph=True)
        assert gradient.isfinite().all()
        assert gradient[0] == 0
        assert gradient[1] != 0


# --- several choices ---------------------------------------------------------------------------------------


def test_several_choices_by_hand():
    # 1/4 and 3/4; 1/2, 1/4 and 1/4
    p = MultiCategorical(doubles(0.25, 0.75, 0.5, 0.25, 0.25).log(), (2, 3))
    assert p.log_prob(torch.tensor([1, 2])).item() == pytest.approx(math.log(3 / 16))
    first, second = 0.25 * math.log(4) + 0.75 * math.log(4 / 3), 1.5 * math.log(2)
    assert p.entropy().item() == pytest.approx(first + second)
    assert p.mode().tolist() == [1, 0]
    q = MultiCategorical(torch.zeros(5, dtype=torch.float64), (2, 3))
    assert p.kl(q).item() == pytest.approx(math.log(6) - first - second)
    assert MultiCategorical.parameter_size((2, 3)) == 5


def test_several_choices_are_one_choice_among_all_combinations():
    """The product of the parts, not one softmax over all options side by side."""
    sizes = (2, 3, 2)
    logits, others = normal(2, 4, sum(sizes), seed=3)
    p, q = MultiCategorical(logits, sizes), MultiCategorical(others, sizes)
    every = torch.cartesian_prod(*(torch.arange(size) for size in sizes))
    log_p, log_q = (torch.stack([d.log_prob(one.expand(4, 3)) for one in every], -1) for d in (p, q))
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(p.entropy(), -(log_p.exp() * log_p).sum(-1))
    torch.testing.assert_close(p.kl(q), (log_p.exp() * (log_p - log_q)).sum(-1))
    torch.testing.assert_close(p.mode(), every[log_p.argmax(-1)])


def test_several_choices_come_as_often_as_their_probability():
    n = 40_000
    p = MultiCategorical(doubles(0.1, 0.9, 0.2, 0.5, 0.3).log().expand(n, 5), (2, 3))
    actions = p.sample(torch.Generator().manual_seed(0))
    assert actions.shape == (n, 2)
    shares = (3 * actions[:, 0] + actions[:, 1]).bincount(minlength=6) / n
    assert shares.tolist() == pytest.approx([0.02, 0.05, 0.03, 0.18, 0.45, 0.27], abs=0.01)


# --- state-dependent exploration ---------------------------------------------------------------------------


def some_gsde(*, seed: int = 0, with_noise: bool = False) -> GSDE:
    noise = normal(4, 3, 2, 5, seed=seed + 3) if with_noise else None
    return GSDE(normal(4, 3, 5, seed=seed), normal(4, 3, 2, seed=seed + 1), normal(2, 5, seed=seed + 2), noise)


def test_gsde_by_hand():
    # features 3 and -1, std 1 and 2: a variance of 9 + 4; the matrix (0.5, 1) makes 3 * 0.5 - 1 * 2 = -0.5 of them
    log_std, noise = doubles(0.0, math.log(2)).unsqueeze(-1), doubles(0.5, 1.0).unsqueeze(-1)
    p = GSDE(doubles(10.0), doubles(3.0, -1.0), log_std, noise)
    assert p.sample().tolist() == pytest.approx([9.5])
    assert p.log_prob(doubles(9.5)).item() == pytest.approx(-0.125 / 13 - 0.5 * math.log(2 * math.pi * 13), abs=1e-6)
    assert p.entropy().item() == pytest.approx(0.5 * math.log(2 * math.pi * math.e * 13), abs=1e-6)
    assert p.mode().tolist() == [10.0]
    assert GSDE.parameter_size(3) == 3


def test_gsde_against_the_covariance_of_a_flat_matrix():
    """The action is a linear function of a normal matrix: its covariance is J diag(std^2) J^T, by torch's own class."""
    p = GSDE(normal(3, seed=0), normal(4, seed=1), normal(4, 3, seed=2))
    flat = p.log_std.exp().flatten()
    jacobian = torch.kron(p.features, torch.eye(3, dtype=torch.float64))
    assert jacobian.shape == (3, 12)
    covariance = jacobian @ flat.square().diag() @ jacobian.T + 1e-6 * torch.eye(3, dtype=torch.float64)
    expected = torch.distributions.MultivariateNormal(p.mean, covariance)
    actions = normal(6, 3, seed=3)
    torch.testing.assert_close(torch.stack([p.log_prob(a) for a in actions]), expected.log_prob(actions))
    torch.testing.assert_close(p.entropy(), expected.entropy())
    q = GSDE(normal(3, seed=4), p.features, p.log_std + 0.1)
    both = jacobian @ (flat * math.exp(0.1)).square().diag() @ jacobian.T + 1e-6 * torch.eye(3, dtype=torch.float64)
    other = torch.distributions.MultivariateNormal(q.mean, both)
    torch.testing.assert_close(p.kl(q), torch.distributions.kl_divergence(expected, other))


def test_gsde_samples_have_the_spread_that_its_density_says():
    n, features, log_std = 40_000, doubles(0.5, -2.0, 1.0), normal(3, 2, seed=5)
    p = GSDE(doubles(1.0, -1.0).expand(n, 2), features.expand(n, 3), log_std)
    actions = p.sample(torch.Generator().manual_seed(0))
    stds = (features.square() @ (2 * log_std).exp()).sqrt()
    assert actions.mean(0).tolist() == pytest.approx([1.0, -1.0], abs=4 * float(stds.max()) / math.sqrt(n))
    assert actions.std(0).tolist() == pytest.approx(stds.tolist(), rel=0.015)
    assert float(torch.corrcoef(actions.T)[0, 1]) == pytest.approx(0.0, abs=0.02)
    assert float(-p.log_prob(actions).mean()) == pytest.approx(float(p.entropy()[0]), abs=0.02)


def test_gsde_with_one_matrix_is_one_linear_function_of_the_features():
    noise = normal(2, 3, seed=0).expand(6, 2, 3)
    features = normal(6, 2, seed=1)
    features[5] = 2.0 * features[0] - features[1]
    p = GSDE(torch.zeros(6, 3, dtype=torch.float64), features, normal(2, 3, seed=2), noise)
    deviations = p.sample()
    torch.testing.assert_close(deviations[5], 2.0 * deviations[0] - deviations[1])
    assert not torch.allclose(deviations[0], deviations[1])


def test_gsde_at_features_of_nothing_is_a_density_all_the_same():
    log_std = torch.zeros(2, 1, requires_grad=True)
    p = GSDE(torch.zeros(1), torch.zeros(2), log_std)
    for quantity in (p.log_prob(torch.tensor([0.1])), p.entropy()):
        (gradient,) = torch.autograd.grad(quantity, log_std)
        assert quantity.isfinite()
        assert gradient.isfinite().all()


# --- squashed Gaussian -------------------------------------------------------------------------------------


def test_squashed_gaussian_by_hand():
    # u = 0 of a standard normal: the slope of tanh is 1 there; at u = 1 it is 1 - tanh(1)^2 = 0.41997434
    p = SquashedGaussian(doubles(0.0), doubles(0.0))
    assert p.log_prob(doubles(0.0)).item() == pytest.approx(-0.5 * math.log(2 * math.pi))
    assert p.log_prob(doubles(1.0)).item() == pytest.approx(-0.5 * math.log(2 * math.pi) - 0.5 - math.log(0.41997434))
    assert p.to_box(doubles(1.0)).item() == pytest.approx(0.76159416)
    assert SquashedGaussian.parameter_size(3) == 3


@many
@given(
    shape=leading, n_dimensions=st.integers(1, 4), shared=st.booleans(), seed=seeds, scale=st.sampled_from([0.1, 1.0])
)
def test_squashed_gaussian_against_torch(shape, n_dimensions, shared, seed, scale):
    means = normal(3, *shape, n_dimensions, seed=seed)
    log_stds = normal(2, *(() if shared else shape), n_dimensions, seed=seed + 1, scale=scale)
    p, q = (SquashedGaussian(mean, log_std) for mean, log_std in zip(means, log_stds, strict=False))
    expected, other = (
        torch.distributions.TransformedDistribution(
            torch.distributions.Independent(torch.distributions.Normal(mean, log_std.exp()), 1),
            torch.distributions.TanhTransform(cache_size=1),
        )
        for mean, log_std in zip(means, log_stds, strict=False)
    )
    u = means[2]
    torch.testing.assert_close(p.log_prob(u), expected.log_prob(u.tanh()))
    torch.testing.assert_close(p.kl(q), torch.distributions.kl_divergence(expected.base_dist, other.base_dist))
    torch.testing.assert_close(p.from_box(p.to_box(u)), u)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.1), (0.0, 1.0), (1.5, 0.7), (-3.0, 0.5), (0.5, 3.0)])
def test_squashed_gaussian_integrates_to_one_and_to_its_entropy(mean: float, std: float):
    p = SquashedGaussian(doubles(mean), doubles(math.log(std)))
    u = torch.linspace(mean - 12 * std, mean + 12 * std, 200_001, dtype=torch.float64).unsqueeze(-1)
    a, log_p = p.to_box(u).squeeze(-1), p.log_prob(u)
    assert torch.trapezoid(log_p.exp(), a).item() == pytest.approx(1.0, abs=1e-4)
    of_u = p.log_prob(u).exp() * (1 - p.to_box(u).squeeze(-1) ** 2)  # a density of u again: no rounding at the bounds
    assert -torch.trapezoid(of_u * log_p, u.squeeze(-1)).item() == pytest.approx(p.entropy().item(), abs=2e-3)


def test_squashed_gaussian_far_out_stays_finite_and_has_a_gradient():
    mean = torch.tensor([0.0, 40.0, -40.0], requires_grad=True)
    p = SquashedGaussian(mean, torch.zeros(3))
    for quantity in (p.log_prob(torch.tensor([90.0, -90.0, -60.0])), p.entropy()):
        (gradient,) = torch.autograd.grad(quantity.sum(), mean)
        assert quantity.isfinite().all()
        assert gradient.isfinite().all()
    assert p.from_box(torch.tensor([1.0, -1.0, 0.0])).isfinite().all()


# --- Beta --------------------------------------------------------------------------------------------------


def beta_of(alpha: float, beta: float) -> Beta:
    """With these concentrations, which are 1 plus the softplus of what is given."""
    return Beta(doubles(math.log(math.expm1(alpha - 1.0)), math.log(math.expm1(beta - 1.0))).unsqueeze(0))


def test_beta_by_hand():
    # alpha 2, beta 2: density 6 x (1 - x), half of it over -1..1; at x = 1/2 it is 3/4
    p = beta_of(2.0, 2.0)
    assert p.log_prob(doubles(0.5)).item() == pytest.approx(math.log(0.75))
    assert p.log_prob(doubles(0.1)).item() == pytest.approx(math.log(0.27))
    assert p.mode().item() == pytest.approx(0.5)
    assert beta_of(4.0, 2.0).mode().item() == pytest.approx(0.75)
    assert p.to_box(doubles(0.75)).item() == 0.5
    assert Beta.parameter_size(3) == 6


@many
@given(shape=leading, n_dimensions=st.integers(1, 4), scale=st.sampled_from([0.1, 1.0, 5.0]), seed=seeds)
def test_beta_against_torch(shape, n_dimensions, scale, seed):
    p, q = (Beta(raw) for raw in normal(2, *shape, n_dimensions, 2, seed=seed, scale=scale))
    expected, other = (torch.distributions.Beta(*each.concentrations) for each in (p, q))
    x = torch.rand(*shape, n_dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x.clamp(0.001, 0.999)
    torch.testing.assert_close(p.log_prob(x), (expected.log_prob(x) - math.log(2)).sum(-1))
    torch.testing.assert_close(p.entropy(), (expected.entropy() + math.log(2)).sum(-1))
    torch.testing.assert_close(p.kl(q), torch.distributions.kl_divergence(expected, other).sum(-1))
    torch.testing.assert_close(p.from_box(p.to_box(x)), x)


def test_beta_samples_have_its_mean_spread_and_entropy():
    n = 40_000
    p = Beta(beta_of(3.0, 1.5).raw.expand(n, 1, 2))
    x = p.sample(torch.Generator().manual_seed(0))
    assert x.shape == (n, 1)
    assert x.mean().item() == pytest.approx(3.0 / 4.5, abs=0.005)
    assert x.var().item() == pytest.approx(3.0 * 1.5 / (4.5**2 * 5.5), rel=0.03)
    assert float(-p.log_prob(x).mean()) == pytest.approx(float(p.entropy()[0]), abs=0.02)


def test_beta_that_is_flat_to_rounding_has_a_mode_all_the_same():
    assert Beta(torch.full((1, 1, 2), -20.0)).mode().tolist() == [[0.5]]
    assert Beta(torch.full((1, 1, 2), -400.0)).mode().tolist() == [[0.5]]


def test_beta_is_never_at_its_bounds():
    p = Beta(torch.tensor([[-30.0, 60.0]]).expand(1000, 1, 2).requires_grad_())
    x = p.sample(torch.Generator().manual_seed(0))
    assert ((x > 0) & (x < 1)).all()
    assert p.log_prob(x).isfinite().all()
    assert p.log_prob(p.from_box(torch.ones(1000, 1))).isfinite().all()


# --- joint -------------------------------------------------------------------------------------------------


def some_joint(n: int = 4, seed: int = 0) -> Joint:
    parts = (
        Categorical(normal(n, 3, seed=seed)),
        DiagonalGaussian(normal(n, 2, seed=seed + 1), doubles(0.1, -0.3)),
        MultiCategorical(normal(n, 5, seed=seed + 2), (2, 3)),
        Beta(normal(n, 1, 2, seed=seed + 3)),
    )
    return Joint(parts, (1, 2, 2, 1))


def test_a_joint_action_is_scored_part_by_part():
    p, q = some_joint(), some_joint(seed=50)
    actions = p.sample(torch.Generator().manual_seed(0))
    assert actions.shape == (4, 6)
    choice, gauss, choices, beta = p.parts
    expected = choice.log_prob(actions[:, 0].long()) + gauss.log_prob(actions[:, 1:3])
    expected = expected + choices.log_prob(actions[:, 3:5]) + beta.log_prob(actions[:, 5:])
    torch.testing.assert_close(p.log_prob(actions), expected)
    torch.testing.assert_close(p.entropy(), sum(part.entropy() for part in p.parts))
    torch.testing.assert_close(p.kl(q), sum(mine.kl(its) for mine, its in zip(p.parts, q.parts, strict=True)))
    assert torch.equal(p.mode()[:, 0], choice.mode().double())
    assert torch.equal(p.mode()[:, 1:3], gauss.mode())


def test_joint_samples_have_the_joint_entropy():
    one, n = some_joint(1), 40_000
    p = one[torch.zeros(n, dtype=torch.long)]
    actions = p.sample(torch.Generator().manual_seed(0))
    assert float(-p.log_prob(actions).mean()) == pytest.approx(float(one.entropy()[0]), abs=0.03)


# --- all ---------------------------------------------------------------------------------------------------

SOME = {
    "categorical": Categorical(normal(4, 3, 5, seed=0)),
    "gaussian, one std": DiagonalGaussian(normal(4, 3, 5, seed=0), normal(5, seed=1)),
    "gaussian, std of each state": DiagonalGaussian(normal(4, 3, 5, seed=0), normal(4, 3, 5, seed=1)),
    "several choices": MultiCategorical(normal(4, 3, 5, seed=0), (2, 3)),
    "squashed": SquashedGaussian(normal(4, 3, 5, seed=0), normal(5, seed=1)),
    "squashed, std of each state": SquashedGaussian(normal(4, 3, 5, seed=0), normal(4, 3, 5, seed=1)),
    "beta": Beta(normal(4, 3, 5, 2, seed=0)),
    "joint": some_joint(),
    "gsde": some_gsde(),
}


@pytest.mark.parametrize("name", SOME)
def test_selecting_rows_is_selecting_them_in_every_result(name):
    whole, rows = SOME[name], torch.tensor([3, 1])
    part = whole[rows]
    actions = whole.sample(torch.Generator().manual_seed(0))
    torch.testing.assert_close(part.log_prob(actions[rows]), whole.log_prob(actions)[rows])
    torch.testing.assert_close(part.entropy(), whole.entropy()[rows])
    torch.testing.assert_close(part.kl(part), whole.kl(whole)[rows])
    torch.testing.assert_close(part.mode(), whole.mode()[rows])


@pytest.mark.parametrize("name", SOME)
def test_sampling_repeats_with_its_generator_and_leaves_the_global_one_alone(name):
    before = torch.get_rng_state()
    first, second = (SOME[name].sample(torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, SOME[name].sample(torch.Generator().manual_seed(6)))
    assert torch.equal(before, torch.get_rng_state())


MAKE = {
    "categorical": Categorical,
    "gaussian": lambda x: DiagonalGaussian(x, 0.1 * x[0, 0]),
    "several choices": lambda x: MultiCategorical(x, (2, 3)),
    "squashed": lambda x: SquashedGaussian(x, 0.1 * x[0, 0]),
    "beta": lambda x: Beta(x[..., :4].unflatten(-1, (2, 2))),
    "gsde": lambda x: GSDE(x, 1.0 + x[..., :2], x[0, :2]),
}


@pytest.mark.parametrize("name", MAKE)
def test_kl_is_never_negative(name):
    for seed in range(20):
        p, q = (MAKE[name](normal(4, 3, 5, seed=seed + k, scale=0.01).float()) for k in (0, 1000))
        assert (p.kl(q) >= -1e-6).all()


@pytest.mark.parametrize("name", SOME)
def test_a_frozen_copy_does_not_move(name):
    whole = SOME[name]
    frozen = whole.frozen()
    before = frozen.entropy().clone()
    tensors = [whole] if not isinstance(whole, Joint) else list(whole.parts)
    for each in tensors:
        for value in vars(each).values():
            if isinstance(value, Tensor):
                value.add_(0.3)
    assert torch.equal(frozen.entropy(), before)
    for each in tensors:
        for value in vars(each).values():
            if isinstance(value, Tensor):
                value.sub_(0.3)
