"""Acting during a rollout: in NumPy for small perceptrons on the CPU, in torch for everything else.

Torch takes several times as long as NumPy to dispatch what one observation asks of a small network
(docs/performance.md). The weights are the same memory, so nothing is copied when they change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from proximo.collect.envs import Step
from proximo.collect.gsde import SteadyNoise
from proximo.core.batch import Batch
from proximo.core.distributions import Categorical, DiagonalGaussian
from proximo.models.control import Acted, ActorCritic

MOST_WEIGHTS = 300_000
"""Weights of an actor up to which NumPy acts; beyond, arithmetic outweighs dispatch."""


_AT_ONCE = 8192
"""Observations that the critic sees at a time, so that a long rollout needs no more memory than itself."""


MakeNetwork = Callable[[ActorCritic, nn.Sequential], Callable[[np.ndarray], np.ndarray]]
"""The actor or the critic of a policy as a function of raw observations."""


class Acting(Protocol):
    """Chooses the actions of one rollout, and remembers how."""

    def act(self, t: int, observations: np.ndarray) -> np.ndarray:
        """Sample at raw `observations` `[N, *O]`; return a fresh array of actions that the environment accepts."""
        ...

    def acted(self, observations: np.ndarray, others: np.ndarray) -> tuple[Acted, Tensor]:
        """Everything sampled, `[N, T, ...]`, at the `observations` `[T, N, *O]`; and the values `[M]` of `others`."""
        ...


def acting(
    policy: ActorCritic,
    n_envs: int,
    length: int,
    generator: torch.Generator,
    network: MakeNetwork | None = None,
    memory: Remembered | None = None,
    noise: SteadyNoise | None = None,
) -> Acting:
    """The way of acting that fits the policy; its weights must not change before `acted` is called.

    `network` makes the actor of a small perceptron; by default it is a `NumpyNetwork`. `memory` is for a policy that
    remembers, `noise` what gsde acts with; without it each step has matrices of its own.
    """
    if can_act_in_numpy(policy):
        return _NumpyActing(policy, n_envs, length, generator, network or NumpyNetwork)
    return _TorchActing(policy, generator, memory, noise)


class Remembered:
    """What a policy remembers in each environment while a rollout goes on, and what of it learning needs."""

    def __init__(self, state: np.ndarray, piece: int) -> None:
        """Go on in place from `state` `[N, S]`; note it down at the start of every `piece` steps."""
        self.state = torch.from_numpy(state)
        self._piece = piece
        self._starts: list[Tensor] = []
        self._finals: list[Tensor] = []
        self._forgets: list[np.ndarray] = []

    def before(self, t: int) -> None:
        """Step `t` is about to be chosen."""
        if t % self._piece == 0:
            self._starts.append(self.state.clone())

    def after(self, step: Step, goes_on: np.ndarray | None) -> None:
        """A new episode begins where one ended, and after a step that was a reset alone; not where a life was lost."""
        ends = step.terminated | step.truncated
        forgets = ends | ~step.valid
        if goes_on is not None:
            forgets = forgets & ~(goes_on & step.valid)
        if ends.any() or not step.valid.all():
            self._finals += [self.state[i].clone() for i in (ends & step.valid).nonzero()[0]]
            self.state[torch.from_numpy(forgets)] = 0.0
        self._forgets.append(forgets)

    def noted(self, batch: Batch, device: torch.device) -> Batch:
        """The batch of the rollout with what learning needs of this."""
        forgets = torch.from_numpy(np.stack(self._forgets, 1)).to(device)
        return replace(batch, hidden=self.starts.to(device), forgets=forgets)

    @property
    def starts(self) -> Tensor:
        """`[N, K, S]`: before each piece."""
        return torch.stack(self._starts, 1)

    @property
    def at_others(self) -> Tensor:
        """`[N + M, S]`: now, and before the last observation of each of the M episodes that ended, in order."""
        return torch.cat([self.state, *(row.unsqueeze(0) for row in self._finals)])


def can_act_in_numpy(policy: ActorCritic) -> bool:
    """Whether the actor is a small perceptron in single precision on the CPU."""
    if not policy.is_plain:
        return False
    layers = policy.layers(policy.actor)
    n_weights = sum(weight.numel() for weight, _ in layers)
    first = layers[0][0]
    return first.device.type == "cpu" and first.dtype == torch.float32 and n_weights <= MOST_WEIGHTS


class NumpyNetwork:
    """The actor or the critic of a policy on views of its weights: raw observations in, its outputs out.

    The normalizer is read once, here: make a new one after it has changed.
    """

    def __init__(self, policy: ActorCritic, network: nn.Sequential) -> None:
        """Look at the weights."""
        self._layers = [(weight.detach().numpy().T, bias.detach().numpy()) for weight, bias in policy.layers(network)]
        self._is_tanh = policy.config.activation == "tanh"
        self._shift_scale = None
        if policy.config.normalize_observations:
            self._shift_scale = tuple(tensor.numpy() for tensor in policy.normalization())
            self._limit = np.float32(policy.config.clip_observation)

    def __call__(self, observations: np.ndarray) -> np.ndarray:
        """Logits, means or values `[N, K]` at raw `observations` `[N, *O]`."""
        x = observations.reshape(len(observations), -1)
        if x.dtype != np.float32:
            x = x.astype(np.float32)
        if self._shift_scale is not None:
            shift, scale = self._shift_scale
            x = x - shift
            x *= scale
            np.minimum(np.maximum(x, -self._limit, out=x), self._limit, out=x)
        for weight, bias in self._layers[:-1]:
            x = x @ weight
            x += bias
            if self._is_tanh:
                np.tanh(x, out=x)
            else:
                np.maximum(x, 0, out=x)
        weight, bias = self._layers[-1]
        x = x @ weight
        x += bias
        return x


def for_environment(policy: ActorCritic) -> Callable[[np.ndarray], np.ndarray]:
    """`ActorCritic.to_environment` for arrays, with nothing looked up twice."""
    space = policy.action_space
    if isinstance(space, spaces.Discrete):
        start = int(space.start)
        return (lambda actions: actions + start) if start else np.copy
    assert isinstance(space, spaces.Box)
    shape, dtype, low, high = space.shape, space.dtype, space.low, space.high
    offset, scale = policy.action_map
    is_identity = bool((offset == 0).all() and (scale == 1).all())

    def convert(actions: np.ndarray) -> np.ndarray:
        actions = actions.reshape(-1, *shape)
        if not is_identity:
            actions = actions * scale + offset
        return np.minimum(np.maximum(actions, low), high).astype(dtype, copy=False)

    return convert


class _NumpyActing:
    """Draws the rollout's noise at once; what the environments do not wait for is left to the end."""

    def __init__(
        self, policy: ActorCritic, n_envs: int, length: int, generator: torch.Generator, network: MakeNetwork
    ) -> None:
        self._policy = policy
        self._actor = network(policy, policy.actor)
        self._convert = for_environment(policy)
        n_outputs = policy.layers(policy.actor)[-1][0].shape[0]
        self._parameters = np.empty((length, n_envs, n_outputs), np.float32)
        noise = torch.empty(length, n_envs, n_outputs)
        self._is_discrete = policy.log_std is None
        if policy.log_std is None:
            self._actions = np.empty((length, n_envs), np.int64)
            self._noise = Categorical.gumbel(noise, generator).numpy()
        else:
            self._actions = np.empty((length, n_envs, n_outputs), np.float32)
            self._noise = (noise.normal_(generator=generator) * policy.log_std.detach().exp()).numpy()

    def act(self, t: int, observations: np.ndarray) -> np.ndarray:
        parameters = self._parameters[t]
        parameters[...] = self._actor(observations)
        if self._is_discrete:
            actions = (parameters + self._noise[t]).argmax(1, out=self._actions[t])
        else:
            actions = np.add(parameters, self._noise[t], out=self._actions[t])
        return self._convert(actions)

    def acted(self, observations: np.ndarray, others: np.ndarray) -> tuple[Acted, Tensor]:
        parameters = torch.from_numpy(self._parameters)
        actions = torch.from_numpy(self._actions)
        with torch.no_grad():
            log_std = self._policy.log_std
            distribution = Categorical(parameters) if log_std is None else DiagonalGaussian(parameters, log_std)
            log_probs = distribution.log_prob(actions)
        critic = NumpyNetwork(self._policy, self._policy.critic)
        flat = observations.reshape(-1, *observations.shape[2:])
        pieces = [critic(flat[first : first + _AT_ONCE]) for first in range(0, len(flat), _AT_ONCE)]
        values = torch.from_numpy(np.concatenate(pieces)).view(log_probs.shape)
        columns = (actions, log_probs, values)
        rest = torch.from_numpy(critic(others)).squeeze(1)
        return Acted(*(column.transpose(0, 1).contiguous() for column in columns)), rest


