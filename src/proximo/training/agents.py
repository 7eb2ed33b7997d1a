"""The loop for several agents that learn at once: collect, update each policy, log, save.

A policy, its optimizer and its generators are a `ControlState` each, and learn as a single agent's do
(`control.learn`); what is of all of them together is an `AgentsState`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from proximo.algorithms.adam import FlatAdam
from proximo.algorithms.ppo import PPO
from proximo.collect.agents_rollout import rollout_agents
from proximo.collect.envs import Snapshot
from proximo.collect.parallel_envs import Group, ParallelEnvs
from proximo.collect.rollout import Carry, Clock, Episodes
from proximo.core.batch import Batch
from proximo.errors import DiskError, UserError
from proximo.models.agents import AgentsPolicy, CentralActorCritic
from proximo.models.control import ActorCritic, NetworkConfig
from proximo.models.spaces import space_from_json
from proximo.runs.checkpoint import Checkpoint, mark_best, prune_checkpoints, save_checkpoint
from proximo.runs.contents import take_counters
from proximo.runs.directory import RunDirectory
from proximo.runs.keeping import Keeper
from proximo.runs.metrics import sync_metrics
from proximo.training import control
from proximo.training.agents_config import AgentsConfig
from proximo.training.config import recorded, with_settings
from proximo.training.control import ControlState, Metrics

MOST_NAMED = 32
"""Agents and policies up to which the metrics have a column for each."""


@dataclass
class AgentsState:
    """Everything that changes while several agents learn; a checkpoint is this and nothing else."""

    learners: dict[str, ControlState]
    """By group."""
    agents: tuple[str, ...]
    iteration: int = 0
    env_steps: int = 0
    agent_steps: int = 0
    n_episodes: int = 0
    recent: deque[tuple[tuple[float, ...], int]] = field(default_factory=lambda: deque(maxlen=100))
    """Returns by agent (NaN for one that took no part) and length of the last episodes."""
    best_return: float | None = None
    saved_at_step: int = 0
    seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds since the run was begun or resumed, by the names of `control.PHASES`."""

    @property
    def recent_returns(self) -> deque[float]:
        """The mean over agents of the returns of each of the last episodes."""
        return deque((float(np.nanmean(returns)) for returns, _ in self.recent), maxlen=self.recent.maxlen)

    @property
    def policy(self) -> ActorCritic:
        """The policy that decides how updates are computed: one that is no plain perceptron, where there is one."""
        policies = [learner.policy for learner in self.learners.values()]
        return next((policy for policy in policies if not policy.is_plain), policies[0])

    @property
    def carry(self) -> Carry:
        """What the largest group hands from one rollout to the next."""
        carries = [learner.carry for learner in self.learners.values()]
        assert all(isinstance(carry, Carry) for carry in carries)
        return max(carries, key=lambda carry: carry.observations.nbytes)  # type: ignore[return-value, union-attr]


def start(config: AgentsConfig, envs: ParallelEnvs) -> AgentsState:
    """The state before the first step.

    Raises:
        UserError: if a space is of a kind that is not supported, or an environment cannot be reset.
    """
    first = envs.reset()
    learners = {
        name: _first_learner(config, envs, group, number, first[name])
        for number, (name, group) in enumerate(envs.groups.items())
    }
    return AgentsState(learners, envs.agents)


def _first_learner(
    config: AgentsConfig, envs: ParallelEnvs, group: Group, number: int, observations: np.ndarray
) -> ControlState:
    """The state of the group with this number; each draws on generators of its own."""
    seeds = np.random.SeedSequence([config.seed, 0x9E3779B9, number])
    weights, actions, shuffles = seeds.generate_state(3, np.uint64)
    policy = _policy(
        group.observation_space,
        group.action_space,
        config.network,
        envs.n_state if config.critic == "central" else None,
        torch.Generator().manual_seed(int(weights)),
    ).to(config.device)
    return ControlState(
        policy=policy,
        optimizer=FlatAdam(policy, learning_rate=config.algorithm.learning_rate),
        carry=Carry.start(observations, noise_shape=policy.noise_shape),
        action_generator=torch.Generator(config.device).manual_seed(int(actions)),
        shuffle_generator=torch.Generator().manual_seed(int(shuffles)),
        kl_coef=config.algorithm.kl_coef if isinstance(config.algorithm, PPO) else 0.0,
    )


