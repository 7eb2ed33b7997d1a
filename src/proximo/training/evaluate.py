"""Episodes with frozen weights and a frozen normalizer, in the environment's own rewards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import torch

from proximo.collect.envs import EVALUATION_ENVS, EVALUATION_STREAM, episode_seed
from proximo.collect.serial_envs import SerialEnvs
from proximo.errors import UserError, in_range
from proximo.models.control import ActorCritic

LONGEST_EPISODE = 200_000
"""Steps after which an episode is taken to have no end (Atari's 108,000 frames fit in)."""


@dataclass(frozen=True)
class EpisodeScores:
    """Undiscounted returns and lengths of the episodes, in the order of their seeds."""

    returns: list[float]
    lengths: list[int]


def evaluate_policy(
    policy: ActorCritic,
    make: Callable[[], gym.Env],
    *,
    n_episodes: int,
    seed: int,
    deterministic: bool = True,
    name: str = "the environment",
) -> EpisodeScores:
    """Play `n_episodes` episodes and return what they scored.

    The episodes are fixed beforehand by their seeds, so short episodes are not favoured over long ones.
    The policy is not changed in any way.

    Raises:
        UserError: if `n_episodes` is below 1.
        EnvironmentFault: if the environment raises or returns what it must not.
    """
    in_range("seed", seed, whole=True, at_least=0, usual="0")
    in_range("episodes", n_episodes, at_least=1, whole=True, usual="100")
    n_envs = min(EVALUATION_ENVS, n_episodes)
    envs = SerialEnvs(make, n_envs, EVALUATION_STREAM + seed, name=name, on_space_violation="warn")
    try:
        check_same_spaces(name, envs, policy)
        return _play(policy, envs, n_episodes, None if deterministic else _noise(policy, seed))
    finally:
        envs.close()


def check_same_spaces(name: str, env: gym.Env | SerialEnvs, policy: ActorCritic) -> None:
    """Refuse an environment that the policy was not trained for.

    Raises:
        UserError: if a space of `env` is not that of `policy`.
    """
    if (env.observation_space, env.action_space) != (policy.observation_space, policy.action_space):
        raise UserError(
            f"{name} has observations {env.observation_space} and actions {env.action_space}, but the policy was "
            f"trained with {policy.observation_space} and {policy.action_space}: it is another environment."
        )


def _noise(policy: ActorCritic, seed: int) -> torch.Generator:
    device = next(policy.parameters()).device
    return torch.Generator(device).manual_seed(episode_seed(EVALUATION_STREAM, seed, 0))


def _play(policy: ActorCritic, envs: SerialEnvs, n_episodes: int, generator: torch.Generator | None) -> EpisodeScores:
    """Each environment plays its share of the episodes; without a generator, by the most likely actions."""
    n_envs = envs.n_envs
    quota = [len(range(index, n_episodes, n_envs)) for index in range(n_envs)]
    returns: list[list[float]] = [[] for _ in range(n_envs)]
    lengths: list[list[int]] = [[] for _ in range(n_envs)]
    running_return, running_length = np.zeros(n_envs), np.zeros(n_envs, np.int64)
    observations = envs.reset()
    memory = policy.blank_memory(n_envs)
    while any(len(done) < wanted for done, wanted in zip(returns, quota, strict=True)):
        rows = torch.from_numpy(observations.copy()).to(memory.device)
        step = envs.step(policy.choose(rows, deterministic=generator is None, generator=generator, memory=memory))
        running_return += step.rewards
        running_length += 1
        if running_length.max() > LONGEST_EPISODE:
            raise UserError(
                f"An episode has not ended after {LONGEST_EPISODE:,} steps. Train with max_episode_steps, which "
                "evaluation keeps to, or give the environment a time limit."
            )
        for index in np.flatnonzero(step.terminated | step.truncated):
            if len(returns[index]) < quota[index]:
                returns[index].append(float(running_return[index]))
                lengths[index].append(int(running_length[index]))
            running_return[index], running_length[index] = 0.0, 0
            memory[index] = 0.0
        observations = step.observations
    order = [(number % n_envs, number // n_envs) for number in range(n_episodes)]
    return EpisodeScores([returns[i][e] for i, e in order], [lengths[i][e] for i, e in order])
