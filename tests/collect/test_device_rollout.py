"""`device_rollout` against `rollout`: the same trajectories, the same batch."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from proximo.collect import acting
from proximo.collect.device_envs import DeviceEnvs, DeviceStep, TorchCartPole
from proximo.collect.device_rollout import DeviceCarry, DeviceCollector, device_rollout
from proximo.collect.dlpack_envs import DLPackEnvs
from proximo.collect.envs import EnvironmentFault, Step
from proximo.collect.rollout import Carry, rollout
from proximo.models.control import ActorCritic, NetworkConfig
from tests.on_device import stand_in


class OnTheHost:
    """Environments on the CPU device, as `rollout` wants them: arrays."""

    goes_on = None

    def __init__(self, envs: DeviceEnvs) -> None:
        self.envs = envs
        self.n_envs = envs.n_envs

    def reset(self) -> np.ndarray:
        return self.envs.reset().numpy().copy()

    def step(self, actions: np.ndarray) -> Step:
        step = self.envs.step(torch.from_numpy(actions))
        arrays = [tensor.numpy().copy() for tensor in step]
        return Step(arrays[0], arrays[1].astype(np.float64), *arrays[2:])


class Pixels:
    """Three environments of small uint8 pictures, whose reward is the action, over NumPy; some steps only reset."""

    num_envs = 3
    single_observation_space = spaces.Box(0, 255, (4, 4, 1), np.uint8)
    single_action_space = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 10.0], np.float32))

    def __init__(self) -> None:
        self.random = np.random.default_rng(3)
        self.t = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        return self._pictures(), {}

    def step(self, actions: np.ndarray) -> tuple[Any, ...]:
        self.t += 1
        ends = np.array([self.t % 4 == 0, False, self.t % 7 == 0])
        cut = np.array([False, self.t % 5 == 0, False])
        return self._pictures(), actions.sum(1), ends, cut, {}

    def _pictures(self) -> np.ndarray:
        return self.random.integers(0, 256, (3, 4, 4, 1), np.uint8)


def cart_poles() -> DeviceEnvs:
    return TorchCartPole(5, seed=2, max_episode_steps=25)


def pixels() -> DeviceEnvs:
    return DLPackEnvs(Pixels(), device="cpu", autoreset="next_step", to_actions=np.from_dlpack)


def policy_for(envs: DeviceEnvs, **settings: Any) -> ActorCritic:
    config = NetworkConfig(hidden_sizes=(16,), **settings)
    policy = ActorCritic(envs.observation_space, envs.action_space, config, torch.Generator().manual_seed(3))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(3.0)  # values that tell observations apart
    return policy


BOTH = dict(normalize_observations=True, normalize_rewards=True)


GSDE = dict(distribution="gsde", sde_sample_freq=7)


@pytest.mark.parametrize(
    "settings", [{}, BOTH, BOTH | {"clip_reward": 0.5}, GSDE], ids=["raw", "normalized", "clipped", "gsde"]
)
@pytest.mark.parametrize("make", [cart_poles, pixels])
def test_the_batch_is_that_of_the_host_rollout(make, settings, monkeypatch):
    monkeypatch.setattr(acting, "can_act_in_numpy", lambda policy: False)  # which draws a rollout's noise at once
    on_host, on_device = make(), make()
    host_policy, policy = policy_for(on_host, **settings), policy_for(on_device, **settings)
    host_envs: Any = OnTheHost(on_host)
    shape = policy.noise_shape
    host_carry, carry = Carry.start(host_envs.reset(), noise_shape=shape), DeviceCarry.start(on_device.reset(), shape)
    generators = [torch.Generator().manual_seed(9) for _ in range(2)]
    n_ended = 0
    for length in (40, 1, 33):
        expected, ended = rollout(host_policy, host_envs, host_carry, length, generators[0], gamma=0.9)
        batch, episodes = device_rollout(policy, on_device, carry, length, generators[1], gamma=0.9)
        for field in dataclasses.fields(batch):
            ours, theirs = getattr(batch, field.name), getattr(expected, field.name)
            if theirs is None:
                assert ours is None
                continue
            assert ours.dtype == theirs.dtype, field.name
            torch.testing.assert_close(
                ours, theirs, rtol=1e-5, atol=1e-6, msg=lambda m, name=field.name: f"{name}: {m}"
            )
        assert episodes[:3] == ended[:3]  # where they ended only rollouts on the host say
        n_ended += len(ended.returns)
        for name, array in ((name, array) for name, array in vars(host_carry).items() if array is not None):
            if name == "memory":
                assert not array.size
                continue
            np.testing.assert_allclose(np.asarray(getattr(carry, name)), array, rtol=1e-6)
        for one, other in ((host_policy, expected), (policy, batch)):
            one.update_observation_moments(other.observations[other.mask])
        assert host_policy.reward_scale == pytest.approx(policy.reward_scale, rel=1e-9)
    assert n_ended > 8


def test_a_collector_goes_on_where_it_was_in_the_same_memory():
    collected = []
    for whole in (True, False):
        envs = cart_poles()
        policy, carry, generator = policy_for(envs), DeviceCarry.start(envs.reset()), torch.Generator().manual_seed(1)
        if whole:
            batch, episodes = device_rollout(policy, envs, carry, 30, generator, gamma=0.9)
            collected.append((batch.observations, episodes.returns))
            continue
        collector = DeviceCollector(policy, envs, carry, 15, generator, gamma=0.9)
        first, before = collector.collect()
        kept = first.observations.clone()
        second, after = collector.collect()
        assert second.observations.data_ptr() == first.observations.data_ptr()
        collected.append((torch.cat([kept, second.observations], 1), before.returns + after.returns))
    assert torch.equal(collected[0][0], collected[1][0])
    assert collected[0][1] == collected[1][1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("field", ["rewards", "observations", "final_observations"])
def test_what_is_not_finite_is_refused(field, bad):
    class Spoilt(TorchCartPole):
        def step(self, actions: torch.Tensor) -> DeviceStep:
            step = super().step(actions)
            self.n_taken = getattr(self, "n_taken", 0) + 1
            values = getattr(step, field).clone()
            values[1] = bad
            return step._replace(truncated=self._valid, **{field: values}) if self.n_taken == 3 else step

    envs = Spoilt(4)
    carry = DeviceCarry.start(envs.reset())
    with pytest.raises(EnvironmentFault, match=r"environment 1.* not finite") as caught:
        device_rollout(policy_for(envs), envs, carry, 3, torch.Generator().manual_seed(0), gamma=0.9)
    assert caught.value.record["env_index"] == 1


@pytest.mark.parametrize("length", [2, 30])
@pytest.mark.parametrize("action_space", ["discrete", "continuous", "gsde"])
def test_capturing_leaves_no_trace_and_a_step_never_waits_for_the_host(monkeypatch, length, action_space):
    class Poles(TorchCartPole):
        def __init__(self) -> None:
            super().__init__(5, seed=2, max_episode_steps=25)
            if action_space != "discrete":
                self.action_space = spaces.Box(-3.0, 5.0, (1,), np.float32)

        def step(self, actions: torch.Tensor) -> DeviceStep:
            return super().step((actions.reshape(5) > 0).long())

    monkeypatch.setattr("proximo.collect.device_rollout.captured", stand_in)
    ends = []
    for capture in (False, True):
        envs = Poles()
        policy = policy_for(envs, **BOTH | (GSDE if action_space == "gsde" else {}))
        carry = DeviceCarry.start(envs.reset(), policy.noise_shape)
        generator = torch.Generator().manual_seed(1)
        collector = DeviceCollector(policy, envs, carry, length, generator, gamma=0.9, capture=capture)
        collector.collect()
        batch, _ = collector.collect()
        ends.append((batch.observations, batch.actions, carry.discounted_return, envs.snapshot().arrays["state"]))
    assert all(np.array_equal(one, other) for one, other in zip(*ends, strict=True))
