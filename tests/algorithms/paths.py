"""The same update on the eager path and on another one, which must come to the same."""

from __future__ import annotations

import torch

from proximo.algorithms.adam import FlatAdam
from proximo.algorithms.ppo import PPO
from proximo.core.batch import Batch

COMMON = dict(learning_rate=0.03, n_epochs=3, batch_size=13, gamma=0.97, gae_lambda=0.9, max_grad_norm=1.0)

CASES = [
    {},
    {"entropy_coef": 0.3},
    {"value_clip_epsilon": 0.05},
    {"value_clip_epsilon": 0.3, "value_coef": 2.0, "entropy_coef": 0.01},
    {"normalize_advantages": False, "max_grad_norm": 1e6},
    {"clip_epsilon": 0.02},
    {"batch_size": 1000},
    {"batch_size": 2, "n_epochs": 1},
]
"""Settings over `COMMON` that every path knows."""


def updated(policy, batch: Batch, **settings) -> tuple[dict[str, float], FlatAdam]:
    optimizer = FlatAdam(policy, learning_rate=0.0)
    algorithm = PPO(**(COMMON | settings))
    return algorithm.update(policy, optimizer, batch, torch.Generator().manual_seed(3)), optimizer


def both_ways(make_policy, make_batch, path: str, *, shape: tuple[int, int] = (4, 13), **settings):
    """Policy, metrics and optimizer after one update on the eager path, and on another one."""
    results = []
    for way in ("eager", path):
        policy = make_policy()
        results.append((policy, *updated(policy, make_batch(policy, *shape), update_path=way, **settings)))
    return results
