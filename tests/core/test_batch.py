"""Selecting and flattening a batch, and cutting it into minibatches."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from proximo.core.batch import Batch, minibatch_indices


def numbered(mask: list[list[bool]]) -> Batch:
    """A batch in which every step knows its number (times the field's own factor)."""
    valid = torch.tensor(mask)
    number = torch.arange(valid.numel()).view(valid.shape)
    numbers = number.double()
    return Batch(
        observations=torch.stack([numbers, -numbers], -1),
        actions=number[..., None, None].expand(*valid.shape, 1, 3),
        mask=valid,
        rewards=10 * numbers,
        log_probs=20 * numbers,
        values=30 * numbers,
        next_values=40 * numbers,
        terminated=number % 2 == 0,
        done=number % 3 == 0,
        ref_log_probs=50 * numbers,
        group=torch.arange(len(valid)) // 2,
    )


MASK = [[True, False, True], [True, True, False]]


def test_valid_steps_are_counted():
    assert numbered(MASK).n_valid == 4


def test_as_steps_keeps_the_valid_ones_in_order_each_a_row_of_its_own():
    steps = numbered(MASK).as_steps()
    # 0 1 2     of which 0, 2, 3, 4 are valid
    # 3 4 5
    assert steps.mask.tolist() == [[True]] * 4
    assert steps.observations.tolist() == [[[0, 0]], [[2, -2]], [[3, -3]], [[4, -4]]]
    assert steps.actions.tolist() == [[[[n] * 3]] for n in (0, 2, 3, 4)]
    assert steps.rewards.tolist() == [[0], [20], [30], [40]]
    assert steps.log_probs.tolist() == [[0], [40], [60], [80]]
    assert steps.values.tolist() == [[0], [60], [90], [120]]
    assert steps.next_values.tolist() == [[0], [80], [120], [160]]
    assert steps.terminated.tolist() == [[True], [True], [False], [True]]
    assert steps.done.tolist() == [[True], [False], [True], [False]]
    assert steps.ref_log_probs.tolist() == [[0], [100], [150], [200]]
    assert steps.group is None


def test_rows_are_selected_in_every_field():
    batch = numbered([[True, True], [True, False], [False, True]])
    batch = dataclasses.replace(batch, hidden=torch.arange(12.0).view(3, 2, 2), forgets=batch.done)
    novel = {f"intrinsic_{name}": batch.rewards + 1.0 for name in ("rewards", "values", "next_values")}
    batch = dataclasses.replace(batch, **novel)
    chosen = batch[torch.tensor([2, 0])]
    for field in dataclasses.fields(Batch):
        whole, part = getattr(batch, field.name), getattr(chosen, field.name)
        assert torch.equal(part, torch.stack([whole[2], whole[0]]))
    assert torch.equal(batch[1:].rewards, batch.rewards[1:])


def test_several_observations_go_together_and_what_is_not_there_stays_away():
    batch = numbered(MASK)
    batch = dataclasses.replace(batch, observations={"tokens": batch.rewards, "twice": 2 * batch.rewards}, values=None)
    assert batch[1:].observations["twice"].tolist() == [[60, 80, 100]]
    assert batch[1:].values is None
    assert batch.as_steps().observations["tokens"].tolist() == [[0], [20], [30], [40]]


def test_a_field_of_another_shape_is_refused():
    batch = numbered(MASK)
    with pytest.raises(TypeCheckError, match="values"):
        dataclasses.replace(batch, values=batch.values[:, :2])
    with pytest.raises(TypeCheckError, match="done"):
        dataclasses.replace(batch, done=batch.done.double())


def cut(n_rows: int, batch_size: int, seed: int = 0) -> list[torch.Tensor]:
    return list(minibatch_indices(n_rows, batch_size, torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize(
    ("n_rows", "batch_size", "sizes"),
    [
        (256, 64, [64, 64, 64, 64]),
        (257, 64, [65, 64, 64, 64]),  # no lone 257th
        (319, 64, [64, 64, 64, 64, 63]),
        (10, 64, [10]),
        (1, 64, [1]),
        (3, 1, [1, 1, 1]),
        (65, 32, [33, 32]),
    ],
)
def test_sizes_of_minibatches(n_rows, batch_size, sizes):
    assert [len(rows) for rows in cut(n_rows, batch_size)] == sizes


@settings(max_examples=80, deadline=None)
@given(n_rows=st.integers(1, 700), batch_size=st.integers(1, 300), seed=st.integers(0, 99))
def test_every_row_is_in_exactly_one_minibatch_of_about_the_size(n_rows, batch_size, seed):
    minibatches = cut(n_rows, batch_size, seed)
    sizes = [len(rows) for rows in minibatches]
    assert sorted(torch.cat(minibatches).tolist()) == list(range(n_rows))
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= 1.5 * batch_size
    if n_rows >= batch_size:
        assert min(sizes) >= min(batch_size, n_rows) * 2 // 3
    if n_rows > 1 and batch_size > 2:
        assert min(sizes) > 1


def test_the_order_is_fresh_each_time_and_repeats_with_the_generator():
    generator = torch.Generator().manual_seed(3)
    first, second = (torch.cat(minibatch_indices(50, 10, generator)) for _ in range(2))
    assert not torch.equal(first, second)
    assert not torch.equal(first, torch.arange(50))
    again = torch.Generator().manual_seed(3)
    assert torch.equal(first, torch.cat(minibatch_indices(50, 10, again)))
    assert torch.equal(second, torch.cat(minibatch_indices(50, 10, again)))


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    cut(50, 10)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("n_rows", "batch_size"), [(0, 4), (4, 0), (-1, 4), (4, -1)])
def test_nothing_to_cut_is_refused(n_rows, batch_size):
    with pytest.raises(ValueError, match="at least 1"):
        cut(n_rows, batch_size)


def test_a_step_continues_the_one_before_it_unless_that_ended_or_was_a_reset():
    batch = dataclasses.replace(
        numbered([[True, True, True, True], [True, False, True, True]]),
        done=torch.tensor([[False, True, False, True], [False, False, False, False]]),
    )
    assert batch.continues.tolist() == [[True, True, False, True], [True, True, False, True]]
    # Where it was noted when memory was emptied, that is what counts: a lost life is an end, and is remembered.
    lives = dataclasses.replace(batch, forgets=torch.tensor([[False] * 4, [True, False, False, False]]))
    assert lives.continues.tolist() == [[True] * 4, [True, False, True, True]]


def test_rows_with_states_are_cut_into_pieces():
    batch = dataclasses.replace(numbered([[True] * 4, [True] * 4]), group=None, hidden=torch.arange(8.0).view(2, 2, 2))
    cut = batch.as_pieces()
    assert cut.rewards.tolist() == [[0, 10], [20, 30], [40, 50], [60, 70]]
    assert cut.actions.shape == (4, 2, 1, 3)
    assert cut.hidden.tolist() == [[[0, 1]], [[2, 3]], [[4, 5]], [[6, 7]]]
    assert cut.n_pieces == 1
    assert batch.as_steps().hidden is None
