"""Policies that remember: one step at a time is the same as along a row, and what is remembered is the caller's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

from proximo.core.batch import Batch
from proximo.models.control import ActorCritic, NetworkConfig

SEEN, DONE = spaces.Box(-1.0, 1.0, (3,), np.float32), spaces.Discrete(4)

NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
"""Of torch's layers."""


def policy_with(seed: int = 0, **settings) -> ActorCritic:
    config = NetworkConfig(**({"memory": "gru", "memory_size": 5, "hidden_sizes": (6,)} | settings))
    return ActorCritic(SEEN, DONE, config, torch.Generator().manual_seed(seed))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


KINDS = [
    {"memory": "gru"},
    {"memory": "lstm"},
    {"memory": "lstm", "shared_memory": True},
    {"memory": "gru", "memory_layers": 3},
    {"memory": "lstm", "memory_layers": 2, "orthogonal_init": False},
]


def stepped(policy: ActorCritic, observations: Tensor, keep: Tensor, memory: Tensor) -> Batch:
    """Acted on one step at a time, with a state that is emptied before the steps where `keep` is False."""
    n, length = keep.shape
    hidden = memory.clone()
    acted = []
    generator = seeded(3)
    for t in range(length):
        memory[~keep[:, t]] = 0.0
        acted.append(policy.act(observations[:, t], generator, memory))
    actions, log_probs, values = (torch.stack(list(column), 1) for column in zip(*acted, strict=True))
    done = torch.cat([~keep[:, 1:], torch.zeros(n, 1, dtype=torch.bool)], 1)
    mask = torch.ones(n, length, dtype=torch.bool)
    zeros = torch.zeros(n, length)
    return Batch(observations, actions, mask, zeros, log_probs, values, zeros, done, done, hidden=hidden.unsqueeze(1))


@pytest.mark.parametrize("settings", KINDS)
def test_along_a_row_it_is_what_it_was_step_by_step(settings):
    """Also where episodes begin within the row, and from a state that is not empty."""
    policy = policy_with(**settings)
    observations = torch.randn(2, 9, 3, generator=seeded(1))
    keep = torch.ones(2, 9, dtype=torch.bool)
    keep[0, 3] = keep[1, 7] = keep[1, 8] = False
    memory = torch.randn(policy.blank_memory(2).shape, generator=seeded(2))
    batch = stepped(policy, observations, keep, memory.clone())
    batch = replace(batch, hidden=memory.unsqueeze(1))
    new = policy.evaluate(batch)
    torch.testing.assert_close(new.log_probs, batch.log_probs)
    torch.testing.assert_close(new.values, batch.values)


def test_state_of_torchs_own_layers_with_the_same_weights():
    """Two layers of the actor's LSTM, step by step, against nn.LSTM: outputs, and the order h, c, h, c."""
    policy = policy_with(memory="lstm", memory_layers=2, orthogonal_init=False)
    assert policy.memory is not None
    stack, layer = policy.memory.actor, nn.LSTM(3, 5, num_layers=2)
    with torch.no_grad():
        for k in (0, 1):
            for ours, theirs in zip(("inputs", "hidden", "inputs_bias", "hidden_bias"), NAMES, strict=True):
                weight = stack.get_parameter(f"{ours}_{k}")
                nn.init.normal_(weight, generator=seeded(k))
                layer.get_parameter(f"{theirs}_l{k}").copy_(weight)
        inputs, state = torch.randn(6, 2, 3, generator=seeded(5)), torch.zeros(2, stack.state_size)
        outputs = torch.stack([stack.step(x, state) for x in inputs])
        expected, (h, c) = layer(inputs)
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(state, torch.cat([h[0], c[0], h[1], c[1]], 1))