class _TorchActing:
    def __init__(
        self, policy: ActorCritic, generator: torch.Generator, memory: Remembered | None, noise: SteadyNoise | None
    ) -> None:
        self._policy = policy
        self._generator = generator
        self._noise = noise
        self._device = generator.device
        self._memory = memory
        self._acted: list[Acted] = []

    def act(self, t: int, observations: np.ndarray) -> np.ndarray:
        rows = torch.from_numpy(observations).to(self._device)
        noise = None if self._noise is None else self._noise.next().to(self._device)
        if self._memory is None:
            acted = self._policy.act(rows, self._generator, noise=noise)
        else:
            self._memory.before(t)
            state = self._memory.state.to(self._device)
            acted = self._policy.act(rows, self._generator, state, noise)
            self._memory.state.copy_(state)
        self._acted.append(acted)
        return self._policy.to_environment(acted.actions)

    def acted(self, observations: np.ndarray, others: np.ndarray) -> tuple[Acted, Tensor]:
        del observations
        columns: Sequence[Sequence[Tensor]] = list(zip(*self._acted, strict=True))
        memory = None if self._memory is None else self._memory.at_others.to(self._device)
        rest = self._policy.scaled_values(torch.from_numpy(others).to(self._device), memory)
        return Acted(*(torch.stack(list(column), 1) for column in columns)), rest
