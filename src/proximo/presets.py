"""Tuned settings per environment, each with where they come from and what they scored here.

A measured score is the mean return of 100 deterministic evaluation episodes of the final policy, averaged
over the seeds listed in docs/benchmarks.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
from gymnasium import spaces

from proximo.train.config import ControlConfig, with_settings

ZOO = "RL Baselines3 Zoo, hyperparams/ppo.yml"


@dataclass(frozen=True)
class Preset:
    """Settings of one task; `source` says where they come from, `score` what they reached here."""

    settings: dict[str, Any]
    source: str
    score: str = "not measured"


PRESETS: dict[str, Preset] = {
    "CartPole-v1": Preset(
        dict(
            total_steps=100_000,
            n_envs=8,
            rollout_length=32,
            batch_size=256,
            n_epochs=20,
            gamma=0.98,
            gae_lambda=0.8,
            learning_rate=1e-3,
            learning_rate_schedule="linear",
            clip_epsilon=0.2,
            clip_schedule="linear",
        ),
        source=ZOO,
    ),
    "Acrobot-v1": Preset(
        dict(
            total_steps=500_000,
            n_envs=16,
            rollout_length=256,
            batch_size=64,
            n_epochs=4,
            gae_lambda=0.94,
            learning_rate=3e-4,
            normalize_observations=True,
            normalize_rewards=True,
        ),
        source=ZOO,
    ),
    "MountainCar-v0": Preset(
        dict(
            total_steps=1_000_000,
            n_envs=16,
            rollout_length=16,
            batch_size=64,
            n_epochs=4,
            gae_lambda=0.98,
            normalize_observations=True,
            normalize_rewards=True,
        ),
        source=ZOO,
    ),
    "MountainCarContinuous-v0": Preset(
        dict(
            total_steps=100_000,
            n_envs=1,
            rollout_length=8,
            batch_size=8,
            n_epochs=10,
            gamma=0.9999,
            gae_lambda=0.9,
            learning_rate=7.77e-5,
            entropy_coef=0.00429,
            clip_epsilon=0.1,
            max_grad_norm=5.0,
            value_coef=0.19,
            normalize_observations=True,
            normalize_rewards=True,
        ),
        source=ZOO,
    ),
    "Pendulum-v1": Preset(
        dict(
            total_steps=200_000,
            n_envs=4,
            rollout_length=1024,
            batch_size=64,
            n_epochs=10,
            gamma=0.9,
            learning_rate=1e-3,
        ),
        source=ZOO + ", without its state-dependent exploration",
    ),
    "LunarLander-v3": Preset(
        dict(
            total_steps=1_000_000,
            n_envs=16,
            rollout_length=1024,
            batch_size=64,
            n_epochs=4,
            gamma=0.999,
            gae_lambda=0.98,
            entropy_coef=0.01,
            on_space_violation="warn",
        ),
        source=ZOO,
    ),
    "BipedalWalker-v3": Preset(
        dict(
            total_steps=2_000_000,
            n_envs=32,
            rollout_length=512,
            batch_size=256,
            n_epochs=10,
            gamma=0.999,
            clip_epsilon=0.18,
            normalize_observations=True,
            normalize_rewards=True,
            on_space_violation="warn",
        ),
        source=ZOO,
    ),
}


def default_settings(action_space: spaces.Space) -> dict[str, Any]:
    """Sensible settings for an unknown environment, by its spaces.

    Continuous actions usually come with observations and rewards of any magnitude, so both are normalized.
    """
    if isinstance(action_space, spaces.Box):
        return dict(
            n_envs=8,
            rollout_length=256,
            batch_size=64,
            n_epochs=10,
            normalize_observations=True,
            normalize_rewards=True,
        )
    return dict(
        n_envs=8,
        rollout_length=128,
        batch_size=128,
        n_epochs=4,
        entropy_coef=0.01,
        normalize_observations=True,
    )


def resolve_settings(env_id: str, make: Callable[[], gym.Env]) -> tuple[ControlConfig, str]:
    """The tuned settings of an environment, or defaults by its spaces, and a line that says which.

    `make` is called only where there are no tuned settings.
    """
    preset = PRESETS.get(env_id)
    if preset is not None:
        config = with_settings(ControlConfig(), {"env_id": env_id, **preset.settings}, where=f"preset {env_id}")
        return config, f"tuned for {env_id} ({preset.source}); measured: {preset.score}"
    env = make()
    settings = default_settings(env.action_space)
    env.close()
    config = with_settings(ControlConfig(), {"env_id": env_id, **settings}, where="defaults")
    kind = "continuous" if isinstance(env.action_space, spaces.Box) else "discrete"
    return config, f"defaults for {kind} actions: nobody has tuned {env_id}"
