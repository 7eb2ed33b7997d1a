"""The written-out gradient against the one that torch derives: same steps, same stops, same refusals."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from proximo.algorithms import compiled
from proximo.algorithms.adam import FlatAdam, NonFiniteUpdateError
from proximo.algorithms.compiled import Pace
from proximo.algorithms.ppo import PPO
from proximo.core.batch import Batch
from proximo.errors import UserError
from proximo.models.control import ActorCritic, NetworkConfig
from tests.algorithms.paths import CASES, COMMON, both_ways, updated


@pytest.fixture(params=["fused", "compiled", "compiled on two threads"])
def path(request, monkeypatch) -> Iterator[str]:
    """The paths with the gradient written out."""
    path, _, on_two = request.param.partition(" ")
    if path == "compiled":
        pytest.importorskip("numba", reason="numba is not installed")
    before = torch.get_num_threads()
    torch.set_num_threads(2 if on_two else 1)
    monkeypatch.setattr(Pace, "n_threads", lambda pace: 2)
    yield path
    torch.set_num_threads(before)


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("kind", ["discrete", "continuous"])
@pytest.mark.parametrize("settings", CASES, ids=lambda settings: ",".join(settings) or "plain")
def test_a_whole_update_agrees_with_the_eager_one(plain_policy, make_batch, path, kind, activation, settings):
    (eager, expected, _), (fused, metrics, _) = both_ways(
        lambda: plain_policy(kind, activation=activation), make_batch, path, **settings
    )
    assert eager.n_evaluations > 0
    assert fused.n_evaluations == 0
    torch.testing.assert_close(fused.flat(), eager.flat(), rtol=0, atol=1e-11)
    assert metrics.keys() == expected.keys()
    assert metrics == pytest.approx(expected, abs=1e-10)
    assert metrics["approx_kl_max"] > 0.003  # the policy went somewhere
    if settings not in ({"batch_size": 1000}, {"batch_size": 2, "n_epochs": 1}):
        assert metrics["clip_fraction"] > 0.02  # and out of the band


@pytest.mark.parametrize("kind", ["discrete", "continuous"])
def test_single_precision_agrees_to_its_rounding(plain_policy, make_batch, path, kind):
    (eager, expected, _), (fused, metrics, _) = both_ways(
        lambda: plain_policy(kind, dtype=torch.float32), make_batch, path, entropy_coef=0.01, value_clip_epsilon=0.2
    )
    torch.testing.assert_close(fused.flat(), eager.flat(), rtol=0, atol=2e-3)
    assert metrics == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("target_kl", [1e-6, 0.005, 0.01, 0.02])
def test_the_kl_stop_is_the_same(plain_policy, make_batch, path, target_kl):
    (eager, expected, _), (fused, metrics, _) = both_ways(plain_policy, make_batch, path, target_kl=target_kl)
    assert metrics["n_updates"] == expected["n_updates"] < 12
    assert metrics["kl_stopped"] == expected["kl_stopped"] == 1.0
    assert metrics["approx_kl_max"] > 1.5 * target_kl
    assert metrics == pytest.approx(expected, abs=1e-10)
    torch.testing.assert_close(fused.flat(), eager.flat(), rtol=0, atol=1e-11)


def test_at_the_first_minibatch_every_ratio_is_one(plain_policy, make_batch, path):
    for kind in ("discrete", "continuous"):
        policy = plain_policy(kind)
        metrics, _ = updated(policy, make_batch(policy), update_path=path, n_epochs=1, batch_size=1000)
        assert abs(metrics["approx_kl"]) < 1e-12
        assert metrics["clip_fraction"] == 0.0


def test_gradients_of_another_update_are_not_left_in(plain_policy, make_batch, path):
    results = []
    for way in ("eager", path):
        policy = plain_policy("continuous")
        optimizer = FlatAdam(policy, learning_rate=0.0)
        for seed, way in ((0, "eager"), (1, path), (2, "eager")):
            algorithm = PPO(**COMMON, update_path=way)
            algorithm.update(policy, optimizer, make_batch(policy, seed=seed), torch.Generator().manual_seed(seed))
        results.append(policy.flat())
    torch.testing.assert_close(*results, rtol=0, atol=1e-10)


NOT_FINITE = [(name, math.nan) for name in ("rewards", "observations", "log_probs", "values")]
NOT_FINITE += [("rewards", math.inf), ("values", -math.inf)]


@pytest.mark.parametrize("settings", [{}, {"value_clip_epsilon": 0.2}], ids=["plain", "value_clip"])
@pytest.mark.parametrize("kind", ["discrete", "continuous"])
@pytest.mark.parametrize(("field", "bad"), NOT_FINITE)
def test_what_is_not_finite_is_refused_and_the_weights_stay_bit_identical(
    plain_policy, make_batch, path, field, bad, kind, settings
):
    # A NaN is neither above nor below anything: every comparison in the written-out gradient must let it through.
    policy = plain_policy(kind)
    batch = make_batch(policy)
    spoilt = getattr(batch, field).clone()
    spoilt[0, 0] = bad
    before = policy.flat()
    with pytest.raises(NonFiniteUpdateError):
        updated(policy, dataclasses.replace(batch, **{field: spoilt}), update_path=path, batch_size=1000, **settings)
    assert torch.equal(policy.flat(), before)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("target_kl", [None, 0.01])
def test_a_ratio_that_overflows_ends_as_on_the_eager_path(plain_policy, make_batch, path, sign, target_kl):
    # Its advantage below 0: the loss is infinite, before any stop. Above 0 it is clipped, and only its gradient is bad.
    ends = []
    for way in ("eager", path):
        policy = plain_policy("continuous")
        batch = make_batch(policy, masked=0.0)
        log_probs, rewards = batch.log_probs.clone(), torch.zeros_like(batch.rewards)
        log_probs[0, 0], rewards[0, 0] = -2000.0, sign
        ended = torch.ones_like(batch.done)
        zero = torch.zeros_like(batch.values)
        changed = dict(log_probs=log_probs, rewards=rewards, values=zero, terminated=ended, done=ended)
        before = policy.flat()
        try:
            metrics, _ = updated(
                policy,
                dataclasses.replace(batch, **changed),
                update_path=way,
                batch_size=1000,
                target_kl=target_kl,
                normalize_advantages=False,
            )
            ends.append((metrics["kl_stopped"], metrics["n_updates"]))
        except NonFiniteUpdateError:
            ends.append("refused")
        assert torch.equal(policy.flat(), before)
    assert ends[0] == ends[1]
    assert ends[0] == ("refused" if sign < 0 or target_kl is None else (1.0, 0))


@pytest.mark.parametrize("way_out", ["refused", "stopped", "whole"])
def test_the_next_order_is_the_references_whatever_ended_an_update(plain_policy, make_batch, path, way_out):
    states = []
    for way in ("eager", path):
        policy = plain_policy()
        batch = make_batch(policy)
        if way_out == "refused":
            batch = dataclasses.replace(batch, rewards=batch.rewards.masked_fill(batch.rewards > 1.0, math.nan))
        generator = torch.Generator().manual_seed(3)
        target_kl = 0.005 if way_out == "stopped" else None
        algorithm = PPO(**COMMON, update_path=way, target_kl=target_kl)
        try:
            algorithm.update(policy, FlatAdam(policy, learning_rate=0.0), batch, generator)
        except NonFiniteUpdateError:
            assert way_out == "refused"
        states.append(generator.get_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("actions", [gym.spaces.Discrete(2), gym.spaces.Box(-1, 1, (6,)), gym.spaces.Discrete(1)])
@pytest.mark.parametrize("hidden_sizes", [(64, 64), (), (33,)])
def test_after_an_iteration_of_real_networks_parameters_agree_to_1e_5(path, actions, hidden_sizes):
    n_observed = 17
    weights = []
    for way in ("eager", path):
        space = gym.spaces.Box(-10, 10, (n_observed,))
        policy = ActorCritic(space, actions, NetworkConfig(hidden_sizes=hidden_sizes), torch.Generator().manual_seed(0))
        generator = torch.Generator().manual_seed(1)
        observations = torch.randn(4, 128, n_observed, generator=generator)
        acted = policy.act(observations.flatten(0, 1), generator)
        flags = torch.rand(4, 128, generator=generator) < 0.02

        def rows(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.unflatten(0, (4, 128))

        batch = Batch(
            observations=observations,
            actions=rows(acted.actions),
            mask=torch.ones_like(flags),
            rewards=torch.randn(4, 128, generator=generator),
            log_probs=rows(acted.log_probs),
            values=rows(acted.values),
            next_values=torch.randn(4, 128, generator=generator),
            terminated=flags,
            done=flags,
        )
        optimizer = FlatAdam(policy, learning_rate=0.0)
        algorithm = PPO(update_path=way, learning_rate=3e-4, n_epochs=10, batch_size=64, entropy_coef=0.01)
        before = optimizer.weights.clone()
        algorithm.update(policy, optimizer, batch, torch.Generator().manual_seed(3))
        assert (optimizer.weights - before).abs().max() > 1e-3
        weights.append(optimizer.weights)
    torch.testing.assert_close(*weights, rtol=0, atol=1e-5)


def in_a_fork(work, seconds: float) -> int | None:
    """The exit code of a fork that does it; None if it had to be killed."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_of_a_process_that_has_trained_trains_too(plain_policy, make_batch, path):
    policy = plain_policy()
    batch = make_batch(policy)  # here: torch's own matrix products may hang in a fork
    updated(policy, batch, update_path=path)  # the second thread is there now
    assert in_a_fork(lambda: updated(policy, batch, update_path=path), 60.0) == 0


