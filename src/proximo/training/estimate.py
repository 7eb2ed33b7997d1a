"""How long a run will take, from timing a few of its own steps beforehand."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from proximo.algorithms.adam import FlatAdam
from proximo.algorithms.compiled import Pace
from proximo.algorithms.ppo import PPO
from proximo.collect.acting import Remembered, acting
from proximo.collect.envs import VectorEnvs, episode_seed
from proximo.core.batch import Batch
from proximo.models.control import ActorCritic
from proximo.training.compiled_acting import network_for
from proximo.training.config import ControlConfig

_MOST_STEPS = 50


def estimated_seconds(config: ControlConfig, policy: ActorCritic, make_scratch_envs: Callable[[], VectorEnvs]) -> float:
    """Time one small rollout's worth of acting, stepping and learning with PPO, and multiply.

    Everything is done on copies: scratch environments, and a copy of the policy.
    """
    assert isinstance(config.algorithm, PPO)
    policy = copy.deepcopy(policy)
    envs = make_scratch_envs()
    try:
        per_vector_step, observations = _time_collecting(policy, envs, config)
    finally:
        envs.close()
    per_minibatch = minibatch_seconds(policy, observations, config)
    iterations = config.total_steps // config.steps_per_iteration
    minibatches = config.minibatches_per_epoch
    return iterations * (
        config.rollout_length * per_vector_step + config.algorithm.n_epochs * minibatches * per_minibatch
    )


def _time_collecting(policy: ActorCritic, envs: VectorEnvs, config: ControlConfig) -> tuple[float, torch.Tensor]:
    """Seconds per vector step, the median of some, within about a quarter of a second."""
    generator = torch.Generator(config.device).manual_seed(episode_seed(config.seed, 0, 0))
    observations = envs.reset()
    memory = Remembered(policy.blank_memory(envs.n_envs).cpu().numpy(), 1) if policy.has_memory else None
    actor = acting(policy, envs.n_envs, _MOST_STEPS, generator, network_for(config), memory)
    times: list[float] = []
    began = time.perf_counter()
    while not times or (len(times) < _MOST_STEPS and time.perf_counter() - began < 0.25):
        start = time.perf_counter()
        observations = envs.step(actor.act(len(times), observations.copy())).observations
        times.append(time.perf_counter() - start)
    return float(np.median(times)), torch.from_numpy(observations.copy()).to(config.device)


def minibatch_seconds(policy: ActorCritic, observations: torch.Tensor, config: ControlConfig) -> float:
    """Seconds per minibatch of an update of `policy`, the smallest of a few; the first ones warm up."""
    assert isinstance(config.algorithm, PPO)
    length = config.piece_length if policy.has_memory else 1
    size = -(-config.batch_size // length)
    rows = observations[torch.arange(size * length, device=observations.device) % len(observations)]
    acted = policy.act(rows, torch.Generator(config.device).manual_seed(0), policy.blank_memory(len(rows)))
    flags = torch.zeros(size, length, dtype=torch.bool, device=observations.device)
    numbers = torch.zeros(size, length, device=observations.device)
    batch = Batch(
        observations=rows.unflatten(0, (size, length)),
        actions=acted.actions.unflatten(0, (size, length)),
        mask=~flags,
        rewards=torch.linspace(-1, 1, size * length, device=observations.device).view(size, length),
        log_probs=acted.log_probs.view(size, length),
        values=numbers,
        next_values=numbers,
        terminated=flags,
        done=flags,
        hidden=policy.blank_memory(size).unsqueeze(1) if policy.has_memory else None,
    )
    algorithm = replace(config.algorithm, learning_rate=1e-8)  # takes as long, and leads nowhere
    optimizer = FlatAdam(policy, learning_rate=algorithm.learning_rate)
    optimizer.pace = Pace(config.threads)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        metrics = algorithm.update(policy, optimizer, batch, torch.Generator().manual_seed(0))
        times.append((time.perf_counter() - start) / max(1, int(metrics["n_updates"])))
    return min(times)
