"""`rollout`: run the policy in the environments for a while, and hand over a `Batch`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch

from proximo.collect.acting import Acting, MakeNetwork, Remembered, acting
from proximo.collect.envs import Step, VectorEnvs
from proximo.collect.gsde import steady_noise
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
    memory: np.ndarray
    """[N, S]: what the policy remembers of the episodes; S is 0 where it has no memory."""
    noise: np.ndarray | None = None
    """[N, F, columns]: gsde's matrices; None for every other distribution."""
    noise_age: np.ndarray | None = None
    """[]: steps taken with them; -1 before there are any."""

    @staticmethod
    def start(
        observations: np.ndarray, memory: np.ndarray | None = None, noise_shape: tuple[int, int] | None = None
    ) -> Carry:
        """At the first observations of all environments."""
        n = len(observations)
        memory = np.zeros((n, 0), np.float32) if memory is None else memory
        carry = Carry(observations.copy(), np.zeros(n), np.zeros(n, np.int64), np.zeros(n), memory)
        if noise_shape is not None:
            carry.noise, carry.noise_age = np.zeros((n, *noise_shape), np.float32), np.array(-1)
        return carry


class Episodes(NamedTuple):
    """Episodes that ended within a rollout, in order of time: the environment's own returns, and lengths."""

    returns: list[float]
    lengths: list[int]
    n_terminated: int
    ends: Sequence[tuple[int, int]] = ()
    """(t, i) of every end that learning sees, those of lives among them; none of environments on a device."""
    final_observations: Sequence[np.ndarray] = ()
    """`[*O]` each: what was truly seen last, at the `ends`."""


class Clock:
    """Seconds spent choosing actions, and in the environments."""

    def __init__(self) -> None:
        """Begin at 0."""
        self.restart()

    def restart(self) -> None:
        """Go back to 0."""
        self.acting = 0.0
        self.environment = 0.0


def rollout(
    policy: ActorCritic,
    envs: VectorEnvs,
    carry: Carry,
    length: int,
    generator: torch.Generator,
    *,
    gamma: float,
    clock: Clock | None = None,
    network: MakeNetwork | None = None,
    piece: int | None = None,
) -> tuple[Batch, Episodes]:
    """Take `length` steps in each environment with the policy as it is; advance `carry`.

    The normalizers of the policy do not change while this collects. Afterwards the reward scale, which no
    action depends on, takes in the rollout's discounted returns, and then scales the rewards of the batch. `clock`
    adds up where the time goes; `network` is that of `acting`; `piece` is how many steps a policy with memory learns
    from in one piece, all by default.

    Returns:
        The batch, `[N, length]`, and the episodes that ended in it.

    Raises:
        EnvironmentFault: if an environment raises or returns what it must not.
    """
    clock = clock or Clock()
    recorder = Recorder.empty(envs.n_envs, length, carry.observations)
    memory = Remembered(carry.memory, piece or length) if policy.has_memory else None
    noise = steady_noise(policy, carry, generator)
    actor = acting(policy, envs.n_envs, length, generator, network, memory, noise)
    # Around the steps: weights that are cast to bfloat16 for one action are kept for the next one.
    with torch.autocast("cpu", enabled=False):
        for t in range(length):
            observations = recorder.observations[t]
            np.copyto(observations, carry.observations)
            began = perf_counter()
            actions = actor.act(t, observations)
            chosen = perf_counter()
            step = envs.step(actions)
            clock.acting += chosen - began
            clock.environment += perf_counter() - chosen
            recorder.write(t, step, envs.goes_on)
            if memory is not None:
                memory.after(step, envs.goes_on)
            np.copyto(carry.observations, step.observations)
    episodes = _count_episodes(recorder, carry)
    device = next(policy.parameters()).device
    batch = assemble(policy, recorder, actor, carry, gamma, device)
    return batch if memory is None else memory.noted(batch, device), episodes


@dataclass(frozen=True)
class Recorder:
    """Arrays `[T, N]` that the loop writes into, and the true last observations of episodes with their places."""

    observations: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    valid: np.ndarray
    finals: list[np.ndarray]
    ends: list[tuple[int, int]]
    lives: list[tuple[int, int]]
    """Of the ends those where the game goes on: learning sees an end there, returns and lengths do not."""

    @staticmethod
    def empty(n: int, length: int, observations: np.ndarray) -> Recorder:
        """Nothing recorded yet."""
        terminated, truncated, valid = (np.zeros((length, n), bool) for _ in range(3))
        seen = np.empty((length, *observations.shape), observations.dtype)
        return Recorder(seen, np.empty((length, n)), terminated, truncated, valid, [], [], [])

    def write(self, t: int, step: Step, goes_on: np.ndarray | None) -> None:
        """Record step `t`; `goes_on` as in `VectorEnvs`."""
        self.rewards[t] = step.rewards
        self.terminated[t] = step.terminated
        self.truncated[t] = step.truncated
        self.valid[t] = step.valid
        ends = step.terminated | step.truncated
        if ends.any():
            for i in (ends & step.valid).nonzero()[0]:
                self.finals.append(step.final_observations[i].copy())
                self.ends.append((t, int(i)))
                if goes_on is not None and goes_on[i]:
                    self.lives.append((t, int(i)))


