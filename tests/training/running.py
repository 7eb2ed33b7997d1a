"""Short runs, and what to compare of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from proximo.collect.envs import VectorEnvs
from proximo.runs.directory import RunDirectory
from proximo.training.config import ControlConfig, with_settings
from proximo.training.control import ControlState, iterate, start
from proximo.training.environments import make_envs

Make = Callable[..., gym.Env]

SMALL: dict[str, Any] = dict(
    env_id="Test-v0",
    n_envs=2,
    rollout_length=16,
    batch_size=16,
    n_epochs=2,
    hidden_sizes=[8],
    learning_rate=3e-3,
    total_steps=128,
    debug=True,
)


def config_with(**settings: Any) -> ControlConfig:
    """A small run with some settings of its own; `debug` checks the first ratios of each iteration."""
    return with_settings(ControlConfig(), SMALL | settings, where="test")


@dataclass
class Trained:
    """A run that has come to its end."""

    config: ControlConfig
    run: RunDirectory
    envs: VectorEnvs
    state: ControlState
    rows: list[dict[str, Any]]


def begin(config: ControlConfig, make: Make, folder: Path) -> Trained:
    """A run that is about to begin."""
    folder.mkdir(parents=True, exist_ok=True)
    envs = make_envs(config, make)
    return Trained(config, RunDirectory(folder), envs, start(config, envs), [])


def train(config: ControlConfig, make: Make, folder: Path) -> Trained:
    """Train to the end."""
    run = begin(config, make, folder)
    run.rows = list(iterate(config, run.run, run.state, run.envs))
    run.envs.close()
    return run


def tensors_of(state: ControlState) -> dict[str, torch.Tensor]:
    """Every tensor that a run's future depends on."""
    carried = {name: array for name, array in vars(state.carry).items() if array is not None}
    return (
        {f"policy {name}": tensor for name, tensor in state.policy.state_dict().items()}
        | {f"optimizer {name}": tensor for name, tensor in state.optimizer.state_dict().items()}
        | {f"carry {name}": torch.from_numpy(np.array(array)) for name, array in carried.items()}
        | {
            "actions": state.action_generator.get_state(),
            "shuffles": state.shuffle_generator.get_state(),
        }
    )


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """The names of the tensors that are not bit for bit the same."""
    assert one.keys() == other.keys()
    return [name for name in one if one[name].dtype != other[name].dtype or not torch.equal(one[name], other[name])]
