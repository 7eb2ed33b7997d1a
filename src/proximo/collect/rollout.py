"""`rollout`: run the policy in the environments for a while, and hand over a `Batch`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from proximo.collect.envs import VectorEnvs
from proximo.core.batch import Batch
from proximo.models.control import ActorCritic


@dataclass
class Carry:
    """What one rollout leaves to the next, per environment; overwritten in place by `rollout`."""

    observations: np.ndarray
    """[N, *O]: what to act on next."""
    episode_return: np.ndarray
    """[N]: rewards since the reset, the environment's own."""
    episode_length: np.ndarray
    """[N]: steps since the reset."""
    discounted_return: np.ndarray
    """[N]: sum of gamma^k r since the reset, as the reward scale sees it."""

    @staticmethod
    def start(observations: np.ndarray) -> Carry:
        """At the first observations of all environments."""
        n = len(observations)
        return Carry(observations.copy(), np.zeros(n), np.zeros(n, np.int64), np.zeros(n))


class Episodes(NamedTuple):
    """Episodes that ended within a rollout, in order of time: the environment's own returns, and lengths."""

    returns: list[float]
    lengths: list[int]
    n_terminated: int


def rollout(
    policy: ActorCritic,
    envs: VectorEnvs,
    carry: Carry,
    length: int,
    generator: torch.Generator,
    *,
    gamma: float,
) -> tuple[Batch, Episodes]:
    """Take `length` steps in each environment with the policy as it is; advance `carry`.

    The normalizers of the policy do not change while this collects. Afterwards the reward scale, which no
    action depends on, takes in the rollout's discounted returns, and then scales the rewards of the batch.

    Returns:
        The batch, `[N, length]`, and the episodes that ended in it.

    Raises:
        EnvironmentFault: if an environment raises or returns what it must not.
    """
    device = next(policy.parameters()).device
    recorder = _Recorder.empty(envs.n_envs, length, carry.observations)
    acted, finals, final_places = [], [], []
    episodes = Episodes([], [], 0)
    n_terminated = 0
    for t in range(length):
        recorder.observations[:, t] = carry.observations
        step_result = policy.act(torch.from_numpy(recorder.observations[:, t]).to(device), generator)
        acted.append(step_result)
        step = envs.step(policy.to_environment(step_result.actions))
        done = (step.terminated | step.truncated) & step.valid
        lost = step.truncated & ~step.valid
        if t and lost.any():  # the episode ends at the step before, at the observation that was acted on now
            recorder.done[lost, t - 1] = True
        recorder.write(t, step.rewards, step.terminated & step.valid, done, step.valid)
        _advance(carry, step.rewards, step.valid)
        over = done if envs.goes_on is None else done & ~envs.goes_on
        for i in np.flatnonzero(done):
            finals.append(step.final_observations[i].copy())
            final_places.append((i, t))
        for i in np.flatnonzero(over):
            episodes.returns.append(float(carry.episode_return[i]))
            episodes.lengths.append(int(carry.episode_length[i]))
            n_terminated += int(step.terminated[i])
        recorder.discounted[:, t] = _advance_discounted(carry, step.rewards, step.valid, gamma)
        _forget(carry, over | lost)
        carry.discounted_return[done] = 0.0
        np.copyto(carry.observations, step.observations)
    batch = _assemble(policy, recorder, acted, carry.observations, finals, final_places, device)
    return batch, episodes._replace(n_terminated=n_terminated)


@dataclass(frozen=True)
class _Recorder:
    """Arrays `[N, T]` that the loop writes into."""

    observations: np.ndarray
    rewards: np.ndarray
    discounted: np.ndarray
    terminated: np.ndarray
    done: np.ndarray
    valid: np.ndarray

    @staticmethod
    def empty(n: int, length: int, observations: np.ndarray) -> _Recorder:
        flags = [np.zeros((n, length), bool) for _ in range(3)]
        numbers = [np.zeros((n, length)) for _ in range(2)]
        return _Recorder(np.zeros((n, length, *observations.shape[1:]), observations.dtype), *numbers, *flags)

    def write(self, t: int, rewards: np.ndarray, terminated: np.ndarray, done: np.ndarray, valid: np.ndarray) -> None:
        self.rewards[:, t] = rewards
        self.terminated[:, t] = terminated
        self.done[:, t] = done
        self.valid[:, t] = valid


def _advance(carry: Carry, rewards: np.ndarray, valid: np.ndarray) -> None:
    carry.episode_return += np.where(valid, rewards, 0.0)
    carry.episode_length += valid


def _advance_discounted(carry: Carry, rewards: np.ndarray, valid: np.ndarray, gamma: float) -> np.ndarray:
    carry.discounted_return[:] = np.where(valid, gamma * carry.discounted_return + rewards, carry.discounted_return)
    return carry.discounted_return


def _forget(carry: Carry, done: np.ndarray) -> None:
    carry.episode_return[done] = 0.0
    carry.episode_length[done] = 0
    carry.discounted_return[done] = 0.0


def _assemble(
    policy: ActorCritic,
    recorder: _Recorder,
    acted: list,
    last_observations: np.ndarray,
    finals: list[np.ndarray],
    final_places: list[tuple[int, int]],
    device: torch.device,
) -> Batch:
    """Put the pieces together; the critic sees the true final observations of the episodes that ended."""
    values = torch.stack([a.values for a in acted], 1)
    next_values = torch.cat([values[:, 1:], policy.scaled_values(_tensor(last_observations, device))[:, None]], 1)
    if finals:
        places = torch.as_tensor(np.array(final_places), device=device)
        next_values[places[:, 0], places[:, 1]] = policy.scaled_values(_tensor(np.stack(finals), device))
    mask = torch.from_numpy(recorder.valid).to(device)
    rewards = torch.from_numpy(recorder.rewards)
    if policy.config.sign_rewards:
        rewards = rewards.sign()
    if policy.config.normalize_rewards:
        policy.update_return_moments(torch.from_numpy(recorder.discounted[recorder.valid]).to(device))
        limit = policy.config.clip_reward
        rewards = (rewards / policy.reward_scale).clamp(-limit, limit)
    return Batch(
        observations=torch.from_numpy(recorder.observations).to(device),
        actions=torch.stack([a.actions for a in acted], 1),
        mask=mask,
        rewards=rewards.to(device, torch.float32),
        log_probs=torch.stack([a.log_probs for a in acted], 1),
        values=values,
        next_values=next_values,
        terminated=torch.from_numpy(recorder.terminated).to(device),
        done=torch.from_numpy(recorder.done).to(device),
    )


def _tensor(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(array.copy()).to(device)
