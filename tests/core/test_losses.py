"""The losses by hand, value and gradient, in every case; and blind to whatever stands at masked places."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import Tensor

from proximo.core.losses import clipped_surrogate, clipped_value, kl_penalized_surrogate, value_loss

POISON = (math.nan, math.inf, -math.inf, 1e300)


def row(*numbers: float, grad: bool = False) -> Tensor:
    return torch.tensor([numbers], dtype=torch.float64, requires_grad=grad)


def everywhere(tensor: Tensor) -> Tensor:
    return torch.ones_like(tensor, dtype=torch.bool)


# --- PPO-Clip ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "gradient"),
    [
        # epsilon 0.2; the gradient is with respect to log pi(a|s): -A * ratio where the ratio counts, else 0
        pytest.param(2.0, 1.5, -2.4, 0.0, id="good action, above the band: 1.2 * 2, flat"),
        pytest.param(2.0, 0.5, -1.0, -1.0, id="good action, below the band: 0.5 * 2, whole gradient"),
        pytest.param(-2.0, 1.5, 3.0, 3.0, id="bad action, above the band: 1.5 * -2, whole gradient"),
        pytest.param(-2.0, 0.5, 1.6, 0.0, id="bad action, below the band: 0.8 * -2, flat"),
        pytest.param(2.0, 1.1, -2.2, -2.2, id="good action, in the band"),
        pytest.param(-2.0, 0.9, 1.8, 1.8, id="bad action, in the band"),
        pytest.param(2.0, 0.9, -1.8, -1.8, id="good action, in the band, made rarer"),
        pytest.param(-2.0, 1.1, 2.2, 2.2, id="bad action, in the band, made commoner"),
        pytest.param(0.0, 1.5, 0.0, 0.0, id="no advantage"),
    ],
)
def test_clipped_surrogate_case_by_case(advantage, ratio, loss, gradient):
    # Old probability 1/4, so that nothing rests on an old log-probability of 0.
    log_probs = row(math.log(0.25 * ratio), grad=True)
    result = clipped_surrogate(log_probs, row(math.log(0.25)), row(advantage), everywhere(log_probs), clip_epsilon=0.2)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(loss, abs=1e-12)
    assert log_probs.grad.item() == pytest.approx(gradient, abs=1e-12)


def test_clipped_surrogate_is_a_mean_over_valid_steps_and_shows_how_far_the_policy_went():
    ratios = row(1.5, 0.5, 1.1, 0.9, 9.0)
    mask = torch.tensor([[True, True, True, True, False]])
    advantages = row(2.0, 2.0, -1.0, 1.0, 5.0)
    result = clipped_surrogate(ratios.log(), torch.zeros_like(ratios), advantages, mask, clip_epsilon=0.2)
    # -(1.2*2 + 0.5*2 - 1.1 + 0.9) / 4
    assert result.loss.item() == pytest.approx(-(2.4 + 1.0 - 1.1 + 0.9) / 4)
    assert result.clip_fraction.item() == 0.5  # 1.5 and 0.5 of four
    # k3 = ratio - 1 - log ratio at samples of the old policy
    # 0.5 - 0.405465, -0.5 + 0.693147, 0.1 - 0.0953102, -0.1 + 0.105361: 0.0945349 + 0.193147 + 0.00468982 + 0.00536052
    assert result.approx_kl.item() == pytest.approx((0.0945349 + 0.1931472 + 0.0046898 + 0.0053605) / 4, abs=1e-7)
    whole = clipped_surrogate(
        ratios.log(), torch.zeros_like(ratios), advantages, mask, clip_epsilon=0.2, denominator=8.0
    )
    assert [float(part) for part in whole] == pytest.approx([float(part) / 2 for part in result])


def test_at_ratio_one_the_gradient_is_the_policy_gradient():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    actions = torch.randint(5, (3, 4), generator=generator)
    advantages = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    mask = torch.rand(3, 4, generator=generator) < 0.7
    # The policy gradient by hand: d log p(a) / d logits = onehot(a) - p, times -A / n.
    score = torch.nn.functional.one_hot(actions, 5) - logits.detach().softmax(-1)
    expected = -score * (advantages * mask / mask.sum())[..., None]

    log_probs = torch.distributions.Categorical(logits=logits).log_prob(actions)
    result = clipped_surrogate(log_probs, log_probs.detach(), advantages, mask, clip_epsilon=0.2)
    (gradient,) = torch.autograd.grad(result.loss, logits)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)
    assert result.approx_kl == 0.0
    assert result.clip_fraction == 0.0


steps = st.lists(
    st.tuples(st.floats(-2, 2), st.floats(-5, 5), st.booleans()), min_size=1, max_size=12
)  # log-ratio, advantage, valid


@settings(max_examples=80, deadline=None)
@given(steps=steps, epsilon=st.floats(0.01, 0.9))
def test_clipped_surrogate_against_the_one_sided_bound(steps, epsilon):
    # The same objective in another form (OpenAI Spinning Up): the ratio has a ceiling where A > 0, a floor else.
    n = max(1, sum(valid for *_, valid in steps))
    loss, gradients = 0.0, []
    for log_ratio, advantage, valid in steps:
        ratio = math.exp(log_ratio)
        bounded = min(ratio, 1 + epsilon) if advantage > 0 else max(ratio, 1 - epsilon)
        loss -= valid * bounded * advantage / n
        gradients.append(-valid * advantage * ratio / n if bounded == ratio else 0.0)
    log_ratio, advantages, valid = zip(*steps, strict=True)
    log_probs = row(*log_ratio, grad=True)
    old, mask = torch.zeros_like(log_probs), torch.tensor([valid])
    result = clipped_surrogate(log_probs, old, row(*advantages), mask, clip_epsilon=epsilon)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(loss, abs=1e-10)
    assert log_probs.grad[0].tolist() == pytest.approx(gradients, abs=1e-10)
    assert 0.0 <= result.clip_fraction <= 1.0
    assert result.approx_kl >= 0.0


# --- PPO-Penalty -------------------------------------------------------------------------------------------


def test_kl_penalized_surrogate_by_hand():
    log_probs, kl = row(math.log(1.5), 0.0, 0.0, grad=True), row(0.1, 0.2, 9.0, grad=True)
    mask = torch.tensor([[True, True, False]])
    result = kl_penalized_surrogate(log_probs, row(0.0, 0.0, 0.0), row(2.0, -1.0, 7.0), kl, mask, kl_coef=3.0)
    # -((1.5*2 - 3*0.1) + (-1 - 3*0.2)) / 2 = -(2.7 - 1.6) / 2
    assert result.loss.item() == pytest.approx(-0.55)
    assert result.clip_fraction == 0.0
    assert result.approx_kl.item() == pytest.approx((0.5 - math.log(1.5)) / 2)
    result.loss.backward()
    assert log_probs.grad[0].tolist() == pytest.approx([-1.5, 0.5, 0.0])  # -A * ratio / 2, and not clipped
    assert kl.grad[0].tolist() == pytest.approx([1.5, 1.5, 0.0])  # + beta / 2


# --- the critic --------------------------------------------------------------------------------------------


def test_value_loss_by_hand():
    values = row(1.0, 4.0, 9.0, grad=True)
    loss = value_loss(values, row(3.0, 3.0, 0.0), torch.tensor([[True, True, False]]))
    loss.backward()
    assert loss.item() == 2.5  # ((1 - 3)^2 + (4 - 3)^2) / 2, without a factor 1/2
    assert values.grad.tolist() == [[-2.0, 1.0, 0.0]]


@pytest.mark.parametrize(
    ("value", "target", "loss", "gradient"),
    [
        # V_old = 10, epsilon 1; the gradient is 2 (V - R) where the plain error counts, else 0
        pytest.param(10.5, 15.0, 20.25, -9.0, id="inside the band: the plain error"),
        pytest.param(13.0, 15.0, 16.0, 0.0, id="far enough towards the target: (11 - 15)^2, flat"),
        pytest.param(7.0, 15.0, 64.0, -16.0, id="on the wrong side: (7 - 15)^2, not (9 - 15)^2"),
        pytest.param(13.0, 11.5, 2.25, 3.0, id="beyond the target: (13 - 11.5)^2, not (11 - 11.5)^2"),
        pytest.param(7.0, 5.0, 16.0, 0.0, id="far enough downwards: (9 - 5)^2, flat"),
    ],
)
def test_clipped_value_takes_the_worse_of_both(value, target, loss, gradient):
    values = row(value, grad=True)
    result = clipped_value(values, row(10.0), row(target), everywhere(values), clip_epsilon=1.0)
    result.backward()
    assert result.item() == pytest.approx(loss)
    assert values.grad.item() == pytest.approx(gradient)


values_strategy = st.lists(st.tuples(*[st.floats(-5, 5)] * 3), min_size=1, max_size=8)


@settings(max_examples=80, deadline=None)
@given(steps=values_strategy, epsilon=st.floats(0.01, 3.0))
def test_clipped_value_is_never_below_the_plain_loss_and_equal_to_it_in_a_wide_band(steps, epsilon):
    values, old, returns = (row(*column) for column in zip(*steps, strict=True))
    plain = value_loss(values, returns, everywhere(values))
    assert clipped_value(values, old, returns, everywhere(values), clip_epsilon=epsilon) >= plain - 1e-12
    wide = clipped_value(values, old, returns, everywhere(values), clip_epsilon=11.0)
    assert float(wide) == pytest.approx(float(plain))


# --- what stands at masked places ---------------------------------------------------------------------------

LOSSES = {
    "clipped_surrogate": (
        ("log_probs", "old_log_probs", "advantages"),
        lambda mask, a, b, c: clipped_surrogate(a, b, c, mask, clip_epsilon=0.2),
    ),
    "kl_penalized_surrogate": (
        ("log_probs", "old_log_probs", "advantages", "kl"),
        lambda mask, a, b, c, d: kl_penalized_surrogate(a, b, c, d.square(), mask, kl_coef=0.5),
    ),
    "value_loss": (("values", "returns"), lambda mask, a, b: (value_loss(a, b, mask),)),
    "clipped_value": (
        ("values", "old_values", "returns"),
        lambda mask, a, b, c: (clipped_value(a, b, c, mask, clip_epsilon=0.2),),
    ),
}
PLACES = [(name, argument) for name, (arguments, _) in LOSSES.items() for argument in arguments]


@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize(("name", "argument"), PLACES)
def test_nothing_masked_reaches_a_loss_a_metric_or_a_gradient(name, argument, poison):
    arguments, function = LOSSES[name]
    generator = torch.Generator().manual_seed(1)
    mask = torch.tensor([[True, False, True, False], [False, True, True, True]])
    clean = [torch.randn(2, 4, generator=generator, dtype=torch.float64) for _ in arguments]

    def results(tensors: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        learned = tensors[0].clone().requires_grad_()
        parts = function(mask, learned, *tensors[1:])
        (gradient,) = torch.autograd.grad(parts[0], learned)
        return [part.detach() for part in parts], gradient

    index = arguments.index(argument)
    poisoned = [*clean]
    poisoned[index] = clean[index].masked_fill(~mask, poison)
    (expected, expected_gradient), (actual, gradient) = results(clean), results(poisoned)
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))
    assert torch.equal(expected_gradient, gradient)
    assert (gradient[~mask] == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_parts_over_the_count_of_the_whole_add_up_and_order_and_padding_change_nothing(name):
    arguments, function = LOSSES[name]
    generator = torch.Generator().manual_seed(2)
    mask = torch.rand(5, 4, generator=generator) < 0.6
    tensors = [torch.randn(5, 4, generator=generator, dtype=torch.float64) for _ in arguments]
    whole = function(mask, *tensors)

    order = torch.randperm(5, generator=generator)
    for part, same in zip(whole, function(mask[order], *(t[order] for t in tensors)), strict=True):
        torch.testing.assert_close(part, same, rtol=1e-13, atol=0)

    def padded(tensor: Tensor, fill: float) -> Tensor:
        return torch.cat([torch.full_like(tensor[:, :2], fill), tensor], 1)

    for part, same in zip(whole, function(padded(mask, False), *(padded(t, 3.0) for t in tensors)), strict=True):
        torch.testing.assert_close(part, same, rtol=1e-13, atol=0)


def test_a_wrong_shape_is_refused():
    with pytest.raises(TypeCheckError, match="advantages"):
        clipped_surrogate(row(1, 2), row(1, 2), row(1), torch.ones(1, 2, dtype=torch.bool), clip_epsilon=0.2)
    with pytest.raises(TypeCheckError, match="returns"):
        value_loss(row(1, 2), row(1, 2)[..., None], torch.ones(1, 2, dtype=torch.bool))
