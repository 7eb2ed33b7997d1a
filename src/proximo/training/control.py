"""The control loop: collect, update, log, save. All of a run's state is one `ControlState`."""

from __future__ import annotations

import json
import shlex
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from gymnasium import spaces

from proximo.algorithms.adam import FlatAdam, NonFiniteUpdateError
from proximo.algorithms.compiled import Pace
from proximo.algorithms.ppo import PPO
from proximo.collect.device_envs import DeviceEnvs
from proximo.collect.device_rollout import DeviceCarry, DeviceCollector
from proximo.collect.envs import EnvironmentFault, Snapshot, VectorEnvs
from proximo.collect.rollout import Carry, Clock, Episodes, rollout
from proximo.core.batch import Batch
from proximo.errors import DiskError, UserError, tell
from proximo.models.control import ActorCritic, NetworkConfig
from proximo.models.spaces import space_from_json, space_to_json
from proximo.runs.checkpoint import Checkpoint, mark_best, prune_checkpoints, save_checkpoint
from proximo.runs.contents import take_counters
from proximo.runs.directory import RunDirectory
from proximo.runs.keeping import Keeper
from proximo.runs.metrics import sync_metrics
from proximo.training.compiled_acting import network_for
from proximo.training.config import Algorithm, ControlConfig, recorded, settings_of, with_settings
from proximo.training.environments import Envs
from proximo.training.exploration import Explorer, explored_update, is_warming_up, refuse_what_cannot_explore, warm_up
from proximo.training.rollout_metrics import rollout_metrics
from proximo.training.skipping import leave_out

Metrics = dict[str, Any]

PHASES = ("seconds_acting", "seconds_environment", "seconds_collecting", "seconds_updating", "seconds_overhead")
"""Acting and stepping are in collecting. Overhead: between the iteration before and this one, while metrics are
written, shown and checkpoints saved; it is not in `seconds`, nor in `steps_per_second`."""

CLOCK_METRICS = frozenset({"seconds", "steps_per_second", *PHASES})
"""Metrics that a clock decides; all others are the same in a resumed run."""