def test_nobody_waits_for_a_thread_that_does_not_come():
    kernels = pytest.importorskip("proximo.algorithms.kernels", reason="numba is not installed")
    arrived = np.zeros(128, np.int64)
    kernels.abandon(arrived, kernels.CRITIC)
    assert not kernels._wait(arrived, 64, 1)
    arrived[64] = 3
    assert kernels._wait(arrived, 64, 3)


def test_an_interrupt_before_the_actor_begins_leaves_no_critic_waiting(plain_policy, make_batch, monkeypatch):
    pytest.importorskip("numba", reason="numba is not installed")
    policy = plain_policy()
    optimizer, batch, ppo = (
        FlatAdam(policy, learning_rate=0.0),
        make_batch(policy),
        PPO(**COMMON, update_path="compiled"),
    )
    monkeypatch.setattr(Pace, "n_threads", lambda pace: 2)
    second = compiled._second_thread()

    class Interrupted:
        def submit(self, *call: Any) -> Any:
            waiting.append(second.submit(*call))
            raise KeyboardInterrupt

    waiting: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "_second_thread", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            ppo.update(policy, optimizer, batch, torch.Generator())
    waiting[0].result(timeout=60)
    assert ppo.update(policy, optimizer, batch, torch.Generator())["n_updates"] > 0