def test_actor_and_critic_have_memories_of_their_own_unless_shared():
    apart, shared = policy_with(), policy_with(shared_memory=True)
    assert apart.memory is not None
    assert apart.memory.critic is not None
    assert {id(w) for w in apart.critic_weights()} >= {id(w) for w in apart.memory.critic.parameters()}
    assert shared.memory is not None
    assert {id(w) for w in shared.policy_weights()} >= {id(w) for w in shared.memory.parameters()}
    assert apart.blank_memory(2).shape == (2, 10)
    assert shared.blank_memory(2).shape == (2, 5)
    assert policy_with(memory="lstm", memory_layers=2).blank_memory(1).shape == (1, 40)


class TestForPeople:
    def test_it_goes_on_from_what_it_gave_back(self):
        policy = policy_with()
        rows = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
        memory, together = policy.fresh_memory(), policy.blank_memory(1)
        for row in rows:
            given, before = memory.copy(), memory.copy()
            value, log_prob = policy.value(row, memory=memory), policy.log_prob(row, 1, memory=memory)
            action, memory = policy(row, memory=given)
            assert np.array_equal(given, before), "what is given stays as it is"
            assert not np.array_equal(given, memory)
            expected = policy.act(torch.from_numpy(row[None]), seeded(), together)
            assert value == pytest.approx(float(expected.values), abs=1e-6)
            assert action in policy.action_space
            assert log_prob <= 0
        np.testing.assert_allclose(memory, together[0].numpy(), atol=1e-6)

    def test_many_at_once_are_each_alone(self):
        policy = policy_with(memory="lstm")
        rows = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
        _, memory = policy(rows, memory=policy.fresh_memory(2))
        for row, own in zip(rows, memory, strict=True):
            np.testing.assert_allclose(policy(row, memory=policy.fresh_memory())[1], own, atol=1e-6)

    def test_torch_for_torch(self):
        _, memory = policy_with()(torch.zeros(3), memory=torch.zeros(10))
        assert isinstance(memory, Tensor)

    @pytest.mark.parametrize(
        ("memory", "said"),
        [
            (None, "fresh_memory"),
            (np.zeros(4), r"memory has shape \(4,\); expected \(10,\)"),
            (np.zeros((1, 10)), r"expected \(10,\)"),
            (np.full(10, np.nan), "every number must be finite"),
            ("all of it", "not an array of numbers"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, memory, said):
        for asked in (
            lambda: policy_with()(np.zeros(3), memory=memory),
            lambda: policy_with().value(np.zeros(3), memory=memory),
            lambda: policy_with().log_prob(np.zeros(3), 0, memory=memory),
        ):
            with pytest.raises(ValueError, match=said):
                asked()

    @pytest.mark.parametrize("n", [-1, 1.5, "2"])
    def test_how_many_is_a_whole_number(self, n):
        with pytest.raises(ValueError, match="whole number"):
            policy_with().fresh_memory(n)

    def test_a_policy_without_memory_takes_none(self):
        with pytest.raises(ValueError, match="memory is given to a policy that has none"):
            policy_with(memory="none", memory_size=64)(np.zeros(3), memory=np.zeros(3))


def test_a_batch_is_cut_where_it_is_known_what_was_remembered():
    policy = policy_with()
    observations = torch.randn(2, 8, 3, generator=seeded(1))
    keep = torch.ones(2, 8, dtype=torch.bool)
    keep[1, 4] = keep[0, 5] = False
    whole = stepped(policy, observations, keep, policy.blank_memory(2))
    middle = policy.blank_memory(2)
    stepped(policy, observations[:, :4], keep[:, :4], middle)
    middle[1] = 0.0  # an episode begins with the second piece: what was remembered then is nothing
    assert whole.hidden is not None
    cut = replace(whole, hidden=torch.stack([whole.hidden[:, 0], middle], 1)).as_pieces()
    assert cut.mask.shape == (4, 4)
    assert torch.equal(cut.observations[1], observations[0, 4:])
    for batch in (whole, cut):
        torch.testing.assert_close(policy.evaluate(batch).log_probs, batch.log_probs)
    gradient = torch.autograd.grad(policy.evaluate(cut).values.sum(), policy.critic_weights())
    assert all(part.isfinite().all() for part in gradient)
