"""The same run on a GPU; skips itself, and says so, where there is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import proximo
from proximo.runs.checkpoint import newest_checkpoint
from proximo.runs.directory import RunDirectory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

SMALL = dict(total_steps=2048, n_envs=4, rollout_length=64, batch_size=64, n_epochs=2, quiet=True, device="cuda")


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