def test_gradients_that_were_replaced_are_refused(plain_policy, make_batch, path):
    policy = plain_policy()
    optimizer = FlatAdam(policy, learning_rate=0.0)
    policy.zero_grad()
    with pytest.raises(RuntimeError, match="the gradients were replaced"):
        PPO(**COMMON, update_path=path).update(policy, optimizer, make_batch(policy), torch.Generator())


@pytest.mark.parametrize("kind", ["discrete", "continuous"])
def test_minibatches_of_one_step_agree_and_make_no_nan(plain_policy, make_batch, path, kind):
    (eager, *_), (fused, metrics, _) = both_ways(
        lambda: plain_policy(kind), make_batch, path, shape=(1, 6), batch_size=1
    )
    torch.testing.assert_close(fused.flat(), eager.flat(), rtol=0, atol=1e-11)
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("constant", [0.1, 10.1])
def test_equal_advantages_are_no_signal_on_either_path(plain_policy, make_batch, path, constant):
    # Whitening leaves 0; the rounding of their mean, blown up to -1 or 1 everywhere, would move the actor.
    def flat_rewards(policy, *shape: int) -> Batch:
        batch = make_batch(policy, *shape, masked=0.0)
        zero, ended = torch.zeros_like(batch.rewards), torch.ones_like(batch.done)
        return dataclasses.replace(batch, rewards=zero + constant, values=zero, terminated=ended, done=ended)

    for way in ("eager", path):
        policy = plain_policy(dtype=torch.float32)
        batch = flat_rewards(policy, 4, 16)
        metrics, _ = updated(policy, batch, update_path=way, n_epochs=1, batch_size=64)
        assert abs(metrics["policy_loss"]) < 1e-3


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_masked_steps_change_nothing_whatever_stands_there(plain_policy, make_batch, path, poison):
    results = []
    for fill in (None, poison):
        policy = plain_policy()
        batch = make_batch(policy, masked=0.4)
        if fill is not None:
            floats = ("rewards", "log_probs", "values", "next_values")
            changed = {name: getattr(batch, name).masked_fill(~batch.mask, fill) for name in floats}
            observations = batch.observations.masked_fill(~batch.mask[..., None], fill)
            batch = dataclasses.replace(batch, **changed, observations=observations)
        updated(policy, batch, update_path=path)
        results.append(policy.flat())
    assert torch.equal(*results)


