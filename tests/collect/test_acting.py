"""Acting in NumPy against acting in torch: the same networks, the same distributions, the same actions."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch

from proximo.collect.acting import MOST_WEIGHTS, NumpyNetwork, acting, can_act_in_numpy, for_environment
from proximo.core.distributions import Categorical, DiagonalGaussian
from proximo.models.control import ActorCritic, NetworkConfig

ACTIONS = {
    "discrete": gym.spaces.Discrete(3),
    "discrete from 5": gym.spaces.Discrete(3, start=5),
    "unit box": gym.spaces.Box(-1, 1, (2,)),
    "wide box": gym.spaces.Box(np.array([-3.0, 0.0], np.float32), np.array([1.0, 2.0], np.float32)),
    "matrix of doubles": gym.spaces.Box(-2, 2, (2, 2), np.float64),
}


def make_policy(actions: gym.Space, n_observed: int = 4, dtype=np.float32, **settings) -> ActorCritic:
    space = gym.spaces.Box(-100, 100, (n_observed,), dtype)
    policy = ActorCritic(space, actions, NetworkConfig(**settings), torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    policy.update_observation_moments(torch.randn(50, n_observed, generator=torch.Generator().manual_seed(2)) * 5 + 1)
    return policy


def seen(n: int, n_observed: int = 4) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(n, n_observed)).astype(np.float32) * 8


@pytest.mark.parametrize(
    "settings", [{}, {"normalize_observations": True, "clip_observation": 1.5}], ids=["raw", "normal"]
)
@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("hidden_sizes", [(), (7,), (64, 64)])
@pytest.mark.parametrize("name", ACTIONS)
def test_a_rollouts_actions_are_the_distributions(name, hidden_sizes, activation, settings):
    policy = make_policy(ACTIONS[name], activation=activation, hidden_sizes=hidden_sizes, **settings)
    rows = np.stack([seen(5) * (t + 1) / 3 for t in range(3)])
    actor = acting(policy, 5, 3, torch.Generator().manual_seed(7))
    given = [actor.act(t, rows[t]) for t in range(3)]
    acted, others = actor.acted(rows, rows[1][:2])

    observations = torch.from_numpy(rows).transpose(0, 1)
    with torch.no_grad():
        inputs = policy._normalized(observations)
        expected = policy._distribution(inputs)
    kind = DiagonalGaussian if policy.log_std is not None else Categorical
    assert isinstance(expected, kind)
    torch.testing.assert_close(acted.log_probs, expected.log_prob(acted.actions).detach(), rtol=0, atol=2e-5)
    torch.testing.assert_close(acted.values, policy.critic(inputs).squeeze(-1).detach(), rtol=0, atol=2e-5)
    torch.testing.assert_close(others, acted.values[:2, 1], rtol=0, atol=2e-5)
    for t in range(3):
        own = policy.to_environment(acted.actions[:, t])
        assert given[t].dtype == own.dtype
        assert np.array_equal(given[t], own)
        assert all(policy.action_space.contains(action) for action in given[t])


def test_frequencies_and_spreads_are_those_of_the_policy():
    rows = np.broadcast_to(seen(1), (4000, 1, 4))
    for name in ("discrete", "unit box"):
        policy = make_policy(ACTIONS[name])
        actor = acting(policy, 1, len(rows), torch.Generator().manual_seed(7))
        for t, row in enumerate(rows):
            actor.act(t, row)
        actions = actor.acted(np.ascontiguousarray(rows), rows[0])[0].actions[0]
        with torch.no_grad():
            expected = policy._distribution(torch.from_numpy(rows[0].copy()))
        if isinstance(expected, Categorical):
            shares = torch.bincount(actions, minlength=3) / len(actions)
            torch.testing.assert_close(shares, expected.log_probabilities[0].exp(), rtol=0, atol=0.03)
        else:
            deviation = expected.log_std.exp()
            torch.testing.assert_close(actions.mean(0), expected.mean[0], rtol=0, atol=float(0.1 * deviation.max()))
            torch.testing.assert_close(actions.std(0), deviation.detach(), rtol=0.06, atol=0)


def test_weights_that_change_are_seen_without_another_network():
    policy = make_policy(ACTIONS["unit box"])
    network = NumpyNetwork(policy, policy.actor)
    before = network(seen(3))
    with torch.no_grad():
        policy.actor[-1].bias.add_(1.0)
    assert network(seen(3)) == pytest.approx(before + 1.0, abs=1e-5)


def test_observations_of_other_kinds_are_read():
    policy = make_policy(ACTIONS["discrete"], dtype=np.int64)
    whole = np.arange(8).reshape(2, 4)
    network = NumpyNetwork(policy, policy.actor)
    assert np.array_equal(network(whole), network(whole.astype(np.float32)))


def test_actions_are_fresh_arrays():
    for space in ACTIONS.values():
        policy = make_policy(space)
        actor = acting(policy, 5, 1, torch.Generator().manual_seed(7))
        given = actor.act(0, seen(5))
        given[...] = given.dtype.type(0)  # an environment may write into its action
        assert actor.acted(seen(5)[None], seen(1))[0].actions.abs().sum() > 0


def test_large_networks_and_other_devices_act_in_torch():
    assert can_act_in_numpy(make_policy(ACTIONS["discrete"]))
    wide = make_policy(ACTIONS["discrete"], hidden_sizes=(1024, MOST_WEIGHTS // 1024))
    assert not can_act_in_numpy(wide)
    actor = acting(wide, 5, 1, torch.Generator().manual_seed(7))
    given = actor.act(0, seen(5))
    acted, others = actor.acted(seen(5)[None], seen(2))
    assert np.array_equal(acted.actions[:, 0].numpy(), given)
    torch.testing.assert_close(others, wide.scaled_values(torch.from_numpy(seen(2))))
    assert not can_act_in_numpy(make_policy(ACTIONS["discrete"]).double())
    assert not can_act_in_numpy(make_policy(ACTIONS["discrete"]).to("meta"))


def test_the_map_to_the_environment_is_the_policys_own():
    for space in (ACTIONS["wide box"], ACTIONS["matrix of doubles"], gym.spaces.Box(-np.inf, np.inf, (3,))):
        policy = make_policy(space)
        actions = torch.randn(6, int(np.prod(space.shape))) * 3
        assert np.array_equal(for_environment(policy)(actions.numpy()), policy.to_environment(actions))
