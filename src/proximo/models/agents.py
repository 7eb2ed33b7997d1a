"""Policies of several agents: who acts as part of what is seen, a critic that sees the whole, and all of them together.

A group is a set of agents that share one policy. With `agent_id` the observation of an agent of a larger group says
which one it is: a Dict with the agent's number beside what it had (Gupta et al. 2017; Terry et al. 2020).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from proximo.core.batch import Batch
from proximo.core.normalize import RunningMoments
from proximo.core.policy import Evaluation, PlainActorCritic
from proximo.errors import UserError
from proximo.models.control import Acted, ActorCritic, NetworkConfig
from proximo.models.networks import perceptron
from proximo.models.packing import PackedObservations, leaves

AGENT_ID = "agent_id"
"""The key under which an observation says which agent of its group sees it."""


def with_agent_id(space: spaces.Space, n_agents: int) -> spaces.Dict:
    """The space of observations that say which of `n_agents` sees them.

    Raises:
        UserError: if there is something of that name in it.
    """
    inner = space.spaces if isinstance(space, spaces.Dict) else {"observation": space}
    if AGENT_ID in inner:
        raise UserError(
            f"The observations {space} have a part {AGENT_ID!r} of their own. If it says who the agent is, turn the "
            "setting off: --no-agent-id."
        )
    return spaces.Dict({**inner, AGENT_ID: spaces.Discrete(n_agents)})


def tagged(observation: Any, number: Any) -> dict[str, Any]:
    """An observation of the space of `with_agent_id`, of the agent with this number in its group."""
    return {**(observation if isinstance(observation, Mapping) else {"observation": observation}), AGENT_ID: number}


class CentralActorCritic(ActorCritic):
    """An actor that sees its own observation, and a critic that sees the state of the whole environment as well.

    The critic of MAPPO (Yu et al. 2022, section 3 and "agent-specific global state"): the agent's own observation and
    the state side by side. For learning, an observation is a row `[R + S]`: the agent's own, flat, then the state. The
    calls for people take the agent's own observation, as those of `ActorCritic` do; `value` takes the state too.
    """

    state_mean: Tensor
    state_variance: Tensor
    state_count: Tensor

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        config: NetworkConfig,
        n_state: int,
        generator: torch.Generator | None = None,
    ) -> None:
        """Build the networks; the state is `n_state` numbers.

        Raises:
            UserError: if a space is of a kind that is not supported, or observations are images.
        """
        super().__init__(observation_space, action_space, config, generator)
        if self.encoder is not None:
            raise UserError(
                f"critic is 'central', which is for observations of numbers; these have images: {observation_space}. "
                "Use --critic own."
            )
        self.n_state = n_state
        self.n_own = math.prod(self.observation_space.shape)
        space = self.observation_space
        n_numbers = space.n_numbers if isinstance(space, PackedObservations) else self.n_own
        sizes = config.hidden_sizes
        self.critic = perceptron(n_numbers + n_state, sizes, config, 1, head_gain=1.0, generator=generator)
        moments = RunningMoments.empty((n_state,))
        self.register_buffer("state_mean", moments.mean)
        self.register_buffer("state_variance", moments.variance)
        self.register_buffer("state_count", moments.count)

    @property
    def is_plain(self) -> bool:
        """Never: the critic sees more than the actor."""
        return False

    def plain(self, batch: Batch) -> PlainActorCritic | None:
        """Nothing that the fused update knows."""
        del batch

    def act(
        self,
        observations: Tensor,
        generator: torch.Generator,
        memory: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Acted:
        """Sample actions at rows `[N, R + S]`; no gradient."""
        del memory
        own = observations[..., : self.n_own]
        with torch.no_grad():
            inputs = self._features(own)
            distribution = self._distribution(inputs, self._mask(own), noise)
            actions = distribution.sample(generator)
            return Acted(actions, distribution.log_prob(actions), self._central_values(inputs, observations))

    def evaluate(self, batch: Batch) -> Evaluation:
        """Score `batch.actions` under the present weights, with gradient."""
        assert isinstance(batch.observations, Tensor)
        own = batch.observations[..., : self.n_own]
        inputs = self._features(own, batch.mask.shape)
        distribution = self._distribution(inputs, self._mask(own))
        values = self._central_values(inputs, batch.observations)
        return Evaluation(distribution.log_prob(batch.actions), distribution.entropy(), values, distribution)

    def scaled_values(self, observations: Tensor, memory: Tensor | None = None) -> Tensor:
        """The critic at rows `[N, R + S]`, in scaled reward units; no gradient."""
        del memory
        with torch.no_grad():
            return self._central_values(self._features(observations[..., : self.n_own]), observations)

    def update_observation_moments(self, observations: Tensor) -> None:
        """Merge rows `[N, R + S]` into both normalizers. Only ever between two rollouts."""
        super().update_observation_moments(observations[..., : self.n_own])
        moments = RunningMoments(self.state_mean, self.state_variance, self.state_count)
        moments = moments.updated(observations[..., self.n_own :])
        self.state_mean.copy_(moments.mean)
        self.state_variance.copy_(moments.variance)
        self.state_count.copy_(moments.count)

    def value(self, observation: Any, *, memory: Any = None, state: Any = None) -> Any:
        """Expected discounted return from one observation of the agent's own and the state `[S]`, or a batch of both.

        Raises:
            ValueError: without the state, or if one is no array of finite numbers of its shape.
        """
        del memory
        if state is None:
            raise ValueError("this critic sees the state of the whole environment: value(observation, state=...)")
        rows, single = self._rows(observation, None, needs_mask=False)
        seen = torch.as_tensor(np.asarray(state, np.float32), device=rows.device).reshape(len(rows), -1)
        if seen.shape[1] != self.n_state or not seen.isfinite().all():
            raise ValueError(f"the state must be {self.n_state} finite numbers for each observation")
        wide = torch.cat([rows.reshape(len(rows), -1).to(torch.float32), seen], 1)
        values = self.scaled_values(wide) * self.reward_scale
        values = values[0] if single else values
        return values if isinstance(observation, Tensor) else values.cpu().numpy()

    def _central_values(self, inputs: Tensor, observations: Tensor) -> Tensor:
        state = observations[..., self.n_own :]
        if self.config.normalize_observations:
            limit = self.config.clip_observation
            mean, scale = self.state_mean.to(torch.float32), (self.state_variance + 1e-8).rsqrt().to(torch.float32)
            state = ((state - mean) * scale).clamp(-limit, limit)
        return self.critic(torch.cat([inputs, state], -1)).squeeze(-1)


@dataclass(frozen=True)
class AgentPolicy:
    """How one agent acts: by its own observation alone."""

    policy: ActorCritic
    number: int | None
    """Its number within its group, where the policy is told; else None."""

    def __call__(
        self, observation: Any, *, deterministic: bool = True, seed: int | None = None, action_mask: Any = None
    ) -> Any:
        """Choose an action for one observation of the agent, or a batch; see `ActorCritic.__call__`.

        Raises:
            ValueError: as `ActorCritic.__call__`.
        """
        return self.policy(self._told(observation), deterministic=deterministic, seed=seed, action_mask=action_mask)

    def log_prob(self, observation: Any, action: Any, *, action_mask: Any = None) -> Any:
        """Log-probability of `action` at one observation or a batch; see `ActorCritic.log_prob`."""
        return self.policy.log_prob(self._told(observation), action, action_mask=action_mask)

    def _told(self, observation: Any) -> Any:
        if self.number is None:
            return observation
        space = self.policy.observation_space
        assert isinstance(space, PackedObservations)
        told = tagged(observation, self.number)
        leaf = next(leaf for leaf in leaves(space.source, "observation") if leaf.path != (AGENT_ID,))
        shape = np.shape(leaf.of(told, "observation"))
        leading = shape[: max(0, len(shape) - len(leaf.space.shape or ()))]
        return tagged(observation, np.full(leading, self.number))


class AgentsPolicy:
    """The policies of all agents of an environment, by the agents' names.

    `policy(observations)` takes and returns what a PettingZoo `ParallelEnv` does: a dict by agent. `policy["agent_0"]`
    is one agent's own.
    """

    def __init__(self, policies: Mapping[str, ActorCritic], agents: Mapping[str, tuple[str, int | None]]) -> None:
        """Take the policies of the groups, and for each agent its group and its number there."""
        self.policies = dict(policies)
        self.agents = {
            name: AgentPolicy(self.policies[group], number) for name, (group, number) in agents.items()
        }  # in the order of possible_agents

    def __getitem__(self, agent: str) -> AgentPolicy:
        """One agent's policy.

        Raises:
            UserError: if there is no such agent.
        """
        if agent not in self.agents:
            raise UserError(f"There is no agent {agent!r}. There are: {', '.join(self.agents)}.")
        return self.agents[agent]

    def __iter__(self) -> Iterator[str]:
        """The names of the agents."""
        return iter(self.agents)

    def __len__(self) -> int:
        """How many agents there are."""
        return len(self.agents)

    def __call__(
        self,
        observations: Mapping[str, Any],
        *,
        deterministic: bool = True,
        seed: int | None = None,
        action_masks: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """An action for each agent that sees something.

        Args:
            observations: by agent, one each.
            deterministic: take the most likely actions; False samples.
            seed: makes sampled actions repeatable.
            action_masks: by agent, where the environment tells in its `infos` what is possible.

        Raises:
            UserError: if there is no agent of a name.
            ValueError: if an observation does not fit its space.
        """
        masks = action_masks or {}
        names = list(self.agents)
        return {
            name: self[name](
                observation,
                deterministic=deterministic,
                # A seed of its own for each: agents with the same policy must not draw the same.
                seed=None if seed is None else seed * len(names) + names.index(name),
                action_mask=masks.get(name),
            )
            for name, observation in observations.items()
        }
