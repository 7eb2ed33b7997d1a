"""Episodes of several agents with frozen policies, and the environment as a video wants it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from gymnasium import spaces

from proximo.collect.envs import EVALUATION_ENVS, EVALUATION_STREAM, close_quietly, episode_seed
from proximo.collect.games import Games
from proximo.collect.make import EnvFactory
from proximo.collect.parallel_envs import JointEpisode, ParallelEnvs
from proximo.collect.several import make_several, mask_in_info, spaces_of
from proximo.errors import UserError, in_range
from proximo.models.agents import AgentsPolicy
from proximo.models.packing import MASK_KEY
from proximo.training.agents_config import AgentsConfig, SelfPlayConfig
from proximo.training.config import ControlConfig
from proximo.training.evaluate import LONGEST_EPISODE


def make_parallel_envs(
    config: AgentsConfig, factory: EnvFactory, *, n_envs: int | None = None, seed: int | None = None
) -> ParallelEnvs:
    """The environments that the config asks for; so many with another seed, and no critic, for an evaluation.

    Raises:
        UserError: if they cannot be made, or are not as PettingZoo has them.
    """
    task = config.environment
    return ParallelEnvs(
        partial(make_several, factory, task.env_id, task.env_kwargs, "parallel"),
        task.n_envs if n_envs is None else n_envs,
        config.seed if seed is None else seed,
        name=task.env_id,
        sharing=config.agents,
        agent_id=config.agent_id,
        is_central=config.critic == "central" and n_envs is None,
        action_mask=task.action_mask,
        max_episode_steps=task.max_episode_steps,
        on_space_violation=task.on_space_violation if n_envs is None else "warn",
    )


def action_mask_of(config: ControlConfig, factory: EnvFactory) -> Any:
    """Where an environment of several agents says which actions are possible; one is made and reset to find out."""
    task = config.environment
    if isinstance(config, SelfPlayConfig):
        games = Games(partial(make_several, factory, task.env_id, task.env_kwargs, "turns"), 1, name=task.env_id)
        games.close()
        return games.action_mask
    env = make_several(factory, task.env_id, task.env_kwargs, "parallel")
    try:
        _, infos = env.reset(seed=config.seed)
        found = {mask_in_info(*spaces_of(env, task.env_id, agent), infos.get(agent)) for agent in env.agents}
    except Exception:  # whoever trains on it will be told
        return "none"
    finally:
        close_quietly(task.env_id, [env])
    return found.pop() if len(found) == 1 else "auto"  # of several kinds: those that are observed


def evaluate_agents(
    config: AgentsConfig,
    policy: AgentsPolicy,
    factory: EnvFactory,
    *,
    n_episodes: int,
    seed: int,
    deterministic: bool = True,
) -> dict[str, Any]:
    """Play `n_episodes` episodes, fixed beforehand by their seeds, and say what the agents scored.

    Returns:
        `return_mean`, `return_std`, `return_min`, `return_max` over episodes of the mean over agents;
        `team_return_mean`, the mean of the sum over agents; `agents`, each one's mean return; `length_mean`.

    Raises:
        UserError: if `n_episodes` is below 1, or the environment is another one, or fails.
    """
    in_range("seed", seed, whole=True, at_least=0, usual="0")
    in_range("episodes", n_episodes, at_least=1, whole=True, usual="100")
    n_envs = min(EVALUATION_ENVS, n_episodes)
    envs = make_parallel_envs(config, factory, n_envs=n_envs, seed=EVALUATION_STREAM + seed)
    try:
        _check_same(config.environment.env_id, envs, policy)
        generator = None if deterministic else torch.Generator().manual_seed(episode_seed(EVALUATION_STREAM, seed, 0))
        played = _play(policy, envs, n_episodes, generator)
    finally:
        envs.close()
    returns = np.array([episode.returns for episode in played])
    means = np.nanmean(returns, 1)
    own = {agent: column[~np.isnan(column)] for agent, column in zip(envs.agents, returns.T, strict=True)}
    return {
        "return_mean": float(means.mean()),
        "return_std": float(means.std()),
        "return_min": float(means.min()),
        "return_max": float(means.max()),
        "team_return_mean": float(np.nansum(returns, 1).mean()),
        "agents": {agent: float(column.mean()) if len(column) else None for agent, column in own.items()},
        "length_mean": float(np.mean([episode.length for episode in played])),
    }


def _check_same(name: str, envs: ParallelEnvs, policy: AgentsPolicy) -> None:
    """Refuse an environment that the policies were not trained for."""
    if tuple(policy) != envs.agents or set(policy.policies) != set(envs.groups):
        raise UserError(f"{name} has the agents {', '.join(envs.agents)}, but the run had {', '.join(policy)}.")
    for group_name, group in envs.groups.items():
        own = policy.policies[group_name]
        if (group.observation_space, group.action_space) != (own.observation_space, own.action_space):
            raise UserError(
                f"{name} has observations {group.observation_space} and actions {group.action_space} for "
                f"{group.agents[0]}, but the policy was trained with {own.observation_space} and {own.action_space}: "
                "it is another environment."
            )


def _play(
    policy: AgentsPolicy, envs: ParallelEnvs, n_episodes: int, generator: torch.Generator | None
) -> list[JointEpisode]:
    """Each environment plays its share of the episodes; they come back in the order of their seeds."""
    n_envs = envs.n_envs
    quota = [len(range(index, n_episodes, n_envs)) for index in range(n_envs)]
    done: list[list[JointEpisode]] = [[] for _ in range(n_envs)]
    n_steps = np.zeros(n_envs, np.int64)
    seen = {name: rows.copy() for name, rows in envs.reset().items()}
    while any(len(own) < wanted for own, wanted in zip(done, quota, strict=True)):
        actions = {
            name: policy.policies[name].choose(
                torch.from_numpy(rows), deterministic=generator is None, generator=generator
            )
            for name, rows in seen.items()
        }
        seen = {name: step.observations.copy() for name, step in envs.step(actions).items()}
        n_steps += 1
        for episode in envs.ended:
            n_steps[episode.env_index] = 0
            if len(done[episode.env_index]) < quota[episode.env_index]:
                done[episode.env_index].append(episode)
        envs.ended.clear()
        if n_steps.max() > LONGEST_EPISODE:
            raise UserError(
                f"An episode has not ended after {LONGEST_EPISODE:,} steps. Train with max_episode_steps, which "
                "evaluation keeps to, or give the environment a time limit."
            )
    return [done[number % n_envs][number // n_envs] for number in range(n_episodes)]


class FilmedAgents:
    """A parallel environment as `report.video` films one: what is seen, and done, is that of all agents at once."""

    def __init__(self, env: Any, config: AgentsConfig) -> None:
        """Take one environment."""
        self.env, self.metadata = env, getattr(env, "metadata", {})
        self.render_mode = getattr(env, "render_mode", None)
        self._limit = config.environment.max_episode_steps
        self._has_masks = config.environment.action_mask == "info"
        self._n_steps = 0
        self._live: list[str] = []

    def reset(self, *, seed: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode."""
        self._n_steps = 0
        observations, infos = self.env.reset(seed=seed)
        self._live = list(self.env.agents)
        return self._seen(observations, infos), {}

    def step(self, action: dict[str, Any]) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Step all agents that live."""
        self._n_steps += 1
        observations, _, terminations, truncations, infos = self.env.step(action)
        self._live = [agent for agent in self._live if not (terminations[agent] or truncations[agent])]
        is_cut = self._limit is not None and self._n_steps >= self._limit
        return self._seen(observations, infos), 0.0, not self._live, is_cut, {}

    def render(self) -> Any:
        """What the environment draws."""
        return self.env.render()

    def close(self) -> None:
        """Free everything."""
        self.env.close()

    def _seen(self, observations: dict[str, Any], infos: dict[str, Any]) -> Any:
        live = {agent: observations[agent] for agent in self._live}
        masks = {agent: infos[agent][MASK_KEY] for agent in self._live} if self._has_masks else {}
        return live, masks


def filmed(policy: AgentsPolicy) -> Callable[..., Any]:
    """The policies as `report.video` asks them."""

    def act(seen: Any, *, deterministic: bool, seed: int | None, is_first: bool) -> dict[str, Any]:
        del is_first  # nobody remembers anything
        observations, masks = seen
        chosen = policy(observations, deterministic=deterministic, seed=seed, action_masks=masks)
        return {
            agent: int(action) if isinstance(policy[agent].policy.action_space, spaces.Discrete) else action
            for agent, action in chosen.items()
        }

    return act
