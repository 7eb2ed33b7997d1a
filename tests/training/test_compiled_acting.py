"""Acting in machine code gives what acting in NumPy gives."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch

from proximo.collect.acting import NumpyNetwork
from proximo.models.control import ActorCritic, NetworkConfig
from proximo.training import compiled_acting
from proximo.training.compiled_acting import CompiledNetwork, network_for
from proximo.training.config import ControlConfig, with_settings
from tests.environments import BoxIdentity
from tests.training.running import config_with, train

pytest.importorskip("numba", reason="numba is not installed")


@pytest.mark.parametrize("hidden", [(), (1,), (64, 64), (8, 33, 2)])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("n_envs", [1, 5])
def test_actor_and_critic_agree_with_numpy(hidden, activation, normalize, n_envs):
    config = NetworkConfig(hidden_sizes=hidden, activation=activation, normalize_observations=normalize)
    space = gym.spaces.Box(-9, 9, (2, 3))
    policy = ActorCritic(space, gym.spaces.Discrete(4), config, torch.Generator().manual_seed(0))
    observations = np.random.default_rng(0).normal(1, 3, (n_envs, 2, 3)).astype(np.float32)
    if normalize:
        policy.update_observation_moments(
            torch.from_numpy(observations).repeat(3, 1, 1) * torch.arange(1, 7).view(2, 3)
        )
        observations[0, 0, 0] = 1e6  # clipped
    for network in (policy.actor, policy.critic):
        found = CompiledNetwork(policy, network)(observations)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, NumpyNetwork(policy, network)(observations), rtol=1e-5, atol=1e-6)


def test_what_is_not_a_number_gets_through():
    policy = ActorCritic(gym.spaces.Box(-9, 9, (3,)), gym.spaces.Discrete(2), NetworkConfig())
    found = CompiledNetwork(policy, policy.actor)(np.array([[0, np.nan, 0], [0, 0, 0]], np.float32))
    assert np.isnan(found[0]).all()
    assert np.isfinite(found[1]).all()


def test_other_kinds_of_observations_are_converted():
    policy = ActorCritic(gym.spaces.Box(0, 255, (3,), np.uint8), gym.spaces.Discrete(2), NetworkConfig())
    seen = np.array([[0, 200, 7]], np.uint8)
    expected = NumpyNetwork(policy, policy.actor)(seen)
    np.testing.assert_allclose(CompiledNetwork(policy, policy.actor)(seen), expected, rtol=1e-5, atol=1e-6)


def test_a_compiled_run_acts_by_it_and_another_does_not(tmp_path, monkeypatch):
    made = []

    class Watched(CompiledNetwork):
        def __init__(self, *given) -> None:
            made.append(1)
            super().__init__(*given)

    monkeypatch.setattr(compiled_acting, "CompiledNetwork", Watched)
    for path, expected in (("compiled", 2), ("fused", 0)):
        made.clear()
        settings = dict(n_envs=2, rollout_length=32, batch_size=32, n_epochs=1, total_steps=128, debug=True)
        train(config_with(**settings, update_path=path), BoxIdentity, tmp_path / path)
        assert len(made) == expected
    assert network_for(with_settings(ControlConfig(), {"update_path": "eager"}, where="test")) is None
