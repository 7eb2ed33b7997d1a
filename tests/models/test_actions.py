"""What an actor's outputs mean in each space: distributions, masks, and the way to the environment and back."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from proximo.core.distributions import (
    GSDE,
    Beta,
    Categorical,
    DiagonalGaussian,
    Joint,
    MultiCategorical,
    SquashedGaussian,
)
from proximo.errors import UserError
from proximo.models.actions import ActionHead
from proximo.models.control import ActorCritic, NetworkConfig
from proximo.models.packing import PackedActions, PackedObservations

BOX = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 10.0], np.float32))
HYBRID = spaces.Dict({"aim": BOX, "button": spaces.Discrete(3, start=1), "keys": spaces.MultiBinary(2)})


def head_for(space: spaces.Space, **settings: Any) -> ActionHead:
    settings = {"kind": "gaussian", "has_own_std": False, "log_std_init": -1.0, "rescale": True} | settings
    return ActionHead(space, **settings)


@pytest.mark.parametrize(
    ("space", "settings", "kind", "n_outputs", "n_log_stds"),
    [
        (spaces.Discrete(4), {}, Categorical, 4, 0),
        (spaces.MultiDiscrete([2, 3]), {}, MultiCategorical, 5, 0),
        (spaces.MultiBinary(3), {}, MultiCategorical, 6, 0),
        (BOX, {}, DiagonalGaussian, 2, 2),
        (BOX, {"has_own_std": True}, DiagonalGaussian, 4, 0),
        (BOX, {"kind": "squashed_gaussian"}, SquashedGaussian, 2, 2),
        (BOX, {"kind": "squashed_gaussian", "has_own_std": True}, SquashedGaussian, 4, 0),
        (BOX, {"kind": "beta"}, Beta, 4, 0),
        (PackedActions(HYBRID), {}, Joint, 9, 2),
    ],
)
def test_each_space_has_its_distribution_and_actions_that_fit(space, settings, kind, n_outputs, n_log_stds):
    head = head_for(space, **settings)
    assert (head.n_outputs, sum(head.log_stds)) == (n_outputs, n_log_stds)
    outputs = torch.randn(64, n_outputs, generator=torch.Generator().manual_seed(0))
    log_std = torch.full((n_log_stds,), -0.5) if n_log_stds else None
    distribution = head.distribution(outputs, log_std)
    assert type(distribution) is kind
    actions = distribution.sample(torch.Generator().manual_seed(1))
    assert distribution.log_prob(actions).shape == (64,)
    rows = head.to_environment(actions)
    for row in rows:
        action = space.unpack(row) if isinstance(space, PackedActions) else row
        assert (space.source if isinstance(space, PackedActions) else space).contains(action)
    if kind is not Joint:
        on_device = head.on_device(torch.device("cpu"))(actions)
        assert np.array_equal(on_device.numpy(), rows)


def test_the_way_to_the_environment_by_hand():
    # aim: -2..2 and 0..10, so 0.5 and -1 of the policy are 1 and 0; option 0 of the button is 1
    head = head_for(PackedActions(HYBRID))
    rows = head.to_environment(torch.tensor([[0.5, -1.0, 0.0, 1.0, 0.0], [-3.0, 0.0, 2.0, 0.0, 1.0]]))
    assert rows.tolist() == [[1.0, 0.0, 1.0, 1.0, 0.0], [-2.0, 5.0, 3.0, 0.0, 1.0]]  # clipped to the bounds
    assert head.from_environment(rows[:1]).tolist() == [[0.5, -1.0, 0.0, 1.0, 0.0]]
    assert head.log_scale == pytest.approx(math.log(2.0) + math.log(5.0))


@pytest.mark.parametrize("kind", ["squashed_gaussian", "beta"])
def test_bounded_distributions_reach_the_bounds_and_no_further(kind: str):
    head = head_for(BOX, kind=kind)
    outputs = torch.tensor([[60.0, -60.0]]) if kind == "squashed_gaussian" else torch.tensor([[9e6, 0.0, -90.0, 9e6]])
    log_std = torch.zeros(2) if kind == "squashed_gaussian" else None
    distribution = head.distribution(outputs, log_std)
    assert head.to_environment(distribution.mode())[0].tolist() == pytest.approx([2.0, 0.0], abs=1e-4)
    again = torch.from_numpy(head.from_environment(np.array([[2.0, 0.0]], np.float32)))
    assert head.distribution(torch.zeros_like(outputs), log_std).log_prob(again).isfinite().all()


def test_bounds_are_needed_for_what_lies_between_them():
    for kind in ("squashed_gaussian", "beta"):
        with pytest.raises(UserError, match="action is unbounded"):
            head_for(spaces.Box(-np.inf, np.inf, (1,)), kind=kind)
        with pytest.raises(UserError, match="rescale_actions is off"):
            head_for(BOX, kind=kind, rescale=False)


def test_whole_numbers_in_a_box_are_refused_by_their_place():
    with pytest.raises(UserError, match=r"action\['n'\]'s space is .*MultiDiscrete"):
        head_for(PackedActions(spaces.Dict({"n": spaces.Box(0, 9, (1,), np.int64)})))


class TestMasks:
    def test_every_choice_of_a_joint_action_has_its_part_of_the_mask(self):
        head = head_for(PackedActions(HYBRID))
        mask = torch.tensor([[True, False, True, False, True, True, False]]).expand(500, -1)
        distribution = head.distribution(torch.zeros(500, 9), torch.zeros(2), mask)
        rows = head.to_environment(distribution.sample(torch.Generator().manual_seed(0)))
        assert set(rows[:, 2]) == {1.0, 3.0}  # the button: not 2
        assert set(rows[:, 3]) == {1.0}  # the first key must be pressed,
        assert set(rows[:, 4]) == {0.0}  # the second not
        # What is left is a choice of two beside the aim.
        aim = DiagonalGaussian(torch.zeros(1, 2), torch.zeros(2)).entropy()
        assert distribution.entropy()[0].item() == pytest.approx(aim.item() + math.log(2))

    def test_masked_entries_have_no_probability_anywhere_in_the_policy(self):
        space = PackedObservations(spaces.Box(-1, 1, (2,)), (4,))
        policy = ActorCritic(space, spaces.Discrete(4), NetworkConfig(), torch.Generator().manual_seed(0))
        seen, mask = np.zeros((300, 2), np.float32), np.tile([False, True, False, True], (300, 1))
        actions = policy(seen, deterministic=False, seed=0, action_mask=mask)
        assert set(actions.tolist()) == {1, 3}
        log_probs = [policy.log_prob(seen[0], action, action_mask=mask[0]) for action in range(4)]
        assert log_probs[0] == log_probs[2] == -math.inf
        assert math.exp(log_probs[1]) + math.exp(log_probs[3]) == pytest.approx(1.0)
        assert np.isfinite(policy.value(seen)).all()
        with pytest.raises(ValueError, match="there is no action_mask"):
            policy(seen)
        with pytest.raises(ValueError, match="forbids every action"):
            policy(seen[0], action_mask=np.zeros(4))

    def test_a_mask_for_a_policy_without_any_is_refused(self):
        policy = ActorCritic(spaces.Box(-1, 1, (2,)), spaces.Discrete(4), NetworkConfig())
        with pytest.raises(ValueError, match="trained without masks"):
            policy(np.zeros(2), action_mask=np.ones(4))


class TestPolicies:
    SEEN = spaces.Dict({"camera": spaces.Box(0, 255, (36, 36, 3), np.uint8), "x": spaces.Box(-1, 1, (2,))})

    def one(self, n: int | None = None) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(0)
        leading = () if n is None else (n,)
        return {
            "camera": rng.integers(0, 256, (*leading, 36, 36, 3), np.uint8),
            "x": rng.uniform(-1, 1, (*leading, 2)).astype(np.float32),
        }

    @pytest.mark.parametrize("encoder", ["auto", "nature_cnn", "impala"])
    def test_images_and_numbers_are_both_seen(self, encoder: Any):
        policy = ActorCritic(
            PackedObservations(self.SEEN),
            PackedActions(HYBRID),
            NetworkConfig(encoder=encoder, normalize_observations=True),
        )
        one = self.one()
        value = policy.value(one)
        assert value != policy.value(one | {"x": -one["x"]})
        assert value != policy.value(one | {"camera": 255 - one["camera"]})
        action = policy(one)
        assert HYBRID.contains(action)
        assert np.isfinite(policy.log_prob(one, action))

    def test_a_batch_is_one_after_the_other_and_torch_is_as_numpy(self):
        policy = ActorCritic(PackedObservations(self.SEEN), PackedActions(HYBRID), NetworkConfig())
        batch = self.one(3)
        actions = policy(batch)
        assert actions["aim"].shape == (3, 2)
        assert np.allclose(actions["aim"][1], policy({key: value[1] for key, value in batch.items()})["aim"], atol=1e-5)
        as_torch = policy({key: torch.from_numpy(value) for key, value in batch.items()})
        assert isinstance(as_torch["aim"], torch.Tensor)
        assert np.array_equal(as_torch["aim"].numpy(), actions["aim"])
        assert policy.value(batch).shape == (3,)
        assert policy.log_prob(batch, actions).shape == (3,)

    def test_images_need_an_encoder_and_numbers_have_no_use_for_one(self):
        with pytest.raises(UserError, match="encoder is 'mlp', but the observations have images"):
            ActorCritic(PackedObservations(self.SEEN), spaces.Discrete(2), NetworkConfig(encoder="mlp"))
        space = PackedObservations(spaces.Discrete(5))
        with pytest.raises(UserError, match="there is no image"):
            ActorCritic(space, spaces.Discrete(2), NetworkConfig(encoder="impala"))

    def test_a_number_that_is_none_is_named(self):
        policy = ActorCritic(PackedObservations(self.SEEN), spaces.Discrete(2), NetworkConfig())
        with pytest.raises(ValueError, match=r"observation\['x'\]\[1\] is nan"):
            policy(self.one() | {"x": np.array([0.0, np.nan])})

    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"distribution": "squashed_gaussian"},
            {"distribution": "beta"},
            {"state_dependent_std": True},
            {"distribution": "squashed_gaussian", "state_dependent_std": True},
            {"distribution": "gsde", "log_std_init": 1.0},
        ],
    )
    def test_log_prob_is_the_density_in_the_environments_units(self, settings: dict[str, Any]):
        """Sums to one over a fine grid of what the environment takes."""
        space = spaces.Box(3.0, 7.0, (1,), np.float32)
        policy = ActorCritic(
            spaces.Box(-1, 1, (2,)),
            space,
            NetworkConfig(**{"log_std_init": -1.0} | settings),
            torch.Generator().manual_seed(0),
        )
        is_within = settings.get("distribution") in ("squashed_gaussian", "beta")
        actions = np.linspace(3.0, 7.0, 40_001)[1:-1] if is_within else np.linspace(-15.0, 25.0, 40_001)
        log_probs = policy.log_prob(np.full((len(actions), 2), 0.3, np.float32), actions[:, None].astype(np.float64))
        assert np.trapezoid(np.exp(log_probs), actions) == pytest.approx(1.0, abs=2e-3)

    @pytest.mark.parametrize("name", ["beta", "gsde"])
    def test_two_spreads_that_hang_on_the_state_are_one_too_many(self, name: Any):
        with pytest.raises(UserError, match=f"state_dependent_std is on and distribution is '{name}'"):
            NetworkConfig(distribution=name, state_dependent_std=True)


class TestStateDependentExploration:
    def policy(self, **settings: Any) -> ActorCritic:
        config = NetworkConfig(distribution="gsde", hidden_sizes=(6,), **settings)
        return ActorCritic(spaces.Box(-1, 1, (2,)), BOX, config, torch.Generator().manual_seed(0))

    def test_what_it_begins_with_hangs_on_no_width(self):
        for width in (4, 400):
            config = NetworkConfig(distribution="gsde", hidden_sizes=(width,), log_std_init=-0.7)
            policy = ActorCritic(spaces.Box(-1, 1, (2,)), BOX, config)
            assert policy.noise_shape == (width, 2)
            assert policy.log_std is not None
            of_ones = torch.ones(width).square() @ (2 * policy.log_std.detach()).exp()
            assert of_ones.log().tolist() == pytest.approx([-1.4, -1.4], abs=1e-4)

    def test_one_seed_is_one_function_of_the_state(self):
        policy = self.policy(log_std_init=-2.0)
        seen = np.random.default_rng(0).uniform(-1, 1, (5, 2)).astype(np.float32)
        together = policy(seen, deterministic=False, seed=3)
        assert np.allclose(together, [policy(row, deterministic=False, seed=3) for row in seen], atol=1e-5)
        assert not np.allclose(together, policy(seen, deterministic=False, seed=4), atol=1e-3)
        assert not np.allclose(policy(seen, deterministic=False), policy(seen, deterministic=False), atol=1e-3)
        assert np.array_equal(policy(seen), policy(seen))
        # Noise that is linear in the features: with them twice as large it is, too.
        features = policy.actor[:-1](torch.from_numpy(seen)).detach()
        deviation = torch.from_numpy((together - policy(seen)) / np.array([2.0, 5.0], np.float32))
        matrix = torch.linalg.lstsq(features[:, :5], deviation).solution
        assert matrix.isfinite().all()

    def test_its_spread_teaches_the_features_nothing(self):
        policy = self.policy()
        distribution = policy._distribution(torch.randn(7, 2))
        distribution.entropy().sum().backward()
        assert all(weight.grad is None for weight in policy.actor.parameters())
        assert policy.log_std is not None
        assert policy.log_std.grad is not None
        assert policy.log_std.grad.abs().min() > 0

    def test_choices_beside_it_are_drawn_as_ever(self):
        config = NetworkConfig(distribution="gsde", hidden_sizes=(6,), log_std_init=-3.0)
        policy = ActorCritic(spaces.Box(-1, 1, (2,)), PackedActions(HYBRID), config, torch.Generator().manual_seed(0))
        assert policy.noise_shape == (6, 2)
        seen = torch.zeros(200, 2) + 0.5
        noise = torch.randn(1, 6, 2).expand(200, -1, -1)
        actions = policy.act(seen, torch.Generator().manual_seed(0), noise=noise).actions
        assert len(actions[:, :2].unique(dim=0)) == 1  # one state, one matrix: one aim
        assert len(actions[:, 2].unique()) == 3

    def test_a_policy_of_choices_alone_has_no_matrix(self):
        policy = ActorCritic(spaces.Box(-1, 1, (2,)), spaces.Discrete(3), NetworkConfig(distribution="gsde"))
        assert policy.noise_shape is None

    @pytest.mark.parametrize("value", [0, -2, 1.5, True])
    def test_how_long_a_matrix_is_kept_is_checked(self, value: Any):
        with pytest.raises(UserError, match="sde_sample_freq is "):
            NetworkConfig(sde_sample_freq=value)


class TestClasses:
    @pytest.mark.parametrize(
        ("kind", "name"),
        [(DiagonalGaussian, "gaussian"), (SquashedGaussian, "squashed_gaussian"), (Beta, "beta"), (GSDE, "gsde")],
    )
    def test_a_class_is_its_name(self, kind: Any, name: str):
        assert NetworkConfig(distribution=kind) == NetworkConfig(distribution=name)  # type: ignore[arg-type]

    def test_a_class_without_a_name_is_refused_with_those_that_have_one(self):
        class Mine(Beta):
            pass

        with pytest.raises(UserError, match=r"Mine, a class that no name stands for; there are .*Beta \('beta'\)"):
            NetworkConfig(distribution=Mine)  # type: ignore[arg-type]
        with pytest.raises(UserError, match="what choices always have"):
            NetworkConfig(distribution=Categorical)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=r"distribution is 'bata'; .*Did you mean 'beta'\?"):
            NetworkConfig(distribution="bata")  # type: ignore[arg-type]