def _carried(learner: ControlState) -> dict[str, Any]:
    """The arrays that a group hands from one rollout to the next, by their names; matrices where it has gsde."""
    return {key: array for key, array in vars(learner.carry).items() if array is not None}


def _policy(
    observations: Any, actions: Any, network: NetworkConfig, n_state: int | None, generator: torch.Generator | None
) -> ActorCritic:
    if n_state is None:
        return ActorCritic(observations, actions, network, generator)
    return CentralActorCritic(observations, actions, network, n_state, generator)


def iterate(
    config: AgentsConfig,
    run: RunDirectory,
    state: AgentsState,
    envs: ParallelEnvs,
    stopping: Callable[[], object] = lambda: False,
) -> Iterator[Metrics]:
    """Train until `total_steps`, yielding the metrics of each iteration once they are written; as `control.iterate`.

    Raises:
        UserError: if an environment raises or returns what it must not, too many updates in a row are not finite, or
            the disk refuses too often.
    """
    keeper, stopped = Keeper(run.metrics_path), False
    clock = Clock()
    updated = time.perf_counter()
    while not (control.finished(config, state) or stopped):  # type: ignore[arg-type]
        began = time.perf_counter()
        overhead = began - updated
        moments = {
            name: {buffer: value.clone() for buffer, value in learner.policy.named_buffers()}
            for name, learner in state.learners.items()
        }
        clock.restart()
        batches = _collect(config, state, envs, clock)
        collected = time.perf_counter()
        metrics = _merged(
            {
                name: _learn(config, run, learner, batches[name], moments[name])
                for name, learner in state.learners.items()
            }
        )
        _count(config, state, batches, envs)
        updated = time.perf_counter()
        state.seconds += updated - began
        clocks = control.clocks_of(state, clock, config.steps_per_iteration, overhead, began, collected, updated)  # type: ignore[arg-type]
        row = _progress(state) | metrics | clocks
        stopped, ended = bool(stopping()), control.finished(config, state)  # type: ignore[arg-type]
        due = state.env_steps - state.saved_at_step >= config.checkpoint_interval
        keeper.keep(
            row,
            partial(save, config, run, state, envs),
            is_due=stopped or ended or due,
            is_sound=not any(learner.skipped_in_a_row for learner in state.learners.values()),
            is_last=ended,
            is_urgent=stopped,
        )
        yield row


def _collect(config: AgentsConfig, state: AgentsState, envs: ParallelEnvs, clock: Clock) -> dict[str, Batch]:
    return rollout_agents(
        {name: learner.policy for name, learner in state.learners.items()},
        envs,
        {name: learner.carry for name, learner in state.learners.items() if isinstance(learner.carry, Carry)},
        config.rollout_length,
        {name: learner.action_generator for name, learner in state.learners.items()},
        gamma=config.algorithm.gamma,
        clock=clock,
    )


def _learn(
    config: AgentsConfig, run: RunDirectory, learner: ControlState, batch: Batch, moments: dict[str, torch.Tensor]
) -> Metrics:
    """Update one policy; one whose agents were not there during the whole rollout has nothing to learn from."""
    algorithm = control.in_force(config, learner)
    metrics: Metrics = {"learning_rate": algorithm.learning_rate}
    if batch.n_valid:
        metrics = control.learn(config, run, learner, algorithm, batch, Episodes([], [], 0), moments)
    learner.iteration += 1
    learner.env_steps += config.steps_per_iteration
    return metrics


def _merged(metrics: dict[str, Metrics]) -> Metrics:
    """The metrics of the only policy; of several the means, and each one's own with the group's name behind."""
    if len(metrics) == 1:
        return next(iter(metrics.values()))
    names = list(dict.fromkeys(name for own in metrics.values() for name in own))
    merged: Metrics = {name: float(np.mean([own[name] for own in metrics.values() if name in own])) for name in names}
    if len(metrics) <= MOST_NAMED:
        merged |= {f"{name}/{group}": value for group, own in metrics.items() for name, value in own.items()}
    return merged


