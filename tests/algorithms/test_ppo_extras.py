"""What PPO has for language models: other lambdas, other clips, the KL in the loss, the critic alone."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from proximo.algorithms.adam import FlatAdam
from proximo.algorithms.ppo import PPO
from proximo.core.batch import Batch
from proximo.core.kl import ReferenceKL
from proximo.errors import UserError
from tests.algorithms.test_grpo import Direct, Recorder, batch_of, numbers

PLAIN = PPO(n_epochs=1, batch_size=64, gamma=1.0, gae_lambda=0.5, normalize_advantages=False, value_coef=1.0)


def language(rewards: list[list[float]], lengths: list[int], values: list[list[float]], **fields: Any) -> Batch:
    """Responses whose critic said `values` (one more than there are tokens; the last is never read)."""
    old, following = numbers([row[:-1] for row in values]), numbers([row[1:] for row in values])
    group = list(range(len(rewards)))
    return batch_of(rewards, lengths, group, **({"values": old, "next_values": following} | fields))


def update(settings: PPO, batch: Batch, *, ratio: float = 1.0, **arguments: Any):
    policy = Direct(tuple(batch.mask.shape), critic=True, ratio=ratio)
    with torch.no_grad():
        policy.values.copy_(torch.where(batch.mask, batch.values, 0.0))
    recorder = Recorder(policy)
    metrics = settings.update(policy, recorder, batch, torch.Generator().manual_seed(0), **arguments)
    return recorder.seen, metrics


# --- lambdas, by hand ---------------------------------------------------------------------------------------------

# Three tokens, KL penalties -0.1 and -0.2 and a score of 1 at the last with its own -0.3; V = 0.5, 0.2, 0.4, then 9.
ONE = language([[-0.1, -0.2, 0.7]], [3], [[0.5, 0.2, 0.4, 9.0]])
# delta_2 = 0.7 + 0 - 0.4 = 0.3; delta_1 = -0.2 + 0.4 - 0.2 = 0; delta_0 = -0.1 + 0.2 - 0.5 = -0.4
HALF = [-0.4 + 0.25 * 0.3, 0.5 * 0.3, 0.3]  # lambda 1/2: delta + A/2
WHOLE = [-0.4 + 0.3, 0.3, 0.3]  # lambda 1: rewards to go less V
# the return at each place under lambda 1 is the sum of rewards to go: 0.4, 0.5, 0.7


def test_a_response_of_three_tokens():
    (gradients,), _ = update(PLAIN, ONE)
    assert gradients["log_probs"].tolist()[0] == pytest.approx([-a / 3 for a in HALF])
    assert gradients["values"].tolist()[0] == pytest.approx([-2 * a / 3 for a in HALF])  # 2 (V - (A + V)) / 3


def test_the_critic_may_have_a_lambda_of_its_own():
    (gradients,), _ = update(dataclasses.replace(PLAIN, value_gae_lambda=1.0), ONE)
    assert gradients["log_probs"].tolist()[0] == pytest.approx([-a / 3 for a in HALF])
    assert gradients["values"].tolist()[0] == pytest.approx([-2 * a / 3 for a in WHOLE])


def test_a_critic_lambda_of_zero_is_a_lambda():
    (gradients,), _ = update(dataclasses.replace(PLAIN, value_gae_lambda=0.0), ONE)
    assert gradients["values"].tolist()[0] == pytest.approx([2 * 0.4 / 3, 0.0, -2 * 0.3 / 3], abs=1e-15)


def test_lambda_of_a_response_from_its_length():
    # 1 - 1 / (k n) with k = 1/2: n = 4 has 1/2; n = 1 would have -1, and has 0; masked places are no length
    values = [[0.0, 0.0, 0.0, 0.0, 9.0], [0.0, 9.0, 9.0, 9.0, 9.0]]
    batch = language([[0.0, 0.0, 0.0, 1.0], [1.0, 7.0, 7.0, 7.0]], [4, 1], values)
    (gradients,), _ = update(dataclasses.replace(PLAIN, gae_lambda=0.0, gae_lambda_per_step=0.5), batch)
    found = (-5 * gradients["log_probs"]).tolist()
    assert found[0] == pytest.approx([0.125, 0.25, 0.5, 1.0])
    assert found[1] == pytest.approx([1.0, 0.0, 0.0, 0.0])
    (critic,), _ = update(dataclasses.replace(PLAIN, gae_lambda_per_step=0.5, value_gae_lambda=1.0), batch)
    assert (-2.5 * critic["values"]).tolist()[0] == pytest.approx([1.0] * 4)


# --- clips --------------------------------------------------------------------------------------------------------


def test_clip_higher_and_the_dual_clip_are_in_force():
    batch = language([[1.0], [-1.0]], [1, 1], [[0.0, 0.0], [0.0, 0.0]])

    def gradient(ratio: float, **settings: float) -> list[float]:
        (gradients,), _ = update(dataclasses.replace(PLAIN, **settings), batch, ratio=ratio)
        return (2 * gradients["log_probs"][:, 0]).tolist()

    assert gradient(1.25) == pytest.approx([0.0, 1.25])
    assert gradient(1.25, clip_epsilon_high=0.28) == pytest.approx([-1.25, 1.25])
    assert gradient(4.0) == pytest.approx([0.0, 4.0])
    assert gradient(4.0, dual_clip=3.0) == pytest.approx([0.0, 0.0])


def test_both_ends_of_the_band_follow_the_schedule():
    settings = PPO(clip_epsilon=0.2, clip_epsilon_high=0.4, clip_schedule="linear").at(0.5, 1.0)
    assert (settings.clip_epsilon, settings.clip_epsilon_high) == pytest.approx((0.1, 0.2))
    settings = PPO(clip_schedule="linear").at(0.5, 1.0)
    assert settings.clip_epsilon_high is None


# --- the KL in the loss -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("estimator", "gradient"), [("k2", -math.log(2)), ("k3", -1.0)])
def test_the_kl_in_the_loss_pulls_towards_the_reference(estimator, gradient):
    zero = language([[0.0] * 3], [2], [[0.0] * 4], ref_log_probs=torch.full((1, 3), math.log(0.5)).double())
    (gradients,), metrics = update(PLAIN, zero, reference_kl=ReferenceKL(0.1, estimator))
    assert gradients["log_probs"].tolist()[0] == pytest.approx([0.1 * gradient / 2] * 2 + [0.0])
    by_hand = {"k2": math.log(2) ** 2 / 2, "k3": 2 - 1 - math.log(2)}
    assert metrics["kl_loss"] == pytest.approx(by_hand[estimator])


def test_a_perceptron_takes_the_kl_in_the_loss_too_and_not_the_path_that_knows_none(plain_policy, make_batch):
    policy = plain_policy()
    batch = make_batch(policy)
    batch = dataclasses.replace(batch, ref_log_probs=batch.log_probs - 0.1)
    optimizer = FlatAdam(policy, learning_rate=1e-3)
    metrics = PPO().update(policy, optimizer, batch, torch.Generator(), reference_kl=ReferenceKL(0.1, "k3"))
    assert metrics["kl_loss"] > 0


# --- the critic alone ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [False, True])
def test_the_critic_alone_learns_where_the_policy_is_not_to(normalize):
    settings = dataclasses.replace(PLAIN, normalize_advantages=normalize, value_gae_lambda=0.9)
    (both,), _ = update(settings, ONE)
    (alone,), _ = update(settings, ONE, learn_policy=False)
    assert alone["log_probs"].abs().max() == 0
    assert torch.equal(alone["values"], both["values"])


def test_alone_the_critic_learns_the_rewards_that_followed_and_no_estimates_of_its_own():
    (by_default,), _ = update(PLAIN, ONE, learn_policy=False)
    (followed,), _ = update(dataclasses.replace(PLAIN, value_gae_lambda=1.0), ONE, learn_policy=False)
    (estimated,), _ = update(dataclasses.replace(PLAIN, value_gae_lambda=PLAIN.gae_lambda), ONE, learn_policy=False)
    assert torch.equal(by_default["values"], followed["values"])
    assert not torch.equal(by_default["values"], estimated["values"])


def test_nor_does_the_entropy_bonus_move_a_policy_that_is_not_to_learn():
    (alone,), _ = update(dataclasses.replace(PLAIN, entropy_coef=0.1), ONE, learn_policy=False)
    assert "entropies" not in alone or alone["entropies"].abs().max() == 0


# --- what must change nothing -------------------------------------------------------------------------------------


def larger() -> Batch:
    generator = torch.Generator().manual_seed(0)
    rewards, noise = torch.randn(2, 8, 6, generator=generator, dtype=torch.float64)
    values = torch.randn(8, 7, generator=generator, dtype=torch.float64)
    batch = language(rewards.tolist(), [1, 6, 3, 0, 2, 5, 4, 6], values.tolist())
    return dataclasses.replace(
        batch, log_probs=batch.log_probs + 0.3 * noise, ref_log_probs=batch.log_probs - 0.3 * noise
    )


FULL = dataclasses.replace(
    PLAIN, batch_size=8, normalize_advantages=True, value_clip_epsilon=0.2, entropy_coef=0.01, gae_lambda_per_step=0.5
)


@pytest.mark.parametrize(
    "cut", [{"microbatch_size": n} for n in (1, 2, 4)] + [{"microbatch_tokens": n} for n in (1, 9)]
)
def test_however_a_minibatch_is_cut_the_gradient_is_the_same(cut):
    (whole,), metrics = update(FULL, larger(), reference_kl=ReferenceKL(0.1, "k3"))
    (pieces,), cut_metrics = update(dataclasses.replace(FULL, **cut), larger(), reference_kl=ReferenceKL(0.1, "k3"))
    for name in whole:
        torch.testing.assert_close(pieces[name], whole[name], rtol=0.0, atol=1e-14)
    assert cut_metrics == pytest.approx(metrics, abs=1e-12)


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e6])
def test_nothing_behind_the_mask_reaches_a_gradient_or_a_metric(poison):
    clean = larger()
    names = ("rewards", "log_probs", "values", "next_values", "ref_log_probs")
    fields = {name: getattr(clean, name).masked_fill(~clean.mask, poison) for name in names}
    flags = {"terminated": clean.terminated | ~clean.mask, "done": clean.done | ~clean.mask}
    poisoned = dataclasses.replace(clean, **fields, **flags)
    results = [update(FULL, batch, reference_kl=ReferenceKL(0.1, "k2")) for batch in (clean, poisoned)]
    (one,), (other,) = results[0][0], results[1][0]
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert results[0][1] == results[1][1]


def test_advantages_are_whitened_over_the_tokens_of_responses_alone():
    def spread(wide: bool) -> Tensor:
        width = 9 if wide else 3
        values = [[0.0] * (width + 1)] * 2
        rewards = [[1.0] + [0.0] * (width - 1), [0.0, 0.0, 3.0] + [0.0] * (width - 3)]
        settings = dataclasses.replace(PLAIN, gae_lambda=0.0, normalize_advantages=True)
        return update(settings, language(rewards, [1, 3], values))[0][0]["log_probs"][:, :3]

    # advantages 1 and 0, 0, 3: mean 1, squares 0 + 1 + 1 + 4 over 3, standard deviation sqrt 2
    expected = numbers([[0.0, 0.0, 0.0], [1 / math.sqrt(2), 1 / math.sqrt(2), -2 / math.sqrt(2)]]) / 4
    torch.testing.assert_close(spread(False), expected, rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(spread(True), expected, rtol=1e-7, atol=1e-12)


def test_a_huge_score_moves_the_weights_only_as_far_as_the_norm_allows():
    batch = language([[0.0, 0.0, 1e9]], [3], [[0.0] * 4])
    policy = Direct((1, 3), critic=True)
    optimizer = FlatAdam(policy, learning_rate=1e-3)
    metrics = dataclasses.replace(PLAIN, max_grad_norm=0.25).update(policy, optimizer, batch, torch.Generator())
    assert metrics["grad_norm"] > 1e8
    assert optimizer.gradient.norm().item() == pytest.approx(0.25, rel=1e-6)


# --- bad inputs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("clip_epsilon_high", -0.1),
        ("dual_clip", 1.0),
        ("value_gae_lambda", 1.1),
        ("gae_lambda_per_step", 0.0),
        ("microbatch_tokens", 0),
    ],
)
def test_an_impossible_setting_is_refused_by_name_with_its_value(name, value):
    with pytest.raises(UserError, match=rf"^{name} is {value!r}"):
        PPO(**{name: value})


@pytest.mark.parametrize("extra", [{"clip_epsilon_high": 0.3}, {"dual_clip": 3.0}, {"microbatch_tokens": 64}])
def test_the_fused_path_is_not_asked_for_what_it_does_not_know(extra):
    with pytest.raises(UserError, match="update_path is 'fused'"):
        PPO(update_path="fused", **extra)


def test_what_is_for_language_models_alone_is_refused_for_others(plain_policy, make_batch):
    policy = plain_policy()
    settings = PPO(gae_lambda_per_step=0.05)
    with pytest.raises(UserError, match="gae_lambda_per_step is for language models"):
        settings.update(policy, FlatAdam(policy, learning_rate=1e-3), make_batch(policy), torch.Generator())


def test_what_language_models_do_not_have_is_said():
    with pytest.raises(UserError, match="kl_penalty"):
        update(dataclasses.replace(PLAIN, objective="kl_penalty"), ONE)
    critic, none = Direct((1, 3), critic=True), Direct((1, 3))
    without = dataclasses.replace(ONE, values=None)
    with pytest.raises(ValueError, match="values"):
        PLAIN.update(critic, FlatAdam(critic, learning_rate=1e-3), without, torch.Generator())
    with pytest.raises(ValueError, match="critic"):
        PLAIN.update(none, FlatAdam(none, learning_rate=1e-3), ONE, torch.Generator())
    with pytest.raises(ValueError, match="ref_log_probs"):
        update(PLAIN, ONE, reference_kl=ReferenceKL(0.1, "k3"))
