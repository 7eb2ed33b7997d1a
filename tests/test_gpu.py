"""The same run on a GPU; skips itself, and says so, where there is none."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

import proximo
from proximo.algorithms.adam import FlatAdam, NonFiniteUpdateError
from proximo.algorithms.ppo import PPO
from proximo.collect.device_envs import TorchCartPole
from proximo.collect.device_rollout import DeviceCarry, DeviceCollector, device_rollout
from proximo.collect.dlpack_envs import DLPackEnvs
from proximo.errors import UserError
from proximo.models.control import ActorCritic, NetworkConfig
from proximo.runs.checkpoint import newest_checkpoint
from proximo.runs.directory import RunDirectory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

SMALL = dict(
    **dict(total_steps=2048, n_envs=4, rollout_length=64, batch_size=64, n_epochs=2, quiet=True, device="cuda"),
    **dict(learning_rate_schedule="constant", clip_schedule="constant"),  # half a run must be the beginning of it
)


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_train_resume_and_load_on_a_gpu(env_id: str, tmp_path: Path) -> None:
    whole = proximo.train(env_id, run_dir=tmp_path / "whole", normalize_observations=True, debug=True, **SMALL)
    half = proximo.train(
        env_id, run_dir=tmp_path / "half", normalize_observations=True, debug=True, **(SMALL | {"total_steps": 1024})
    )
    resumed = proximo.resume(half.path, total_steps=2048, quiet=True)
    ends = [newest_checkpoint(RunDirectory(run.path).checkpoints).tensors["policy"] for run in (whole, resumed)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    policy = proximo.load(whole.path)
    observation = np.zeros(policy.observation_space.shape, np.float32)
    on_gpu = proximo.load(whole.path).to("cuda")
    assert np.allclose(policy.value(observation), on_gpu.value(observation), atol=1e-4)
    assert np.allclose(
        policy.log_prob(observation, policy(observation)), on_gpu.log_prob(observation, on_gpu(observation)), atol=1e-4
    )


ON_DEVICE = SMALL | dict(vectorization="device", n_envs=64, rollout_length=32, batch_size=512, total_steps=64 * 32 * 4)


def test_train_and_resume_where_environments_live_on_the_gpu(tmp_path: Path) -> None:
    run = proximo.train("CartPole-v1", run_dir=tmp_path / "run", debug=True, **ON_DEVICE)
    assert run.env_steps == 64 * 32 * 4
    resumed = proximo.resume(run.path, total_steps=2 * run.env_steps, quiet=True)
    assert resumed.env_steps == 2 * run.env_steps
    assert resumed.return_mean is not None
    assert resumed.return_mean > 20
    assert proximo.evaluate(run, episodes=2)["return_mean"] > 7


@pytest.mark.parametrize("normalize", [False, True])
def test_captured_collecting_gives_the_numbers_of_launching_one_by_one(normalize: bool) -> None:
    batches = []
    for capture in (False, True):
        envs = TorchCartPole(32, "cuda", seed=1, max_episode_steps=20)
        config = NetworkConfig(normalize_observations=normalize, normalize_rewards=normalize)
        spaces = (envs.observation_space, envs.action_space)
        policy = ActorCritic(*spaces, config, torch.Generator().manual_seed(0)).to("cuda")
        carry, generator = DeviceCarry.start(envs.reset()), torch.Generator("cuda").manual_seed(2)
        collector = DeviceCollector(policy, envs, carry, 24, generator, gamma=0.9, capture=capture)
        for _ in range(3):
            batch, episodes = collector.collect()
            policy.update_observation_moments(batch.observations[batch.mask])
        batches.append((batch, episodes))
    (one, ended), (other, ended_too) = batches
    torch.testing.assert_close(one.observations, other.observations, rtol=1e-5, atol=1e-6)
    assert torch.equal(one.actions, other.actions)
    torch.testing.assert_close(one.next_values, other.next_values, rtol=1e-4, atol=1e-5)
    assert ended == ended_too


@pytest.mark.parametrize("target_kl", [None, 0.002])
def test_the_captured_update_agrees_with_the_eager_one(target_kl: float | None) -> None:
    ends = []
    for path in ("eager", "graphed"):
        envs = TorchCartPole(16, "cuda", seed=1)
        spaces = (envs.observation_space, envs.action_space)
        policy = ActorCritic(*spaces, NetworkConfig(), torch.Generator().manual_seed(0)).to("cuda")
        carry, acting = DeviceCarry.start(envs.reset()), torch.Generator("cuda").manual_seed(2)
        batch, _ = device_rollout(policy, envs, carry, 32, acting, gamma=0.9)
        optimizer = FlatAdam(policy, learning_rate=0.0)
        metrics = []
        for seed in range(3):
            algorithm = PPO(batch_size=100, n_epochs=3, target_kl=target_kl, learning_rate=1e-3 / (seed + 1))
            algorithm = dataclasses.replace(algorithm, update_path=path)
            metrics.append(algorithm.update(policy, optimizer, batch, torch.Generator().manual_seed(seed)))
        ends.append((optimizer.weights, metrics, optimizer.n_steps))
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=0, atol=1e-4)
    assert ends[0][2] == ends[1][2]
    for ours, theirs in zip(ends[1][1], ends[0][1], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-2, abs=1e-3)


def test_what_is_not_finite_is_refused_by_the_captured_update_too() -> None:
    envs = TorchCartPole(16, "cuda", seed=1)
    policy = ActorCritic(envs.observation_space, envs.action_space, NetworkConfig()).to("cuda")
    optimizer = FlatAdam(policy, learning_rate=1e-3)
    carry, acting = DeviceCarry.start(envs.reset()), torch.Generator("cuda").manual_seed(2)
    batch, _ = device_rollout(policy, envs, carry, 32, acting, gamma=0.9)
    spoilt = dataclasses.replace(batch, rewards=batch.rewards * float("nan"))
    before = optimizer.weights.clone()
    with pytest.raises(NonFiniteUpdateError):
        PPO(update_path="graphed").update(policy, optimizer, spoilt, torch.Generator())
    assert torch.equal(optimizer.weights, before)
    assert PPO(update_path="graphed").update(policy, optimizer, batch, torch.Generator())["n_updates"] == 80


def test_arrays_on_the_gpu_are_looked_at_where_they_lie() -> None:
    class Inner:
        num_envs = 3
        single_observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
        single_action_space = gym.spaces.Discrete(2)

        def __init__(self) -> None:
            self.observations = torch.zeros(3, 2, device="cuda")

        def reset(self, *, seed: int | None = None) -> tuple[torch.Tensor, dict]:
            return self.observations, {}

    envs = DLPackEnvs(Inner(), device="cuda", autoreset="next_step")
    assert envs.reset().data_ptr() == envs._envs.observations.data_ptr()
    with pytest.raises(UserError, match="said to be on cpu"):
        DLPackEnvs(Inner(), device="cpu", autoreset="next_step").reset()
