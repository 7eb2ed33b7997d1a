"""Critic-free updates: the gradient of every token by hand, and what must not change it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from proximo.algorithms.adam import FlatAdam
from proximo.algorithms.grpo import GRPO, PAPERS
from proximo.core.batch import Batch
from proximo.core.kl import ReferenceKL
from proximo.core.policy import Evaluation
from proximo.errors import UserError

POISON = (math.nan, math.inf, 1e30)
OLD = math.log(0.25)


class Direct(nn.Module):
    """Log-probabilities, entropies and values are its parameters `[B, T]`, so the gradient is one per token.

    A batch says in its actions which rows it holds.
    """

    has_memory = True

    def __init__(self, shape: tuple[int, int], *, critic: bool = False, ratio: float = 1.0) -> None:
        super().__init__()
        start = torch.full(shape, OLD + math.log(ratio), dtype=torch.float64)
        self.log_probs = nn.Parameter(start)
        self.entropies = nn.Parameter(torch.ones_like(start))
        self.values = nn.Parameter(torch.zeros_like(start)) if critic else None

    def evaluate(self, batch: Batch) -> Evaluation:
        rows = batch.actions[:, 0]
        values = None if self.values is None else self.values[rows]
        return Evaluation(self.log_probs[rows], self.entropies[rows], values, None)

    def row_lengths(self, batch: Batch) -> list[int]:
        return batch.mask.sum(1).tolist()

    def plain(self, batch: Batch) -> None:
        return None


class Recorder:
    """An optimizer that takes no step and keeps the gradients it was shown."""

    def __init__(self, module: nn.Module) -> None:
        self.learning_rate = 0.0
        self.module = module
        self.seen: list[dict[str, Tensor]] = []

    def zero_grad(self) -> None:
        for parameter in self.module.parameters():
            parameter.grad = None

    def clipped_step(self, max_grad_norm: float) -> float:
        grads = {name: p.grad for name, p in self.module.named_parameters() if p.grad is not None}
        self.seen.append(grads)
        return float(torch.cat([grad.flatten() for grad in grads.values()]).norm())


def numbers(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def batch_of(rewards: list[list[float]], lengths: list[int], group: list[int], **fields: Any) -> Batch:
    """Responses of so many tokens, each with the old probability 1/4."""
    width = len(rewards[0])
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    last = torch.arange(width) == torch.tensor(lengths)[:, None] - 1
    old = torch.full(mask.shape, OLD, dtype=torch.float64)
    rows = torch.arange(len(rewards))[:, None].expand(mask.shape).clone()
    common = dict(observations=rows, actions=rows, mask=mask, rewards=numbers(rewards), log_probs=old, values=None)
    common |= dict(next_values=None, terminated=last, done=last, group=torch.tensor(group))
    return Batch(**(common | fields))


# One prompt, scores 0, 1, 5 (sums of the rewards) and an answer without a score: advantages -2, -1, 3 and none.
REWARDS = [[0.0, 0, 0, 0], [0.5, 0.5, 0, 0], [-1.0, 0, 2, 4], [9.0, 9, 9, 9]]
BATCH = batch_of(REWARDS, [1, 2, 4, 0], [0, 0, 0, 0])
PLAIN = GRPO(baseline="group_mean", n_epochs=1, batch_size=4)


def update(settings: GRPO, batch: Batch = BATCH, *, ratio: float = 1.0, longest: int = 8, **arguments: Any):
    policy = Direct(tuple(batch.mask.shape), ratio=ratio)
    recorder = Recorder(policy)
    metrics = settings.update(policy, recorder, batch, torch.Generator().manual_seed(0), longest=longest, **arguments)
    return recorder.seen, metrics


# --- by hand ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weighing", "per_token"),
    [
        # the gradient of -A * ratio at ratio 1 is -A, over the denominator
        pytest.param("rows", [2 / (3 * 1), 1 / (3 * 2), -3 / (3 * 4)], id="rows: 3 answers, each over its own tokens"),
        pytest.param("steps", [2 / 7, 1 / 7, -3 / 7], id="steps: 7 tokens"),
        pytest.param("longest", [2 / 24, 1 / 24, -3 / 24], id="longest: 3 answers of 8 tokens at most"),
    ],
)
def test_the_gradient_of_every_token(weighing, per_token):
    (gradients,), metrics = update(dataclasses.replace(PLAIN, weighing=weighing))
    a, b, c = per_token
    expected = [[a, 0, 0, 0], [b, b, 0, 0], [c, c, c, c], [0, 0, 0, 0]]
    torch.testing.assert_close(gradients["log_probs"], numbers(expected), rtol=1e-12, atol=0.0)
    assert metrics["policy_loss"] == pytest.approx(a * 1 + b * 2 + c * 4)  # linear in the ratio at 1
    assert metrics["approx_kl"] == 0.0
    assert metrics["n_updates"] == 1


@pytest.mark.parametrize(
    ("baseline", "expected"),
    [
        ("group_mean", [-2.0, -1.0, 3.0]),
        ("group_std", [value / (math.sqrt(7) + 1e-4) for value in (-2.0, -1.0, 3.0)]),
        ("leave_one_out", [-3.0, -1.5, 4.5]),
    ],
)
def test_advantages_of_each_baseline(baseline, expected):
    found = GRPO(baseline=baseline).advantages(BATCH)
    assert found[:, 0].tolist() == pytest.approx([*expected, 0.0])
    assert found[BATCH.mask].tolist() == pytest.approx([expected[0]] + [expected[1]] * 2 + [expected[2]] * 4)
    assert found[~BATCH.mask].abs().max() == 0


def test_clip_higher_and_the_dual_clip_are_in_force():
    def gradient(ratio: float, **settings: float) -> list[float]:
        (gradients,), _ = update(dataclasses.replace(PLAIN, weighing="steps", **settings), ratio=ratio)
        return (7 * gradients["log_probs"][:3, 0]).tolist()

    assert gradient(1.25) == pytest.approx([2.5, 1.25, 0.0])  # the good answer is out of the band
    assert gradient(1.25, clip_epsilon_high=0.28) == pytest.approx([2.5, 1.25, -3.75])
    assert gradient(4.0, dual_clip=3.0) == pytest.approx([0.0, 0.0, 0.0])  # bad ones beyond the dual clip, too
    assert gradient(4.0) == pytest.approx([8.0, 4.0, 0.0])


@pytest.mark.parametrize("weighing", ["rows", "steps", "longest"])
def test_entropy_and_the_kl_in_the_loss_are_weighed_like_the_policy_loss(weighing):
    ref = torch.full((4, 4), math.log(0.5), dtype=torch.float64)  # log pi - log ref = -log 2, ref / pi = 2
    batch = dataclasses.replace(BATCH, rewards=torch.zeros_like(BATCH.rewards), ref_log_probs=ref)
    settings = dataclasses.replace(PLAIN, weighing=weighing, entropy_coef=0.5)
    (k3,), metrics = update(settings, batch, reference_kl=ReferenceKL(0.1, "k3"))
    (k2,), _ = update(settings, batch, reference_kl=ReferenceKL(0.1, "k2"))
    denominator = {"rows": [3.0, 6.0, 12.0], "steps": [7.0] * 3, "longest": [24.0] * 3}[weighing]
    for row, n in enumerate(denominator):
        # k3: 1 - ref / pi = -1; k2: log pi - log ref. Descent makes the token more likely, as the reference has it.
        assert k3["log_probs"][row, 0].item() == pytest.approx(-0.1 / n)
        assert k2["log_probs"][row, 0].item() == pytest.approx(-0.1 * math.log(2) / n)
        assert k3["entropies"][row, 0].item() == pytest.approx(-0.5 / n)
    share = sum(n_tokens / n for n_tokens, n in zip([1, 2, 4], denominator, strict=True))
    assert metrics["kl_loss"] == pytest.approx((2 - 1 - math.log(2)) * share)
    assert metrics["entropy"] == pytest.approx(share)


# --- what must change nothing -------------------------------------------------------------------------------------


def larger(seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    batch = batch_of(rewards.tolist(), [1, 6, 3, 0, 2, 5, 4, 6], [0, 0, 0, 0, 1, 1, 1, 1])
    noise = 0.3 * torch.randn(8, 6, generator=generator, dtype=torch.float64)
    return dataclasses.replace(batch, log_probs=batch.log_probs + noise, ref_log_probs=batch.log_probs - noise)


@pytest.mark.parametrize("weighing", ["rows", "steps", "longest"])
@pytest.mark.parametrize(
    "cut", [{"microbatch_size": n} for n in (1, 2, 4)] + [{"microbatch_tokens": n} for n in (1, 9)]
)
def test_however_a_minibatch_is_cut_the_gradient_is_the_same(weighing, cut):
    settings = GRPO(weighing=weighing, batch_size=8, n_epochs=1, entropy_coef=0.01)
    kl = ReferenceKL(0.1, "k3")
    (whole,), metrics = update(settings, larger(), reference_kl=kl)
    (pieces,), cut_metrics = update(dataclasses.replace(settings, **cut), larger(), reference_kl=kl)
    for name in whole:
        torch.testing.assert_close(pieces[name], whole[name], rtol=0.0, atol=1e-14)
    assert cut_metrics == pytest.approx(metrics, abs=1e-12)


@pytest.mark.parametrize("weighing", ["rows", "steps", "longest"])
@pytest.mark.parametrize("poison", POISON)
def test_nothing_behind_the_mask_reaches_a_gradient_or_a_metric(weighing, poison):
    clean = larger()
    fields = {
        name: getattr(clean, name).masked_fill(~clean.mask, poison)
        for name in ("rewards", "log_probs", "ref_log_probs")
    }
    settings = GRPO(weighing=weighing, batch_size=8, n_epochs=1, entropy_coef=0.01, microbatch_size=3)
    results = [
        update(settings, batch, reference_kl=ReferenceKL(0.1, "k2"))
        for batch in (clean, dataclasses.replace(clean, **fields))
    ]
    (one,), (other,) = results[0][0], results[1][0]
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert results[0][1] == results[1][1]


def test_padding_and_the_order_of_rows_are_nothing():
    clean = larger()
    order = torch.tensor([5, 0, 7, 3, 1, 6, 2, 4])
    pad = (2, 3)

    def widened(value: Any) -> Any:
        return torch.nn.functional.pad(value, pad) if isinstance(value, Tensor) and value.ndim == 2 else value

    wide = Batch(**{name: widened(value) for name, value in vars(clean[order]).items()})
    wide = dataclasses.replace(wide, actions=torch.arange(8)[:, None].expand(8, 11).clone())
    settings = GRPO(batch_size=8, n_epochs=1)
    (one,), metrics = update(settings, clean)
    (other,), wide_metrics = update(settings, wide)
    torch.testing.assert_close(other["log_probs"][:, 2:8], one["log_probs"][order], rtol=0.0, atol=1e-14)
    assert wide_metrics == pytest.approx(metrics, abs=1e-12)


def test_a_rollout_without_any_score_moves_nothing():
    batch = dataclasses.replace(BATCH, mask=torch.zeros_like(BATCH.mask))
    policy = Direct((4, 4))
    before = policy.log_probs.detach().clone()
    metrics = PLAIN.update(policy, FlatAdam(policy, learning_rate=1.0), batch, torch.Generator(), longest=8)
    assert torch.equal(policy.log_probs, before)
    assert all(math.isfinite(value) for value in metrics.values())


# --- steps --------------------------------------------------------------------------------------------------------


def test_a_huge_gradient_is_scaled_down_to_max_grad_norm():
    batch = dataclasses.replace(BATCH, rewards=1e6 * BATCH.rewards)
    policy = Direct((4, 4))
    optimizer = FlatAdam(policy, learning_rate=1e-3)
    settings = dataclasses.replace(PLAIN, max_grad_norm=0.5)
    metrics = settings.update(policy, optimizer, batch, torch.Generator(), longest=8)
    assert metrics["grad_norm"] > 1e5
    assert optimizer.gradient.norm().item() == pytest.approx(0.5, rel=1e-6)
    unclipped = dataclasses.replace(PLAIN, max_grad_norm=1e12)
    unclipped.update(policy, optimizer, batch, torch.Generator(), longest=8)
    assert optimizer.gradient.norm().item() > 1e5


def test_the_policy_moves_with_the_advantages_and_towards_the_reference():
    policy = Direct((4, 4))
    kl = ReferenceKL(0.1, "k2")
    ref = torch.full((4, 4), OLD, dtype=torch.float64)
    ref[1] += 1.0
    rewards = torch.zeros_like(BATCH.rewards)
    batch = dataclasses.replace(BATCH, rewards=rewards, ref_log_probs=ref)
    optimizer = FlatAdam(policy, learning_rate=1e-2)
    PLAIN.update(policy, optimizer, batch, torch.Generator(), longest=8, reference_kl=kl)
    moved = policy.log_probs.detach() - OLD
    assert moved[1, :2].min() > 0  # more likely under the reference
    assert moved[[0, 2, 3]].abs().max() == 0
    PLAIN.update(policy, optimizer, BATCH, torch.Generator(), longest=8)
    assert policy.log_probs.detach()[2].min() > OLD
    assert policy.log_probs.detach()[0, 0] < OLD


def test_epochs_minibatches_and_the_kl_stop():
    seen, metrics = update(GRPO(batch_size=2, n_epochs=3))
    assert len(seen) == metrics["n_updates"] == 6
    seen, metrics = update(GRPO(batch_size=4, n_epochs=3, target_kl=0.1), ratio=3.0)
    assert seen == []
    assert metrics["kl_stopped"] == 1.0


def test_the_learning_rate_goes_down_in_a_line():
    settings = GRPO(learning_rate=1e-3, learning_rate_schedule="linear")
    assert settings.at(0.25).learning_rate == pytest.approx(2.5e-4)
    assert GRPO(learning_rate=1e-3).at(0.25).learning_rate == 1e-3
    policy = Direct((4, 4))
    optimizer = FlatAdam(policy, learning_rate=9.0)
    settings.at(0.5).update(policy, optimizer, BATCH, torch.Generator(), longest=8)
    assert optimizer.learning_rate == pytest.approx(5e-4)


@pytest.mark.parametrize(
    ("paper", "expected"),
    [
        ("grpo", [2 / 3, 1 / 6, -3 / 12]),
        ("dr_grpo", [2 / 24, 1 / 24, -3 / 24]),
        ("dapo", [2 / 7, 1 / 7, -3 / 7]),
        ("rloo", [3 / 7, 1.5 / 7, -4.5 / 7]),
    ],
)
def test_the_papers(paper, expected):
    (gradients,), _ = update(dataclasses.replace(PAPERS[paper], batch_size=4))
    scale = math.sqrt(7) + 1e-4 if paper in ("grpo", "dapo") else 1.0
    assert (scale * gradients["log_probs"][:3, 0]).tolist() == pytest.approx(expected)


# --- bad inputs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("baseline", "groupstd"),
        ("weighing", "row"),
        ("learning_rate_schedule", "cosine"),
        ("learning_rate", 0.0),
        ("clip_epsilon", 1.0),
        ("clip_epsilon_high", 0.0),
        ("dual_clip", 1.0),
        ("n_epochs", 0),
        ("batch_size", 1.5),
        ("entropy_coef", -0.1),
        ("max_grad_norm", math.nan),
        ("target_kl", 0.0),
        ("microbatch_size", 0),
        ("microbatch_tokens", 0),
    ],
)
def test_an_impossible_setting_is_refused_by_name_with_its_value(name, value):
    with pytest.raises(UserError, match=rf"^{name} is {value!r}"):
        GRPO(**{name: value})


def test_what_the_batch_lacks_is_said():
    with pytest.raises(ValueError, match="group"):
        update(PLAIN, dataclasses.replace(BATCH, group=None))
    with pytest.raises(ValueError, match="ref_log_probs"):
        update(PLAIN, reference_kl=ReferenceKL(0.1, "k3"))
