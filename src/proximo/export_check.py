"""Whether an exported file does what its policy does: observations to try it on, and how far the two are apart.

The yardstick is the policy as people call it (`policy(observation)`, `policy.value`), which goes another way to the
networks than the graph that was exported, through packed rows, NumPy and float64. Differences are

- of continuous actions: in half ranges of a bounded action, else in parts of the action where it is above 1;
- of choices: 0 where they are the same, else how much less likely, in nats, the file's choice is for the policy;
- of values: in scaled reward units, or in parts of the value where that is above 1;
- of what is remembered: in itself, or in parts of it where that is above 1.

The policy itself is not exact to 1e-6 everywhere: sums of large terms are rounded, and another order of summation
rounds them otherwise. `rounding` measures that, by weights that are wrong in their last bit.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces

from proximo.errors import UserError, in_words
from proximo.models.control import ActorCritic
from proximo.models.graph import PolicyGraph, Port
from proximo.models.packing import MASK_KEY, Leaf, PackedActions, PackedObservations, rebuilt

TOLERANCE = 1e-6
"""By how much an exported file may differ from its policy, where float32 does not leave more open."""

ROUNDINGS = 4.0
"""How many times the policy's own rounding may differ: sums in another order add up other errors, in every layer."""

MOST_OBSERVATIONS = 256
"""Drawn from the space, and again from episodes; fewer where one is large."""

Arrays = dict[str, np.ndarray]
"""Arrays with one leading dimension by the names of a graph's inputs or outputs."""


@dataclass(frozen=True)
class Given:
    """N observations, as the file takes them and as the policy does."""

    inputs: Arrays
    observation: Any
    """Of the environment's space, every array in it with a leading N."""
    action_mask: np.ndarray | None
    """Where the environment tells it in its `info`."""
    memory: np.ndarray | None = None
    """Of policies that remember."""

    @property
    def asides(self) -> dict[str, Any]:
        """What `policy.value` takes beside observations."""
        return {} if self.memory is None else {"memory": self.memory}


def observations_drawn(graph: PolicyGraph, n: int, seed: int) -> Arrays:
    """`n` observations from the space; in turn such as the normalizer has seen, where there is one.

    Of what has no bounds, they are normal numbers, three times as wide.
    """
    random = np.random.default_rng(seed)
    columns = graph.columns
    drawn = {}
    for port in graph.inputs:
        if port.role == "action_mask":
            drawn[port.name] = _masks(graph.policy, random, n).reshape(n, *port.shape).astype(port.dtype)
        elif port.role == "memory":
            drawn[port.name] = (0.5 * random.standard_normal((n, *port.shape))).astype(port.dtype)
        elif isinstance(port.space, spaces.Box) and np.issubdtype(port.dtype, np.floating):
            drawn[port.name] = _numbers(graph, port, columns.get(port.name), random, n).astype(port.dtype)
        else:
            assert port.space is not None
            port.space.seed(seed)
            drawn[port.name] = np.stack([port.space.sample() for _ in range(n)]).astype(port.dtype)
    return drawn


def _numbers(graph: PolicyGraph, port: Port, columns: slice | None, random: np.random.Generator, n: int) -> np.ndarray:
    """Floats of a Box, `[n, *shape]`."""
    assert isinstance(port.space, spaces.Box)
    low, high = port.space.low.astype(np.float64), port.space.high.astype(np.float64)
    bounded = (np.abs(low) < 1e8) & (np.abs(high) < 1e8)  # some write the largest float for infinity
    normal = random.standard_normal((n, *port.shape))
    # What is not bounded is drawn around 0, or around the bound that 0 is beyond.
    around = np.clip(0.0, low, high) + 3.0 * normal
    uniform = random.uniform(np.where(bounded, low, 0.0), np.where(bounded, high, 1.0), (n, *port.shape))
    values = np.where(bounded, uniform, around)
    policy = graph.policy
    if policy.config.normalize_observations and columns is not None:
        mean = policy.observation_mean[columns].numpy().reshape(port.shape)
        std = policy.observation_variance[columns].sqrt().numpy().reshape(port.shape)
        values[::2] = (mean + 2.0 * std * normal)[::2]
    return np.clip(values, low, high)


