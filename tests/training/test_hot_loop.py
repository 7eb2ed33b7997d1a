"""A guard for speed that no noise reaches: how many operations a step and a minibatch take, not how many seconds.

Small networks cost what dispatching their operations costs, so these are counted: calls, arithmetic, comparisons,
reading and writing of elements, as our own code asks for them. A change that adds some to these loops must be worth it:
then raise the number here, and say why in the commit.
"""

from __future__ import annotations

import dis
import os
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from proximo.algorithms.adam import FlatAdam
from proximo.algorithms.ppo import PPO
from proximo.collect.native import NativeEnvs
from proximo.collect.rollout import Carry, rollout
from proximo.collect.serial_envs import SerialEnvs
from proximo.models.control import ActorCritic, NetworkConfig


class Still(gym.Env):
    """Costs nothing of ours."""

    observation_space = gym.spaces.Box(-10, 10, (17,))
    action_space = gym.spaces.Box(-1, 1, (6,))
    seen = np.zeros(17, np.float32)

    def reset(self, *, seed=None, options=None):
        return self.seen, {}

    def step(self, action):
        return self.seen, 1.0, False, False, {}


class StillVector(gym.vector.VectorEnv):
    metadata = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}  # noqa: RUF012 (as Gymnasium has it)

    def __init__(self, n_envs: int) -> None:
        self.num_envs = n_envs
        self.single_observation_space, self.single_action_space = gym.spaces.Box(-5, 5, (4,)), gym.spaces.Discrete(2)
        self.seen, self.rewards, self.no = np.zeros((n_envs, 4), np.float32), np.ones(n_envs), np.zeros(n_envs, bool)

    def reset(self, *, seed=None, options=None):
        return self.seen, {}

    def step(self, actions):
        return self.seen, self.rewards, self.no, self.no, {}


COUNTED = ("CALL", "BINARY", "INPLACE", "COMPARE", "UNARY", "STORE_SUBSCR", "CONTAINS")


def operations(work: Callable[[], object]) -> int:
    """Operations in functions of Proximo's own."""
    count = 0

    def look(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        if event == "call" and "/proximo/" not in frame.f_code.co_filename.replace(os.sep, "/"):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            name = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            count += name.startswith(COUNTED)
        return look

    sys.settrace(look)
    try:
        work()
    finally:
        sys.settrace(None)
    return count


def slope(work: Callable[[int], Callable[[], object]], few: int, many: int) -> float:
    """Operations per unit of work, without what is done once."""
    work(few)()  # what the first time alone takes
    return (operations(work(many)) - operations(work(few))) / (many - few)


@pytest.mark.parametrize(("n_envs", "most"), [(1, 104), (8, 216)])
def test_operations_per_step_of_a_rollout(n_envs, most):
    envs = SerialEnvs(Still, n_envs, 0)
    policy = ActorCritic(
        envs.observation_space, envs.action_space, NetworkConfig(normalize_observations=True, normalize_rewards=True)
    )
    carry = Carry.start(envs.reset())

    def work(length: int) -> Callable[[], object]:
        return lambda: rollout(policy, envs, carry, length, torch.Generator().manual_seed(0), gamma=0.99)

    found = slope(work, 20, 120)
    assert most / 2 < found <= most


def test_operations_per_step_of_a_rollout_in_a_vector_environment():
    """Of ours: what the environment itself does is Gymnasium's own business."""
    envs = NativeEnvs(StillVector(8), 0)
    policy = ActorCritic(envs.observation_space, envs.action_space, NetworkConfig())
    carry = Carry.start(envs.reset())

    def work(length: int) -> Callable[[], object]:
        return lambda: rollout(policy, envs, carry, length, torch.Generator().manual_seed(0), gamma=0.99)

    found = slope(work, 20, 120)
    assert 60 < found <= 130


@pytest.mark.parametrize(("path", "most"), [("fused", 248), ("compiled", 6)])
def test_operations_per_minibatch_of_an_update(path, most):
    if path == "compiled":
        pytest.importorskip("numba", reason="numba is not installed")
    envs = SerialEnvs(Still, 1, 0)
    policy = ActorCritic(envs.observation_space, envs.action_space, NetworkConfig())
    optimizer = FlatAdam(policy, learning_rate=0.0)
    batch, _ = rollout(policy, envs, Carry.start(envs.reset()), 64, torch.Generator().manual_seed(0), gamma=0.99)

    def work(n_minibatches: int) -> Callable[[], object]:
        algorithm = PPO(update_path=path, batch_size=64 // n_minibatches, n_epochs=1)
        return lambda: algorithm.update(policy, optimizer, batch, torch.Generator().manual_seed(0))

    assert slope(work, 4, 32) <= most