def _count_episodes(recorder: Recorder, carry: Carry) -> Episodes:
    """The episodes that ended, in order of time; `carry` keeps what the open ones have so far."""
    rewards = np.where(recorder.valid, recorder.rewards, 0.0)
    lost = recorder.truncated & ~recorder.valid
    lives = set(recorder.lives)
    over = [place for place in recorder.ends if place not in lives]
    cuts = [*((t, i, True) for t, i in over), *((int(t), int(i), False) for t, i in np.argwhere(lost))]
    n_terminated = sum(bool(recorder.terminated[place]) for place in over)
    episodes = Episodes([], [], n_terminated, recorder.ends, recorder.finals)
    first = np.zeros(len(carry.episode_return), np.int64)

    def add_up(i: int, last: int) -> None:
        """Add what environment `i` got since its last cut, in order of time."""
        some = rewards[first[i] : last, i]
        if len(some):
            carry.episode_return[i] = np.add.accumulate(np.concatenate((carry.episode_return[i : i + 1], some)))[-1]
            carry.episode_length[i] += recorder.valid[first[i] : last, i].sum()
        first[i] = last

    for t, i, is_end in sorted(cuts):
        add_up(i, t + 1)
        if is_end:
            episodes.returns.append(float(carry.episode_return[i]))
            episodes.lengths.append(int(carry.episode_length[i]))
        carry.episode_return[i] = carry.episode_length[i] = 0
    for i in range(len(first)):
        add_up(i, len(rewards))
    return episodes


def _discounted(recorder: Recorder, cut: np.ndarray, carry: Carry, gamma: float) -> np.ndarray:
    """Running discounted returns `[T, N]`, from 0 again after every `cut` `[T, N]`; advances `carry`."""
    discounted = np.empty_like(recorder.rewards)
    running = carry.discounted_return
    is_plain, has_cut = bool(recorder.valid.all()), np.logical_or.reduce(cut, axis=1)
    for t, (rewards, row) in enumerate(zip(recorder.rewards, discounted, strict=True)):
        np.multiply(running, gamma, out=row)
        row += rewards
        if not is_plain:
            np.copyto(row, running, where=~recorder.valid[t])
        np.copyto(running, row)
        if has_cut[t]:
            running[cut[t]] = 0.0
    return discounted


def assemble(
    policy: ActorCritic, recorder: Recorder, actor: Acting, carry: Carry, gamma: float, device: torch.device
) -> Batch:
    """Put the pieces together; the critic sees the true final observations of the episodes that ended."""
    finals = np.array(recorder.finals, carry.observations.dtype).reshape(-1, *carry.observations.shape[1:])
    acted, others = actor.acted(recorder.observations, np.concatenate((carry.observations, finals)))
    last_values, final_values = others.split((len(carry.observations), len(finals)))
    next_values = torch.cat([acted.values[:, 1:], last_values[:, None]], 1)
    if recorder.ends:
        places = torch.as_tensor(np.array(recorder.ends), device=device)
        next_values[places[:, 1], places[:, 0]] = final_values
    valid = recorder.valid
    done = (recorder.terminated | recorder.truncated) & valid
    lost = recorder.truncated & ~valid
    discounted = _discounted(recorder, done | lost, carry, gamma)
    done[:-1] |= lost[1:]  # that episode ends at the step before, at the observation that was acted on then
    rewards = torch.from_numpy(recorder.rewards)
    if policy.config.sign_rewards:
        rewards = rewards.sign()
    if policy.config.normalize_rewards:
        policy.update_return_moments(torch.from_numpy(discounted.T[valid.T]).to(device))
        limit = policy.config.clip_reward
        rewards = (rewards / policy.reward_scale).clamp(-limit, limit)
    return Batch(
        observations=_rows(recorder.observations, device),
        actions=acted.actions,
        mask=_rows(valid, device),
        rewards=rewards.T.to(device, torch.float32).contiguous(),
        log_probs=acted.log_probs,
        values=acted.values,
        next_values=next_values,
        terminated=_rows(recorder.terminated & valid, device),
        done=_rows(done, device),
    )


def _rows(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """`[T, N, ...]` to `[N, T, ...]`."""
    return torch.from_numpy(array).transpose(0, 1).to(device).contiguous()
