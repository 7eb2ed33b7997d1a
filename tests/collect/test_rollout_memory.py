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
    settings |= {} if memory == "none" else {"memory_size": 4}
    config = NetworkConfig(memory=memory, hidden_sizes=(5,), orthogonal_init=False, **settings)  # type: ignore[arg-type]
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


class Breaking(gym.Env):
    """Ends, is cut off, or raises, by chance."""

    observation_space = spaces.Box(-9.0, 9.0, (2,), np.float32)
    action_space = spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        return self._seen(), {}

    def step(self, action: Any):
        chance = self.np_random.random()
        if chance < 0.06:
            raise RuntimeError("broken")
        return self._seen(), float(action), chance > 0.93, 0.88 < chance < 0.93, {}

    def _seen(self) -> np.ndarray:
        return self.np_random.uniform(-1, 1, 2).astype(np.float32)


@pytest.mark.parametrize("memory", ["gru", "lstm"])
def test_every_step_is_what_the_policy_does_by_itself(memory):
    """Step by step through public calls: states before pieces, values, and what follows each kind of end."""
    envs = SerialEnvs(Breaking, 3, 0, name="Breaking", max_restarts=1000)
    policy = policy_of(memory, memory_layers=2)
    carry, generator = Carry.start(envs.reset(), policy.blank_memory(3).numpy()), torch.Generator().manual_seed(1)
    remembered = [policy.fresh_memory() for _ in range(3)]
    n_lost = n_ended = 0
    for _ in range(4):
        batch, episodes = rollout(policy, envs, carry, 24, generator, gamma=0.9, piece=8)
        finals = dict(zip(episodes.ends, episodes.final_observations, strict=True))
        for i in range(3):
            own = remembered[i]
            for t in range(24):
                if t % 8 == 0:
                    assert batch.hidden is not None
                    np.testing.assert_allclose(batch.hidden[i, t // 8], own, atol=1e-5)
                if not batch.mask[i, t]:
                    own, n_lost = policy.fresh_memory(), n_lost + 1
                    continue
                seen = batch.observations[i, t].numpy()  # type: ignore[index]
                assert float(batch.values[i, t]) == pytest.approx(policy.value(seen, memory=own), abs=1e-5)  # type: ignore[index]
                _, own = policy(seen, memory=own)
                after = finals.get((t, i))
                if after is None:
                    after = batch.observations[i, t + 1].numpy() if t < 23 else carry.observations[i]  # type: ignore[index]
                value = policy.value(after, memory=own)
                assert float(batch.next_values[i, t]) == pytest.approx(value, abs=1e-5)  # type: ignore[index]
                if (t, i) in finals:
                    own, n_ended = policy.fresh_memory(), n_ended + 1
            remembered[i] = own
        whole = policy.evaluate(batch)
        torch.testing.assert_close(whole.log_probs[batch.mask], batch.log_probs[batch.mask], rtol=1e-5, atol=1e-5)
    assert n_lost > 5
    assert n_ended > 10


class Lives(SerialEnvs):
    """Environments whose every end is that of a life."""

    def step(self, actions: np.ndarray) -> Any:
        step = super().step(actions)
        self.goes_on = (step.terminated | step.truncated) & step.valid
        return step


def test_a_lost_life_is_remembered():
    """Learning sees an end there, the game goes on, and so does what is remembered: as in evaluation."""
    policy, envs = policy_of("gru"), Lives(Counting, 2, 0, name="Counting")
    carry = Carry.start(envs.reset(), policy.blank_memory(2).numpy())
    batch, _ = rollout(policy, envs, carry, 14, torch.Generator().manual_seed(1), gamma=0.9, piece=7)
    assert batch.done.any()
    assert batch.continues.all()
    memory = policy.fresh_memory(2)
    for t in range(14):
        assert batch.values is not None
        seen = batch.observations[:, t].numpy()  # type: ignore[index]
        np.testing.assert_allclose(policy.value(seen, memory=memory), batch.values[:, t], atol=1e-5)
        _, memory = policy(seen, memory=memory)
    new = policy.evaluate(batch)
    torch.testing.assert_close(new.log_probs, batch.log_probs)
