"""Whatever the batch and the settings: order, padding, what stands behind masks, and cuts change no gradient."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from proximo.algorithms.adam import FlatAdam
from proximo.algorithms.grpo import GRPO
from proximo.algorithms.ppo import PPO
from proximo.core.batch import Batch
from proximo.core.kl import ReferenceKL
from tests.algorithms.conftest import PlainPolicy, _make_batch
from tests.algorithms.test_grpo import Direct, Recorder
from tests.fuzz.examples import examples

POISON = (math.nan, math.inf, -math.inf, 1e300, -1e30)
HEADS = ("log_probs", "entropies", "values")


class World(NamedTuple):
    """A batch, and what the policy says of it now: the heads of `Direct`, each `[B, T]`."""

    batch: Batch
    heads: dict[str, Tensor]

    def mapped(self, change: Callable[[Tensor], Tensor]) -> World:
        """Change every tensor `[B, ...]` alike; rows are numbered anew."""
        batch = self.batch._mapped(change)
        rows = torch.arange(len(batch.mask))[:, None].expand(batch.mask.shape).clone()
        heads = {name: change(tensor) for name, tensor in self.heads.items()}
        return World(replace(batch, actions=rows), heads)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """Random experience with holes anywhere, whole rows of them too, and at least one step that counts."""
    shape = draw(st.integers(1, 6)), draw(st.integers(1, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def share(probability: float) -> Tensor:
        return torch.rand(shape, generator=generator) < probability

    mask = share(draw(st.sampled_from([0.1, 0.5, 0.9, 1.0]))) & ~share(0.2).all(1, keepdim=True)
    mask[draw(st.integers(0, shape[0] - 1)), draw(st.integers(0, shape[1] - 1))] = True
    terminated = share(0.2)
    old = normal() - 2
    batch = Batch(
        observations=normal(),
        actions=torch.arange(shape[0])[:, None].expand(shape).clone(),
        mask=mask,
        rewards=normal(),
        log_probs=old,
        values=normal(),
        next_values=normal(),
        terminated=terminated,
        done=terminated | share(0.2),
        ref_log_probs=old + 0.5 * normal(),
        group=torch.randint(0, 3, (shape[0],), generator=generator),
    )
    return World(batch, {"log_probs": old + 0.3 * normal(), "entropies": normal().abs(), "values": normal()})


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


SHARED: dict[str, st.SearchStrategy[Any]] = dict(
    clip_epsilon_high=maybe(st.floats(0.05, 0.5)), dual_clip=maybe(st.floats(1.1, 4)), entropy_coef=st.floats(0, 0.1)
)
PPOS = st.builds(
    PPO,
    n_epochs=st.just(1),
    batch_size=st.just(1000),
    gamma=st.floats(0, 1),
    gae_lambda=st.floats(0, 1),
    value_gae_lambda=maybe(st.floats(0, 1)),
    gae_lambda_per_step=maybe(st.floats(0.1, 2)),
    normalize_advantages=st.booleans(),
    value_clip_epsilon=maybe(st.floats(0.05, 1)),
    **SHARED,
)
GRPOS = st.builds(
    GRPO,
    baseline=st.sampled_from(["group_std", "group_mean", "leave_one_out"]),
    weighing=st.sampled_from(["rows", "steps", "longest"]),
    batch_size=st.just(1000),
    microbatch_tokens=st.none(),
    **SHARED,
)
KLS = maybe(st.builds(ReferenceKL, st.floats(0, 1), st.sampled_from(["k2", "k3"])))


class Learned(NamedTuple):
    """The gradient at every place, and the metrics."""

    gradients: dict[str, Tensor]
    metrics: dict[str, float]


def learned(settings: PPO | GRPO, world: World, kl: ReferenceKL | None) -> Learned:
    n_rows, length = world.batch.mask.shape
    policy = Direct((n_rows, length), critic=isinstance(settings, PPO))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            parameter.copy_(world.heads[name])
    recorder = Recorder(policy)
    more: dict[str, Any] = {} if isinstance(settings, PPO) else {"longest": 8}
    generator = torch.Generator().manual_seed(0)
    metrics = settings.update(policy, recorder, world.batch, generator, reference_kl=kl, **more)
    (gradients,) = recorder.seen
    return Learned(gradients, metrics)


def assert_same(one: Learned, other: Learned, there: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
    """The gradients of `one` are those of `other`, where `there` finds them, and so are the metrics."""
    assert one.gradients.keys() == other.gradients.keys()
    for name, gradient in one.gradients.items():
        assert gradient.isfinite().all()
        torch.testing.assert_close(there(other.gradients[name]), gradient, rtol=1e-10, atol=1e-13)
    assert other.metrics == pytest.approx(one.metrics, rel=1e-9, abs=1e-11, nan_ok=True)


@examples(80)
@given(settings=PPOS | GRPOS, world=worlds(), kl=KLS, data=st.data())
def test_the_order_of_rows_is_nothing(settings, world, kl, data):
    order = torch.tensor(data.draw(st.permutations(range(len(world.batch.mask)))))
    back = order.argsort()
    shuffled = learned(settings, world.mapped(lambda tensor: tensor[order]), kl)
    assert_same(learned(settings, world, kl), shuffled, lambda tensor: tensor[back])


@examples(80)
@given(settings=PPOS | GRPOS, world=worlds(), kl=KLS, poison=st.sampled_from(POISON), data=st.data())
def test_nothing_behind_the_mask_is_looked_at(settings, world, kl, poison, data):
    batch, hidden = world.batch, ~world.batch.mask
    fields = {
        name: getattr(batch, name).masked_fill(hidden, poison)
        for name in data.draw(
            st.sets(st.sampled_from(["rewards", "log_probs", "values", "next_values", "ref_log_probs"]))
        )
    }
    flags = {"terminated": batch.terminated ^ hidden, "done": batch.done ^ hidden} if data.draw(st.booleans()) else {}
    chosen = data.draw(st.sets(st.sampled_from(HEADS)))
    heads = {name: head.masked_fill(hidden, poison) if name in chosen else head for name, head in world.heads.items()}
    spoilt = learned(settings, World(replace(batch, **fields, **flags), heads), kl)
    plain = learned(settings, world, kl)
    assert_same(plain, spoilt)
    assert all((gradient[hidden] == 0).all() for gradient in spoilt.gradients.values())


@examples(80)
@given(settings=PPOS | GRPOS, world=worlds(), kl=KLS, poison=st.sampled_from((0.0, *POISON)), data=st.data())
def test_padding_of_columns_and_rows_is_nothing(settings, world, kl, poison, data):
    n_rows, length = world.batch.mask.shape
    places = data.draw(
        st.lists(st.integers(0, length), min_size=1, max_size=3).map(sorted)
    )  # columns go in before them
    more_rows = data.draw(st.integers(0, 2))
    columns = torch.tensor([column + sum(place <= column for place in places) for column in range(length)])

    def padded(tensor: Tensor) -> Tensor:
        filling: Any = {torch.bool: False, torch.long: 0}.get(tensor.dtype, poison)
        if tensor.ndim == 1:  # the group of each row
            return torch.cat([tensor, tensor.new_full((more_rows,), filling)])
        wide = tensor.new_full((n_rows + more_rows, length + len(places)), filling)
        wide[:n_rows, columns] = tensor
        return wide

    wide = learned(settings, world.mapped(padded), kl)
    assert_same(learned(settings, world, kl), wide, lambda tensor: tensor[:n_rows, columns])


@examples(80)
@given(settings=PPOS | GRPOS, world=worlds(), kl=KLS, rows=maybe(st.integers(1, 7)), tokens=maybe(st.integers(1, 50)))
def test_however_a_minibatch_is_cut_its_gradient_is_the_same(settings, world, kl, rows, tokens):
    assume(rows is not None or tokens is not None)
    cut = replace(settings, microbatch_size=rows, microbatch_tokens=tokens)
    assert_same(learned(settings, world, kl), learned(cut, world, kl))


# --- networks without memory, on both paths of the update ---------------------------------------------------------


def weights_after(policy_seed: int, batch: Batch, kind: str, **settings: Any) -> Tensor:
    policy: Any = PlainPolicy(kind, policy_seed)
    PPO(batch_size=1000, n_epochs=2, **settings).update(
        policy, FlatAdam(policy, learning_rate=0.01), batch, torch.Generator().manual_seed(0)
    )
    return policy.flat()


@examples(60)
@given(
    kind=st.sampled_from(["discrete", "continuous"]),
    path=st.sampled_from(["eager", "fused"]),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 9)),
    masked=st.sampled_from([0.0, 0.3, 0.9]),
    poison=st.sampled_from(POISON),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_both_paths_see_steps_alone(kind, path, shape, masked, poison, seed, data):
    batch = _make_batch(PlainPolicy(kind, seed), *shape, seed=seed, masked=masked)
    batch = replace(batch, log_probs=batch.log_probs + 0.1 * batch.rewards)  # ratios are no longer 1
    order = torch.tensor(data.draw(st.permutations(range(shape[0]))))
    other = poisoned(batch, poison)[order]
    settings = data.draw(
        st.fixed_dictionaries({"value_clip_epsilon": maybe(st.just(0.2)), "entropy_coef": st.just(0.01)})
    )
    settings |= {"update_path": path, "normalize_advantages": data.draw(st.booleans())}
    before, after = (weights_after(seed, each, kind, **settings) for each in (batch, other))
    assert after.isfinite().all()
    torch.testing.assert_close(after, before, rtol=0, atol=1e-9)


def poisoned(batch: Batch, poison: float) -> Batch:
    """All that is behind the mask, at its worst."""
    fields = {}
    for entry in dataclasses.fields(batch):
        value = getattr(batch, entry.name)
        if isinstance(value, Tensor) and entry.name != "mask":
            hidden = ~batch.mask.view(*batch.mask.shape, *[1] * (value.ndim - 2))
            filling: Any = poison if value.is_floating_point() else True if value.dtype == torch.bool else 999
            fields[entry.name] = value.masked_fill(hidden, filling)
    return replace(batch, **fields)


# --- the batch itself ---------------------------------------------------------------------------------------------


@examples(60)
@given(world=worlds(), data=st.data())
def test_steps_of_chosen_rows_are_the_chosen_steps(world, data):
    batch = world.batch
    rows = torch.tensor(data.draw(st.lists(st.integers(0, len(batch.mask) - 1), min_size=1, max_size=8)))
    steps = batch[rows].as_steps()
    number = (batch.mask.flatten().cumsum(0) - 1).view(batch.mask.shape)  # of each valid step among all of them
    chosen = batch.as_steps()[number[rows][batch.mask[rows]]]
    for entry in dataclasses.fields(Batch):
        one: Any = getattr(steps, entry.name)
        other: Any = getattr(chosen, entry.name)
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)