def test_the_path_is_chosen_by_what_is_possible(plain_policy, tiny_policy, make_batch):
    def evaluations(policy, **settings) -> int:
        updated(policy, make_batch(policy, 1, 5), n_epochs=1, **settings)
        return policy.n_evaluations

    assert evaluations(plain_policy()) == 0
    assert evaluations(plain_policy(), update_path="eager") > 0
    assert evaluations(plain_policy(), microbatch_size=4) > 0
    assert evaluations(plain_policy(), objective="kl_penalty") > 0
    assert evaluations(tiny_policy()) > 0  # lays nothing open


@pytest.mark.parametrize("settings", [{"objective": "kl_penalty"}, {"microbatch_size": 8}])
@pytest.mark.parametrize("path", ["fused", "compiled"])
def test_a_path_that_cannot_be_is_refused(settings, path):
    with pytest.raises(UserError, match=f"update_path is '{path}'"):
        PPO(update_path=path, **settings)


class TestPace:
    """What it says after a history of updates; `busy` is what two threads cost by then."""

    @staticmethod
    def play(pace: Pace, n: int, one: float, two: float) -> list[int]:
        counts = []
        for _ in range(n):
            counts.append(pace.n_threads())
            pace.took(counts[-1], {1: one, 2: two}[counts[-1]])
        return counts

    def test_it_tries_both_and_takes_the_faster(self):
        assert self.play(Pace(2), 10, one=1.0, two=0.6) == [1, 2, 1, 2] + [2] * 6
        assert self.play(Pace(2), 10, one=1.0, two=1.1) == [1, 2, 1, 2] + [1] * 6

    def test_it_goes_over_at_once_when_the_other_core_gets_work(self):
        pace = Pace(2)
        self.play(pace, 20, one=1.0, two=0.6)
        assert self.play(pace, 5, one=1.0, two=20.0) == [2, 1, 1, 1, 1]

    def test_it_looks_again_and_comes_back(self):
        pace = Pace(2)
        self.play(pace, 20, one=1.0, two=1.2)
        counts = self.play(pace, 2 * Pace.LOOK_AGAIN, one=1.0, two=0.6)
        assert counts.count(1) <= Pace.LOOK_AGAIN
        assert counts[-1] == 2

    def test_it_seldom_looks_at_what_is_far_slower(self):
        counts = self.play(Pace(2), 40 * Pace.LOOK_AGAIN, one=1.0, two=20.0)
        assert 2 < counts.count(2) < 8
