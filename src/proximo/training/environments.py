"""The environments of a control run, by its settings."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

from proximo.collect.atari import is_atari
from proximo.collect.child_process import n_cores
from proximo.collect.device_envs import DeviceEnvs, make_device_envs
from proximo.collect.envpool_envs import EnvPoolEnvs
from proximo.collect.envs import VectorEnvs
from proximo.collect.make import EnvFactory, make_packed_env
from proximo.collect.native import NativeEnvs, make_native
from proximo.collect.serial_envs import SerialEnvs
from proximo.collect.workers import WorkerEnvs
from proximo.errors import UserError
from proximo.training.agents_config import AgentsConfig
from proximo.training.agents_evaluate import make_parallel_envs
from proximo.training.config import ControlConfig

Envs = VectorEnvs | DeviceEnvs


def make_envs(config: ControlConfig, factory: EnvFactory) -> Envs:
    """Make the vector environment that the config asks for."""
    task = config.environment
    if isinstance(config, AgentsConfig):
        return cast(VectorEnvs, make_parallel_envs(config, factory))
    if task.vectorization == "native":
        native = NativeEnvs(
            make_native(
                task.env_id,
                task.n_envs,
                task.env_kwargs,
                max_episode_steps=task.max_episode_steps,
                episodic_life=task.episodic_life,
            ),
            config.seed,
            name=task.env_id,
            on_space_violation=task.on_space_violation,
            atari=is_atari(task.env_id),
        )
        return _with_steps_to_learn_from(native, config)
    if task.vectorization == "envpool":
        options = dict(task.env_kwargs)
        if task.max_episode_steps is not None:
            options["max_episode_steps"] = task.max_episode_steps
        pool = EnvPoolEnvs(task.env_id, task.n_envs, min(n_cores(), task.n_envs), options)
        native = NativeEnvs(pool, config.seed, name=task.env_id, on_space_violation=task.on_space_violation)
        return _with_steps_to_learn_from(native, config)
    if task.vectorization == "device":
        return make_device_envs(
            task.env_id,
            factory,
            task.n_envs,
            config.device,
            config.seed,
            task.env_kwargs,
            max_episode_steps=task.max_episode_steps,
        )

    # A partial rather than a closure: worker processes unpickle it without importing this module and torch.
    make_one = partial(
        make_packed_env,
        factory,
        task.env_id,
        task.env_kwargs,
        max_episode_steps=task.max_episode_steps,
        action_mask=task.action_mask,
    )
    shared: dict[str, Any] = dict(
        name=task.env_id, on_space_violation=task.on_space_violation, max_restarts=task.restarts_allowed
    )
    if task.vectorization == "workers":
        return WorkerEnvs(
            make_one, task.n_envs, config.seed, n_workers=task.n_workers, timeout=task.step_timeout, **shared
        )
    return SerialEnvs(make_one, task.n_envs, config.seed, **shared)


def _with_steps_to_learn_from(envs: NativeEnvs, config: ControlConfig) -> NativeEnvs:
    if envs.resets_take_steps and config.rollout_length < 2:
        envs.close()
        task = config.environment
        raise UserError(
            f"rollout_length is 1, but {task.env_id} with vectorization {task.vectorization} spends a step on each "
            "reset: a rollout could hold nothing to learn from. Give a rollout_length of 2 or more, or --vectorization "
            "serial."
        )
    return envs
