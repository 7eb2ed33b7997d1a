"""What `auto` becomes before a run starts."""

from __future__ import annotations

import copy
import importlib.util
import re
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info

import proximo
from proximo.errors import UserError
from proximo.models.control import ActorCritic, NetworkConfig
from proximo.process import training_threads
from proximo.training import choices, control
from proximo.training.choices import MINIBATCHES_THAT_PAY, with_environments_chosen, with_update_chosen
from proximo.training.config import ControlConfig, changed_settings, recorded, with_settings

# 256 steps an iteration in 4 minibatches, 10 epochs: 40 minibatches an iteration.
LONG = dict(n_envs=1, rollout_length=256, batch_size=64, n_epochs=10, total_steps=256 * MINIBATCHES_THAT_PAY // 40)
SHORT = LONG | dict(total_steps=LONG["total_steps"] - 256)
POLICY = ActorCritic(gym.spaces.Box(-1, 1, (3,)), gym.spaces.Discrete(2), NetworkConfig())


def config(**settings: Any) -> ControlConfig:
    return with_settings(ControlConfig(), settings, where="test")


def path_of(**settings: Any) -> str:
    return with_update_chosen(config(threads=1, **settings), POLICY).algorithm.update_path


@pytest.fixture
def has_numba(monkeypatch):
    monkeypatch.setattr(choices, "why_not_compiled", lambda: "")


class TestUpdatePath:
    def test_a_long_run_is_compiled_and_a_short_one_is_not(self, has_numba):
        assert path_of(**LONG) == "compiled"
        assert path_of(**SHORT) == "fused"

    def test_nothing_is_compiled_without_numba(self, monkeypatch):
        monkeypatch.setattr(choices, "why_not_compiled", lambda: "ImportError: no llvmlite")
        assert path_of(**LONG) == "fused"
        with pytest.raises(UserError, match=r"needs numba and scipy: ImportError: no llvmlite.*\[fast\]"):
            path_of(update_path="compiled")

    @pytest.mark.parametrize(
        "raised",
        [ImportError("numpy is too new"), RuntimeError("cannot cache function"), SystemError("_internal failed")],
    )
    def test_numba_that_is_there_and_does_not_work_is_as_if_it_were_not(self, monkeypatch, raised):
        def fail() -> None:
            raise raised

        monkeypatch.setattr(choices, "_load_the_compiler", fail)
        assert str(raised) in choices.why_not_compiled()
        assert path_of(**LONG) == "fused"

    def test_what_the_written_out_gradient_does_not_know_is_eager(self, has_numba):
        assert path_of(objective="kl_penalty", **LONG) == "eager"

    def test_on_a_gpu_it_is_a_graph_where_that_can_be(self, has_numba):
        assert path_of(device="cuda:1", **LONG) == "graphed"
        assert path_of(device="cuda", objective="kl_penalty", **LONG) == "eager"

    @pytest.mark.parametrize("path", ["fused", "compiled"])
    def test_a_path_that_cannot_be_is_refused_before_the_run(self, has_numba, path):
        space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
        pixels = ActorCritic(space, gym.spaces.Discrete(2), NetworkConfig())
        with pytest.raises(UserError, match=f"update_path is '{path}', which is for perceptrons on the CPU"):
            with_update_chosen(config(update_path=path), pixels)
        with pytest.raises(UserError, match="or on cuda"):
            with_update_chosen(config(update_path=path, device="cuda"), POLICY)

    @pytest.mark.parametrize("path", ["eager", "fused", "compiled"])
    def test_what_is_asked_for_is_kept(self, monkeypatch, has_numba, path):
        monkeypatch.setattr(choices, "minibatch_seconds", lambda *args: 1.0)
        assert path_of(update_path=path) == path

    def test_threads_that_are_given_are_kept_and_small_networks_get_one(self, has_numba):
        assert with_update_chosen(config(threads=3), POLICY).threads == 3
        assert with_update_chosen(config(update_path="fused"), POLICY).threads == 1
        assert with_update_chosen(config(update_path="eager"), POLICY).threads == 1

    def test_the_compiled_update_may_take_two_threads_where_there_are_two_cores(self, monkeypatch, has_numba):
        monkeypatch.setattr(choices, "minibatch_seconds", lambda *args: 1.0)
        for cores, threads in ((1, 1), (2, 2), (16, 2)):
            monkeypatch.setattr(choices, "n_cores", lambda cores=cores: cores)
            assert with_update_chosen(config(update_path="compiled"), POLICY).threads == threads

    @pytest.mark.parametrize(
        ("times", "fastest"), [({4: 1.0, 1: 3.0}, 4), ({4: 1.0, 1: 0.95}, 4), ({4: 1.0, 1: 0.5}, 1)]
    )
    def test_the_threads_of_large_networks_are_measured(self, monkeypatch, times, fastest):
        space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
        pixels = ActorCritic(space, gym.spaces.Discrete(2), NetworkConfig())
        before = torch.get_num_threads()
        monkeypatch.setattr(choices, "n_cores", lambda: 4)
        monkeypatch.setattr(choices, "minibatch_seconds", lambda *args: times[torch.get_num_threads()])
        chosen = with_update_chosen(config(), pixels)
        assert (chosen.threads, chosen.algorithm.update_path) == (fastest, "eager")
        assert torch.get_num_threads() == before


def no_factory(**kwargs: Any) -> gym.Env:
    raise AssertionError("nothing need be made to choose a vectorization")


class TestMasks:
    def chosen(self, env: Any, **settings: Any) -> str:
        return with_environments_chosen(config(env_id="mine:Env", **settings), env).environment.action_mask

    def test_they_are_looked_for_where_there_is_a_choice(self):
        class Told(gym.Env):
            observation_space = gym.spaces.Box(0.0, 1.0, (1,))
            action_space = gym.spaces.Discrete(2)

            def reset(self, *, seed=None, options=None):
                return np.zeros(1, np.float32), {"action_mask": np.ones(2, np.int8)}

        class Continuous(Told):
            action_space = gym.spaces.Box(-1.0, 1.0, (1,))

        class Seen(Told):
            observation_space = gym.spaces.Dict({"x": gym.spaces.Discrete(2), "action_mask": gym.spaces.MultiBinary(2)})

        class Failing(Told):
            def reset(self, *, seed=None, options=None):
                raise RuntimeError

        assert self.chosen(Told) == "info"
        assert self.chosen(Continuous) == "none"
        assert self.chosen(Seen) == "observation"
        assert self.chosen(Failing) == "none"
        assert self.chosen(Told, action_mask="none") == "none"
        assert self.chosen(no_factory, vectorization="native") == "none"


class TestVectorization:
    def chosen(self, **settings: Any) -> str:
        return with_environments_chosen(config(action_mask="none", **settings), no_factory).environment.vectorization

    def test_environments_with_a_vector_version_that_resumes_are_native(self):
        assert self.chosen(env_id="CartPole-v1", n_envs=8) == "native"
        assert self.chosen(env_id="CartPole-v1", n_envs=7) == "serial"
        assert self.chosen(env_id="Pendulum-v1", n_envs=64) == "serial"
        assert self.chosen(env_id="my_file.py:MyEnv", n_envs=64) == "serial"

    def test_of_a_rollout_of_one_step_all_could_be_resets(self):
        assert self.chosen(env_id="CartPole-v1", n_envs=8, rollout_length=1, batch_size=8) == "serial"

    def test_a_class_of_the_same_name_is_another_task(self, monkeypatch):
        spec = copy.deepcopy(gym.spec("CartPole-v1"))
        for changes in (
            dict(id="Mine-v0", vector_entry_point="mine:CartPoleVectorEnv"),
            dict(id="Mine-v1", entry_point="mine:CartPoleEnv"),
            dict(id="Mine-v2", additional_wrappers=(gym.wrappers.TimeAwareObservation.wrapper_spec(),)),
            dict(id="Mine-v3", vector_entry_point=None),
        ):
            mine = replace(spec, **changes)
            monkeypatch.setitem(gym.registry, mine.id, mine)
            assert self.chosen(env_id=mine.id, n_envs=64) == "serial", mine.id
        same = replace(spec, id="Same-v0")
        monkeypatch.setitem(gym.registry, same.id, same)
        assert self.chosen(env_id=same.id, n_envs=64) == "native"

    def test_environments_that_may_be_restarted_are_not(self):
        assert self.chosen(env_id="CartPole-v1", n_envs=64, on_environment_fault="restart") == "serial"

    def test_who_says_how_many_workers_gets_them(self):
        assert self.chosen(env_id="CartPole-v1", n_envs=64, n_workers=2) == "workers"
        with pytest.raises(UserError, match="n_workers is 2, which is for --vectorization workers, and this is native"):
            config(env_id="CartPole-v1", n_workers=2, vectorization="native")

    @pytest.mark.parametrize("kind", ["serial", "workers", "native"])
    def test_what_is_asked_for_is_kept(self, kind):
        assert self.chosen(env_id="CartPole-v1", n_envs=64, vectorization=kind) == kind


def test_a_run_writes_down_what_was_chosen(tmp_path, capsys):
    run = proximo.train("CartPole-v1", total_steps=512, n_envs=16, rollout_length=16, run_dir=tmp_path / "run")
    written = (tmp_path / "run" / "config.toml").read_text()
    assert 'update_path = "fused"' in written
    assert 'vectorization = "native"' in written
    assert "threads = 1" in written
    shown = capsys.readouterr()
    assert "update fused (gradients written out), 1 thread; 16 environments, native" in shown.out + shown.err
    assert run.phases.keys() == set(control.PHASES)
    assert 0 < run.phases["seconds_acting"] + run.phases["seconds_environment"] < run.phases["seconds_collecting"]
    assert run.phases["seconds_collecting"] + run.phases["seconds_updating"] == pytest.approx(run.seconds)


@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")
def test_a_compiled_run_is_the_same_on_one_thread_and_on_two(tmp_path):
    runs = [
        proximo.train(
            "Pendulum-v1",
            total_steps=1024,
            n_envs=2,
            rollout_length=128,
            update_path="compiled",
            threads=threads,
            run_dir=tmp_path / str(threads),
            quiet=True,
        )
        for threads in (1, 2)
    ]
    one, two = (np.concatenate([p.detach().numpy().ravel() for p in run.policy.parameters()]) for run in runs)
    assert np.array_equal(one, two)
    assert replace(runs[0].config, threads=2) == runs[1].config


RESUMES = """
import sys
import proximo
from proximo import terminal
from proximo.algorithms import fused
from proximo.training import control
from threadpoolctl import threadpool_info

began = control.iterate
def look(*arguments):
    for row in began(*arguments):
        yield row
    print([pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"], file=sys.stderr)
control.iterate = look
run = proximo.resume(sys.argv[1], total_steps=1024)
"""


@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")
def test_a_compiled_run_is_resumed_exactly_by_another_process(tmp_path):
    settings = dict(n_envs=2, rollout_length=128, update_path="compiled", learning_rate_schedule="constant", quiet=True)
    whole = proximo.train("Pendulum-v1", total_steps=1024, run_dir=tmp_path / "whole", **settings)
    proximo.train("Pendulum-v1", total_steps=512, run_dir=tmp_path / "half", **settings)
    ran = subprocess.run(
        [sys.executable, "-c", RESUMES, str(tmp_path / "half")], capture_output=True, text=True, timeout=250
    )
    assert ran.returncode == 0, ran.stderr
    said = ran.stdout + ran.stderr
    assert "exact: every open episode" in said
    assert "may differ" not in said
    pools = re.findall(r"^\[([\d, ]+)\]$", ran.stderr, re.MULTILINE)
    assert set(pools[-1].split(", ")) == {"1"}
    resumed = proximo.load(tmp_path / "half")
    for one, two in zip(whole.policy.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)


def test_rollouts_of_nothing_but_resets_are_refused(tmp_path):
    settings = dict(n_envs=8, rollout_length=1, batch_size=8, total_steps=160, max_episode_steps=5)
    with pytest.raises(UserError, match=r"rollout_length is 1.*spends a step on each reset.*--vectorization serial"):
        proximo.train("CartPole-v1", vectorization="native", run_dir=tmp_path / "native", **settings)
    run = proximo.train("CartPole-v1", run_dir=tmp_path / "chosen", quiet=True, **settings)
    assert run.env_steps == 160


def test_numba_that_fails_while_it_compiles(monkeypatch, has_numba):
    def fail(*_: object) -> int:
        raise EOFError("Ran out of input")

    said: list[str] = []
    monkeypatch.setattr(choices, "_faster", fail)
    chosen = with_update_chosen(config(threads=1, **LONG), POLICY, said.append)
    assert chosen.algorithm.update_path == "fused"
    assert "EOFError: Ran out of input" in said[0]
    assert "This run takes the fused update" in said[0]
    with pytest.raises(UserError, match=r"could not be compiled: EOFError: Ran out of input.*or use update_path fused"):
        with_update_chosen(config(threads=1, update_path="compiled"), POLICY)


def test_runs_side_by_side_do_not_take_each_others_threads():
    """The first one out must neither give threads back to the other one, nor leave the process without."""
    before = torch.get_num_threads(), threadpool_info()
    long, short = (training_threads(config(update_path="compiled", threads=1)) for _ in range(2))
    with ExitStack() as first:
        first.enter_context(long)
        with short:
            pass
        assert torch.get_num_threads() == 1
        assert {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"} == {1}
        second = ExitStack()
        second.enter_context(training_threads(config(update_path="compiled", threads=1)))
    assert {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"} == {1}
    second.close()
    assert (torch.get_num_threads(), threadpool_info()) == before


def test_a_changed_number_of_threads_changes_no_compiled_run():
    before = recorded(config(update_path="compiled", threads=2))
    assert changed_settings(before, config(update_path="compiled", threads=1)) == ""
    before = recorded(config(update_path="eager", threads=2))
    assert "threads was 2 and is 1" in changed_settings(before, config(update_path="eager", threads=1))


@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")
def test_a_learning_rate_that_leads_nowhere_is_told_by_the_run_and_not_while_choosing(tmp_path):
    settings = dict(total_steps=2048, learning_rate=1e30, update_path="compiled", quiet=True)
    with pytest.raises(UserError, match=r"Usual mends: a lower learning_rate"):
        proximo.train("CartPole-v1", run_dir=tmp_path / "run", **settings)


@pytest.mark.parametrize(
    ("path", "threads", "of_torch", "of_blas"),
    [("fused", 2, 1, 2), ("fused", 1, 1, 1), ("compiled", 2, 1, 1), ("eager", 2, 2, 1)],
)
def test_threads_go_to_whom_the_update_belongs(path, threads, of_torch, of_blas):
    def blas() -> set[int]:
        return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}

    before = torch.get_num_threads(), blas()
    with training_threads(config(update_path=path, threads=threads)):
        assert torch.get_num_threads() == of_torch
        assert blas() == {min(of_blas, max(before[1]))}
    assert (torch.get_num_threads(), blas()) == before
