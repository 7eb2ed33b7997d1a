"""`rollout_agents`: run the policies of several agents in their environments, and hand over a `Batch` for each."""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter

import numpy as np
import torch

from proximo.collect.acting import acting
from proximo.collect.gsde import steady_noise
from proximo.collect.parallel_envs import ParallelEnvs
from proximo.collect.rollout import Carry, Clock, Recorder, assemble
from proximo.core.batch import Batch
from proximo.models.control import ActorCritic


def rollout_agents(
    policies: Mapping[str, ActorCritic],
    envs: ParallelEnvs,
    carries: Mapping[str, Carry],
    length: int,
    generators: Mapping[str, torch.Generator],
    *,
    gamma: float,
    clock: Clock,
) -> dict[str, Batch]:
    """Take `length` steps in each environment with the policies as they are; advance `carries`.

    All mappings are by the name of a group. Steps of agents that are dead, or not there, are masked. As in `rollout`,
    no normalizer changes while this collects.

    Returns:
        For each group a batch `[N * agents, length]`.

    Raises:
        UserError: if an environment raises or returns what it must not.
    """
    sizes = {name: len(carry.observations) for name, carry in carries.items()}
    recorders = {name: Recorder.empty(sizes[name], length, carry.observations) for name, carry in carries.items()}
    actors = {
        name: acting(
            policy,
            sizes[name],
            length,
            generators[name],
            noise=steady_noise(policy, carries[name], generators[name]),
        )
        for name, policy in policies.items()
    }
    with torch.autocast("cpu", enabled=False):
        for t in range(length):
            began = perf_counter()
            actions = {}
            for name, actor in actors.items():
                observations = recorders[name].observations[t]
                np.copyto(observations, carries[name].observations)
                actions[name] = actor.act(t, observations)
            chosen = perf_counter()
            steps = envs.step(actions)
            clock.acting += chosen - began
            clock.environment += perf_counter() - chosen
            for name, step in steps.items():
                recorders[name].write(t, step, None)
                np.copyto(carries[name].observations, step.observations)
    return {
        name: assemble(policy, recorders[name], actors[name], carries[name], gamma, next(policy.parameters()).device)
        for name, policy in policies.items()
    }