@dataclass
class ControlState:
    """Everything that changes while a control run goes on; a checkpoint is this and nothing else."""

    policy: ActorCritic
    optimizer: FlatAdam
    carry: Carry | DeviceCarry
    action_generator: torch.Generator
    shuffle_generator: torch.Generator
    kl_coef: float
    explorer: Explorer | None = None
    """What the intrinsic reward has learned; None without one."""
    rate_factor: float = 1.0
    """What the learning rate is multiplied by, where it follows the KL."""
    iteration: int = 0
    env_steps: int = 0
    n_episodes: int = 0
    recent_returns: deque[float] = field(default_factory=lambda: deque(maxlen=100))
    recent_lengths: deque[int] = field(default_factory=lambda: deque(maxlen=100))
    best_return: float | None = None
    saved_at_step: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds since the run was begun or resumed, by the names of `PHASES`."""


def start(config: ControlConfig, envs: Envs) -> ControlState:
    """The state before the first step.

    Raises:
        UserError: if a space is of a kind that is not supported, or settings do not go together.
        EnvironmentFault: if an environment cannot be reset.
    """
    refuse_what_cannot_explore(config)
    is_on_device = config.environment.vectorization == "device"
    _, actions, shuffles = _seeds(config)
    policy = first_policy(config, envs.observation_space, envs.action_space).to(config.device)
    return ControlState(
        policy=policy,
        optimizer=FlatAdam(policy, learning_rate=config.algorithm.learning_rate),
        carry=_first_carry(envs, policy),
        action_generator=torch.Generator(config.device).manual_seed(int(actions)),
        # Half a million steps are shuffled where they are.
        shuffle_generator=torch.Generator(config.device if is_on_device else "cpu").manual_seed(int(shuffles)),
        kl_coef=config.algorithm.kl_coef if isinstance(config.algorithm, PPO) else 0.0,
        explorer=Explorer.start(config, policy) if config.intrinsic.explores else None,
    )


def first_policy(config: ControlConfig, observations: spaces.Space, actions: spaces.Space) -> ActorCritic:
    """The policy that a run begins with, on the CPU.

    Raises:
        UserError: if a space is of a kind that is not supported, or the distribution is not for such actions.
    """
    weights, _, _ = _seeds(config)
    generator, has_more = torch.Generator().manual_seed(int(weights)), config.intrinsic.explores
    policy = ActorCritic(observations, actions, config.network, generator, has_intrinsic_critic=has_more)
    if config.network.distribution != "gaussian" and not policy.head.has_numbers:
        raise UserError(
            f"distribution is {config.network.distribution!r}, which is for continuous actions, and the action space "
            f"is {actions}. Leave it out."
        )
    return policy


def _seeds(config: ControlConfig) -> np.ndarray:
    """Those of the first weights, of the actions, and of the shuffles."""
    return np.random.SeedSequence([config.seed, 0x9E3779B9]).generate_state(3, np.uint64)


def _first_carry(envs: Envs, policy: ActorCritic) -> Carry | DeviceCarry:
    first = envs.reset()
    if isinstance(first, torch.Tensor):
        return DeviceCarry.start(first, policy.noise_shape)
    return Carry.start(first, policy.blank_memory(len(first)).cpu().numpy(), policy.noise_shape)


def _carried(carry: Carry | DeviceCarry) -> dict[str, Any]:
    """The arrays or tensors of it, by their names; a policy without memory, or without matrices, has none of these."""
    kept = {name: array for name, array in vars(carry).items() if array is not None}
    return {name: array for name, array in kept.items() if 0 not in array.shape[1:]}


def iterate(
    config: ControlConfig,
    run: RunDirectory,
    state: ControlState,
    envs: Envs,
    stopping: Callable[[], object] = lambda: False,
) -> Iterator[Metrics]:
    """Train until `total_steps`, yielding the metrics of each iteration once they are written.

    A checkpoint is saved whenever one is due, at the end, and before it ends early because `stopping()` is true. A disk
    that is full holds nothing up: what it refuses is kept and tried again (`runs/keeping.py`). The consumer may also
    stop between two iterations; `save` then keeps what there is.

    Raises:
        EnvironmentFault: if an environment raises or returns what it must not; a replay file is written.
        UserError: if too many updates in a row are not finite, or the disk refuses too often.
    """
    keeper, stopped = Keeper(run.metrics_path), False
    state.optimizer.pace = Pace(config.threads)
    clock = Clock()
    collect = _collector(config, state, envs, clock)
    updated = time.perf_counter()
    while not (finished(config, state) or stopped):
        began = time.perf_counter()
        overhead = began - updated
        algorithm = in_force(config, state)
        moments = {name: buffer.clone() for name, buffer in state.policy.named_buffers()}
        clock.restart()
        batch, episodes = _collect(config, run, envs, collect)
        collected = time.perf_counter()
        metrics = learn(config, run, state, algorithm, batch, episodes, moments)
        _count(state, batch, episodes)
        updated = time.perf_counter()
        state.seconds += updated - began
        if config.environment.restarts_allowed:
            metrics["env_restarts"] = envs.n_restarts
        clocks = clocks_of(state, clock, batch.n_valid, overhead, began, collected, updated)
        row = _progress(state) | metrics | clocks
        stopped, ended = bool(stopping()), finished(config, state)
        due = state.env_steps - state.saved_at_step >= config.checkpoint_interval
        keeper.keep(
            row,
            partial(save, config, run, state, envs),
            is_due=stopped or ended or due,
            is_sound=not state.skipped_in_a_row,
            is_last=ended,
            is_urgent=stopped,
        )
        yield row


def in_force(config: ControlConfig, state: ControlState) -> Algorithm:
    """The algorithm with the settings of this moment."""
    remaining = 1.0 - state.env_steps / config.total_steps
    if isinstance(config.algorithm, PPO):
        return config.algorithm.at(remaining, state.kl_coef, state.rate_factor)
    return config.algorithm.at(remaining)


def finished(config: ControlConfig, state: ControlState) -> bool:
    """Whether another rollout would go past `total_steps`, or the wanted return is reached."""
    full = len(state.recent_returns) == state.recent_returns.maxlen
    reached = (
        config.stop_at_return is not None and full and float(np.mean(state.recent_returns)) >= config.stop_at_return
    )
    return reached or state.env_steps + config.steps_per_iteration > config.total_steps


def save(config: ControlConfig, run: RunDirectory, state: ControlState, envs: Envs) -> None:
    """Write a checkpoint of `state`; mark it `best` if its return is; drop the oldest ones.

    Raises:
        DiskError: if the disk refuses; it may be tried again.
    """
    saved_at_step, best_return = state.saved_at_step, state.best_return
    try:
        _save(config, run, state, envs)
    except DiskError:
        state.saved_at_step, state.best_return = saved_at_step, best_return
        raise


def _save(config: ControlConfig, run: RunDirectory, state: ControlState, envs: Envs) -> None:
    state.saved_at_step = state.env_steps
    current = float(np.mean(state.recent_returns)) if state.recent_returns else None
    is_best = current is not None and (state.best_return is None or current >= state.best_return)
    if is_best:
        state.best_return = current
    snapshot = envs.snapshot()
    parts = {
        "optimizer": state.optimizer.state_dict(),
        "generators": {
            "actions": state.action_generator.get_state(),
            "shuffles": state.shuffle_generator.get_state(),
        },
        "carry": {name: torch.as_tensor(array) for name, array in _carried(state.carry).items()},
        "environments": {name: torch.from_numpy(array) for name, array in snapshot.arrays.items()},
        "explorer": {} if state.explorer is None else state.explorer.state_dict(),
    }
    # One file, not four: what a small run's save costs is the flushing of its files to the disk.
    training = {f"{part}/{name}": tensor for part, group in parts.items() for name, tensor in group.items()}
    counters = {name: getattr(state, name) for name in _COUNTERS}
    described = {
        **counters,
        "recent_returns": list(state.recent_returns),
        "recent_lengths": list(state.recent_lengths),
        "environments": snapshot.values,
        "is_best": is_best,
        "settings": recorded(config),
        "policy": describe_policy(state.policy),
    }
    sync_metrics(run.metrics_path)
    tensors = {"policy": dict(state.policy.state_dict()), "training": training}
    path = save_checkpoint(run.checkpoints, state.env_steps, tensors, described)
    if is_best:
        mark_best(run.checkpoints, path)
    prune_checkpoints(run.checkpoints, config.keep_checkpoints, config.keep_every)


def restore(config: ControlConfig, checkpoint: Checkpoint, envs: Envs) -> tuple[ControlState, list[int]]:
    """The state of a checkpoint, and the environments that had to begin a fresh episode (none: exact)."""
    state = start(config, envs)
    if describe_policy(state.policy) != _described_now(checkpoint.state.get("policy"), state.policy):
        raise UserError(
            f"{checkpoint.path} was made with other spaces or another network than this run's config.toml and "
            "environment have now. Bring them back to what they were, or begin a new run."
        )
    with must_fit(checkpoint):
        return _restored(checkpoint, envs, state)


@contextmanager
def must_fit(checkpoint: Checkpoint) -> Iterator[None]:
    """Say in words that what is in a checkpoint is not what this run has.

    Raises:
        UserError: where taking it over raises.
    """
    try:
        yield
    except (KeyError, ValueError, RuntimeError, IndexError, TypeError, OverflowError, AttributeError) as error:
        raise UserError(
            f"{checkpoint.path} does not fit this run ({error}). Has its config.toml been changed (n_envs)? Bring it "
            "back to what it was, or begin a new run."
        ) from error


def _restored(checkpoint: Checkpoint, envs: Envs, state: ControlState) -> tuple[ControlState, list[int]]:
    described = checkpoint.state
    names = ("optimizer", "generators", "carry", "environments", "explorer")
    parts: dict[str, dict[str, torch.Tensor]] = {name: {} for name in names}
    for name, tensor in checkpoint.tensors["training"].items():
        part, _, inner = name.partition("/")
        parts[part][inner] = tensor
    state.policy.load_state_dict(checkpoint.tensors["policy"])
    state.optimizer.load_state_dict(parts["optimizer"])
    if state.explorer is not None:
        state.explorer.load_state_dict(parts["explorer"])
    state.action_generator.set_state(parts["generators"]["actions"])
    state.shuffle_generator.set_state(parts["generators"]["shuffles"])
    for name, own in _carried(state.carry).items():
        kept = parts["carry"][name]
        array = kept.to(own.device) if isinstance(own, torch.Tensor) else kept.numpy().copy()
        if (array.shape, array.dtype) != (own.shape, own.dtype):
            raise ValueError(f"its {name} are {array.dtype} of shape {array.shape}, not {own.dtype} of {own.shape}")
        setattr(state.carry, name, array)
    arrays = {name: tensor.numpy() for name, tensor in parts["environments"].items()}
    observations, fresh = envs.restore(Snapshot(arrays, described["environments"]))
    for index in fresh:
        state.carry.observations[index] = observations[index]
        for per_episode in (
            state.carry.episode_return,
            state.carry.episode_length,
            state.carry.discounted_return,
            *([state.carry.memory] if isinstance(state.carry, Carry) else []),
        ):
            per_episode[index] = 0
    take_counters(state, described, _COUNTERS, optional=("best_return", "rate_factor"))
    for name in ("recent_returns", "recent_lengths"):
        if not all(isinstance(value, int | float) for value in described[name]):
            raise ValueError(f"its {name} are no numbers")
        getattr(state, name).extend(described[name])
    return state, fresh


def describe_policy(policy: ActorCritic) -> dict[str, Any]:
    """What `load_policy` needs beside the tensors, as JSON-able values."""
    described = {
        "observation_space": space_to_json(policy.observation_space),
        "action_space": space_to_json(policy.action_space),
        "network": settings_of(policy.config),
    }
    return described if policy.intrinsic_critic is None else described | {"has_intrinsic_critic": True}


def _described_now(described: Any, policy: ActorCritic) -> Any:
    """What an older `describe_policy` wrote, with the settings that have come since at what they were before."""
    if not isinstance(described, dict) or not isinstance(described.get("network"), dict):
        return described
    before = {"encoder": policy.config.encoder} if policy.is_plain else BEFORE_ENCODERS
    return described | {"network": settings_of(NetworkConfig()) | before | described["network"]}


BEFORE_ENCODERS = {"encoder": "mlp"}
"""What runs that say nothing of an encoder had: `auto` means more since."""


_COUNTERS = (
    "kl_coef",
    "rate_factor",
    "iteration",
    "env_steps",
    "n_episodes",
    "best_return",
    "saved_at_step",
    "skipped_in_a_row",
    "seconds",
)


def _collector(
    config: ControlConfig, state: ControlState, envs: Envs, clock: Clock
) -> Callable[[], tuple[Batch, Episodes]]:
    """What collects the next rollout, where the environments are."""
    policy, carry, generator = state.policy, state.carry, state.action_generator
    length, gamma = config.rollout_length, config.algorithm.gamma
    if isinstance(carry, DeviceCarry):
        return DeviceCollector(policy, cast(DeviceEnvs, envs), carry, length, generator, gamma=gamma).collect
    network = network_for(config)
    steps = cast(VectorEnvs, envs)
    collect = partial(rollout, policy, steps, carry, length, generator, gamma=gamma, clock=clock, network=network)
    return partial(collect, piece=config.piece_length)


def _collect(
    config: ControlConfig, run: RunDirectory, envs: Envs, collect: Callable[[], tuple[Batch, Episodes]]
) -> tuple[Batch, Episodes]:
    """One rollout; what an environment did wrong is written down so that it can be played again."""
    try:
        collected = collect()
    except EnvironmentFault as fault:
        hint = "" if config.environment.restarts_allowed else _RESTART_HINT
        raise EnvironmentFault(f"{fault}\n{_written_down(fault, run, config)}{hint}", fault.record) from fault
    finally:
        for fault in envs.faults:
            tell(f"proximo: restarted: {fault}\n{_written_down(fault, run, config)}")
        envs.faults.clear()
    return collected


_RESTART_HINT = "\nIf it cannot be mended: --on-environment-fault restart makes such an environment anew and goes on."


def _written_down(fault: EnvironmentFault, run: RunDirectory, config: ControlConfig) -> str:
    """Write the replay file, and say how to use it; whatever goes wrong here must not hide the fault."""
    task = config.environment
    record = {
        "env_id": task.env_id,
        "env_kwargs": task.env_kwargs,
        "max_episode_steps": task.max_episode_steps,
        "action_mask": task.action_mask,
        **fault.record,
    }
    path = run.path / f"replay-env{record['env_index']}-episode{record['episode']}.json"
    try:
        path.write_text(json.dumps(record, default=str))
    except (OSError, TypeError, ValueError) as error:
        return f"A file to replay it could not be written to {path}: {error}."
    if record["seed"] is None:
        return (
            f"Its last action is in {path}; this episode cannot be played again. "
            "With --vectorization serial a fault can be."
        )
    if not config.environment.can_be_named:
        return f"Replay it in Python: proximo.collect.replay.replay_record(make, load_record({str(path)!r}))"
    return f"Replay it: {shlex.join(['proximo', 'check-env', config.environment.env_id, '--replay', str(path)])}"


def _ratio_error(policy: ActorCritic, batch: Batch) -> float:
    """Largest distance of a probability ratio from 1 before any update; above rounding, something is wrong."""
    with torch.no_grad():
        log_ratio = policy.evaluate(batch).log_probs - batch.log_probs
    error = float(log_ratio.expm1().abs()[batch.mask].max())
    if not error < 1e-3:
        raise AssertionError(f"before the first update a probability ratio is {1 + error}, not 1")
    return error


def learn(
    config: ControlConfig,
    run: RunDirectory,
    state: ControlState,
    algorithm: Algorithm,
    batch: Batch,
    episodes: Episodes,
    moments: dict[str, torch.Tensor],
) -> Metrics:
    """Update the policy on a rollout, then its observation normalizer; an update that is not finite is left out.

    Raises:
        UserError: if it was one too many in a row.
    """
    if state.explorer is not None and is_warming_up(config, state.iteration):
        warm_up(state.explorer, batch, episodes, cast(Carry, state.carry).observations)
        return {"learning_rate": algorithm.learning_rate}
    first_ratio_error = _ratio_error(state.policy, batch) if config.debug else None
    seen = rollout_metrics(config.network, state.policy, batch, episodes)
    try:
        metrics: Metrics = _updated(config, state, algorithm, batch, episodes)
    except NonFiniteUpdateError as error:
        metrics = _left_out(config, run, state, batch, error, moments)
    else:
        state.skipped_in_a_row = 0
        if isinstance(algorithm, PPO):
            state.kl_coef = algorithm.next_kl_coef(metrics)
            state.rate_factor = config.algorithm.next_rate_factor(state.rate_factor, metrics)  # type: ignore[union-attr]
        if config.network.normalize_observations:
            assert isinstance(batch.observations, torch.Tensor)
            state.policy.update_observation_moments(batch.observations[batch.mask])
    if first_ratio_error is not None:
        metrics["first_ratio_error"] = first_ratio_error
    clip = {"clip_epsilon": algorithm.clip_epsilon} if isinstance(algorithm, PPO) else {}
    return metrics | seen | {"learning_rate": algorithm.learning_rate} | clip


def _updated(
    config: ControlConfig, state: ControlState, algorithm: Algorithm, batch: Batch, episodes: Episodes
) -> Metrics:
    policy, optimizer, generator = state.policy, state.optimizer, state.shuffle_generator
    if state.explorer is None:
        return algorithm.update(policy, optimizer, batch, generator)
    carried = cast(Carry, state.carry).observations
    algorithm = cast(PPO, algorithm)
    return explored_update(config, state.explorer, algorithm, policy, optimizer, batch, episodes, carried, generator)


def _count(state: ControlState, batch: Batch, episodes: Episodes) -> None:
    state.iteration += 1
    state.env_steps += batch.n_valid
    state.n_episodes += len(episodes.returns)
    state.recent_returns.extend(episodes.returns)
    state.recent_lengths.extend(episodes.lengths)


def _progress(state: ControlState) -> Metrics:
    returns, lengths = state.recent_returns, state.recent_lengths
    return {
        "iteration": state.iteration,
        "env_steps": state.env_steps,
        "n_episodes": state.n_episodes,
        "return_mean": float(np.mean(returns)) if returns else None,
        "length_mean": float(np.mean(lengths)) if lengths else None,
    }


def clocks_of(
    state: ControlState, clock: Clock, n_steps: int, overhead: float, began: float, collected: float, updated: float
) -> Metrics:
    """What the clocks say of an iteration, which is counted into the phases of `state`."""
    passed = (clock.acting, clock.environment, collected - began, updated - collected, overhead)
    phases = dict(zip(PHASES, passed, strict=True))
    for name, seconds in phases.items():
        state.phases[name] = state.phases.get(name, 0.0) + seconds
    speed = n_steps / max(updated - began, 1e-9)
    return {"seconds": state.seconds, "steps_per_second": speed} | phases


def _left_out(
    config: ControlConfig,
    run: RunDirectory,
    state: ControlState,
    batch: Batch,
    error: NonFiniteUpdateError,
    moments: dict[str, torch.Tensor],
) -> Metrics:
    """Go on without this update, and with the normalizers as they were before its rollout.

    Raises:
        UserError: if it was one too many in a row.
    """
    state.policy.load_state_dict(moments, strict=False)
    mends = (
        f"Usual mends: a lower learning_rate (it is {config.algorithm.learning_rate:g}), a lower max_grad_norm "
        f"(it is {config.algorithm.max_grad_norm:g}), --normalize-observations, --normalize-rewards.\n"
        "A run keeps the settings it was begun with, so give them to a new one: proximo train ... "
        f"--learning-rate {min(config.algorithm.learning_rate / 3, 1e-3):.1g}"
    )
    return leave_out(run, state, error, batch, most=config.max_skipped_updates, mends=mends)


def load_policy(checkpoint: Checkpoint) -> ActorCritic:
    """Rebuild the policy of a checkpoint on the CPU, for acting; nothing of the environment is imported."""
    try:
        described = checkpoint.state["policy"]
        settings = BEFORE_ENCODERS | described["network"]
        network = with_settings(NetworkConfig(), settings, where=str(checkpoint.path))
        observations = space_from_json(described["observation_space"])
        actions, has_more = space_from_json(described["action_space"]), bool(described.get("has_intrinsic_critic"))
        policy = ActorCritic(observations, actions, network, has_intrinsic_critic=has_more)
        policy.load_state_dict(checkpoint.tensors["policy"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{checkpoint.path} does not hold a policy of this kind ({error}).") from error
    return policy.eval().requires_grad_(False)
