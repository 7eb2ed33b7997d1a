"""Epochs of minibatches of microbatches: what is cut, what is stopped, and what must make no difference."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from proximo.algorithms.adam import FlatAdam, NonFiniteUpdateError
from proximo.algorithms.ppo import PPO
from proximo.algorithms.update import Epochs, Loss, Minibatch, microbatches, run_epochs
from proximo.core.batch import Batch
from proximo.core.masked import masked_mean


def updated(policy, batch: Batch, *, seed: int = 0, **settings) -> tuple[dict[str, float], FlatAdam]:
    """One `PPO.update` with a large learning rate, so that ratios leave the band."""
    settings = {"learning_rate": 0.03, "n_epochs": 3, "batch_size": 16, "entropy_coef": 0.01} | settings
    optimizer = FlatAdam(policy, learning_rate=0.0)
    metrics = PPO(**settings).update(policy, optimizer, batch, torch.Generator().manual_seed(seed))
    return metrics, optimizer


# --- with a scripted loss ----------------------------------------------------------------------------------


class Scripted:
    """A loss function whose approx_kl follows a script, and an optimizer that counts."""

    learning_rate = 0.0
    has_memory = True

    def row_lengths(self, batch: Batch) -> list[int]:
        return batch.mask.sum(1).tolist()

    def __init__(self, kls: list[float]) -> None:
        self.kls = iter(kls)
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.seen: list[Minibatch] = []
        self.n_steps = 0
        self.norms: list[float] = []

    def loss(self, policy: object, minibatch: Minibatch) -> Loss:
        self.seen.append(minibatch)
        kl = torch.tensor(next(self.kls), dtype=torch.float64)
        return Loss(self.weight * 3.0, kl, {"number": torch.tensor(float(len(self.seen)))})

    def zero_grad(self) -> None:
        self.weight.grad = None

    def clipped_step(self, max_grad_norm: float) -> float:
        self.n_steps += 1
        self.norms.append(float(self.n_steps))
        return self.norms[-1]


def some_minibatch(mask: Tensor) -> Minibatch:
    numbers = torch.arange(mask.numel(), dtype=torch.float64).view(mask.shape)
    no = torch.zeros_like(mask)
    batch = Batch(numbers[..., None], numbers, mask, *[numbers] * 4, no, no)
    return Minibatch(batch, 100 + numbers, 200 + numbers)


def run_script(kls: list[float], *, n_rows: int = 12, **settings) -> tuple[Scripted, dict[str, float]]:
    script = Scripted(kls)
    defaults = dict(n_epochs=3, batch_size=4, normalize_advantages=False, max_grad_norm=1.0)
    everything = some_minibatch(torch.ones(n_rows, 1, dtype=torch.bool))
    metrics = run_epochs(
        script,  # type: ignore[arg-type]
        script,
        everything,
        script.loss,
        Epochs(**(defaults | settings)),
        torch.Generator().manual_seed(0),
    )
    return script, metrics


def test_without_a_target_every_minibatch_of_every_epoch_is_a_step():
    script, metrics = run_script([9.0, 1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 3.0, 4.0])
    assert len(script.seen) == script.n_steps == metrics["n_updates"] == 9
    assert metrics["kl_stopped"] == 0.0
    assert metrics["approx_kl_max"] == 9.0
    assert metrics["approx_kl"] == 3.0  # of the last epoch: (2 + 3 + 4) / 3
    assert metrics["number"] == 8.0  # (7 + 8 + 9) / 3
    assert metrics["grad_norm"] == 5.0  # of all steps: (1 + ... + 9) / 9
    for epoch in range(3):
        rows = torch.cat([m.batch.rewards for m in script.seen[3 * epoch : 3 * epoch + 3]]).flatten()
        assert sorted(rows.tolist()) == list(range(12))
    first, second = (script.seen[k].batch.rewards.flatten().tolist() for k in (0, 3))
    assert first != second  # a fresh order each epoch


def test_the_kl_stop_ends_all_epochs_and_the_triggering_step_is_not_taken():
    # Target 1/8: the bound is 3/16, reached at the fifth minibatch, the second of the second epoch.
    script, metrics = run_script([0.0, 0.1, 0.15, 0.1875, 0.25] + [0.0] * 4, target_kl=0.125)
    assert len(script.seen) == 5
    assert script.n_steps == metrics["n_updates"] == 4
    assert metrics["kl_stopped"] == 1.0
    assert metrics["approx_kl_max"] == 0.25
    assert metrics["approx_kl"] == pytest.approx((0.1875 + 0.25) / 2)
    assert metrics["grad_norm"] == 2.5


@pytest.mark.parametrize(("kl", "stopped"), [(0.1875, 0.0), (math.nextafter(0.1875, 1), 1.0)])
def test_the_kl_stop_is_above_one_and_a_half_times_the_target_not_at_it(kl, stopped):
    script, metrics = run_script([kl] * 9, target_kl=0.125)
    assert metrics["kl_stopped"] == stopped
    assert script.n_steps == (0 if stopped else 9)


def test_a_stop_at_the_very_first_minibatch_leaves_sound_metrics():
    script, metrics = run_script([1.0], target_kl=0.1)
    assert (script.n_steps, metrics["n_updates"], metrics["grad_norm"]) == (0, 0, 0.0)
    assert metrics["approx_kl"] == metrics["approx_kl_max"] == 1.0


def test_the_kl_of_microbatches_is_added_up_before_it_is_judged():
    # Two microbatches of 0.125 each: together above 3/16, alone not.
    script, metrics = run_script([0.125, 0.125], n_rows=4, microbatch_size=2, target_kl=0.125)
    assert (len(script.seen), script.n_steps, metrics["approx_kl_max"]) == (2, 0, 0.25)


def test_advantages_are_whitened_over_the_minibatch_before_it_is_cut():
    script, _ = run_script([0.0] * 8, n_rows=8, n_epochs=1, batch_size=8, microbatch_size=1, normalize_advantages=True)
    advantages = torch.cat([m.advantages for m in script.seen])
    assert len(script.seen) == 8
    assert float(advantages.mean()) == pytest.approx(0.0, abs=1e-12)
    assert float(advantages.std()) == pytest.approx(1.0, abs=1e-6)
    raw, _ = run_script([0.0] * 8, n_rows=8, n_epochs=1, batch_size=8, microbatch_size=1)
    assert sorted(torch.cat([m.advantages for m in raw.seen]).flatten().tolist()) == list(range(100, 108))


# --- minibatches -------------------------------------------------------------------------------------------


def test_a_minibatch_as_steps_keeps_advantages_and_returns_beside_their_rows():
    steps = some_minibatch(torch.tensor([[True, False, True], [False, True, True]])).as_steps()
    assert steps.batch.rewards.tolist() == [[0], [2], [4], [5]]
    assert steps.advantages.tolist() == [[100], [102], [104], [105]]
    assert steps.returns.tolist() == [[200], [202], [204], [205]]


@pytest.mark.parametrize(
    ("size", "sizes"), [(None, [5]), (5, [5]), (9, [5]), (4, [4, 1]), (2, [2, 2, 1]), (1, [1] * 5)]
)
def test_microbatches_share_the_denominator_of_the_whole(size, sizes):
    whole = some_minibatch(torch.tensor([[True, True], [False, False], [True, False], [True, True], [False, True]]))
    parts = microbatches(Scripted([]), whole, Epochs(1, 5, False, 1.0, microbatch_size=size))
    assert [len(part.batch.mask) for part in parts] == sizes
    assert [int(part.denominator) for part in parts] == [6] * len(sizes)
    assert torch.equal(torch.cat([part.advantages for part in parts]), whole.advantages)
    assert torch.equal(torch.cat([part.batch.rewards for part in parts]), whole.batch.rewards)


def test_a_budget_of_tokens_groups_rows_of_like_length():
    mask = torch.arange(6) < torch.tensor([[1], [6], [2], [5], [2]])
    parts = microbatches(Scripted([]), some_minibatch(mask), Epochs(1, 5, False, 1.0, microbatch_tokens=6))
    # Rows of 6 and 5 alone (5 + 5 > 6), then three rows of at most 2: 3 * 2 = 6.
    assert [part.batch.mask.sum(1).tolist() for part in parts] == [[6], [5], [2, 2, 1]]
    assert [int(part.denominator) for part in parts] == [16] * 3


@pytest.mark.parametrize(
    ("weighing", "expected"),
    [
        ("steps", (1 + 2 + 3 + 10) / 4),
        ("rows", ((1 + 2 + 3) / 3 + 10) / 2),
        ("longest", (1 + 2 + 3 + 10) / (2 * 5)),
    ],
)
def test_what_a_loss_is_a_mean_over(weighing, expected):
    numbers = torch.tensor([[1.0, 2.0, 3.0], [torch.nan, 10.0, torch.nan], [torch.nan] * 3], dtype=torch.float64)
    mask = ~numbers.isnan()
    minibatch = some_minibatch(mask)
    for size in (None, 1, 2):
        epochs = Epochs(1, 3, False, 1.0, microbatch_size=size, weighing=weighing, longest=5)
        rows, total = 0, 0.0
        for part in microbatches(Scripted([]), minibatch, epochs):
            n = len(part.batch.mask)
            total += float(masked_mean(numbers[rows : rows + n], part.batch.mask, denominator=part.denominator))
            rows += n
        assert total == pytest.approx(expected, abs=1e-12)


def test_sequences_with_unequal_masks_give_the_same_gradient_however_they_are_cut(tiny_policy, make_batch):
    def loss(policy, minibatch: Minibatch) -> Loss:
        new = policy.evaluate(minibatch.batch)
        mask, denominator = minibatch.batch.mask, minibatch.denominator
        error = masked_mean((new.values - minibatch.returns).square(), mask, denominator=denominator)
        return Loss(error, error.detach(), {"error": error})

    results = []
    for size in (None, 1, 2, 3):
        policy = tiny_policy()
        batch = make_batch(policy, 6, 5, masked=0.5)
        metrics = run_epochs(
            policy,
            FlatAdam(policy, learning_rate=0.01),
            Minibatch(batch, batch.rewards, batch.rewards),
            loss,
            Epochs(4, 6, normalize_advantages=True, max_grad_norm=0.5, microbatch_size=size),
            torch.Generator().manual_seed(0),
        )
        results.append((policy.flat(), metrics["error"], metrics["approx_kl"]))
    for flat, *metrics in results[1:]:
        torch.testing.assert_close(flat, results[0][0], rtol=0, atol=1e-12)
        assert metrics == pytest.approx(results[0][1:], abs=1e-12)


# --- PPO's own update --------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"objective": "kl_penalty"}, {"value_clip_epsilon": 0.2}])
@pytest.mark.parametrize("kind", ["discrete", "continuous"])
def test_microbatches_change_nothing(tiny_policy, make_batch, kind, settings):
    results = []
    for size in (None, 1, 7, 64):
        policy = tiny_policy(kind)
        batch = make_batch(policy, 3, 16)
        metrics, _ = updated(policy, batch, microbatch_size=size, batch_size=20, n_epochs=2, **settings)
        results.append((policy.flat(), metrics))
    for flat, metrics in results[1:]:
        torch.testing.assert_close(flat, results[0][0], rtol=0, atol=1e-12)
        assert metrics == pytest.approx(results[0][1], abs=1e-10)


def test_the_kl_stop_stops_where_it_says_and_keeps_the_weights_of_the_step_before(tiny_policy, make_batch):
    def run(target_kl: float | None):
        policy = tiny_policy()
        batch = make_batch(policy)
        optimizer = FlatAdam(policy, learning_rate=0.0)
        weights, take_step = [policy.flat()], optimizer.clipped_step

        def recording(max_grad_norm: float) -> float:
            norm = take_step(max_grad_norm)
            weights.append(policy.flat())
            return norm

        optimizer.clipped_step = recording
        algorithm = PPO(learning_rate=0.02, n_epochs=5, batch_size=13, target_kl=target_kl)
        metrics = algorithm.update(policy, optimizer, batch, torch.Generator().manual_seed(0))
        return policy, metrics, weights

    _, free, every = run(None)
    assert free["kl_stopped"] == 0.0
    n_minibatches = len(every) - 1
    stops = set()
    for target in (1e-5, 0.005, 0.02, 0.05, 0.1, free["approx_kl_max"]):
        policy, metrics, _ = run(target)
        taken = int(metrics["n_updates"])
        assert metrics["kl_stopped"] == float(metrics["approx_kl_max"] > 1.5 * target)
        assert policy.n_evaluations == taken + (1 if metrics["kl_stopped"] else 0)
        assert torch.equal(policy.flat(), every[taken])
        stops.add(taken)
    # The test is about something: stops in the first epoch, in later ones, and none at all.
    per_epoch = n_minibatches // 5
    assert n_minibatches in stops
    assert any(0 < taken < per_epoch for taken in stops)
    assert any(per_epoch < taken < n_minibatches and taken % per_epoch for taken in stops)


@pytest.mark.parametrize("kind", ["discrete", "continuous"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_the_first_minibatch_every_ratio_is_one(tiny_policy, make_batch, kind, dtype):
    policy = tiny_policy(kind, dtype=dtype)
    metrics, _ = updated(policy, make_batch(policy), n_epochs=1, batch_size=1000)
    assert metrics["n_updates"] == 1
    assert abs(metrics["approx_kl"]) < 1e-10
    assert metrics["approx_kl_max"] == metrics["approx_kl"]
    assert metrics["clip_fraction"] == 0.0


@pytest.mark.parametrize("settings", [{}, {"objective": "kl_penalty"}])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -1e30])
def test_masked_steps_change_nothing_whatever_stands_there(tiny_policy, make_batch, poison, settings):
    def run(spoil) -> tuple[Tensor, dict[str, float]]:
        policy = tiny_policy()
        metrics, _ = updated(policy, spoil(make_batch(policy, masked=0.4)), **settings)
        return policy.flat(), metrics

    def poisoned(batch: Batch) -> Batch:
        floats = ("rewards", "log_probs", "values", "next_values")
        return dataclasses.replace(
            batch,
            **{name: getattr(batch, name).masked_fill(~batch.mask, poison) for name in floats},
            observations=batch.observations.masked_fill(~batch.mask[..., None], poison),
            actions=batch.actions.masked_fill(~batch.mask, 999),
            terminated=batch.terminated ^ ~batch.mask,
            done=batch.done ^ ~batch.mask,
        )

    def padded(batch: Batch) -> Batch:
        def wide(name: str) -> Tensor | None:
            tensor = getattr(batch, name)
            return None if tensor is None else torch.cat([tensor, torch.zeros_like(tensor[:, :3])], 1)

        return Batch(**{field.name: wide(field.name) for field in dataclasses.fields(batch)})

    weights, metrics = run(lambda batch: batch)
    for spoil in (poisoned, padded):
        others, other_metrics = run(spoil)
        assert torch.equal(weights, others)
        assert metrics == other_metrics


def test_the_order_of_environments_is_nothing_to_a_whole_batch(tiny_policy, make_batch):
    results = []
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
        policy = tiny_policy()
        updated(policy, make_batch(policy)[torch.tensor(order)], batch_size=1000)
        results.append(policy.flat())
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


@pytest.mark.parametrize("settings", [{}, {"objective": "kl_penalty"}, {"value_clip_epsilon": 0.2}])
@pytest.mark.parametrize("kind", ["discrete", "continuous"])
def test_a_batch_of_one_step_and_minibatches_of_one_make_no_nan(tiny_policy, make_batch, kind, settings):
    for shape, batch_size in (((1, 1), 64), ((2, 4), 1)):
        policy = tiny_policy(kind)
        before = policy.flat()
        metrics, _ = updated(policy, make_batch(policy, *shape, masked=0.0), batch_size=batch_size, **settings)
        assert policy.flat().isfinite().all()
        assert not torch.equal(policy.flat(), before)
        assert all(math.isfinite(value) for name, value in metrics.items() if name != "explained_variance")
    one_valid = make_batch(policy, 2, 4, masked=1.0)
    assert one_valid.n_valid == 1
    metrics, _ = updated(policy, one_valid, **settings)
    assert policy.flat().isfinite().all()
    assert math.isnan(metrics["explained_variance"])  # one return has no variance to explain


@pytest.mark.parametrize("field", ["rewards", "observations", "log_probs", "values"])
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_loss_that_is_not_finite_is_refused_and_the_weights_stay_bit_identical(tiny_policy, make_batch, field, bad):
    policy = tiny_policy()
    batch = make_batch(policy)
    spoilt = getattr(batch, field).clone()
    spoilt[0, 0] = bad
    before = policy.flat()
    with pytest.raises(NonFiniteUpdateError):
        updated(policy, dataclasses.replace(batch, **{field: spoilt}), batch_size=1000)
    assert torch.equal(policy.flat(), before)


def test_a_later_minibatch_that_breaks_down_leaves_what_the_steps_before_it_made(tiny_policy, make_batch):
    policy = tiny_policy()
    batch = make_batch(policy, masked=0.0)
    rewards = batch.rewards.clone()
    rewards[0, 0] = math.nan  # reaches the advantage of this one step only: nothing is before it
    with pytest.raises(NonFiniteUpdateError):
        updated(policy, dataclasses.replace(batch, rewards=rewards), batch_size=4, n_epochs=1)
    assert policy.flat().isfinite().all()


def test_the_generator_decides_the_order_and_nothing_else_is_drawn(tiny_policy, make_batch):
    def run(seed: int) -> Tensor:
        policy = tiny_policy()
        batch = make_batch(policy)
        before = torch.get_rng_state()
        updated(policy, batch, seed=seed)
        assert torch.equal(before, torch.get_rng_state())
        return policy.flat()

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
