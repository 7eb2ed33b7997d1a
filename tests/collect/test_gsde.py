"""The matrices of state-dependent exploration while collecting: how long they are kept, and what is done with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces

from proximo.collect.device_rollout import DeviceCarry
from proximo.collect.gsde import SteadyNoise, steady_noise
from proximo.collect.rollout import Carry, rollout
from proximo.collect.serial_envs import SerialEnvs
from proximo.models.control import ActorCritic, NetworkConfig
from tests.environments import Noisy


def kept(every: int, rollouts: list[int]) -> list[int]:
    """After how many steps there was another matrix, over rollouts of these lengths."""
    carry, generator = Carry.start(np.zeros((2, 3)), noise_shape=(4, 1)), torch.Generator().manual_seed(0)
    seen = []
    for length in rollouts:
        noise = SteadyNoise(carry, every, generator)
        seen += [noise.next().clone() for _ in range(length)]
    return [t for t in range(len(seen)) if t == 0 or not torch.equal(seen[t], seen[t - 1])]


def test_a_matrix_is_kept_for_so_many_steps_whatever_the_rollouts():
    assert kept(1, [3, 2]) == [0, 1, 2, 3, 4]
    assert kept(3, [4, 1, 5]) == [0, 3, 6, 9]
    assert kept(100, [4, 4]) == [0]


def test_or_for_a_rollout():
    assert kept(-1, [4, 1, 5]) == [0, 4, 5]


def test_each_environment_has_its_own_and_they_are_standard_normal():
    carry = Carry.start(np.zeros((50, 3)), noise_shape=(40, 3))
    noise = SteadyNoise(carry, -1, torch.Generator().manual_seed(0)).next()
    assert noise.shape == (50, 40, 3)
    assert len(noise[:, 0, 0].unique()) == 50
    assert noise.mean().item() == pytest.approx(0.0, abs=0.06)  # 4 / sqrt(6000)
    assert noise.std().item() == pytest.approx(1.0, abs=0.04)
    assert np.array_equal(carry.noise, noise.numpy())  # what is saved is what is acted with


def test_on_a_device_it_is_the_same_and_stays_in_its_memory():
    host, there = Carry.start(np.zeros((2, 3)), noise_shape=(4, 1)), DeviceCarry.start(torch.zeros(2, 3), (4, 1))
    where = there.noise
    one, other = (SteadyNoise(carry, 2, torch.Generator().manual_seed(0)) for carry in (host, there))
    for _ in range(5):
        assert torch.equal(one.next(), other.next())
    assert there.noise is where


def test_other_policies_have_none():
    policy = ActorCritic(spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (2,)), NetworkConfig())
    carry = Carry.start(np.zeros((2, 3)), noise_shape=policy.noise_shape)
    assert (carry.noise, carry.noise_age) == (None, None)
    assert steady_noise(policy, carry, torch.Generator()) is None


def test_the_actions_of_a_rollout_are_what_the_matrix_makes_of_the_features():
    envs = SerialEnvs(Noisy, 3, 0)
    config = NetworkConfig(distribution="gsde", hidden_sizes=(8,), sde_sample_freq=5)
    policy = ActorCritic(envs.observation_space, envs.action_space, config, torch.Generator().manual_seed(0))
    assert policy.log_std is not None
    if policy.noise_shape is None:
        pytest.fail("this environment must have continuous actions")
    carry, generator = Carry.start(envs.reset(), noise_shape=policy.noise_shape), torch.Generator().manual_seed(1)
    batch, _ = rollout(policy, envs, carry, 12, generator, gamma=0.9)
    assert isinstance(batch.observations, torch.Tensor)
    with torch.no_grad():
        features = policy.actor[:-1](batch.observations.float())
        deviations = batch.actions - policy.actor[-1](features)
        assert torch.allclose(policy.evaluate(batch).log_probs, batch.log_probs, atol=1e-5)
    # The first five steps have one matrix, and 10 and 11 the one that is carried on.
    theta = policy.log_std.exp() * torch.from_numpy(carry.noise)
    for env in range(3):
        torch.testing.assert_close(deviations[env, 10:], features[env, 10:] @ theta[env], atol=1e-5, rtol=1e-4)
        assert not torch.allclose(deviations[env, :5], features[env, :5] @ theta[env], atol=1e-2)
    assert int(carry.noise_age) == 2
    envs.close()
