"""The update that never asks the host, run on the CPU, against the eager one: same steps, stops and refusals."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from gymnasium import spaces

from proximo.algorithms.adam import FlatAdam, NonFiniteUpdateError
from proximo.algorithms.graphed import GraphedUpdate
from proximo.algorithms.ppo import PPO
from proximo.core.batch import Batch
from proximo.core.kl import ReferenceKL
from proximo.errors import UserError
from proximo.models.control import ActorCritic, NetworkConfig
from tests.algorithms.paths import CASES, COMMON, both_ways, updated
from tests.on_device import stand_in

MORE_CASES = [
    {"clip_epsilon_high": 0.28, "dual_clip": 1.1},
    {"batch_size": 1, "n_epochs": 1},
    {"value_coef": 0.0},
]


@pytest.mark.parametrize("kind", ["discrete", "continuous"])
@pytest.mark.parametrize("settings", CASES + MORE_CASES, ids=lambda settings: ",".join(settings) or "plain")
@pytest.mark.parametrize("shared", [False, True], ids=["plain", "shared"])
def test_a_whole_update_agrees_with_the_eager_one(plain_policy, tiny_policy, make_batch, kind, settings, shared):
    make = tiny_policy if shared else plain_policy
    (eager, expected, reference), (graphed, metrics, optimizer) = both_ways(
        lambda: make(kind), make_batch, "graphed", **settings
    )
    torch.testing.assert_close(graphed.flat(), eager.flat(), rtol=0, atol=1e-11)
    assert metrics.keys() == expected.keys()
    assert metrics == pytest.approx(expected, abs=1e-10)
    assert optimizer.n_steps == reference.n_steps == metrics["n_updates"]
    for name, moment in reference.state_dict().items():
        torch.testing.assert_close(optimizer.state_dict()[name], moment, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", ["discrete", "continuous"])
def test_single_precision_agrees_to_its_rounding(plain_policy, make_batch, kind):
    (eager, expected, _), (graphed, metrics, _) = both_ways(
        lambda: plain_policy(kind, dtype=torch.float32), make_batch, "graphed", entropy_coef=0.01, learning_rate=3e-4
    )
    torch.testing.assert_close(graphed.flat(), eager.flat(), rtol=0, atol=1e-5)
    assert metrics == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("target_kl", [1e-6, 0.005, 0.01, 0.02])
def test_the_kl_stop_is_the_same(plain_policy, make_batch, target_kl):
    (eager, expected, reference), (graphed, metrics, optimizer) = both_ways(
        plain_policy, make_batch, "graphed", target_kl=target_kl
    )
    assert metrics["n_updates"] == expected["n_updates"] < 12
    assert metrics["kl_stopped"] == expected["kl_stopped"] == 1.0
    assert metrics == pytest.approx(expected, abs=1e-10)
    torch.testing.assert_close(graphed.flat(), eager.flat(), rtol=0, atol=1e-11)
    assert optimizer.n_steps == reference.n_steps


def test_one_graph_serves_iterations_of_other_sizes_and_schedules(plain_policy, make_batch):
    results = []
    for path in ("eager", "graphed"):
        policy = plain_policy("continuous")
        optimizer = FlatAdam(policy, learning_rate=0.0)
        graphs, metrics = [], []
        for seed, (masked, remaining) in enumerate([(0.0, 1.0), (0.2, 0.6), (0.3, 0.5), (0.0, 0.1)]):
            algorithm = PPO(
                **COMMON, update_path=path, learning_rate_schedule="linear", clip_schedule="linear", clip_epsilon=0.1
            ).at(remaining, 1.0)
            batch = make_batch(policy, 4, 13, seed=seed, masked=masked)
            metrics.append(algorithm.update(policy, optimizer, batch, torch.Generator().manual_seed(seed)))
            graphs.append(optimizer.graphed)
        assert len({id(graph) for graph in graphs}) == 1
        assert isinstance(graphs[0], GraphedUpdate) == (path == "graphed")
        results.append((policy.flat(), metrics))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=1e-10)
    for ours, theirs in zip(results[1][1], results[0][1], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-9)


def test_other_settings_make_another_graph(plain_policy, make_batch):
    policy = plain_policy()
    optimizer = FlatAdam(policy, learning_rate=0.0)
    graphs = []
    for settings in ({}, {"n_epochs": 2}, {"entropy_coef": 0.1}, {"entropy_coef": 0.1, "clip_epsilon_high": 0.3}):
        algorithm = PPO(**(COMMON | settings), update_path="graphed")
        algorithm.update(policy, optimizer, make_batch(policy), torch.Generator().manual_seed(0))
        graphs.append(optimizer.graphed)
    assert graphs[0] is graphs[1]
    assert len({id(graph) for graph in graphs}) == 3


NOT_FINITE = [(name, math.nan) for name in ("rewards", "observations", "log_probs", "values")]
NOT_FINITE += [("rewards", math.inf), ("values", -math.inf), ("rewards", 1e200)]


@pytest.mark.parametrize("batch_size", [13, 1000])
@pytest.mark.parametrize("settings", [{}, {"value_clip_epsilon": 0.2}, {"target_kl": 1e9}], ids=lambda s: ",".join(s))
@pytest.mark.parametrize(("field", "bad"), NOT_FINITE)
def test_what_is_not_finite_is_refused_where_the_eager_path_refuses_it(
    plain_policy, make_batch, field, bad, settings, batch_size
):
    weights, messages, steps = [], [], []
    for path in ("eager", "graphed"):
        policy = plain_policy()
        optimizer = FlatAdam(policy, learning_rate=0.0)
        batch = make_batch(policy, 4, 13)
        spoilt = getattr(batch, field).clone()
        spoilt[2, 4] = bad
        batch = dataclasses.replace(batch, **{field: spoilt})
        algorithm = PPO(**(COMMON | settings | {"batch_size": batch_size}), update_path=path)
        with pytest.raises(NonFiniteUpdateError) as caught:
            algorithm.update(policy, optimizer, batch, torch.Generator().manual_seed(3))
        weights.append(policy.flat())
        messages.append(str(caught.value))
        steps.append(optimizer.n_steps)
        assert optimizer.first_moment.isfinite().all()
    torch.testing.assert_close(*weights, rtol=0, atol=1e-11)
    assert messages[0] == messages[1]
    assert steps[0] == steps[1]


def test_after_a_refusal_it_goes_on(plain_policy, make_batch):
    policy = plain_policy()
    optimizer = FlatAdam(policy, learning_rate=0.0)
    algorithm = PPO(**COMMON, update_path="graphed")
    batch = make_batch(policy)
    spoilt = dataclasses.replace(batch, rewards=batch.rewards * math.nan)
    with pytest.raises(NonFiniteUpdateError):
        algorithm.update(policy, optimizer, spoilt, torch.Generator())
    metrics = algorithm.update(policy, optimizer, batch, torch.Generator())
    assert metrics["n_updates"] == 12
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("normalize", [False, True])
def test_uint8_pictures_stay_so_until_the_policy_sees_them(normalize):
    space = spaces.Box(0, 255, (6, 6, 2), "uint8")
    results = []
    for path in ("eager", "graphed"):
        policy = ActorCritic(
            space,
            spaces.Discrete(3),
            NetworkConfig(hidden_sizes=(8,), normalize_observations=normalize),
            torch.Generator().manual_seed(0),
        )
        generator = torch.Generator().manual_seed(1)
        observations = torch.randint(0, 256, (2, 12, 6, 6, 2), dtype=torch.uint8, generator=generator)
        acted = policy.act(observations.flatten(0, 1), generator)
        flags = torch.zeros(2, 12, dtype=torch.bool)
        batch = Batch(
            observations=observations,
            actions=acted.actions.view(2, 12),
            mask=~flags,
            rewards=torch.randn(2, 12, generator=generator),
            log_probs=acted.log_probs.view(2, 12),
            values=acted.values.view(2, 12),
            next_values=acted.values.view(2, 12),
            terminated=flags,
            done=flags,
        )
        optimizer = FlatAdam(policy, learning_rate=0.0)
        PPO(batch_size=5, n_epochs=2, update_path=path).update(
            policy, optimizer, batch, torch.Generator().manual_seed(3)
        )
        results.append(optimizer.weights)
        if isinstance(optimizer.graphed, GraphedUpdate):
            assert optimizer.graphed._columns["observations"].dtype == torch.uint8
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", [{"objective": "kl_penalty"}, {"microbatch_size": 8}, {"microbatch_tokens": 64}])
def test_settings_that_cannot_be_are_refused(settings):
    with pytest.raises(UserError, match="update_path is 'graphed'"):
        PPO(update_path="graphed", **settings)


def test_policies_that_cannot_be_are_refused(tiny_policy, make_batch):
    policy = tiny_policy()
    batch = make_batch(policy)
    batch = dataclasses.replace(batch, ref_log_probs=batch.log_probs)
    arguments = (FlatAdam(policy, learning_rate=0.0), batch, torch.Generator())
    with pytest.raises(UserError, match="'graphed', which is for control"):
        PPO(update_path="graphed").update(policy, *arguments, reference_kl=ReferenceKL(0.1, "k2"))
    policy.has_memory = True
    with pytest.raises(UserError, match="'graphed', which is for control"):
        PPO(update_path="graphed").update(policy, *arguments)


@pytest.mark.parametrize("settings", [{"target_kl": 0.01}, {"batch_size": 1000}, {"clip_epsilon_high": 0.3}])
@pytest.mark.parametrize("kind", ["discrete", "continuous"])
def test_capturing_leaves_no_trace_and_a_step_never_waits_for_the_host(
    plain_policy, make_batch, monkeypatch, kind, settings
):
    ends = []
    for capture in (False, True):
        if capture:
            monkeypatch.setattr("proximo.algorithms.graphed.captured", stand_in)
        policy = plain_policy(kind)
        metrics, optimizer = updated(policy, make_batch(policy), update_path="graphed", **settings)
        ends.append((policy.flat(), optimizer.second_moment, metrics))
    assert torch.equal(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])
    assert ends[0][2] == ends[1][2]