def _masks(policy: ActorCritic, random: np.random.Generator, n: int) -> np.ndarray:
    """Masks `[n, options]` in which half is possible, and at least one option of each choice."""
    space = policy.observation_space
    assert isinstance(space, PackedObservations)
    pieces = []
    for size in space.options:
        piece = random.random((n, size)) < 0.5
        piece[np.arange(n), random.integers(size, size=n)] = True
        pieces.append(piece)
    return np.concatenate(pieces, 1)


def observations_played(graph: PolicyGraph, env: gym.Env, n: int, seed: int) -> Arrays:
    """`n` observations of an environment, as they come while the policy acts in it.

    Raises:
        UserError: if the environment raises, or returns what the policy cannot take.
    """
    rows: dict[str, list[np.ndarray]] = {port.name: [] for port in graph.inputs}
    policy, is_told = graph.policy, any(_is_told(port) for port in graph.inputs)
    try:
        observation, info = env.reset(seed=seed)
        memory = policy.fresh_memory()
        for _ in range(n):
            mask = info.get(MASK_KEY) if is_told else None
            for port in graph.inputs:
                value = memory if port.role == "memory" else mask if _is_told(port) else _part(port, observation)
                rows[port.name].append(np.array(value, port.dtype).reshape(port.shape))
            if policy.has_memory:
                action, memory = policy(observation, action_mask=mask, memory=memory)
            else:
                action = policy(observation, action_mask=mask)
            observation, _, terminated, truncated, info = env.step(action)
            if terminated or truncated:
                (observation, info), memory = env.reset(), policy.fresh_memory()
    except Exception as error:  # whatever an environment raises
        raise UserError(f"no episode could be played: {in_words(error)}") from error
    return {name: np.stack(values) for name, values in rows.items()}


def _part(port: Port, observation: Any) -> Any:
    return Leaf(port.path, spaces.Space()).of(observation, "observation")


def _is_told(port: Port) -> bool:
    """Whether this is a mask that comes in `info`."""
    return port.role == "action_mask" and port.space is None


def joined(graph: PolicyGraph, *several: Arrays) -> Given:
    """Observations one after the other, as the file and as the policy take them."""
    inputs = {port.name: np.concatenate([arrays[port.name] for arrays in several]) for port in graph.inputs}
    told = [inputs[port.name] for port in graph.inputs if _is_told(port)]
    space = graph.policy.observation_space
    source = space.source if isinstance(space, PackedObservations) else space
    memory = [inputs[port.name] for port in graph.inputs if port.role == "memory"]
    parts = {port.path: inputs[port.name] for port in graph.inputs if port.space is not None}
    return Given(inputs, rebuilt(source, parts, ()), told[0] if told else None, memory[0] if memory else None)


