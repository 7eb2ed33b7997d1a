"""A chain of states small enough that everything about it is known: values, advantages, and what GAE makes of them.

A walker in one of `N_STATES` places chooses left or right and goes where it wanted to with probability `OBEYS`, else
the other way. Beyond the right end it gets 1, beyond the left end nothing, and both end the episode. Every reward
carries noise. The policy is fixed: right with probability `RIGHT`, everywhere.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

N_STATES, OBEYS, RIGHT, GAMMA, NOISE = 9, 0.8, 0.6, 0.97, 0.1
POLICY = np.array([1.0 - RIGHT, RIGHT])


class Chain(NamedTuple):
    """Places `[S + 2]`, of which the last two are the ends beyond left and right: they have value 0, for ever.

    `transitions` `[S, A, S + 2]`; `rewards` `[S + 2]`, on average, for coming to a place.
    """

    transitions: np.ndarray
    rewards: np.ndarray


def the_chain() -> Chain:
    left_end, right_end = N_STATES, N_STATES + 1
    transitions = np.zeros((N_STATES, 2, N_STATES + 2))
    for state in range(N_STATES):
        lower = state - 1 if state > 0 else left_end
        upper = state + 1 if state < N_STATES - 1 else right_end
        for action, (wanted, other) in enumerate(((lower, upper), (upper, lower))):
            transitions[state, action, wanted] += OBEYS
            transitions[state, action, other] += 1.0 - OBEYS
    rewards = np.zeros(N_STATES + 2)
    rewards[right_end] = 1.0
    return Chain(transitions, rewards)


def true_values(chain: Chain) -> np.ndarray:
    """Solve `v = r + gamma P v` for the policy; `[S + 2]`, the ends have 0."""
    by_policy = np.einsum("a,sat->st", POLICY, chain.transitions)
    inner = by_policy[:, :N_STATES]
    values = np.linalg.solve(np.eye(N_STATES) - GAMMA * inner, by_policy @ chain.rewards)
    return np.append(values, [0.0, 0.0])


def true_advantages(chain: Chain) -> np.ndarray:
    """`q - v`, `[S, A]`."""
    values = true_values(chain)
    return chain.transitions @ (chain.rewards + GAMMA * values) - values[:N_STATES, None]


def critic_with_errors(chain: Chain, size: float, seed: int) -> np.ndarray:
    """Return the true values plus errors whose standard deviation is `size` times that of the values; `[S + 2]`."""
    values = true_values(chain)
    errors = np.random.default_rng(seed).standard_normal(N_STATES)
    errors *= size * values[:N_STATES].std() / errors.std()
    values[:N_STATES] += errors
    return values


class Moments(NamedTuple):
    """Mean and variance of an estimated advantage, by state and action `[S, A]`."""

    mean: np.ndarray
    variance: np.ndarray


def exact_moments(chain: Chain, critic: np.ndarray, gae_lambda: float) -> Moments:
    """Mean and variance of GAE's estimate at the first step, without sampling.

    With X the estimate at a step, `X = delta + c X'` and `c = gamma lambda`: both moments solve a linear system over
    the states, `m = E[delta] + c P m` and `M = E[delta^2] + 2 c E[delta m'] + c^2 P M`.
    """
    carry = GAMMA * gae_lambda
    delta = chain.rewards + GAMMA * critic - critic[:N_STATES, None]  # [S, S + 2]
    by_policy = np.einsum("a,sat->st", POLICY, chain.transitions)
    inner = by_policy[:, :N_STATES]

    first = np.einsum("sat,st->sa", chain.transitions, delta)
    mean = np.append(np.linalg.solve(np.eye(N_STATES) - carry * inner, first @ POLICY), [0.0, 0.0])
    mean_of_pairs = first + carry * chain.transitions @ mean

    second = np.einsum("sat,st->sa", chain.transitions, delta**2 + 2.0 * carry * delta * mean) + NOISE**2
    square = np.append(np.linalg.solve(np.eye(N_STATES) - carry**2 * inner, second @ POLICY), [0.0, 0.0])
    square_of_pairs = second + carry**2 * chain.transitions @ square
    return Moments(mean_of_pairs, square_of_pairs - mean_of_pairs**2)


class Walks(NamedTuple):
    """Sampled episodes `[N, T]`: places before and after each step, rewards, ends, and what is part of an episode."""

    before: np.ndarray
    after: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    mask: np.ndarray


def sample_walks(chain: Chain, state: int, action: int, n: int, length: int, generator: np.random.Generator) -> Walks:
    """`n` episodes that begin with this action in this state and follow the policy; cut off after `length` steps."""
    thresholds = chain.transitions.cumsum(2)
    shape = (n, length)
    before, after = np.zeros(shape, int), np.zeros(shape, int)
    place, running = np.full(n, state), np.ones(n, bool)
    mask = np.zeros(shape, bool)
    for t in range(length):
        actions = np.full(n, action) if t == 0 else (generator.random(n) < RIGHT).astype(int)
        inside = np.where(running, place, 0)
        chance = generator.random(n)
        following = (chance[:, None] > thresholds[inside, actions]).sum(1).clip(max=N_STATES + 1)
        before[:, t], after[:, t], mask[:, t] = inside, np.where(running, following, 0), running
        place = following
        running = running & (following < N_STATES)
    rewards = chain.rewards[after] + NOISE * generator.standard_normal(shape)
    return Walks(before, after, np.where(mask, rewards, 0.0), mask & (after >= N_STATES), mask)


def bias_between_actions(bias: np.ndarray) -> np.ndarray:
    """The part of a bias `[S, A]` that differs between the actions of a state: the rest cannot turn a gradient."""
    return bias - (bias @ POLICY)[:, None]


def mean_over_pairs(x: np.ndarray) -> float:
    """Mean over states of the mean over the policy's actions, of `[S, A]`."""
    return float((x @ POLICY).mean())
