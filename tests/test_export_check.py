"""How far two policies are apart, worked out by hand, and the observations that files are tried on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces

from proximo.errors import UserError
from proximo.export_check import answers, differences, how_many, joined, observations_drawn, rounding
from proximo.models.control import ActorCritic, NetworkConfig
from proximo.models.graph import PolicyGraph
from proximo.models.packing import PackedActions, PackedObservations

SEEN = spaces.Box(-1.0, 1.0, (3,))


def graph_of(actions: spaces.Space, seen: spaces.Space = SEEN, **settings) -> PolicyGraph:
    config = NetworkConfig(orthogonal_init=False, **settings)
    policy = ActorCritic(seen, actions, config, torch.Generator().manual_seed(3))
    return PolicyGraph(policy.eval().requires_grad_(False)).eval()


def apart(graph: PolicyGraph, n: int, **changes: np.ndarray) -> dict[str, np.ndarray]:
    """What is found where the outputs of a policy are changed by so much."""
    given = joined(graph, observations_drawn(graph, n, seed=1))
    wanted = answers(graph, graph.policy, given)
    found = {name: (array + changes.get(name, 0)).astype(array.dtype) for name, array in wanted.items()}
    return differences(graph, given, wanted, found)


def test_bounded_actions_are_measured_in_half_ranges():
    graph = graph_of(spaces.Box(np.array([-0.01, 10.0]), np.array([0.01, 30.0]), dtype=np.float64))
    found = apart(graph, 2, action=np.array([[2e-6, 0.0], [1e-6, 5e-5]]))
    np.testing.assert_allclose(found["action"], [2e-4, 1e-4], rtol=1e-6)
    assert (found["value"] == 0).all()


def test_a_last_bit_of_the_action_itself_is_no_difference():
    """At 1000, neighbours in float32 are 6.1e-5 apart, which is 1.2e-4 of this half range."""
    graph = graph_of(spaces.Box(999.5, 1000.5, (1,)))
    given = joined(graph, observations_drawn(graph, 4, seed=1))
    wanted = answers(graph, graph.policy, given)
    for bits, allowed in ((1, True), (4, False)):
        found = wanted | {"action": wanted["action"] + np.float32(bits * 2.0**-14)}
        assert (differences(graph, given, wanted, found)["action"] <= 1e-6).all() == allowed


def test_unbounded_actions_are_measured_by_themselves_above_1():
    graph = graph_of(spaces.Box(-np.inf, np.inf, (1,), np.float64))
    graph.policy.actor[-1].weight.zero_()
    graph.policy.actor[-1].bias.fill_(50.0)
    assert apart(graph, 1, action=np.array([[0.5]]))["action"] == pytest.approx(0.01)
    graph.policy.actor[-1].bias.fill_(0.25)
    assert apart(graph, 1, action=np.array([[0.5]]))["action"] == pytest.approx(0.5)


def test_values_are_measured_in_the_scale_of_rewards():
    graph = graph_of(spaces.Discrete(2), normalize_rewards=True)
    graph.policy.return_variance.fill_(400.0 - 1e-8)
    graph.policy.return_count.fill_(1.0)
    graph.policy.critic[-1].weight.zero_()
    graph.policy.critic[-1].bias.fill_(0.5)  # a value of 10, and a reward scale of 20
    assert apart(graph, 1, value=np.array([1.0]))["value"] == pytest.approx(1 / 20)
    graph.policy.critic[-1].bias.fill_(5.0)  # a value of 100
    assert apart(graph, 1, value=np.array([1.0]))["value"] == pytest.approx(1 / 100)


def test_choices_are_measured_by_how_much_less_likely_they_are():
    graph = graph_of(spaces.Discrete(3, start=5))
    graph.policy.actor[-1].weight.zero_()
    graph.policy.actor[-1].bias.copy_(torch.tensor([2.0, 2.0, 0.5]))  # 0 and 1 are a tie, which goes to 0
    np.testing.assert_allclose(apart(graph, 3, action=np.array([0, 1, 2]))["action"], [0, 0, 1.5], atol=1e-6)
    for beyond in (-1, 3):  # no such choice
        np.testing.assert_array_equal(apart(graph, 2, action=np.array([0, beyond]))["action"], [0, np.inf])


def test_a_choice_that_the_mask_forbids_is_infinitely_far():
    seen = PackedObservations(SEEN, [2])
    graph = graph_of(spaces.Discrete(2), seen)
    drawn = observations_drawn(graph, 2, seed=1)
    drawn["action_mask"] = np.array([[1, 0], [0, 1]], np.int8)
    given = joined(graph, drawn)
    wanted = answers(graph, graph.policy, given)
    np.testing.assert_array_equal(wanted["action"], [0, 1])
    found = wanted | {"action": np.array([1, 1])}
    np.testing.assert_array_equal(differences(graph, given, wanted, found)["action"], [np.inf, 0])


def test_a_part_is_measured_by_itself():
    actions = PackedActions(spaces.Dict({"aim": spaces.Box(-2.0, 2.0, (1,)), "key": spaces.Discrete(3)}))
    found = apart(graph_of(actions), 3, action_aim=np.array([[0.0], [0.5], [0.0]], np.float32))
    np.testing.assert_allclose(found["action_aim"], [0, 0.25, 0], atol=1e-6)
    assert (found["action_key"] == 0).all()


def test_no_number_and_another_kind_are_differences():
    graph = graph_of(spaces.Box(-1.0, 1.0, (1,)))
    assert apart(graph, 2, action=np.array([[np.nan], [0.0]]))["action"].tolist() == [np.inf, 0.0]
    given = joined(graph, observations_drawn(graph, 2, seed=1))
    wanted = answers(graph, graph.policy, given)
    for wrong in (wanted["action"][:, 0], wanted["action"].astype(np.float64)):
        with pytest.raises(UserError, match=r"its output 'action' is float\d\d of shape"):
            differences(graph, given, wanted, wanted | {"action": wrong})


def test_rounding_is_some_last_bits():
    """Of a policy of usual size; of one that is a sum of large terms that cancel it is much more."""
    graph = graph_of(spaces.Box(-1.0, 1.0, (1,)))
    given = joined(graph, observations_drawn(graph, 64, seed=1))
    usual = rounding(graph, given, answers(graph, graph.policy, given))
    assert all(0 < value < 1e-6 for value in usual.values())
    graph.policy.actor[2].weight.zero_()
    graph.policy.actor[2].bias.copy_(torch.tensor([2.0, -2.0] * 32))
    graph.policy.actor[-1].weight.fill_(1e5)
    graph.policy.actor[-1].bias.fill_(0.25)
    assert rounding(graph, given, answers(graph, graph.policy, given))["action"] > 1e-3


def test_draws_cover_the_space_and_what_the_normalizer_has_seen():
    seen = spaces.Box(np.array([-5.0, 0.0, -np.inf, 100.0]), np.array([5.0, 1e6, np.inf, np.inf]), dtype=np.float64)
    graph = graph_of(spaces.Discrete(2), seen, normalize_observations=True)
    graph.policy.observation_mean.copy_(torch.tensor([0.0, 10.0, 1000.0, 200.0]))
    graph.policy.observation_variance.copy_(torch.tensor([0.01, 1.0, 1.0, 25.0]))
    drawn = observations_drawn(graph, 256, seed=0)["observation"]
    assert drawn.dtype == np.float64
    assert seen.contains(drawn.astype(np.float64)[0])
    assert (drawn >= seen.low).all()
    assert (drawn <= seen.high).all()
    known, other = drawn[::2], drawn[1::2]
    np.testing.assert_allclose(known.mean(0), [0.0, 10.0, 1000.0, 200.0], atol=3.0)
    np.testing.assert_allclose(known.std(0)[:3], [0.2, 2.0, 2.0], rtol=0.3)
    assert other[:, 0].max() > 4.5
    assert other[:, 1].max() > 9e5
    assert abs(other[:, 2].mean()) < 2
    np.testing.assert_array_equal(drawn, observations_drawn(graph, 256, seed=0)["observation"])


def test_masks_that_are_drawn_leave_something_to_do():
    graph = graph_of(spaces.MultiDiscrete([2, 1, 3]), PackedObservations(SEEN, [2, 1, 3]))
    masks = observations_drawn(graph, 200, seed=0)["action_mask"]
    for first, last in ((0, 2), (2, 3), (3, 6)):
        assert masks[:, first:last].any(1).all()
    assert 0.4 < masks.mean() < 0.85


def test_large_observations_are_fewer():
    assert how_many(graph_of(spaces.Discrete(2))) == 256
    screen = spaces.Box(0, 255, (4, 84, 84), np.uint8)
    assert how_many(graph_of(spaces.Discrete(2), screen)) == 256
    assert how_many(graph_of(spaces.Discrete(2), spaces.Box(0, 255, (3, 512, 512), np.uint8))) == 10