def how_many(graph: PolicyGraph) -> int:
    """Of how many observations each of the two kinds should be: 256, or 32 MiB of floats."""
    size = 4 * sum(math.prod(port.shape) for port in graph.inputs)
    return max(8, min(MOST_OBSERVATIONS, 2**25 // size))


# --- apart ----------------------------------------------------------------------------------------------------------


def answers(graph: PolicyGraph, policy: ActorCritic, given: Given) -> Arrays:
    """What a policy does at observations, by the names of the graph's outputs."""
    actions = policy(given.observation, action_mask=given.action_mask, **given.asides)
    remembered = {}
    if given.memory is not None:
        actions, memory = actions
        remembered = {graph.outputs[-1].name: memory}
    found = {port.name: np.asarray(Leaf(port.path, spaces.Space()).of(actions, "action")) for port in graph.actions}
    return found | {graph.value.name: policy.value(given.observation, **given.asides)} | remembered


def differences(graph: PolicyGraph, given: Given, wanted: Arrays, found: Arrays) -> dict[str, np.ndarray]:
    """How far `found` is from the policy's `wanted`, by output, `[N]`; see the top of this file.

    Raises:
        UserError: if an output is missing, or of another shape or dtype.
    """
    _check_kinds(graph, wanted, found)
    apart = {}
    for port, half in zip(graph.actions, graph.policy.head.half_ranges, strict=True):
        if half is not None:
            apart[port.name] = _worst(wanted[port.name], found[port.name], _scale(half, wanted[port.name]))
        else:
            apart[port.name] = _less_likely(graph, given, wanted, port, found[port.name])
    return apart | _others_apart(graph, wanted, found)


def rounding(graph: PolicyGraph, given: Given, wanted: Arrays) -> dict[str, float]:
    """How far the policy is from itself with weights that are wrong in the last bit of float32, by output."""
    nudged = _nudged(graph.policy)
    apart = {}
    moved = answers(graph, nudged, given)
    for port, half in zip(graph.actions, graph.policy.head.half_ranges, strict=True):
        if half is not None:
            scale = _scale(half, wanted[port.name])
            apart[port.name] = float(_worst(wanted[port.name], moved[port.name], scale).max())
        else:
            likely = [_log_probs(graph, each, given, wanted) for each in (graph.policy, nudged)]
            apart[port.name] = float(np.abs(likely[0] - likely[1]).max())
    return apart | {name: float(far.max()) for name, far in _others_apart(graph, wanted, moved).items()}


def _others_apart(graph: PolicyGraph, wanted: Arrays, found: Arrays) -> Arrays:
    """The differences of what is no action."""
    apart = {}
    for port in graph.outputs:
        if port.role in ("value", "memory"):
            unit = graph.policy.reward_scale if port.role == "value" else 1.0
            want = wanted[port.name]
            apart[port.name] = _worst(want, found[port.name], np.maximum(unit, np.abs(want)))
    return apart


def _check_kinds(graph: PolicyGraph, wanted: Arrays, found: Arrays) -> None:
    for port in graph.outputs:
        want, got = wanted[port.name], found.get(port.name)
        if got is None or got.shape != want.shape or got.dtype != port.dtype:
            what = "nothing" if got is None else f"{got.dtype} of shape {got.shape}"
            raise UserError(f"its output {port.name!r} is {what}, not {port.dtype} of shape {want.shape}")


def _scale(half: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """What a difference of 1 is for each number of actions `[N, *A]`: half a range, or the action itself."""
    half = half.reshape(actions.shape[1:])
    scale = np.where(np.isnan(half), np.maximum(1.0, np.abs(actions.astype(np.float64))), half)
    # What the action's own kind of number cannot tell apart is no difference.
    return np.maximum(scale, 2.0 * np.spacing(np.abs(actions)).astype(np.float64) / TOLERANCE)


def _worst(wanted: np.ndarray, found: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The largest difference of each row; what is no number is infinitely far away."""
    apart = np.abs(wanted.astype(np.float64) - found.astype(np.float64)) / scale
    apart = np.where(wanted == found, 0.0, np.where(np.isnan(apart), np.inf, apart))
    return apart.reshape(len(apart), -1).max(1)


def _less_likely(graph: PolicyGraph, given: Given, wanted: Arrays, port: Port, found: np.ndarray) -> np.ndarray:
    """By how many nats the file's choices are less likely than the policy's, `[N]`; infinite for impossible ones."""
    same = (wanted[port.name] == found).reshape(len(found), -1).all(1)
    if same.all():
        return np.zeros(len(found))
    try:
        theirs = _log_probs(graph, graph.policy, given, wanted | {port.name: found})
    except ValueError:  # a choice that there is not
        return np.where(same, 0.0, np.inf)
    gap = _log_probs(graph, graph.policy, given, wanted) - theirs
    return np.where(same, 0.0, np.maximum(gap, 0.0))


def _log_probs(graph: PolicyGraph, policy: ActorCritic, given: Given, actions: Arrays) -> np.ndarray:
    space = policy.action_space
    source = space.source if isinstance(space, PackedActions) else space
    action = rebuilt(source, {port.path: actions[port.name] for port in graph.actions}, ())
    return policy.log_prob(given.observation, action, action_mask=given.action_mask, **given.asides).astype(np.float64)


def _nudged(policy: ActorCritic) -> ActorCritic:
    """A copy whose every weight is larger or smaller by a 2^-23 of itself."""
    copied = copy.deepcopy(policy)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in copied.parameters():
            sign = torch.randint(0, 2, weight.shape, generator=generator) * 2 - 1
            weight.mul_(1.0 + sign * 2.0**-23)
    return copied