def _count(config: AgentsConfig, state: AgentsState, batches: dict[str, Batch], envs: ParallelEnvs) -> None:
    state.iteration += 1
    state.env_steps += config.steps_per_iteration
    state.agent_steps += sum(batch.n_valid for batch in batches.values())
    state.n_episodes += len(envs.ended)
    state.recent.extend((episode.returns, episode.length) for episode in envs.ended)
    envs.ended.clear()


def _progress(state: AgentsState) -> Metrics:
    row: Metrics = {
        "iteration": state.iteration,
        "env_steps": state.env_steps,
        "agent_steps": state.agent_steps,
        "n_episodes": state.n_episodes,
    }
    if not state.recent:
        return row | {"return_mean": None, "team_return_mean": None, "length_mean": None}
    returns = np.array([own for own, _ in state.recent])
    row |= {
        "return_mean": float(np.mean(state.recent_returns)),
        "team_return_mean": float(np.nansum(returns, 1).mean()),
        "length_mean": float(np.mean([length for _, length in state.recent])),
    }
    if len(state.agents) <= MOST_NAMED:
        for agent, column in zip(state.agents, returns.T, strict=True):
            own = column[~np.isnan(column)]
            row[f"return_mean/{agent}"] = float(own.mean()) if len(own) else None
    return row


def finished(config: AgentsConfig, state: AgentsState) -> bool:
    """Whether another rollout would go past `total_steps`, or the wanted return is reached."""
    return control.finished(config, state)  # type: ignore[arg-type]


def save(config: AgentsConfig, run: RunDirectory, state: AgentsState, envs: ParallelEnvs) -> None:
    """Write a checkpoint of `state`; mark it `best` if its return is; drop the oldest ones.

    Raises:
        DiskError: if the disk refuses; it may be tried again.
    """
    before = state.saved_at_step, state.best_return
    try:
        _save(config, run, state, envs)
    except DiskError:
        state.saved_at_step, state.best_return = before
        raise


_COUNTERS = ("iteration", "env_steps", "agent_steps", "n_episodes", "best_return", "saved_at_step", "seconds")
_OF_LEARNERS = ("kl_coef", "rate_factor", "iteration", "env_steps", "skipped_in_a_row")


def _save(config: AgentsConfig, run: RunDirectory, state: AgentsState, envs: ParallelEnvs) -> None:
    state.saved_at_step = state.env_steps
    current = float(np.mean(state.recent_returns)) if state.recent else None
    is_best = current is not None and (state.best_return is None or current >= state.best_return)
    if is_best:
        state.best_return = current
    snapshot = envs.snapshot()
    training = {f"environments/{name}": torch.from_numpy(array) for name, array in snapshot.arrays.items()}
    for number, learner in enumerate(state.learners.values()):
        parts = {
            "optimizer": learner.optimizer.state_dict(),
            "generators": {
                "actions": learner.action_generator.get_state(),
                "shuffles": learner.shuffle_generator.get_state(),
            },
            "carry": {key: torch.as_tensor(array) for key, array in _carried(learner).items()},
        }
        for part, group in parts.items():
            training |= {f"{part}/{number}/{key}": tensor for key, tensor in group.items()}
    policies = {
        f"{number}/{key}": tensor
        for number, learner in enumerate(state.learners.values())
        for key, tensor in learner.policy.state_dict().items()
    }
    described = {
        **{name: getattr(state, name) for name in _COUNTERS},
        "agents": list(state.agents),
        "recent": [[list(returns), length] for returns, length in state.recent],
        "environments": snapshot.values,
        "is_best": is_best,
        "settings": recorded(config),
        "learners": {
            name: {
                **{counter: getattr(learner, counter) for counter in _OF_LEARNERS},
                **_described(learner.policy, envs.groups[name]),
            }
            for name, learner in state.learners.items()
        },
    }
    sync_metrics(run.metrics_path)
    path = save_checkpoint(run.checkpoints, state.env_steps, {"policy": policies, "training": training}, described)
    if is_best:
        mark_best(run.checkpoints, path)
    prune_checkpoints(run.checkpoints, config.keep_checkpoints, config.keep_every)


