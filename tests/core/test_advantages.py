"""GAE by hand, against a quadratic-time oracle, and by what must hold of it."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import Tensor

from proximo.core.advantages import gae

POISON = (math.nan, math.inf, -math.inf)


@dataclass(frozen=True)
class Rollout:
    """The arguments of `gae`, in float64."""

    rewards: Tensor
    values: Tensor
    next_values: Tensor
    terminated: Tensor
    done: Tensor
    mask: Tensor

    def advantages(self, gamma: float, gae_lambda: float) -> Tensor:
        return gae(**vars(self), gamma=gamma, gae_lambda=gae_lambda)

    def but(self, **changes: Tensor) -> Rollout:
        return dataclasses.replace(self, **changes)


def by_hand(rewards, values, next_values, *, terminated=(), truncated=(), masked=()) -> Rollout:
    """One environment; the last three arguments are the steps at which it happens."""
    steps = range(len(rewards))

    def flags(where) -> Tensor:
        return torch.tensor([[t in where for t in steps]])

    floats = (torch.tensor([list(map(float, row))], dtype=torch.float64) for row in (rewards, values, next_values))
    return Rollout(*floats, flags(terminated), flags({*terminated, *truncated}), ~flags(masked))


# --- by hand: gamma = lambda = 1/2, so the recursion carries 1/4 on ---------------------------------------


def test_a_termination_removes_the_value_of_what_comes_next():
    rollout = by_hand([1, 2, 3], [4, 8, 2], [8, 2, 99], terminated=[2])
    # delta_2 = 3 + 0     - 2 =  1    A_2 =  1
    # delta_1 = 2 + 0.5*2 - 8 = -5    A_1 = -5 + 1/4 *  1    = -4.75
    # delta_0 = 1 + 0.5*8 - 4 =  1    A_0 =  1 + 1/4 * -4.75 = -0.1875
    assert rollout.advantages(0.5, 0.5).tolist() == [[-0.1875, -4.75, 1.0]]


def test_a_truncation_keeps_the_final_value_and_cuts_the_recursion():
    rollout = by_hand([1, 2, 7], [4, 8, 10], [8, 6, 4], truncated=[1])
    # delta_2 = 7 + 0.5*4 - 10 = -1   A_2 = -1     another episode; the rollout ends before it does
    # delta_1 = 2 + 0.5*6 -  8 = -3   A_1 = -3     6 is the value of the final observation, 10 is not
    # delta_0 = 1 + 0.5*8 -  4 =  1   A_0 = 1 + 1/4 * -3 = 0.25
    assert rollout.advantages(0.5, 0.5).tolist() == [[0.25, -3.0, -1.0]]


def test_an_episode_both_terminated_and_truncated_is_terminated():
    rollout = by_hand([1, 2, 7], [4, 8, 10], [8, 6, 4], terminated=[1], truncated=[1])
    # delta_1 = 2 + 0 - 8 = -6        A_1 = -6
    # delta_0 = 1 + 4 - 4 =  1        A_0 = 1 + 1/4 * -6 = -0.5
    assert rollout.advantages(0.5, 0.5).tolist() == [[-0.5, -6.0, -1.0]]


def test_a_masked_reset_row_between_two_episodes_is_nothing():
    # As under NEXT_STEP autoreset: step 1 terminates, step 2 only resets, step 3 begins the next episode.
    rollout = by_hand([1, 2, 50, 7], [4, 8, 60, 10], [8, 6, 70, 4], terminated=[1], masked=[2])
    assert rollout.advantages(0.5, 0.5).tolist() == [[-0.5, -6.0, 0.0, -1.0]]


def test_a_masked_step_inside_an_episode_is_passed_over_without_discount():
    # delta_2 = 3 - 2 = 1, delta_0 = 1 + 0.5*8 - 4 = 1; A_0 = 1 + 1/4 * 1, not 1 + 1/16
    rollout = by_hand([1, 50, 3], [4, 60, 2], [8, 70, 99], terminated=[2], masked=[1])
    assert rollout.advantages(0.5, 0.5).tolist() == [[1.25, 0.0, 1.0]]


def test_environments_do_not_touch_each_other():
    one = by_hand([1, 2, 3], [4, 8, 2], [8, 2, 99], terminated=[2])
    other = by_hand([1, 2, 7], [4, 8, 10], [8, 6, 4], truncated=[1])
    both = Rollout(*(torch.cat(pair) for pair in zip(vars(one).values(), vars(other).values(), strict=True)))
    assert both.advantages(0.5, 0.5).tolist() == [[-0.1875, -4.75, 1.0], [0.25, -3.0, -1.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision_is_that_of_the_arguments(dtype):
    ones, no = torch.ones(1, 3, dtype=dtype), torch.zeros(1, 3, dtype=torch.bool)
    result = gae(ones, 0 * ones, 0 * ones, no, no, ~no, gamma=0.99, gae_lambda=0.95)
    # 0.99 * 0.95 = 0.9405; 1 + 0.9405 + 0.9405^2 = 2.82504025
    assert result.dtype == dtype
    assert result[0].tolist() == pytest.approx([2.82504025, 1.9405, 1.0], rel=4 * torch.finfo(dtype).eps)


def test_reward_one_for_ever_cut_at_every_hundredth_step_is_worth_one_over_one_minus_gamma():
    # At V = 1 / (1 - gamma) nothing is left to learn, time limits or not; had they been taken for
    # terminations, each last step would show an advantage of -gamma * V = -99.
    n_steps, value = 250, torch.full((1, 250), 100.0, dtype=torch.float64)
    no = torch.zeros(1, n_steps, dtype=torch.bool)
    cut = (torch.arange(n_steps) % 100 == 99)[None]
    result = gae(torch.ones_like(value), value, value, no, cut, ~no, gamma=0.99, gae_lambda=0.95)
    assert result.abs().max() < 1e-11


def test_a_value_jump_on_the_last_step_is_seen():
    # V(s_T) = 10 at the true final observation, V(s_t) = 0 before it: delta = 0 + 1 * 10 - 0.
    rollout = by_hand([0, 0], [0, 0], [0, 10], truncated=[1])
    assert rollout.advantages(1.0, 1.0).tolist() == [[10.0, 10.0]]


# --- any rollout --------------------------------------------------------------------------------------------

EVENTS = ("step", "step", "step", "terminated", "truncated", "both", "masked")


@st.composite
def rollouts(draw, *, consistent: bool = False) -> Rollout:
    """Any mixture of events; at masked steps the flags are arbitrary.

    `consistent`: where an episode goes on, `next_values` is the value at the next valid step.
    """
    n_envs, n_steps = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    row = st.lists(st.sampled_from(EVENTS), min_size=n_steps, max_size=n_steps)
    events = [draw(row) for _ in range(n_envs)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rewards, values, next_values = torch.randn(3, n_envs, n_steps, generator=generator, dtype=torch.float64) * 3
    noise = torch.rand(2, n_envs, n_steps, generator=generator) < 0.5

    def where(*names: str) -> Tensor:
        return torch.tensor([[event in names for event in row] for row in events])

    mask = ~where("masked")
    terminated = torch.where(mask, where("terminated", "both"), noise[0])
    done = torch.where(mask, where("terminated", "truncated", "both"), noise[0] | noise[1])
    if consistent:
        for b in range(n_envs):
            valid = [t for t in range(n_steps) if mask[b, t]]
            for now, following in itertools.pairwise(valid):
                if not done[b, now]:
                    next_values[b, now] = values[b, following]
    return Rollout(rewards, values, next_values, terminated, done, mask)


def steps_to_the_end(rollout: Rollout, b: int, start: int) -> list[int]:
    """The valid steps from `start` up to and including the last of its episode in the rollout."""
    steps = []
    for t in range(start, rollout.mask.shape[1]):
        if rollout.mask[b, t]:
            steps.append(t)
            if rollout.done[b, t]:
                break
    return steps


def td_error(rollout: Rollout, b: int, t: int, gamma: float) -> float:
    future = 0.0 if rollout.terminated[b, t] else float(rollout.next_values[b, t])
    return float(rollout.rewards[b, t]) + gamma * future - float(rollout.values[b, t])


def at_valid_steps(rollout: Rollout, value) -> Tensor:
    """`value(b, t)` at every valid step, 0 elsewhere."""
    result = torch.zeros_like(rollout.rewards)
    for b, t in rollout.mask.nonzero().tolist():
        result[b, t] = value(b, t)
    return result


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


unit = st.floats(0.0, 1.0)
many = settings(max_examples=60, deadline=None)


@many
@given(rollout=rollouts(), gamma=unit, gae_lambda=unit)
def test_it_is_the_discounted_sum_of_td_errors_to_the_end_of_the_episode(rollout, gamma, gae_lambda):
    def total(b: int, t: int) -> float:
        steps = steps_to_the_end(rollout, b, t)
        return sum((gamma * gae_lambda) ** k * td_error(rollout, b, s, gamma) for k, s in enumerate(steps))

    assert_same(rollout.advantages(gamma, gae_lambda), at_valid_steps(rollout, total))


@many
@given(rollout=rollouts(consistent=True), gamma=unit, gae_lambda=unit)
def test_it_is_the_mixture_of_n_step_advantages(rollout, gamma, gae_lambda):
    # Schulman et al. 2016, eq. 16: (1 - lambda) * sum lambda^(n-1) A^(n), the last one with all the rest.
    def mixture(b: int, t: int) -> float:
        steps = steps_to_the_end(rollout, b, t)
        n_step = []
        gathered = 0.0
        for k, s in enumerate(steps):
            gathered += gamma**k * float(rollout.rewards[b, s])
            future = 0.0 if rollout.terminated[b, s] else float(rollout.next_values[b, s])
            n_step.append(gathered + gamma ** (k + 1) * future - float(rollout.values[b, t]))
        early = sum((1 - gae_lambda) * gae_lambda**k * a for k, a in enumerate(n_step[:-1]))
        return early + gae_lambda ** (len(n_step) - 1) * n_step[-1]

    assert_same(rollout.advantages(gamma, gae_lambda), at_valid_steps(rollout, mixture))


@many
@given(rollout=rollouts(), gamma=unit)
def test_lambda_zero_is_the_one_step_td_error(rollout, gamma):
    expected = at_valid_steps(rollout, lambda b, t: td_error(rollout, b, t, gamma))
    assert_same(rollout.advantages(gamma, 0.0), expected)


@many
@given(rollout=rollouts(consistent=True), gamma=unit)
def test_lambda_one_is_monte_carlo_minus_value(rollout, gamma):
    def monte_carlo(b: int, t: int) -> float:
        steps = steps_to_the_end(rollout, b, t)
        rewards = sum(gamma**k * float(rollout.rewards[b, s]) for k, s in enumerate(steps))
        last = steps[-1]
        tail = 0.0 if rollout.terminated[b, last] else float(rollout.next_values[b, last])
        return rewards + gamma ** len(steps) * tail - float(rollout.values[b, t])

    assert_same(rollout.advantages(gamma, 1.0), at_valid_steps(rollout, monte_carlo))


@many
@given(rollout=rollouts(), gamma=unit, gae_lambda=unit, data=st.data())
def test_nothing_leaks_over_the_end_of_an_episode(rollout, gamma, gae_lambda, data):
    ends = (rollout.done & rollout.mask).nonzero().tolist()
    if not ends:
        return
    b, end = data.draw(st.sampled_from(ends))
    poison = data.draw(st.sampled_from((*POISON, 1e9)))
    later = torch.zeros_like(rollout.mask)
    later[b, end + 1 :] = True
    changed = rollout.but(
        rewards=rollout.rewards.masked_fill(later, poison),
        values=rollout.values.masked_fill(later, poison),
        next_values=rollout.next_values.masked_fill(later, poison),
        terminated=rollout.terminated ^ later,
        mask=rollout.mask | later,
    )
    before, after = rollout.advantages(gamma, gae_lambda), changed.advantages(gamma, gae_lambda)
    assert torch.equal(before[~later], after[~later])


@many
@given(rollout=rollouts(), gamma=unit, gae_lambda=unit, poison=st.sampled_from(POISON))
def test_a_terminated_step_ignores_what_stands_in_next_values(rollout, gamma, gae_lambda, poison):
    poisoned = rollout.but(next_values=rollout.next_values.masked_fill(rollout.terminated, poison))
    assert torch.equal(rollout.advantages(gamma, gae_lambda), poisoned.advantages(gamma, gae_lambda))


@many
@given(rollout=rollouts(), gamma=unit, gae_lambda=unit, poison=st.sampled_from(POISON))
def test_what_stands_at_masked_steps_reaches_nothing(rollout, gamma, gae_lambda, poison):
    floats = ("rewards", "values", "next_values")
    poisoned = rollout.but(
        **{name: getattr(rollout, name).masked_fill(~rollout.mask, poison) for name in floats},
        terminated=rollout.terminated ^ ~rollout.mask,
        done=rollout.done ^ ~rollout.mask,
    )
    result = poisoned.advantages(gamma, gae_lambda)
    assert torch.equal(rollout.advantages(gamma, gae_lambda), result)
    assert (result[~rollout.mask] == 0).all()


@many
@given(rollout=rollouts(), gamma=unit, gae_lambda=unit, data=st.data())
def test_padding_anywhere_and_the_order_of_environments_change_nothing(rollout, gamma, gae_lambda, data):
    n_envs, n_steps = rollout.mask.shape
    order = torch.tensor(data.draw(st.permutations(range(n_envs))))
    # Where each step goes when `n_padding` masked ones are strewn between them.
    n_padding = data.draw(st.integers(0, 5))
    places = st.permutations(range(n_steps + n_padding)).map(lambda p: sorted(p[:n_steps]))
    places = torch.tensor(data.draw(places))

    def padded(name: str, tensor: Tensor) -> Tensor:
        fill = {"mask": False, "terminated": True, "done": True}.get(name, math.nan)
        wide = torch.full((n_envs, n_steps + n_padding), fill, dtype=tensor.dtype)
        wide[:, places] = tensor[order]
        return wide

    moved = Rollout(**{name: padded(name, tensor) for name, tensor in vars(rollout).items()})
    expected = rollout.advantages(gamma, gae_lambda)[order]
    assert torch.equal(moved.advantages(gamma, gae_lambda)[:, places], expected)


# --- the run-time checks of shapes and types are on --------------------------------------------------------


def test_a_wrong_shape_is_refused():
    rollout = by_hand([1, 2, 3], [4, 8, 2], [8, 2, 99])
    with pytest.raises(TypeCheckError, match="values"):
        rollout.but(values=rollout.values[:, :2]).advantages(0.5, 0.5)


def test_a_float_for_a_mask_is_refused():
    rollout = by_hand([1, 2, 3], [4, 8, 2], [8, 2, 99])
    with pytest.raises(TypeCheckError, match="mask"):
        rollout.but(mask=rollout.mask.double()).advantages(0.5, 0.5)
