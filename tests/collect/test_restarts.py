"""Environments that fail and are made anew: what is cut, what goes on, and when it is too often."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from itertools import count
from typing import Any, ClassVar

import cloudpickle  # noqa: TID251
import numpy as np
import pytest
import torch

from proximo.collect.envs import EnvironmentFault, Step, episode_seed
from proximo.collect.rollout import Carry, rollout
from proximo.collect.serial_envs import SerialEnvs
from proximo.collect.worker_handle import Worker
from proximo.collect.workers import WorkerEnvs
from proximo.core.advantages import gae
from proximo.errors import UserError
from proximo.models.control import ActorCritic, NetworkConfig
from proximo.runs.checkpoint import named_checkpoint
from proximo.training.config import EnvironmentConfig
from proximo.training.control import iterate, restore
from proximo.training.environments import make_envs
from tests.environments import FAULTS_IN_A_RESET, FAULTS_IN_A_STEP, FAULTS_OF_THE_PROCESS, Faulty
from tests.training.running import begin, config_with, differing, tensors_of, train

cloudpickle.register_pickle_by_value(sys.modules["tests.environments"])
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def seeded(fault: str, *seeds: int) -> Faulty:
    """Ends after eight steps; `fault` happens on the third step, or in the reset, of episodes with these seeds."""
    return Faulty(fault, seeds=seeds, length=8)


def one_faulty(fault: str):
    numbers = count()
    return lambda: Faulty(fault, faulty=next(numbers) == 0)


def copied(step: Step) -> Step:
    return Step(*(array.copy() for array in step))


def play(envs: Any, n_steps: int) -> list[Step]:
    actions = np.zeros((envs.n_envs, *envs.action_space.shape), envs.action_space.dtype)
    return [copied(envs.step(actions)) for _ in range(n_steps)]


@pytest.mark.parametrize("fault", FAULTS_IN_A_STEP)
def test_a_step_that_fails_is_no_experience_and_cuts_its_episode(fault):
    envs, sound = SerialEnvs(one_faulty(fault), 2, 3, max_restarts=1), SerialEnvs(lambda: Faulty(""), 2, 3)
    envs.reset()
    sound.reset()
    steps, expected = play(envs, 30), play(sound, 30)
    lost = [t for t, step in enumerate(steps) if not step.valid[0]]
    assert lost == [8]  # the third step of episode 1; episodes have six
    step = steps[8]
    assert (step.truncated[0], step.terminated[0], step.rewards[0]) == (True, False, 0.0)
    assert np.array_equal(step.final_observations[0], steps[7].observations[0])
    assert envs.n_restarts == len(envs.faults) == 1
    assert envs.faults[0].record["episode"] == 1
    assert envs.faults[0].record["step"] == 3
    for one, other in zip(steps, expected, strict=True):  # the environment beside it notices nothing
        assert all(np.array_equal(a[1], b[1]) for a, b in zip(one, other, strict=True))


def test_the_episode_after_a_fault_is_the_next_one_with_its_own_seed():
    envs = SerialEnvs(one_faulty("raises"), 1, 3, max_restarts=1)
    envs.reset()
    steps = play(envs, 9)
    fresh = Faulty("")
    expected, _ = fresh.reset(seed=episode_seed(3, 0, 2))
    assert np.array_equal(steps[8].observations[0], expected)


@pytest.mark.parametrize("fault", FAULTS_IN_A_RESET)
def test_an_episode_that_cannot_begin_is_passed_over(fault):
    envs = SerialEnvs(one_faulty(fault), 1, 3, max_restarts=1)
    envs.reset()
    steps = play(envs, 12)
    assert all(step.valid[0] for step in steps)  # the step that ended the episode before was whole
    assert envs.n_restarts == 1
    expected, _ = Faulty("").reset(seed=episode_seed(3, 0, 2))
    assert np.array_equal(steps[5].observations[0], expected)


def test_one_fault_too_many_is_raised_and_says_so():
    envs = SerialEnvs(lambda: Faulty("NaN reward", at=1, episode=0), 1, 3, max_restarts=3)
    envs.reset()
    play(envs, 3)
    with pytest.raises(EnvironmentFault, match=r"the reward is nan(.|\n)*restarted 3 times \(max_restarts\)"):
        play(envs, 1)


def test_several_environments_may_fail_in_one_step():
    envs = SerialEnvs(lambda: Faulty("NaN reward"), 3, 3, max_restarts=3)
    envs.reset()
    step = play(envs, 9)[8]
    assert not step.valid.any()
    assert envs.n_restarts == 3


def test_without_leave_a_fault_is_raised_as_ever():
    envs = SerialEnvs(one_faulty("raises"), 1, 3)
    envs.reset()
    with pytest.raises(EnvironmentFault, match="the arm is stuck"):
        play(envs, 9)


BAD = (episode_seed(3, 2, 1), episode_seed(3, 0, 2))


@pytest.mark.parametrize("fault", ["raises", "NaN reward"])
def test_workers_restart_as_this_process_does(fault):
    serial = SerialEnvs(lambda: seeded(fault, *BAD), 5, 3, max_restarts=4)
    envs = WorkerEnvs(lambda: seeded(fault, *BAD), 5, 3, n_workers=2, max_restarts=4)
    assert np.array_equal(envs.reset(), serial.reset())
    for one, other in zip(play(envs, 40), play(serial, 40), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    assert envs.n_restarts == serial.n_restarts == 2
    assert sorted(map(str, envs.faults)) == sorted(map(str, serial.faults)) or fault == "raises"  # tracebacks differ
    ours, theirs = envs.snapshot(), serial.snapshot()
    assert ours.values == theirs.values
    assert all(np.array_equal(ours.arrays[name], theirs.arrays[name]) for name in theirs.arrays)
    envs.close()


@pytest.mark.parametrize("fault", FAULTS_OF_THE_PROCESS)
def test_a_worker_that_dies_or_hangs_is_replaced_and_all_its_episodes_are_cut(fault):
    bad = episode_seed(3, 2, 1)
    sound = SerialEnvs(lambda: seeded(""), 4, 3)
    envs = WorkerEnvs(lambda: seeded(fault, bad), 4, 3, n_workers=2, max_restarts=1, timeout=1.0)
    envs.reset()
    sound.reset()
    steps, expected = play(envs, 30), play(sound, 30)
    at = 7 if fault == "hangs in reset" else 10  # in the step that ends episode 0, or the third one of episode 1
    lost = [(t, index) for t, step in enumerate(steps) for index in range(4) if not step.valid[index]]
    assert lost == [(at, 2), (at, 3)]  # environments 2 and 3 share the worker
    assert np.array_equal(steps[at].final_observations[2:], steps[at - 1].observations[2:])
    assert envs.n_restarts == 1
    assert envs.faults[0].record["env_index"] == 2
    for one, other in zip(steps, expected, strict=True):
        assert all(np.array_equal(a[:2], b[:2]) for a, b in zip(one, other, strict=True))
    envs.close()


def test_a_worker_killed_from_outside_between_two_steps_is_replaced():
    envs = WorkerEnvs(lambda: seeded(""), 2, 3, n_workers=2, max_restarts=1)
    envs.reset()
    play(envs, 2)
    os.kill(envs._workers[1].process.pid or 0, signal.SIGKILL)
    steps = play(envs, 5)
    assert [step.valid.tolist() for step in steps] == [[True, False]] + [[True, True]] * 4
    os.kill(envs._workers[0].process.pid or 0, signal.SIGKILL)
    with pytest.raises(EnvironmentFault, match="max_restarts"):
        play(envs, 5)
    envs.close()


@pytest.mark.parametrize("fault", FAULTS_IN_A_RESET)
def test_the_first_reset_and_those_of_a_restore_may_fail_too(fault):
    bad = (episode_seed(3, 2, 0), episode_seed(3, 2, 1), episode_seed(3, 0, 1))
    kinds = [
        SerialEnvs(lambda: seeded(fault, *bad[:2]), 4, 3, max_restarts=9),
        WorkerEnvs(lambda: seeded(fault, *bad[:2]), 4, 3, n_workers=2, max_restarts=9),
    ]
    expected, _ = Faulty("").reset(seed=episode_seed(3, 2, 2))
    for envs in kinds:
        assert np.array_equal(envs.reset()[2], expected)
        play(envs, 10)  # environment 2 is in episode 3, the others in 1
        assert envs.n_restarts == len(envs.faults) == 2
    moment = kinds[0].snapshot()
    assert moment.arrays["episodes"].tolist() == [1, 1, 3, 1]
    kinds[1].close()
    kinds = [
        SerialEnvs(lambda: seeded(fault, *bad), 4, 3, max_restarts=9),
        WorkerEnvs(lambda: seeded(fault, *bad), 4, 3, n_workers=2, max_restarts=9),
    ]
    for envs in kinds:
        envs.reset()  # as a resumed run does first
        assert envs.restore(moment)[1] == [0]
        assert (envs.n_restarts, len(envs.faults)) == (3, 1)
        assert (envs.faults[0].record["episode"], envs.faults[0].record["actions"]) == (1, [])
    for one, other in zip(play(kinds[0], 20), play(kinds[1], 20), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    ours, theirs = (envs.snapshot() for envs in kinds)
    assert ours.values == theirs.values
    assert all(np.array_equal(ours.arrays[name], theirs.arrays[name]) for name in theirs.arrays)
    kinds[1].close()


def test_a_first_reset_that_always_fails_ends_the_run():
    with pytest.raises(EnvironmentFault, match="restarted 3 times"):
        SerialEnvs(lambda: Faulty("reset raises", episode=0), 2, 3, max_restarts=3).reset()
    with pytest.raises(EnvironmentFault, match="the arm is stuck"):
        SerialEnvs(lambda: Faulty("reset raises", episode=0), 2, 3).reset()


def test_a_worker_may_hang_in_the_first_reset_and_in_a_restore():
    bad = episode_seed(3, 2, 0)
    envs = WorkerEnvs(lambda: seeded("hangs in reset", bad), 4, 3, n_workers=2, max_restarts=9, timeout=0.5)
    sound = SerialEnvs(lambda: seeded(""), 4, 3)
    sound.reset()
    assert np.array_equal(envs.reset()[[0, 1, 3]], sound.snapshot().arrays["observations"][[0, 1, 3]])
    assert envs.snapshot().arrays["episodes"].tolist() == [0, 0, 1, 0]
    play(sound, 2)
    moment = sound.snapshot()
    observations, fresh = envs.restore(moment)
    assert fresh == [2, 3]  # they share the worker that was lost
    assert np.array_equal(observations[:2], moment.arrays["observations"][:2])
    assert envs.snapshot().arrays["episodes"].tolist() == [0, 0, 1, 1]
    assert len(play(envs, 10)) == 10
    envs.close()


@pytest.mark.parametrize("fault", ["panics", "is cancelled"])
def test_what_is_no_ordinary_exception_is_named_and_covered_too(fault):
    bad = episode_seed(3, 1, 0)
    kinds = [SerialEnvs, WorkerEnvs]
    for kind in kinds:
        envs = kind(lambda: Panicking(fault, seeds=[bad]), 2, 3, max_restarts=1)
        envs.reset()
        assert [step.valid.tolist() for step in play(envs, 4)] == [[True, True]] * 2 + [[True, False], [True, True]]
        assert f"step() raised {Panicking.FAULTS[fault].__name__}: stuck" in str(envs.faults[0])
        envs.close()


def test_ctrl_c_is_no_fault_of_an_environment():
    envs = SerialEnvs(lambda: Panicking("is interrupted", episode=0), 1, 3, max_restarts=1)
    envs.reset()
    with pytest.raises(KeyboardInterrupt):
        play(envs, 4)


class Panic(BaseException):  # as pyo3's PanicException
    pass


class Panicking(Faulty):
    """Raises something that is no `Exception`, at the third step; cannot be closed either."""

    FAULTS: ClassVar = {"panics": Panic, "is cancelled": asyncio.CancelledError, "is interrupted": KeyboardInterrupt}

    def misbehave(self, answer: list[Any]) -> Any:
        raise self.FAULTS[self.fault]("stuck")

    def close(self) -> None:
        raise Panic("closing")


def test_a_worker_lost_before_it_does_anything_is_not_laid_to_what_the_one_before_did(monkeypatch):
    envs = WorkerEnvs(lambda: seeded("kills its process", episode_seed(3, 0, 0)), 2, 3, n_workers=1, max_restarts=3)
    envs.reset()
    begun = Worker.begin

    def stillborn(*place):
        worker = begun(*place)
        worker.process.kill()
        return worker

    monkeypatch.setattr(Worker, "begin", staticmethod(stillborn))
    with pytest.raises(UserError, match="SIGKILL while none of its environments was at work") as raised:
        play(envs, 3)
    assert not isinstance(raised.value, EnvironmentFault)
    envs.close()


def test_nothing_is_bootstrapped_across_a_fault():
    envs = SerialEnvs(one_faulty("raises"), 1, 3, max_restarts=1)
    network = NetworkConfig(hidden_sizes=(8,))
    policy = ActorCritic(envs.observation_space, envs.action_space, network, torch.Generator().manual_seed(0))
    carry = Carry.start(envs.reset())
    batch, episodes = rollout(policy, envs, carry, 14, torch.Generator().manual_seed(0), gamma=0.9)
    assert batch.mask[0].tolist() == [True] * 8 + [False] + [True] * 5
    assert batch.done[0].nonzero().flatten().tolist() == [5, 7]
    assert not batch.terminated.any()
    assert batch.values is not None
    assert batch.next_values is not None
    assert batch.next_values[0, 7] == batch.values[0, 8]  # the true observation that the lost step began from
    assert len(episodes.returns) == 1  # the episode that was cut has no return to count
    assert carry.episode_length[0] == 5
    later = batch.rewards.clone()
    later[:, 9:] += 100.0
    before, after = (
        gae(
            rewards,
            batch.values,
            batch.next_values,
            batch.terminated,
            batch.done,
            batch.mask,
            gamma=0.9,
            gae_lambda=0.9,
        )
        for rewards in (batch.rewards, later)
    )
    assert torch.equal(before[:, :8], after[:, :8])
    delta = batch.rewards[0, 7] + 0.9 * batch.values[0, 8] - batch.values[0, 7]
    assert before[0, 7] == pytest.approx(float(delta), rel=1e-6)
    assert before[0, 8] == 0.0


class TestRuns:
    def config(self, **settings):
        # 16 steps an iteration, episodes of 8: environment 1 fails in iteration 2, in the third step of episode 2.
        return config_with(on_environment_fault="restart", checkpoint_every=32, keep_checkpoints=9, **settings)

    def make(self):
        return seeded("raises", episode_seed(0, 1, 2))

    def test_a_run_goes_on_counts_and_leaves_a_replay_file(self, tmp_path, capfd):
        run = train(self.config(), self.make, tmp_path)
        assert [row["env_restarts"] for row in run.rows] == [0, 1, 1, 1, 1][: len(run.rows)]
        assert run.rows[1]["env_steps"] == 63  # a step that was lost is no experience
        record = json.loads((tmp_path / "replay-env1-episode2.json").read_text())
        assert len(record["actions"]) == 3
        said = capfd.readouterr().err
        assert "restarted: Test-v0, environment 1, episode 2, step 3" in said
        assert "the arm is stuck" in said

    def test_a_resumed_run_ends_where_the_undisturbed_one_does(self, tmp_path):
        whole = train(self.config(max_restarts=1), self.make, tmp_path / "whole")
        for before in (32, 95):
            envs = make_envs(whole.config, self.make)
            state, fresh = restore(whole.config, named_checkpoint(whole.run.checkpoints, before), envs)
            assert fresh == []
            part = begin(whole.config, self.make, tmp_path / f"from {before}")
            list(iterate(whole.config, part.run, state, envs))
            assert differing(tensors_of(state), tensors_of(whole.state)) == []
            assert envs.n_restarts == 1

    def test_a_run_without_leave_says_how_to_get_it(self, tmp_path):
        with pytest.raises(EnvironmentFault, match="--on-environment-fault restart"):
            train(config_with(), self.make, tmp_path)

    def test_native_environments_cannot_be_restarted(self):
        with pytest.raises(UserError, match="serial or workers"):
            EnvironmentConfig(on_environment_fault="restart", vectorization="native")