def _described(policy: ActorCritic, group: Group) -> dict[str, Any]:
    """What `load_policies` needs beside the tensors."""
    n_state = policy.n_state if isinstance(policy, CentralActorCritic) else None
    return {
        "policy": control.describe_policy(policy),
        "n_state": n_state,
        "agents": list(group.agents),
        "has_ids": group.has_ids,
    }


def restore(config: AgentsConfig, checkpoint: Checkpoint, envs: ParallelEnvs) -> tuple[AgentsState, list[int]]:
    """The state of a checkpoint, and the environments that had to begin a fresh episode (none: exact).

    Raises:
        UserError: if it is of other agents, spaces or networks, or does not fit this run.
    """
    state = start(config, envs)
    found = checkpoint.state.get("learners")
    own = {name: _described(learner.policy, envs.groups[name]) for name, learner in state.learners.items()}
    then = found if isinstance(found, dict) else {}
    if set(then) != set(own) or any({key: then[name].get(key) for key in own[name]} != own[name] for name in own):
        raise UserError(
            f"{checkpoint.path} was made with other agents, spaces or networks than this run's config.toml and "
            "environment have now. Bring them back to what they were, or begin a new run."
        )
    with control.must_fit(checkpoint):
        return _restored(checkpoint, envs, state)


def _restored(checkpoint: Checkpoint, envs: ParallelEnvs, state: AgentsState) -> tuple[AgentsState, list[int]]:
    training, described = checkpoint.tensors["training"], checkpoint.state
    for number, (name, learner) in enumerate(state.learners.items()):
        learner.policy.load_state_dict(_under(checkpoint.tensors["policy"], str(number)))
        learner.optimizer.load_state_dict(_under(training, f"optimizer/{number}"))
        learner.action_generator.set_state(training[f"generators/{number}/actions"])
        learner.shuffle_generator.set_state(training[f"generators/{number}/shuffles"])
        take_counters(learner, described["learners"][name], _OF_LEARNERS, optional=("rate_factor",))
        for key, own in _carried(learner).items():
            array = training[f"carry/{number}/{key}"].numpy().copy()
            if (array.shape, array.dtype) != (own.shape, own.dtype):
                raise ValueError(f"its {key} are {array.dtype} of shape {array.shape}, not {own.dtype} of {own.shape}")
            setattr(learner.carry, key, array)
    arrays = {name: tensor.numpy().copy() for name, tensor in _under(training, "environments").items()}
    observations, fresh = envs.restore(Snapshot(arrays, described["environments"]))
    for name, learner in state.learners.items():
        assert isinstance(learner.carry, Carry)
        for index in fresh:
            rows = envs.rows_of(index, name)
            learner.carry.observations[rows] = observations[name][rows]
            learner.carry.discounted_return[rows] = 0.0
    take_counters(state, described, _COUNTERS, optional=("best_return",))
    for returns, length in described["recent"]:
        state.recent.append((tuple(float(value) for value in returns), int(length)))
    return state, fresh


def _under(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """The tensors whose names begin with this one, without it."""
    return {key[len(name) + 1 :]: tensor for key, tensor in tensors.items() if key.startswith(f"{name}/")}


def load_policies(checkpoint: Checkpoint) -> AgentsPolicy:
    """Rebuild the policies of a checkpoint on the CPU, for acting; nothing of the environment is imported.

    Raises:
        UserError: if it holds none.
    """
    try:
        policies, places = {}, {}
        for group, (name, found) in enumerate(checkpoint.state["learners"].items()):
            described = found["policy"]
            network = with_settings(NetworkConfig(), described["network"], where=str(checkpoint.path))
            seen, acts = space_from_json(described["observation_space"]), space_from_json(described["action_space"])
            policy = _policy(seen, acts, network, found["n_state"], None)
            policy.load_state_dict(_under(checkpoint.tensors["policy"], str(group)))
            policies[name] = policy.eval().requires_grad_(False)
            for number, agent in enumerate(found["agents"]):
                places[agent] = (name, number if found["has_ids"] else None)
        return AgentsPolicy(policies, {agent: places[agent] for agent in checkpoint.state["agents"]})
    except (KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise UserError(f"{checkpoint.path} does not hold policies of several agents ({error}).") from error
