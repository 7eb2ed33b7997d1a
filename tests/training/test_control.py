"""The control loop, its checkpoints, and the way back from any of them."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

from proximo.collect.envs import EnvironmentFault, episode_seed
from proximo.collect.make import find_factory
from proximo.collect.native import NativeEnvs
from proximo.collect.serial_envs import SerialEnvs
from proximo.errors import UserError
from proximo.models.control import ActorCritic, NetworkConfig
from proximo.runs.checkpoint import Checkpoint, load_checkpoint, named_checkpoint, newest_checkpoint
from proximo.runs.directory import RunDirectory
from proximo.runs.metrics import read_metrics, truncate_metrics
from proximo.training import control
from proximo.training.config import ControlConfig, changed_settings
from proximo.training.control import CLOCK_METRICS, iterate, load_policy, restore, save, start
from proximo.training.environments import make_envs
from tests.environments import Counting, Identity, Noisy, Recording, Scripted
from tests.training.running import Trained, begin, config_with, differing, tensors_of, train

BOTH = dict(normalize_observations=True, normalize_rewards=True)


class TestLoop:
    def test_it_ends_before_it_would_go_past_total_steps(self, tmp_path):
        run = train(config_with(total_steps=100), Identity, tmp_path)  # of 32 an iteration
        assert [row["env_steps"] for row in run.rows] == [32, 64, 96]
        assert [row["iteration"] for row in run.rows] == [1, 2, 3]
        assert control.finished(run.config, run.state)

    def test_rows_are_written_before_they_are_given_out(self, tmp_path):
        config = config_with()
        run = begin(config, Identity, tmp_path)
        for number, row in enumerate(iterate(config, run.run, run.state, run.envs), start=1):
            written = read_metrics(run.run.metrics_path)
            assert len(written) == number
            assert written[-1] == {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}

    def test_rows_have_the_public_names(self, tmp_path):
        row = train(config_with(), Identity, tmp_path).rows[-1]
        names = "policy_loss value_loss entropy approx_kl clip_fraction explained_variance return_mean steps_per_second"
        progress = "iteration env_steps n_episodes length_mean learning_rate clip_epsilon seconds"
        assert {*names.split(), *progress.split(), *CLOCK_METRICS} <= set(row)
        assert all(value is None or isinstance(value, int | float) for value in row.values())

    def test_returns_are_of_the_last_hundred_episodes(self, tmp_path):
        script = [(float(n), True, False) for n in range(40)] + [(100.0, False, False), (0.0, False, True)]
        run = train(config_with(n_envs=1, rollout_length=32, total_steps=256), lambda: Scripted(script), tmp_path)
        assert run.rows[0]["n_episodes"] == 32
        assert run.rows[0]["return_mean"] == np.mean(range(32))
        # 42 steps are 41 episodes, the last of them of two steps: 256 steps are six times that, and 4 more.
        returns = ([float(n) for n in range(40)] + [100.0]) * 6 + [0.0, 1.0, 2.0, 3.0]
        assert run.rows[-1]["n_episodes"] == len(returns)
        assert run.rows[-1]["return_mean"] == np.mean(returns[-100:])
        assert run.rows[-1]["length_mean"] == 1 + np.mean([r == 100.0 for r in returns[-100:]])

    def test_before_the_first_episode_has_ended_there_is_no_mean(self, tmp_path):
        run = train(config_with(total_steps=64), lambda: Recording(length=20), tmp_path)
        assert run.rows[0]["return_mean"] is None
        assert run.rows[0]["length_mean"] is None
        assert run.rows[1]["return_mean"] == 20.0

    def test_return_mean_is_in_the_environments_units(self, tmp_path):
        run = train(config_with(**BOTH), lambda: Scripted([(500.0, False, False), (300.0, True, False)]), tmp_path)
        assert run.rows[-1]["return_mean"] == 800.0

    def test_stop_at_return_waits_for_a_hundred_episodes(self, tmp_path):
        run = train(
            config_with(total_steps=10_000, stop_at_return=1.0), lambda: Scripted([(1.0, True, False)]), tmp_path
        )
        assert run.rows[-1]["env_steps"] == 128  # the first multiple of 32 that is at least 100
        assert newest_checkpoint(run.run.checkpoints).step == 128

    def test_rows_that_are_no_experience_are_not_counted(self, tmp_path):
        # Episodes of one step: under NEXT_STEP every other row is a reset.
        gym.register("OneStep-v0", vector_entry_point=lambda num_envs, **_: one_step_envs(num_envs))
        try:
            config = config_with(env_id="OneStep-v0", vectorization="native", normalize_observations=True)
            run = train(config, lambda: Scripted([(1.0, True, False)]), tmp_path)
        finally:
            del gym.registry["OneStep-v0"]
        assert isinstance(run.envs, NativeEnvs)
        assert [row["env_steps"] for row in run.rows] == [16, 32, 48, 64, 80, 96, 112]
        assert run.rows[-1]["n_episodes"] == 112
        assert float(run.state.policy.observation_count) == 112
        assert run.rows[-1]["length_mean"] == 1.0

    def test_the_seed_decides_and_nothing_else(self, tmp_path):
        torch.manual_seed(1)
        one = train(config_with(seed=3, **BOTH), Noisy, tmp_path / "one")
        torch.manual_seed(2)
        two = train(config_with(seed=3, **BOTH), Noisy, tmp_path / "two")
        other = train(config_with(seed=4, **BOTH), Noisy, tmp_path / "other")
        assert differing(tensors_of(one.state), tensors_of(two.state)) == []
        assert "policy actor.0.weight" in differing(tensors_of(one.state), tensors_of(other.state))

    def test_the_time_limit_of_the_config_truncates(self, tmp_path):
        run = train(config_with(max_episode_steps=4), lambda: Noisy(length=1000), tmp_path)
        assert run.rows[-1]["length_mean"] == 4.0

    def test_the_time_limit_of_the_config_truncates_native_environments_too(self, tmp_path):
        config = config_with(env_id="CartPole-v1", vectorization="native", max_episode_steps=4)
        assert train(config, find_factory("CartPole-v1"), tmp_path).rows[-1]["length_mean"] == 4.0

    def test_the_penalty_adapts_from_iteration_to_iteration(self, tmp_path):
        config = config_with(objective="kl_penalty", kl_coef=3.0, kl_target=1e-9)
        rows = train(config, Identity, tmp_path).rows
        assert [row["kl_coef"] for row in rows] == [3.0, 6.0, 12.0, 24.0]

    def test_schedules_go_down_to_the_end_of_the_run(self, tmp_path):
        config = config_with(learning_rate_schedule="linear", clip_schedule="linear", learning_rate=0.004)
        rows = train(config, Identity, tmp_path).rows
        assert [row["learning_rate"] for row in rows] == pytest.approx([0.004, 0.003, 0.002, 0.001])
        assert [row["clip_epsilon"] for row in rows] == pytest.approx([0.2, 0.15, 0.1, 0.05])

    def test_learning_that_breaks_down_stops_with_words_and_sound_weights(self, tmp_path):
        config = config_with(checkpoint_every=32, n_envs=1, rollout_length=32, max_skipped_updates=0)
        script = [(1.0, False, False)] * 40 + [(1e30, True, False)]
        run = begin(config, lambda: Scripted(script), tmp_path)
        with pytest.raises(UserError) as caught:
            list(iterate(config, run.run, run.state, run.envs))
        message = str(caught.value)
        assert "Learning broke down in iteration 2: " in message
        assert "learning_rate (it is 0.003)" in message
        assert "proximo train ... --learning-rate 0.001" in message  # resume takes no settings
        assert all(torch.isfinite(tensor).all() for tensor in run.state.policy.parameters())
        assert newest_checkpoint(run.run.checkpoints).step == 32


def one_step_envs(n_envs: int) -> gym.vector.VectorEnv:
    return gym.vector.SyncVectorEnv([lambda: Scripted([(1.0, True, False)])] * n_envs)


class TestCheckpoints:
    def test_one_is_saved_whenever_it_is_due_and_at_the_end(self, tmp_path):
        config = config_with(total_steps=224, checkpoint_every=64, keep_checkpoints=10)
        run = train(config, Identity, tmp_path)
        steps = sorted(int(path.name.removeprefix("step_")) for path in run.run.checkpoints.glob("step_*"))
        assert steps == [64, 128, 192, 224]

    def test_only_the_last_ones_and_the_best_are_kept(self, tmp_path):
        script = [(9.0, True, False)] * 32 + [(1.0, True, False)] * 1000
        config = config_with(n_envs=1, rollout_length=32, total_steps=256, checkpoint_every=32, keep_checkpoints=2)
        run = train(config, lambda: Scripted(script), tmp_path)
        steps = sorted(int(path.name.removeprefix("step_")) for path in run.run.checkpoints.glob("step_*"))
        assert steps == [32, 224, 256]
        assert named_checkpoint(run.run.checkpoints, "best").step == 32

    def test_the_consumer_may_stop_and_save(self, tmp_path):
        config = config_with(total_steps=320)
        run = begin(config, Identity, tmp_path)
        for row in iterate(config, run.run, run.state, run.envs):
            if row["iteration"] == 3:
                break
        save(config, run.run, run.state, run.envs)
        checkpoint = newest_checkpoint(run.run.checkpoints)
        assert (checkpoint.step, checkpoint.state["iteration"]) == (96, 3)

    def test_saving_changes_nothing(self, tmp_path):
        often = train(config_with(checkpoint_every=32, **BOTH), Noisy, tmp_path / "often")
        never = train(config_with(checkpoint_every=10_000, **BOTH), Noisy, tmp_path / "never")
        assert differing(tensors_of(often.state), tensors_of(never.state)) == []

    @pytest.mark.parametrize("make", [Noisy, Identity])
    def test_a_policy_is_loaded_without_its_environment(self, tmp_path, make):
        run = train(config_with(activation="relu", **BOTH), make, tmp_path)
        policy = load_policy(newest_checkpoint(run.run.checkpoints))
        observations = np.array([run.envs.observation_space.sample() for _ in range(5)])
        assert np.array_equal(policy(observations), run.state.policy(observations))
        assert np.array_equal(policy.value(observations), run.state.policy.value(observations))
        assert policy.reward_scale == run.state.policy.reward_scale
        assert policy.observation_space == run.state.policy.observation_space
        assert policy.action_space == run.state.policy.action_space
        assert not policy.training
        assert not any(parameter.requires_grad for parameter in policy.parameters())


def interrupted(
    config: ControlConfig, make: Callable[..., gym.Env], folder: Path, after: int, *, saving: bool
) -> RunDirectory:
    """Train for some iterations, then lose everything that is not on disk."""
    run = begin(config, make, folder)
    for _ in islice(iterate(config, run.run, run.state, run.envs), after):
        pass
    if saving:
        save(config, run.run, run.state, run.envs)
    run.envs.close()
    return run.run


def resumed(
    config: ControlConfig, make: Callable[..., gym.Env], directory: RunDirectory, until: int | None = None
) -> tuple[Trained, list[int]]:
    """As a new process would: new environments, a new state."""
    envs = make_envs(config, make)
    state, fresh = restore(config, newest_checkpoint(directory.checkpoints), envs)
    truncate_metrics(directory.metrics_path, state.iteration)
    rows = list(islice(iterate(config, directory, state, envs), until))
    return Trained(config, directory, envs, state, rows), fresh


def without_clocks(run: Trained) -> list[dict[str, Any]]:
    rows = read_metrics(run.run.metrics_path)
    return [{name: value for name, value in row.items() if name not in CLOCK_METRICS} for row in rows]


def assert_same_end(one: Trained, other: Trained, *, same_saves: bool = True) -> None:
    """Nothing that decides or shows anything differs, in memory and on disk."""
    assert differing(tensors_of(one.state), tensors_of(other.state)) == []
    assert without_clocks(one) == without_clocks(other)
    assert list(one.state.recent_returns) == list(other.state.recent_returns)
    assert list(one.state.recent_lengths) == list(other.state.recent_lengths)
    ends = [newest_checkpoint(run.run.checkpoints) for run in (one, other)]
    for name in ends[0].tensors:
        assert differing(ends[0].tensors[name], ends[1].tensors[name]) == []
    aside = {"seconds"} if same_saves else {"seconds", "saved_at_step", "best_return"}
    states = [{name: value for name, value in end.state.items() if name not in aside} for end in ends]
    assert states[0] == states[1]


LINEAR = dict(learning_rate_schedule="linear", clip_schedule="linear")
RUNS: dict[str, tuple[Callable[..., gym.Env], dict[str, Any]]] = {
    "CartPole-v1": (find_factory("CartPole-v1"), dict(n_envs=4, target_kl=0.01, **LINEAR)),
    "Pendulum-v1": (find_factory("Pendulum-v1"), dict(rollout_length=30, batch_size=20, update_path="eager", **BOTH)),
    "HalfCheetah-v5": (find_factory("HalfCheetah-v5"), dict(rollout_length=20, **BOTH, **LINEAR)),
    "truncated": (lambda: Noisy(length=11), dict(n_envs=3, rollout_length=15, objective="kl_penalty", **BOTH)),
    "limited": (lambda: Noisy(length=1000), dict(n_envs=3, rollout_length=15, max_episode_steps=7, **BOTH)),
}
N_ITERATIONS = 6


def run_of(name: str) -> tuple[ControlConfig, Callable[..., gym.Env]]:
    if name.startswith("HalfCheetah"):
        pytest.importorskip("mujoco")
    make, settings = RUNS[name]
    config = config_with(**{"env_id": name, "seed": 5, **settings})
    steps = config.steps_per_iteration
    settings = {**settings, "total_steps": N_ITERATIONS * steps, "checkpoint_every": 2 * steps}
    return config_with(**{"env_id": name, "seed": 5, **settings}), make


class TestResume:
    @pytest.mark.parametrize("name", RUNS)
    def test_a_killed_run_ends_bit_for_bit_where_an_undisturbed_one_ends(self, tmp_path, name):
        config, make = run_of(name)
        undisturbed = train(config, make, tmp_path / "undisturbed")
        # The last checkpoint is of iteration 2; iteration 3 is lost and done again.
        directory = interrupted(config, make, tmp_path / "killed", after=3, saving=False)
        assert newest_checkpoint(directory.checkpoints).state["iteration"] == 2
        run, fresh = resumed(config, make, directory)
        assert fresh == []
        assert len(run.rows) == N_ITERATIONS - 2
        assert_same_end(undisturbed, run)

    @pytest.mark.parametrize("name", ["CartPole-v1", "truncated"])
    @pytest.mark.parametrize("after", [1, 5])
    def test_an_interrupted_run_that_saved_does_too(self, tmp_path, name, after):
        config, make = run_of(name)
        undisturbed = train(config, make, tmp_path / "undisturbed")
        directory = interrupted(config, make, tmp_path / "interrupted", after, saving=True)
        assert newest_checkpoint(directory.checkpoints).state["iteration"] == after
        run, fresh = resumed(config, make, directory)
        assert fresh == []
        assert_same_end(undisturbed, run, same_saves=False)

    def test_worker_processes_can_take_over_a_run(self, tmp_path):
        config, make = run_of("truncated")
        undisturbed = train(config, make, tmp_path / "undisturbed")
        directory = interrupted(config, make, tmp_path / "killed", after=3, saving=False)
        task = replace(config.environment, vectorization="workers", n_workers=2)
        run, fresh = resumed(replace(config, environment=task), make, directory)
        run.envs.close()
        assert fresh == []
        assert_same_end(undisturbed, run)

    def test_a_run_that_is_killed_again_and_again_does_too(self, tmp_path):
        config, make = run_of("Pendulum-v1")
        undisturbed = train(config, make, tmp_path / "undisturbed")
        directory = interrupted(config, make, tmp_path / "killed", after=2, saving=False)
        resumed(config, make, directory, until=1)  # lost
        resumed(config, make, directory, until=2)
        run, _ = resumed(config, make, directory)
        assert_same_end(undisturbed, run)

    def test_a_restored_state_is_the_saved_one(self, tmp_path):
        config, make = run_of("truncated")
        run = begin(config, make, tmp_path)
        for _ in islice(iterate(config, run.run, run.state, run.envs), 2):
            pass
        state, fresh = restore(config, newest_checkpoint(run.run.checkpoints), make_envs(config, make))
        assert fresh == []
        assert differing(tensors_of(state), tensors_of(run.state)) == []
        for name in ("kl_coef", "iteration", "env_steps", "n_episodes", "best_return", "saved_at_step"):
            assert getattr(state, name) == getattr(run.state, name)
        assert state.kl_coef != config.algorithm.kl_coef

    def test_a_checkpoint_from_before_some_settings_is_one_with_their_defaults(self, tmp_path, monkeypatch):
        config, make = run_of("truncated")
        newer = {"encoder", "precision", "sign_rewards", "episodic_life"}
        described, settings = control.describe_policy, control.recorded

        def older(policy: ActorCritic) -> dict[str, Any]:
            known = described(policy)
            return known | {"network": {k: v for k, v in known["network"].items() if k not in newer}}

        monkeypatch.setattr(control, "describe_policy", older)
        monkeypatch.setattr(control, "recorded", lambda c: {k: v for k, v in settings(c).items() if k not in newer})
        run = begin(config, make, tmp_path)
        for _ in islice(iterate(config, run.run, run.state, run.envs), 2):
            pass
        monkeypatch.undo()
        checkpoint = newest_checkpoint(run.run.checkpoints)
        assert not newer & set(checkpoint.state["policy"]["network"])
        assert changed_settings(checkpoint.state["settings"], config) == ""
        state, fresh = restore(config, checkpoint, make_envs(config, make))
        assert fresh == []
        assert differing(tensors_of(state), tensors_of(run.state)) == []
        assert load_policy(checkpoint).config == replace(config.network, encoder="mlp")

    def test_images_of_a_run_from_before_there_were_encoders_go_to_a_perceptron(self, tmp_path, monkeypatch):
        space = gym.spaces.Box(0, 255, (36, 36, 3), np.uint8)
        policy = ActorCritic(space, gym.spaces.Discrete(2), NetworkConfig(hidden_sizes=(4,), encoder="mlp"))
        described = control.describe_policy(policy)
        del described["network"]["encoder"]
        checkpoint = Checkpoint(tmp_path, 0, {"policy": dict(policy.state_dict())}, {"policy": described}, {})
        seen = space.sample()
        assert load_policy(checkpoint).is_plain
        assert np.array_equal(load_policy(checkpoint).value(seen), policy.value(seen))

    def test_a_finished_run_stays_finished(self, tmp_path):
        config, make = run_of("CartPole-v1")
        finished = train(config, make, tmp_path)
        run, _ = resumed(config, make, finished.run)
        assert run.rows == []
        assert differing(tensors_of(finished.state), tensors_of(run.state)) == []

    def test_schedules_go_on_where_they_were(self, tmp_path):
        config = config_with(total_steps=128, checkpoint_every=32, learning_rate=0.004, **LINEAR)
        directory = interrupted(config, Identity, tmp_path, after=2, saving=False)
        run, _ = resumed(config, Identity, directory)
        assert [row["learning_rate"] for row in run.rows] == pytest.approx([0.002, 0.001])
        assert [row["clip_epsilon"] for row in run.rows] == pytest.approx([0.1, 0.05])

    def test_what_its_seed_does_not_fix_is_listed_and_begins_afresh(self, tmp_path):
        def make() -> gym.Env:
            return Noisy(length=50, seeded=False)

        config = config_with(total_steps=192, checkpoint_every=64, **BOTH)
        directory = interrupted(config, make, tmp_path, after=2, saving=False)
        envs = make_envs(config, make)
        state, fresh = restore(config, newest_checkpoint(directory.checkpoints), envs)
        assert fresh == [0, 1]
        for array in (state.carry.episode_length, state.carry.episode_return, state.carry.discounted_return):
            assert (array == 0).all()
        before = newest_checkpoint(directory.checkpoints).tensors["training"]
        assert (before["carry/episode_length"] > 0).any()
        assert not np.array_equal(state.carry.observations, before["carry/observations"].numpy())
        assert np.array_equal(state.carry.observations, envs.snapshot().arrays["observations"])
        rows = list(iterate(config, directory, state, envs))
        assert [row["iteration"] for row in rows] == [3, 4, 5, 6]

    def test_native_environments_whose_state_is_known_come_back_exactly(self, tmp_path):
        config = config_with(env_id="CartPole-v1", vectorization="native", total_steps=192, checkpoint_every=50)
        make = find_factory("CartPole-v1")
        undisturbed = train(config, make, tmp_path / "undisturbed")
        directory = interrupted(config, make, tmp_path / "killed", after=3, saving=False)
        run, fresh = resumed(config, make, directory)
        assert fresh == []
        assert_same_end(undisturbed, run)

    def test_other_native_environments_are_listed_and_go_on(self, tmp_path, monkeypatch):
        monkeypatch.setattr("proximo.collect.native._STATE", {})
        config = config_with(env_id="CartPole-v1", vectorization="native", total_steps=192, checkpoint_every=50)
        make = find_factory("CartPole-v1")
        directory = interrupted(config, make, tmp_path, after=3, saving=False)
        run, fresh = resumed(config, make, directory)
        assert fresh == [0, 1]
        assert control.finished(config, run.state)
        assert [row["iteration"] for row in read_metrics(directory.metrics_path)] == list(
            range(1, run.state.iteration + 1)
        )

    def test_checkpoints_are_tensors_and_plain_values(self, tmp_path):
        run = train(config_with(), Identity, tmp_path)
        for path in run.run.checkpoints.glob("step_*"):
            assert {file.suffix for file in path.iterdir()} <= {".json", ".safetensors"}
            load_checkpoint(path)


class Fragile(gym.Env):
    """Breaks when a walk that the seed and the actions decide comes to 2.5."""

    def __init__(self, strength: float = 0.5) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.strength = strength

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.x, self.t = 0.0, 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.t += 1
        self.x += float(action[0]) * self.strength + self.np_random.normal()
        reward = math.nan if self.x > 2.5 else 1.0
        return np.array([self.x], np.float32), reward, False, self.t == 6, {}


class TestFaults:
    def fault(self, folder: Path, make: Callable[..., gym.Env] = Fragile, **settings: Any) -> EnvironmentFault:
        config = config_with(**{"env_id": "fragile.py:Fragile", "seed": 8, "total_steps": 6400, **settings})
        run = begin(config, make, folder)
        with pytest.raises(EnvironmentFault) as caught:
            list(iterate(config, run.run, run.state, run.envs))
        return caught.value

    def test_a_file_to_replay_is_written_and_named(self, tmp_path):
        fault = self.fault(tmp_path, env_kwargs={"strength": 0.5})
        [path] = tmp_path.glob("replay-*.json")
        assert f"--replay {path}" in str(fault)
        assert "the reward is nan" in str(fault)
        record = json.loads(path.read_text())
        told = {**fault.record, "env_id": "fragile.py:Fragile", "env_kwargs": {"strength": 0.5}}
        assert {name: record[name] for name in told} == told
        assert path.name == f"replay-env{record['env_index']}-episode{record['episode']}.json"
        assert record["seed"] == episode_seed(8, record["env_index"], record["episode"])
        assert len(record["actions"]) == record["step"]

    def test_the_file_is_enough_to_see_it_again(self, tmp_path):
        fault = self.fault(tmp_path, env_kwargs={"strength": 0.7})
        record = json.loads(next(tmp_path.glob("replay-*.json")).read_text())
        assert record["step"] > 1
        env = Fragile(**record["env_kwargs"])
        env.reset(seed=record["seed"])
        rewards = [env.step(np.array(action, np.float32))[1] for action in record["actions"]]
        assert all(reward == 1.0 for reward in rewards[:-1])
        assert math.isnan(rewards[-1])
        assert f"step {record['step']} (seed {record['seed']})" in str(fault)

    def test_a_fault_at_a_reset_too(self, tmp_path):
        class NoSecondEpisode(Noisy):
            def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
                if hasattr(self, "t"):
                    raise RuntimeError("only once")
                return super().reset(seed=seed)

        fault = self.fault(tmp_path, NoSecondEpisode)
        record = json.loads(next(tmp_path.glob("replay-*.json")).read_text())
        assert (record["episode"], record["actions"]) == (1, [])
        assert "reset() raised RuntimeError: only once" in str(fault)

    def test_a_file_that_cannot_be_written_does_not_hide_the_fault(self, tmp_path, monkeypatch):
        def refuse(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_text", refuse)
        message = str(self.fault(tmp_path))
        assert "the reward is nan" in message
        assert "could not be written" in message
        assert "No space left" in message

    @pytest.mark.parametrize("env_id", ["test:f.<locals>.<lambda>", "__main__:MyEnv"])
    def test_no_command_is_advised_where_no_name_leads_to_the_environment(self, tmp_path, env_id):
        message = str(self.fault(tmp_path, env_id=env_id))
        assert "replay_record(make, load_record(" in message
        assert "proximo check-env" not in message

    def test_commands_can_be_pasted(self, tmp_path):
        message = str(self.fault(tmp_path / "my run", env_id="my file.py:Env"))
        assert f"proximo check-env 'my file.py:Env' --replay '{tmp_path}/my run/replay-" in message

    def test_arguments_that_json_cannot_hold_do_not_hide_the_fault(self, tmp_path):
        fault = self.fault(tmp_path, env_kwargs={"strength": np.float32(0.5)})
        assert "the reward is nan" in str(fault)

    def test_values_out_of_bounds_can_be_let_pass(self, tmp_path):
        class Loose(Counting):
            def __init__(self) -> None:
                super().__init__()
                self.observation_space = spaces.Box(0.0, 1.0, (3,), np.float32)

        config = config_with(on_space_violation="warn")
        run = train(config, Loose, tmp_path)
        assert isinstance(run.envs, SerialEnvs)
        assert len(run.envs.warnings) == 1
        with pytest.raises(EnvironmentFault, match="outside its space"):
            train(config_with(), Loose, tmp_path / "strict")

    def test_a_checkpoint_from_before_stays_sound(self, tmp_path):
        self.fault(tmp_path, checkpoint_every=32)
        newest_checkpoint(RunDirectory(tmp_path).checkpoints)


class TestStart:
    def test_a_space_that_is_not_supported_is_refused_before_anything_happens(self):
        class Odd(Noisy):
            def __init__(self) -> None:
                super().__init__()
                self.action_space = spaces.Text(3)

        config = config_with()
        with pytest.raises(UserError, match="action_space is Text"):
            start(config, make_envs(config, Odd))

    def test_weights_actions_and_shuffles_are_drawn_from_different_streams(self):
        config = config_with()
        state = start(config, make_envs(config, Identity))
        streams = {state.action_generator.initial_seed(), state.shuffle_generator.initial_seed()}
        other = start(config_with(seed=1), make_envs(config, Identity))
        streams |= {other.action_generator.initial_seed(), other.shuffle_generator.initial_seed()}
        assert len(streams) == 4


FORKS = """
import os, sys
import numpy as np, proximo
from tests.environments import Noisy

class Forking(Noisy):
    def step(self, action):
        if not os.path.exists(sys.argv[1]):
            open(sys.argv[1], "w").close()
            os.fork()
        return super().step(action)

sizes = dict(n_envs=1, rollout_length=16, batch_size=16, n_epochs=1, total_steps=96, checkpoint_every=16)
proximo.train(Forking, run_dir="run", quiet=True, **sizes)
"""


def test_a_fork_that_an_environment_lets_come_back_writes_nothing(tmp_path):
    (tmp_path / "forks.py").write_text(FORKS)
    words = [sys.executable, str(tmp_path / "forks.py"), str(tmp_path / "forked")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run(words, cwd=tmp_path, env=environment, check=True, timeout=120)
    assert (tmp_path / "forked").exists()
    assert [row["iteration"] for row in read_metrics(tmp_path / "run/metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert not list((tmp_path / "run/checkpoints").glob("*-2"))
