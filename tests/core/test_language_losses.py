"""The losses of language models by hand, value and gradient; and blind to whatever stands at masked places."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from proximo.core.losses import clipped_surrogate, dpo, pairwise, reference_kl_loss, token_nll
from proximo.core.masked import masked_mean, whiten

POISON = (math.nan, math.inf, -math.inf, 1e30)


def row(*numbers: float, grad: bool = False) -> Tensor:
    return torch.tensor([numbers], dtype=torch.float64, requires_grad=grad)


def pairs(*numbers: float, grad: bool = False) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64, requires_grad=grad)


def everywhere(tensor: Tensor) -> Tensor:
    return torch.ones_like(tensor, dtype=torch.bool)


# --- clip-higher and dual clip ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "gradient"),
    [
        # band [0.8, 1.28], floor of the objective at 3 A where A < 0; gradient with respect to log pi
        pytest.param(2.0, 1.25, -2.5, -2.5, id="good, between 1.2 and 1.28: still counts"),
        pytest.param(2.0, 1.3, -2.56, 0.0, id="good, above the higher end"),
        pytest.param(2.0, 5.0, -2.56, 0.0, id="good, far above: the dual clip is for A < 0 alone"),
        pytest.param(-2.0, 0.75, 1.6, 0.0, id="bad, below the lower end, which stays 0.8"),
        pytest.param(-2.0, 2.5, 5.0, 5.0, id="bad, above the band, under the dual clip: whole gradient"),
        pytest.param(-2.0, 3.5, 6.0, 0.0, id="bad, beyond the dual clip: 3 * -2, flat"),
        pytest.param(-2.0, 1e6, 6.0, 0.0, id="bad, one huge ratio weighs no more than that"),
    ],
)
def test_clip_higher_and_dual_clip_case_by_case(advantage, ratio, loss, gradient):
    log_probs = row(math.log(1e-7 * ratio), grad=True)
    old = row(math.log(1e-7))
    bounds = dict(clip_epsilon=0.2, clip_epsilon_high=0.28, dual_clip=3.0)
    result = clipped_surrogate(log_probs, old, row(advantage), everywhere(old), **bounds)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(loss, rel=1e-9)
    assert log_probs.grad.item() == pytest.approx(gradient, abs=1e-9)


def test_the_clip_fraction_is_about_the_band_in_force():
    ratios, old = row(1.25, 1.3, 0.85, 0.75), row(0.0, 0.0, 0.0, 0.0)

    def fraction(**bounds: float) -> float:
        arguments = (ratios.log(), old, torch.ones_like(old), everywhere(old))
        return clipped_surrogate(*arguments, clip_epsilon=0.2, **bounds).clip_fraction.item()

    assert fraction() == 0.75  # 1.25, 1.3, 0.75 are outside [0.8, 1.2]
    assert fraction(clip_epsilon_high=0.28) == 0.5


# --- the KL to the reference ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("estimator", "loss", "gradient"),
    [
        # log pi - log ref = log 2 at one step, -log 2 at the other
        # k2: (log 2)^2 / 2 each; gradient (log pi - log ref) / 2 steps
        ("k2", 0.2402265069591007, [0.34657359, -0.34657359]),
        # k3: ref/pi - 1 - log(ref/pi) = 1/2 - 1 + 0.693147 and 2 - 1 - 0.693147; gradient (1 - ref/pi) / 2 steps
        ("k3", (0.1931471805599453 + 0.3068528194400547) / 2, [0.25, -0.5]),
    ],
)
def test_reference_kl_by_hand_and_its_gradient_pulls_towards_the_reference(estimator, loss, gradient):
    log_probs = row(math.log(0.5), math.log(0.25), grad=True)
    ref = row(math.log(0.25), math.log(0.5))
    found = reference_kl_loss(log_probs, ref, everywhere(ref), estimator=estimator)
    found.backward()
    assert found.item() == pytest.approx(loss)
    # Where the policy is above the reference descent brings it down, where below, up (verl #179 had the sign wrong).
    assert log_probs.grad[0].tolist() == pytest.approx(gradient)


def test_the_gradient_of_k2_is_that_of_the_exact_kl_in_expectation():
    generator = torch.Generator().manual_seed(0)
    logits, ref = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    logits.requires_grad_(True)
    log_p, log_q = logits.log_softmax(-1), ref.log_softmax(-1)
    (exact,) = torch.autograd.grad((log_p.exp() * (log_p - log_q)).sum(), logits, retain_graph=True)
    estimate = torch.zeros_like(exact)
    for action in range(5):  # every action, weighed by how often it would be sampled
        arguments = (log_p[action].view(1, 1), log_q[action].view(1, 1), torch.ones(1, 1, dtype=torch.bool))
        (gradient,) = torch.autograd.grad(reference_kl_loss(*arguments, estimator="k2"), logits, retain_graph=True)
        estimate += log_p[action].exp().detach() * gradient
    torch.testing.assert_close(estimate, exact, rtol=1e-10, atol=1e-12)


# --- supervised, pairs, DPO -------------------------------------------------------------------------------------


def test_token_nll_is_a_mean_over_tokens():
    log_probs = row(math.log(0.5), math.log(0.125), -9.0, grad=True)
    mask = torch.tensor([[True, True, False]])
    loss = token_nll(log_probs, mask)
    loss.backward()
    assert loss.item() == pytest.approx(2 * math.log(2))  # (log 2 + 3 log 2) / 2
    assert log_probs.grad.tolist() == [[-0.5, -0.5, 0.0]]


def test_pairwise_by_hand():
    # differences log 3 and -log 3: sigmoid is 3/4 and 1/4
    chosen, rejected = pairs(math.log(3), 0.0, grad=True), pairs(0.0, math.log(3))
    loss = pairwise(chosen, rejected)
    loss.backward()
    assert loss.item() == pytest.approx((math.log(4 / 3) + math.log(4)) / 2)
    assert chosen.grad.tolist() == pytest.approx([-0.25 / 2, -0.75 / 2])  # -(1 - sigmoid) / 2 pairs
    # a margin of log 3 eats the first difference up; the second becomes -2 log 3, sigmoid 1/10
    with_margin = pairwise(chosen, rejected, margin=pairs(math.log(3), math.log(3)))
    assert with_margin.item() == pytest.approx((math.log(2) + math.log(10)) / 2)
    # sums of log 3 for both: 0.5 (log 3)^2 on top
    centred = pairwise(chosen, rejected, centring_coef=0.5)
    assert centred.item() == pytest.approx(loss.item() + 0.5 * math.log(3) ** 2)


def test_the_centring_term_alone_decides_the_level():
    level = pairs(4.0, grad=True)
    (plain,) = torch.autograd.grad(pairwise(level + 1.0, level), level)
    (centred,) = torch.autograd.grad(pairwise(level + 1.0, level, centring_coef=0.01), level)
    assert plain.item() == pytest.approx(0.0, abs=1e-15)
    assert centred.item() == pytest.approx(0.01 * 2 * 9.0 * 2)  # c * 2 (r+ + r-) * d(r+ + r-)/d level


def test_dpo_by_hand():
    chosen, rejected = pairs(-1.0, grad=True), pairs(-4.0, grad=True)
    ref_chosen, ref_rejected = pairs(-2.0), pairs(-3.0)
    beta = math.log(3) / 2  # (1 - -1) beta = log 3: sigmoid 3/4
    loss = dpo(chosen, rejected, ref_chosen, ref_rejected, beta=beta)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(4 / 3))
    assert chosen.grad.item() == pytest.approx(-beta / 4)
    assert rejected.grad.item() == pytest.approx(beta / 4)
    smoothed = dpo(chosen, rejected, ref_chosen, ref_rejected, beta=beta, label_smoothing=0.1)
    assert smoothed.item() == pytest.approx(0.9 * math.log(4 / 3) + 0.1 * math.log(4))


def test_dpo_at_the_reference_is_log_two_whatever_the_pair():
    chosen, rejected = pairs(-1.0, -50.0), pairs(-9.0, -3.0)
    assert dpo(chosen, rejected, chosen, rejected, beta=0.1).item() == pytest.approx(math.log(2))


# --- masks and denominators -------------------------------------------------------------------------------------

LOSSES = {
    "clip": lambda a, b, c, mask, d: (
        clipped_surrogate(a, b, c, mask, clip_epsilon=0.2, clip_epsilon_high=0.3, dual_clip=2.0, denominator=d).loss
    ),
    "k2": lambda a, b, c, mask, d: reference_kl_loss(a, b, mask, estimator="k2", denominator=d),
    "k3": lambda a, b, c, mask, d: reference_kl_loss(a, b, mask, estimator="k3", denominator=d),
    "nll": lambda a, b, c, mask, d: token_nll(a, mask, denominator=d),
}
loss_name = pytest.mark.parametrize("name", list(LOSSES))


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    a, b, c = torch.randn(3, 3, 6, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1]], dtype=torch.bool)
    return -a.abs(), -b.abs(), c, mask


@loss_name
@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("per_row", [False, True])
def test_nothing_masked_reaches_a_loss_or_a_gradient(name, poison, per_row):
    a, b, c, mask = inputs()
    denominator = 3.0 * mask.sum(1, keepdim=True) if per_row else None

    def value_and_gradient(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        first = tensors[0].clone().requires_grad_(True)
        loss = LOSSES[name](first, *tensors[1:], mask, denominator)
        return loss, torch.autograd.grad(loss, first)[0]

    clean = value_and_gradient(a, b, c)
    poisoned = value_and_gradient(*(each.masked_fill(~mask, poison) for each in (a, b, c)))
    assert torch.equal(clean[0], poisoned[0])
    assert torch.equal(clean[1], poisoned[1])


@loss_name
def test_a_denominator_per_row_makes_a_mean_over_rows_of_each_rows_own(name):
    a, b, c, mask = inputs()
    found = LOSSES[name](a, b, c, mask, 3.0 * mask.sum(1, keepdim=True))
    alone = [LOSSES[name](*(each[k : k + 1] for each in (a, b, c, mask)), None) for k in range(3)]
    assert found.item() == pytest.approx(sum(map(float, alone)) / 3)
    # not the mean over tokens, in which the row of one token has a tenth of the weight instead of a third
    assert found.item() != pytest.approx(LOSSES[name](a, b, c, mask, None).item(), rel=1e-3)


def test_a_mean_with_a_weight_per_place_by_hand():
    x, mask = torch.tensor([[1.0, 2.0], [6.0, 50.0]]), torch.tensor([[True, True], [True, False]])
    # (1 + 2) / 4 + 6 / 2
    assert masked_mean(x, mask, denominator=torch.tensor([[4.0], [2.0]])).item() == 3.75


@pytest.mark.parametrize("poison", POISON)
def test_whitening_is_over_valid_tokens(poison):
    # valid are 1, 2 and 6: mean 3, standard deviation sqrt(14 / 2)
    mask = torch.tensor([[True, True, False], [False, True, False]])
    x = torch.tensor([[1.0, 2.0, poison], [poison, 6.0, poison]], dtype=torch.float64)
    expected = [value / math.sqrt(7) for value in (-2.0, -1.0, 3.0)]
    assert whiten(x, mask)[mask].tolist() == pytest.approx(expected)
    assert whiten(x, mask)[~mask].tolist() == [0.0, 0.0, 0.0]
