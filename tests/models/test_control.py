"""`ActorCritic`: weights, units, shapes, normalizers."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from proximo.algorithms.adam import FlatAdam
from proximo.core.batch import Batch
from proximo.errors import UserError
from proximo.models.control import ActorCritic, NetworkConfig

OBSERVATIONS = spaces.Box(-5.0, 5.0, (3,), np.float32)
BOUNDED = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 10.0], np.float32))
SPACES = [
    spaces.Discrete(4),
    spaces.Discrete(4, start=-2),
    BOUNDED,
    spaces.Box(-np.inf, np.inf, (2, 3), np.float32),
    spaces.Box(-1.0, 1.0, (2,), np.float64),
]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def model(actions: spaces.Space = BOUNDED, observations: spaces.Space = OBSERVATIONS, **settings: Any) -> ActorCritic:
    return ActorCritic(observations, actions, NetworkConfig(**settings), seeded())


def stirred(policy: ActorCritic) -> ActorCritic:
    """As if it had learned something: no weight is as it was, the normalizers have seen much."""
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=seeded(1)) * 0.2)
    policy.update_observation_moments(torch.randn(50, *policy.observation_space.shape, generator=seeded(2)) * 3 + 1)
    policy.update_return_moments(torch.randn(50, generator=seeded(3)) * 20)
    return policy


def some_observations(n: int = 7) -> np.ndarray:
    return np.random.default_rng(4).normal(size=(n, 3)).astype(np.float32)


class TestInitialWeights:
    @pytest.mark.parametrize(("network", "head_gain"), [("actor", 0.01), ("critic", 1.0)])
    def test_orthogonal_with_the_known_gains(self, network, head_gain):
        layers = [m for m in getattr(model(hidden_sizes=(8, 5)), network) if isinstance(m, torch.nn.Linear)]
        for layer, gain in zip(layers, [math.sqrt(2), math.sqrt(2), head_gain], strict=True):
            rows, columns = layer.weight.shape
            gram = layer.weight.T @ layer.weight if rows >= columns else layer.weight @ layer.weight.T
            assert torch.allclose(gram, gain**2 * torch.eye(min(rows, columns)), atol=1e-5 * gain)
            assert (layer.bias == 0).all()

    def test_a_new_policy_acts_nearly_at_random_around_the_middle(self):
        discrete, continuous = model(spaces.Discrete(4)), model(BOUNDED)
        inputs = torch.from_numpy(some_observations())
        chances = discrete.actor(inputs).softmax(-1)
        assert ((chances - 0.25).abs() < 0.02).all()
        assert (continuous.actor(inputs).abs() < 0.05).all()

    def test_the_generator_decides_and_nothing_else(self):
        torch.manual_seed(1)
        one = model()
        torch.manual_seed(2)
        two = model()
        other = ActorCritic(OBSERVATIONS, BOUNDED, NetworkConfig(), seeded(9))
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
        assert not torch.equal(one.actor[0].weight, other.actor[0].weight)
        assert not torch.equal(one.actor[0].weight, one.critic[0].weight)

    def test_without_orthogonal_init_too(self):
        one, two = model(orthogonal_init=False), model(orthogonal_init=False)
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
        weight = one.actor[0].weight
        assert (weight.abs() <= 1 / math.sqrt(3)).all()

    def test_sizes_activation_and_first_spread_are_the_settings(self):
        policy = model(hidden_sizes=(8, 5, 3), activation="relu", log_std_init=-0.5)
        assert [type(m).__name__ for m in policy.critic] == ["Linear", "ReLU"] * 3 + ["Linear"]
        assert [m.out_features for m in policy.actor if isinstance(m, torch.nn.Linear)] == [8, 5, 3, 2]
        assert policy.log_std is not None
        assert policy.log_std.tolist() == [-0.5, -0.5]
        assert type(model().actor[1]) is torch.nn.Tanh

    def test_no_hidden_layer_is_possible(self):
        assert len(model(hidden_sizes=()).actor) == 1


class TestActionUnits:
    def test_bounded_dimensions_are_rescaled_and_clipped(self):
        sampled = torch.tensor([[-1.0, -1.0], [0.0, 0.0], [1.0, 1.0], [0.5, -0.5], [-7.0, 9.0]])
        expected = np.array([[-2, 0], [0, 5], [2, 10], [1, 2.5], [-2, 10]], np.float32)
        given = model().to_environment(sampled)
        assert np.array_equal(given, expected)
        assert given.dtype == np.float32

    def test_without_rescaling_they_are_only_clipped(self):
        sampled = torch.tensor([[-1.0, -1.0], [0.5, 4.0], [-7.0, 99.0]])
        expected = np.array([[-1, 0], [0.5, 4], [-2, 10]], np.float32)
        assert np.array_equal(model(rescale_actions=False).to_environment(sampled), expected)

    def test_dimensions_without_two_bounds_stay_as_they_are(self):
        space = spaces.Box(np.array([-np.inf, -0.5, -4], np.float32), np.array([3, np.inf, 4], np.float32))
        given = model(space).to_environment(torch.tensor([[5.0, -2.0, 0.5], [-80.0, 80.0, -0.25]]))
        assert np.array_equal(given, np.array([[3, -0.5, 2], [-80, 80, -1]], np.float32))

    @pytest.mark.parametrize(
        "space", [spaces.Box(-1, 3, (2, 2), np.float32), spaces.Box(-1, 3, (4,), np.float64)], ids=["matrix", "float64"]
    )
    def test_shape_and_type_are_those_of_the_space(self, space):
        given = model(space).to_environment(torch.rand(6, 4))
        assert (given.shape, given.dtype) == ((6, *space.shape), space.dtype)
        assert all(space.contains(action) for action in given)

    def test_discrete_actions_begin_at_the_spaces_start(self):
        policy = model(spaces.Discrete(3, start=-1))
        assert policy.to_environment(torch.tensor([0, 1, 2])).tolist() == [-1, 0, 1]

    def test_each_call_gives_a_fresh_array(self):
        for space in (spaces.Discrete(3), spaces.Box(-1, 1, (2,), np.float32), spaces.Box(-np.inf, np.inf, (2,))):
            policy = model(space)
            sampled = torch.zeros(4, dtype=torch.int64) if space.shape == () else torch.zeros(4, 2)
            given = policy.to_environment(sampled)
            given += 1
            assert (policy.to_environment(sampled) == 0).all()
            assert (sampled == 0).all()

    def test_the_largest_floats_as_bounds_are_bearable(self):
        largest = np.finfo(np.float32).max
        given = model(spaces.Box(-largest, largest, (1,), np.float32)).to_environment(torch.tensor([[0.0], [0.5]]))
        assert np.isfinite(given).all()
        assert given[0] == 0


class TestActing:
    @pytest.mark.parametrize("space", SPACES, ids=str)
    @pytest.mark.parametrize("deterministic", [True, False])
    def test_actions_are_in_the_space_one_or_many(self, space, deterministic):
        policy = stirred(model(space, log_std_init=1.0))
        many = policy(some_observations(), deterministic=deterministic, seed=1)
        assert len(many) == 7
        assert all(space.contains(action) for action in many)
        one = policy(some_observations()[0], deterministic=deterministic, seed=1)
        assert space.contains(one)

    @pytest.mark.parametrize("space", SPACES, ids=str)
    def test_numpy_for_numpy_torch_for_torch(self, space):
        policy = stirred(model(space))
        observations = some_observations()
        tensors = torch.from_numpy(observations)
        action, action_t = policy(observations), policy(tensors)
        assert isinstance(action, np.ndarray)
        assert isinstance(action_t, torch.Tensor)
        assert np.array_equal(action, action_t.numpy())
        for method in (policy.value, lambda o: policy.log_prob(o, action if o is observations else action_t)):
            ours, theirs = method(observations), method(tensors)
            assert isinstance(ours, np.ndarray)
            assert isinstance(theirs, torch.Tensor)
            assert ours.shape == theirs.shape == (7,)
            assert np.array_equal(ours, theirs.numpy())
        assert isinstance(policy(tensors[0]), torch.Tensor)

    @pytest.mark.parametrize("space", SPACES, ids=str)
    def test_one_is_a_row_of_many(self, space):
        policy = stirred(model(space, normalize_observations=True))
        observations = some_observations()
        actions = policy(observations)
        for i, observation in enumerate(observations):
            one = policy(observation)
            assert np.allclose(one, actions[i], atol=1e-5)
            assert np.shape(one) == space.shape
            assert np.allclose(policy.value(observation), policy.value(observations)[i], atol=1e-5)
            single, batch = policy.log_prob(observation, actions[i]), policy.log_prob(observations, actions)
            assert np.shape(single) == ()
            assert np.allclose(single, batch[i], atol=1e-5)

    def test_deterministic_is_the_most_likely(self):
        discrete = stirred(model(spaces.Discrete(4, start=3)))
        inputs = torch.from_numpy(some_observations())
        assert np.array_equal(discrete(some_observations()), 3 + discrete.actor(inputs).argmax(-1).numpy())
        box = stirred(model())
        assert np.array_equal(box(some_observations()), box.to_environment(box.actor(inputs)))

    def test_a_seed_repeats_a_sample_and_touches_no_other_generator(self):
        policy = stirred(model())
        state = torch.get_rng_state()
        one, two = (policy(some_observations(), deterministic=False, seed=3) for _ in range(2))
        other = policy(some_observations(), deterministic=False, seed=4)
        assert np.array_equal(one, two)
        assert not np.array_equal(one, other)
        policy(some_observations())
        assert torch.equal(torch.get_rng_state(), state)

    def test_without_a_seed_samples_differ(self):
        policy = stirred(model())
        assert not np.array_equal(*(policy(some_observations(), deterministic=False) for _ in range(2)))

    @pytest.mark.parametrize("shape", [(4,), (7, 4), (2, 7, 3), ()])
    def test_a_wrong_shape_is_refused(self, shape):
        for method in (model(), model().value, lambda o: model().log_prob(o, np.zeros(2, np.float32))):
            with pytest.raises(ValueError, match="observation has shape"):
                method(np.zeros(shape, np.float32))

    def test_the_shapes_that_would_do_are_told(self):
        for shape, expected in (((3,), "(3,) or (N, 3)"), ((2, 3), "(2, 3) or (N, 2, 3)"), ((), "() or (N,)")):
            policy = model(observations=spaces.Box(-1, 1, shape, np.float32))
            with pytest.raises(ValueError, match=re.escape(f"has shape (5, 5); expected {expected}")):
                policy(np.zeros((5, 5), np.float32))

    @pytest.mark.parametrize("space", SPACES, ids=str)
    def test_a_batch_of_none_has_no_actions(self, space):
        policy = model(space)
        none = np.zeros((0, 3), np.float32)
        for deterministic in (True, False):
            actions = policy(none, deterministic=deterministic)
            assert actions.shape == (0, *space.shape)
            assert actions.dtype == policy(some_observations()).dtype
        assert policy.value(none).shape == policy.log_prob(none, actions).shape == (0,)

    @pytest.mark.parametrize("observation", [None, "text", {"x": 1}, [[1.0], 2.0]])
    def test_what_is_no_observation_is_refused(self, observation):
        for method in (model(), model().value, lambda o: model().log_prob(o, np.zeros(2, np.float32))):
            with pytest.raises(ValueError, match=r"observation is a .*, not an array of numbers"):
                method(observation)

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_what_is_not_finite_is_refused_with_its_place(self, value):
        observations = some_observations()
        observations[4, 1] = value
        with pytest.raises(ValueError, match=rf"observation\[4, 1\] is {value}; every number must be finite"):
            model()(observations)
        with pytest.raises(ValueError, match=rf"observation\[1\] is {value}"):
            model().value(observations[4])

    @pytest.mark.parametrize(("action", "said"), [(7, "7"), (1, "1"), (-1, "-1"), (2.5, "2.5")])
    def test_a_discrete_action_that_there_is_not_is_refused(self, action, said):
        policy = model(spaces.Discrete(2, start=2))
        with pytest.raises(ValueError, match=f"action is {said}; it must be a whole number from 2 to 3"):
            policy.log_prob(some_observations(2), np.array([2, action]))
        assert np.isfinite(policy.log_prob(some_observations(2), np.array([2.0, 3.0]))).all()

    @pytest.mark.parametrize("action", [None, np.zeros(3), np.array([0.0, np.nan]), "left"])
    def test_a_continuous_action_that_there_is_not_is_refused(self, action):
        with pytest.raises(ValueError, match=r"^action"):
            model().log_prob(some_observations(1)[0], action)

    @pytest.mark.parametrize("dtype", [np.float64, np.int64, np.uint8])
    def test_observations_of_any_number_type(self, dtype):
        policy = stirred(model())
        whole = np.array([[1, 2, 3], [0, 4, 1]])
        assert np.array_equal(policy(whole.astype(dtype)), policy(whole.astype(np.float32)))

    def test_observations_of_any_shape(self):
        policy = stirred(model(observations=spaces.Box(-1, 1, (2, 3), np.float32)))
        many = np.random.default_rng(0).uniform(-1, 1, (5, 2, 3)).astype(np.float32)
        assert policy(many).shape == (5, 2)
        assert np.allclose(policy(many[1]), policy(many)[1], atol=1e-6)
        assert policy.value(many[1]).shape == ()

    def test_observations_and_actions_of_a_single_number_without_a_dimension(self):
        policy = model(spaces.Box(-1, 1, (), np.float32), spaces.Box(-1, 1, (), np.float32))
        assert policy(np.zeros(5, np.float32)).shape == (5,)
        acted = policy.act(torch.zeros(5), seeded())
        assert policy.to_environment(acted.actions).shape == (5,)


class TestUnits:
    def test_value_is_in_the_environments_reward_units(self):
        scaled, plain = (stirred(model(normalize_rewards=on)) for on in (True, False))
        observations = some_observations()
        critic = plain.critic(torch.from_numpy(observations)).squeeze(-1).detach().numpy()
        assert np.allclose(plain.value(observations), critic)
        assert scaled.reward_scale == pytest.approx(
            torch.randn(50, generator=seeded(3)).double().mul(20).std(correction=0)
        )
        assert np.allclose(scaled.value(observations), critic * scaled.reward_scale, rtol=1e-5)
        assert np.allclose(scaled.scaled_values(torch.from_numpy(observations)), critic)

    def test_the_scale_is_one_before_anything_is_seen(self):
        assert model(normalize_rewards=True).reward_scale == 1.0

    def test_log_prob_of_discrete_actions(self):
        policy = stirred(model(spaces.Discrete(4, start=2)))
        observations = some_observations(4)
        expected = torch.distributions.Categorical(logits=policy.actor(torch.from_numpy(observations)))
        actions = np.array([2, 3, 4, 5])
        assert np.allclose(
            policy.log_prob(observations, actions), expected.log_prob(torch.from_numpy(actions - 2)).detach(), atol=1e-6
        )

    @pytest.mark.parametrize("rescale", [True, False])
    def test_log_prob_of_continuous_actions_is_the_density_in_the_environments_units(self, rescale):
        policy = stirred(model(rescale_actions=rescale))
        observations = some_observations()
        assert policy.log_std is not None
        plain = torch.distributions.Normal(policy.actor(torch.from_numpy(observations)), policy.log_std.exp())
        scale, offset = (
            (torch.tensor([2.0, 5.0]), torch.tensor([0.0, 5.0])) if rescale else (torch.ones(2), torch.zeros(2))
        )
        expected = torch.distributions.TransformedDistribution(
            plain, [torch.distributions.AffineTransform(offset, scale, cache_size=0)]
        )
        actions = torch.tensor([[0.3, 4.0]]).expand(7, 2)
        log_probs = policy.log_prob(observations, actions.numpy())
        assert np.allclose(log_probs, expected.log_prob(actions).sum(-1).detach(), atol=1e-5)

    def test_log_prob_integrates_to_one(self):
        policy = stirred(model(spaces.Box(-1.0, 5.0, (1,), np.float32), log_std_init=-1.0))
        grid = np.linspace(-20, 25, 20001, dtype=np.float32)[:, None]
        densities = np.exp(policy.log_prob(np.repeat(some_observations(1), len(grid), 0), grid))
        assert float(densities.sum() * 45 / 20000) == pytest.approx(1.0, abs=1e-3)

    @pytest.mark.parametrize("space", SPACES, ids=str)
    def test_log_prob_agrees_with_acting(self, space):
        policy = stirred(model(space, hidden_sizes=(4,), log_std_init=-1.0, normalize_observations=True))
        observations = some_observations(40)
        acted = policy.act(torch.from_numpy(observations), seeded(6))
        given = policy.to_environment(acted.actions)
        clipped = np.zeros(40, bool)
        jacobian = 0.0
        if isinstance(space, spaces.Box):
            bounded = np.isfinite(space.low)
            jacobian = float(np.log((space.high - space.low)[bounded] / 2).sum())
            outside = (given == space.low) | (given == space.high)
            clipped = outside.reshape(40, -1).any(1)
        assert (~clipped).sum() >= 10
        log_probs = policy.log_prob(observations, given)
        expected = acted.log_probs.numpy() - jacobian
        assert np.allclose(log_probs[~clipped], expected[~clipped], atol=1e-4)

    def test_acting_and_evaluating_agree(self):
        policy = stirred(model(normalize_observations=True))
        observations = torch.from_numpy(some_observations())
        acted = policy.act(observations, seeded(6))
        zeros, no = torch.zeros(7, 1), torch.zeros(7, 1, dtype=torch.bool)
        evaluated = policy.evaluate(
            Batch(observations[:, None], acted.actions[:, None], ~no, zeros, zeros, zeros, zeros, no, no)
        )
        assert torch.allclose(evaluated.log_probs[:, 0], acted.log_probs, atol=1e-6)
        assert torch.allclose(evaluated.values[:, 0], acted.values, atol=1e-6)
        assert evaluated.entropy.shape == (7, 1)
        assert evaluated.log_probs.requires_grad
        assert not acted.log_probs.requires_grad


class TestNormalizer:
    def test_observations_are_shifted_scaled_and_clipped(self):
        policy = model(normalize_observations=True, clip_observation=2.0)
        # Mean 1, 2, 3 and standard deviation 2, 4, 1.
        policy.update_observation_moments(torch.tensor([[3.0, 6.0, 4.0], [-1.0, -2.0, 2.0]]))
        plain = model()
        observation = np.array([2.0, 0.0, 9.0], np.float32)
        assert np.allclose(policy.value(observation), plain.value(np.array([0.5, -0.5, 2.0], np.float32)), atol=1e-6)
        assert np.allclose(policy(observation), plain(np.array([0.5, -0.5, 2.0], np.float32)), atol=1e-6)

    def test_off_means_off(self):
        policy = stirred(model())
        raw = torch.from_numpy(some_observations())
        assert torch.equal(policy.scaled_values(raw), policy.critic(raw).squeeze(-1))

    def test_before_anything_is_seen_it_does_nothing(self):
        observations = some_observations()
        assert np.allclose(
            model(normalize_observations=True).value(observations), model().value(observations), atol=1e-6
        )

    def test_a_feature_that_never_varies_makes_no_nan(self):
        policy = model(normalize_observations=True)
        policy.update_observation_moments(torch.tensor([[1.0, 7.0, 0.0], [2.0, 7.0, 0.0]]))
        assert np.isfinite(policy.value(np.array([[1.5, 7.0, 0.0], [1.5, 8.0, -1.0]], np.float32))).all()

    def test_acting_valuing_and_scoring_change_nothing(self):
        policy = stirred(model(normalize_observations=True, normalize_rewards=True))
        before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
        observations = some_observations() * 100
        policy.act(torch.from_numpy(observations), seeded())
        policy.log_prob(observations, policy(observations, deterministic=False))
        policy.value(observations)
        assert all(torch.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())


class TestState:
    def test_everything_that_decides_is_in_the_state_dict(self):
        settings = dict(normalize_observations=True, normalize_rewards=True)
        policy, other = stirred(model(**settings)), model(**settings)
        observations = some_observations()
        assert not np.array_equal(policy(observations), other(observations))
        other.load_state_dict({name: tensor.clone() for name, tensor in policy.state_dict().items()})
        assert np.array_equal(policy(observations), other(observations))
        assert np.array_equal(policy.value(observations), other.value(observations))
        assert policy.reward_scale == other.reward_scale
        assert float(other.observation_count) == 50

    def test_normalizers_are_kept_in_double_precision(self):
        state = model().state_dict()
        moments = [f"{kind}_{name}" for kind in ("observation", "return") for name in ("mean", "variance", "count")]
        assert all(state[name].dtype == torch.float64 for name in moments)

    def test_optimizer_and_module_share_memory_after_loading(self):
        policy = model(normalize_observations=True)
        optimizer = FlatAdam(policy, learning_rate=0.1)
        policy.load_state_dict({name: tensor.clone() for name, tensor in stirred(model()).state_dict().items()})
        flat = torch.cat([parameter.detach().flatten() for parameter in policy.parameters()])
        assert torch.equal(optimizer.weights, flat)
        before = flat.clone()
        optimizer.zero_grad()
        policy.evaluate(
            Batch(
                torch.ones(2, 1, 3),
                torch.ones(2, 1, 2),
                torch.ones(2, 1, dtype=torch.bool),
                *[torch.zeros(2, 1)] * 4,
                *[torch.zeros(2, 1, dtype=torch.bool)] * 2,
            )
        ).log_probs.sum().backward()
        assert optimizer.clipped_step(1.0) > 0
        after = torch.cat([parameter.detach().flatten() for parameter in policy.parameters()])
        assert torch.equal(optimizer.weights, after)
        assert not torch.equal(after, before)


class TestRefusals:
    @pytest.mark.parametrize(
        "space", [spaces.Discrete(3), spaces.Dict({"a": OBSERVATIONS}), spaces.MultiBinary(3)], ids=str
    )
    def test_observation_spaces(self, space):
        """As they are; `PackedObservations` of them can be learned from (test_packing.py)."""
        with pytest.raises(UserError, match="serial or workers"):
            model(observations=space)

    def test_spaces_without_a_number(self):
        with pytest.raises(UserError, match=r"observation space is Box.*holds no numbers.*observation_space"):
            model(observations=spaces.Box(-1, 1, (0,), np.float32))
        with pytest.raises(UserError, match=r"action space is Box.*holds no numbers.*action_space"):
            model(spaces.Box(-1, 1, (2, 0), np.float32))
        assert model(spaces.Discrete(1))(some_observations()).tolist() == [0] * 7

    @pytest.mark.parametrize(
        ("space", "said"),
        [
            (spaces.Box(0, 5, (2,), np.int64), "a Box of actions is of floats"),
            (spaces.Dict({"a": spaces.Discrete(2)}), "serial or workers"),
            (spaces.Text(3), "Box, Discrete, MultiDiscrete, MultiBinary, and Dicts and Tuples of these"),
        ],
        ids=str,
    )
    def test_action_spaces(self, space, said):
        with pytest.raises(UserError, match=said):
            model(space)

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            (dict(hidden_sizes=(64, 0)), "hidden_sizes is"),
            (dict(hidden_sizes=(64, 1.5)), "hidden_sizes is"),
            (dict(activation="tahn"), "Did you mean 'tanh'?"),
            (dict(log_std_init=float("nan")), "log_std_init is nan"),
            (dict(clip_observation=0.0), "clip_observation is 0.0"),
            (dict(clip_reward=-1.0), "clip_reward is -1.0"),
        ],
    )
    def test_settings(self, settings, words):
        with pytest.raises(UserError) as caught:
            NetworkConfig(**settings)
        assert words in str(caught.value)
