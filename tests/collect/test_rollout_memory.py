"""Rollouts of policies that remember: what they remembered is emptied where an episode begins, and there alone."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from proximo.collect.native import NativeEnvs
from proximo.collect.rollout import Carry, rollout
from proximo.collect.serial_envs import SerialEnvs
from proximo.models.control import ActorCritic, NetworkConfig


class Counting(gym.Env):
    """Episodes of 3, 4, 5, 3, ... steps that terminate and are truncated in turns; sees random numbers."""

    observation_space = spaces.Box(-9.0, 9.0, (2,), np.float32)
    action_space = spaces.Discrete(3)
    n_episodes = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.n_episodes += 1
        self.t = 0
        return self._seen(), {}

    def step(self, action: Any):
        self.t += 1
        ended = self.t == 3 + self.n_episodes % 3
        return self._seen(), float(action), ended and self.n_episodes % 2 == 0, ended and self.n_episodes % 2 == 1, {}

    def _seen(self) -> np.ndarray:
        return self.np_random.normal(size=2).astype(np.float32).clip(-9, 9)


def policy_of(memory: str = "lstm", **settings) -> ActorCritic:
    config = NetworkConfig(memory=memory, memory_size=4, hidden_sizes=(5,), orthogonal_init=False, **settings)  # type: ignore[arg-type]
    return ActorCritic(Counting.observation_space, Counting.action_space, config, torch.Generator().manual_seed(0))


def environments(kind: str) -> Any:
    if kind == "serial":
        return SerialEnvs(Counting, 2, 0, name="Counting")
    mode = AutoresetMode.NEXT_STEP if kind == "next step" else AutoresetMode.SAME_STEP
    return NativeEnvs(SyncVectorEnv([Counting] * 2, autoreset_mode=mode), 0, name="Counting")


@pytest.mark.parametrize("kind", ["serial", "next step", "same step"])
@pytest.mark.parametrize("memory", ["gru", "lstm"])
def test_what_learning_sees_is_what_was_done(kind, memory):
    """Every ratio is 1, over rollouts that begin within episodes; values at ends are those of the same episode."""
    policy, envs = policy_of(memory), environments(kind)
    carry, generator = Carry.start(envs.reset(), policy.blank_memory(2).numpy()), torch.Generator().manual_seed(1)
    begun_within = 0
    for _ in range(4):
        batch, _ = rollout(policy, envs, carry, 14, generator, gamma=0.9, piece=7)
        assert batch.hidden is not None
        assert batch.hidden.shape == (2, 2, policy.blank_memory(1).shape[1])
        begun_within += int((batch.hidden[:, 0] != 0).any())
        whole, cut = policy.evaluate(batch), policy.evaluate(batch.as_pieces())
        torch.testing.assert_close(whole.log_probs[batch.mask], batch.log_probs[batch.mask])
        torch.testing.assert_close(whole.values[batch.mask], batch.values[batch.mask])
        torch.testing.assert_close(cut.log_probs.reshape(2, -1)[batch.mask], batch.log_probs[batch.mask])
        # Within an episode the next value is the next step's own.
        inside = (batch.mask & ~batch.done)[:, :-1]
        torch.testing.assert_close(batch.next_values[:, :-1][inside], batch.values[:, 1:][inside])
    assert begun_within >= 2, "a rollout begins with what was remembered"


class OneLong(gym.Env):
    """Sees 1, 2, 3, ... and is truncated after four steps."""

    observation_space = spaces.Box(-9.0, 9.0, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.t = 1
        return np.array([1.0], np.float32), {}

    def step(self, action: Any):
        self.t += 1
        return np.array([self.t], np.float32), 0.0, False, self.t == 5, {}


def test_the_value_at_a_true_last_observation_remembers_its_episode():
    """By hand: the critic stepped through 1, 2, 3, 4 and the last observation 5; then, anew, through 1 and 2."""
    config = NetworkConfig(memory="gru", memory_size=4, hidden_sizes=(5,), orthogonal_init=False)
    policy = ActorCritic(OneLong.observation_space, OneLong.action_space, config, torch.Generator().manual_seed(0))
    envs = SerialEnvs(OneLong, 1, 0, name="OneLong")
    carry = Carry.start(envs.reset(), policy.blank_memory(1).numpy())
    batch, _ = rollout(policy, envs, carry, 5, torch.Generator().manual_seed(0), gamma=0.9)

    def values(*seen: float) -> list[float]:
        memory, found = policy.blank_memory(1), []
        for number in seen:
            acted = policy.act(torch.tensor([[number]]), torch.Generator().manual_seed(0), memory)
            found.append(float(acted.values))
        return found

    first, second = values(1, 2, 3, 4, 5), values(1, 2)
    assert batch.values[0].tolist() == pytest.approx([*first[:4], second[0]], abs=1e-6)
    assert batch.next_values[0].tolist() == pytest.approx([*first[1:], second[1]], abs=1e-6)
    assert batch.done[0].tolist() == [False, False, False, True, False]


def test_without_memory_a_batch_has_no_states():
    policy = policy_of("none")
    envs = environments("serial")
    batch, _ = rollout(policy, envs, Carry.start(envs.reset()), 4, torch.Generator().manual_seed(0), gamma=0.9)
    assert batch.hidden is None
    assert batch.n_pieces == 1
