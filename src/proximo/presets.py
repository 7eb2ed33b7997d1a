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

from proximo.collect.atari import is_atari
from proximo.collect.envs import close_quietly
from proximo.collect.packed_env import mask_of
from proximo.collect.several import SeveralAgentsError, agents_of, policy_spaces, spaces_of
from proximo.errors import tell
from proximo.models.encoders import chosen_encoder
from proximo.models.packing import PackedActions, PackedObservations, leaves
from proximo.training.agents_config import AgentsConfig, SelfPlayConfig
from proximo.training.config import ControlConfig, with_settings

ZOO = "RL Baselines3 Zoo, hyperparams/ppo.yml"


@dataclass(frozen=True)
class Preset:
    """Settings of one task; `source` says where they come from, `score` what they reached here."""

    settings: dict[str, Any]
    source: str
    score: str = "not measured"


_ROBOT = dict(
    total_steps=1_000_000,
    n_envs=8,
    rollout_length=256,
    batch_size=128,
    n_epochs=10,
    learning_rate=3e-4,
    learning_rate_schedule="linear",
    normalize_observations=True,
    normalize_rewards=True,
)
"""2,048 steps per iteration, 10 epochs, 3e-4 going down to 0: the paper's settings for MuJoCo (Schulman et al.
2017, table 3; linear learning rate as in OpenAI baselines), on 8 environments, with both normalizers."""

PAPER = "PPO paper, table 3, on 8 environments with normalization"

_LANDER = dict(
    total_steps=1_000_000,
    n_envs=16,
    rollout_length=256,
    batch_size=256,
    n_epochs=10,
    gamma=0.999,
    gae_lambda=0.98,
    learning_rate=3e-4,
    learning_rate_schedule="linear",
    entropy_coef=0.01,
    normalize_rewards=True,
    on_space_violation="warn",  # the lander flies above and faster than its own observation space says
)
_LANDER_SOURCE = ZOO + ", with reward scaling, shorter rollouts and a linear learning rate (docs/log.md)"

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
        score="500.0 over 10 seeds",
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
            learning_rate_schedule="linear",
            normalize_observations=True,
            normalize_rewards=True,
        ),
        source=ZOO + ", with a linear learning rate",
        score="-79.8 over 5 seeds",
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
        score="-110.2 over 1 seed",
    ),
    "MountainCarContinuous-v0": Preset(
        dict(
            total_steps=100_000,
            n_envs=4,
            rollout_length=256,
            batch_size=128,
            n_epochs=10,
            gamma=0.999,
            gae_lambda=0.95,
            learning_rate=3e-4,
            normalize_observations=True,
            normalize_rewards=True,
        ),
        source="found here (benchmarks/try_settings.py); long discount and normalization as in " + ZOO,
        score="93.9 over 5 seeds",
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
            learning_rate_schedule="linear",
        ),
        source=ZOO + ", without its state-dependent exploration and with a linear learning rate",
        score="-179.7 over 5 seeds",
    ),
    "LunarLander-v3": Preset(_LANDER, source=_LANDER_SOURCE, score="256.0 over 5 seeds"),
    "LunarLanderContinuous-v3": Preset(_LANDER, source=_LANDER_SOURCE, score="266.0 over 1 seed"),
    "BipedalWalker-v3": Preset(
        dict(
            total_steps=5_000_000,
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
        source=ZOO + ", with more steps per iteration (16,384) and larger minibatches (256)",
    ),
    "HalfCheetah-v5": Preset(
        _ROBOT
        | dict(
            rollout_length=64,
            batch_size=64,
            n_epochs=20,
            gamma=0.98,
            gae_lambda=0.92,
            learning_rate=4e-5,
            clip_epsilon=0.1,
            entropy_coef=4e-4,
            value_coef=0.58,
            max_grad_norm=0.8,
            hidden_sizes=[256, 256],
            activation="relu",
            orthogonal_init=False,
            log_std_init=-2.0,
        ),
        source=ZOO + ", on 8 environments, with a linear learning rate of twice the size",
        score="5703.8 over 10 seeds",
    ),
    "Hopper-v5": Preset(_ROBOT, source=PAPER, score="3451.7 over 10 seeds"),
    "Walker2d-v5": Preset(_ROBOT, source=PAPER, score="4377.3 over 10 seeds"),
    "Ant-v5": Preset(
        _ROBOT | dict(log_std_init=-1.0, gamma=0.98, gae_lambda=0.9),
        source=PAPER + ", low initial noise, shorter horizons",
    ),
    "Humanoid-v5": Preset(
        _ROBOT | dict(gamma=0.95, gae_lambda=0.9),
        source=PAPER + "; discount and lambda from " + ZOO,
        score="861.1 over 1 seed",
    ),
    "Swimmer-v5": Preset(
        _ROBOT | dict(n_envs=4, rollout_length=1024, batch_size=256, gamma=0.9999, gae_lambda=0.98, learning_rate=6e-4),
        source=ZOO + ", with a linear learning rate",
        score="295.6 over 1 seed",
    ),
    "Reacher-v5": Preset(_ROBOT, source=PAPER, score="-4.1 over 1 seed"),
    "InvertedPendulum-v5": Preset(_ROBOT | dict(total_steps=300_000), source=PAPER, score="1000.0 over 1 seed"),
    "InvertedDoublePendulum-v5": Preset(
        # Normalized by moments of a balanced pole, the start of an episode lies far out: see docs/log.md.
        _ROBOT | dict(batch_size=64, normalize_observations=False, log_std_init=-1.0),
        source=PAPER + " of rewards alone, and low initial noise",
        score="9111.2 over 10 seeds",
    ),
}


ATARI = Preset(
    dict(
        vectorization="native",
        episodic_life=True,
        sign_rewards=True,
        total_steps=10_000_000,
        n_envs=8,
        rollout_length=128,
        batch_size=256,
        n_epochs=4,
        learning_rate=2.5e-4,
        learning_rate_schedule="linear",
        clip_epsilon=0.1,
        clip_schedule="linear",
        entropy_coef=0.01,
        value_coef=0.5,
    ),
    source=ZOO + "; ale-py's own vector of games, without sticky actions",
)
"""All games `ALE/...`: 10M steps are 40M frames."""


def preset_of(env_id: str) -> Preset | None:
    """The tuned settings of an environment, where there are any."""
    return PRESETS.get(env_id) or (ATARI if is_atari(env_id) else None)


def default_settings(action_space: spaces.Space, observation_space: spaces.Space | None = None) -> dict[str, Any]:
    """Sensible settings for an unknown environment, by its spaces.

    Continuous actions usually come with observations and rewards of any magnitude, so both are normalized. Images are
    scaled by the network that sees them.
    """
    is_packed = isinstance(observation_space, PackedObservations)
    if isinstance(observation_space, spaces.Box) and (
        observation_space.images if is_packed else chosen_encoder("auto", observation_space) == "nature_cnn"
    ):
        seen = default_settings(action_space)
        if not (is_packed and observation_space.n_numbers):
            seen = seen | dict(normalize_observations=False)
        return seen | dict(batch_size=256, n_epochs=4, rollout_length=128, learning_rate=2.5e-4)
    if _is_continuous(action_space):
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


def _is_continuous(action_space: spaces.Space) -> bool:
    """Whether there are numbers in the actions."""
    source = action_space.source if isinstance(action_space, PackedActions) else action_space
    return any(isinstance(leaf.space, spaces.Box) for leaf in leaves(source, "action"))


def resolve_settings(env_id: str, make: Callable[[], gym.Env]) -> tuple[ControlConfig, str]:
    """The tuned settings of an environment, or defaults by its spaces, and a line that says which.

    `make` is called only where there are no tuned settings.
    """
    preset = preset_of(env_id)
    if preset is not None:
        settings = {"env_id": env_id, "action_mask": "none", **preset.settings}
        config = with_settings(ControlConfig(), settings, where=f"preset {env_id}")
        return config, f"tuned for {env_id} ({preset.source}); measured: {preset.score}"
    try:
        env = make()
    except SeveralAgentsError as found:
        return _settings_of_several(env_id, found)
    settings = default_settings(env.action_space, env.observation_space)
    if isinstance(env, gym.Env):
        settings["action_mask"] = mask_of(env, seed=0)
    try:
        env.close()
    except (Exception, SystemExit) as error:  # its spaces are known, and that is all it was made for
        tell(f"proximo: closing {env_id} failed: {type(error).__name__}: {error}")
    config = with_settings(ControlConfig(), {"env_id": env_id, **settings}, where="defaults")
    kind = "continuous" if _is_continuous(env.action_space) else "discrete"
    return config, f"defaults for {kind} actions: nobody has tuned {env_id}"


def _settings_of_several(env_id: str, found: SeveralAgentsError) -> tuple[ControlConfig, str]:
    """Defaults for an environment of several agents, by the spaces of the first one."""
    agents = agents_of(found.env, env_id)
    seen, acts = policy_spaces(*spaces_of(found.env, env_id, agents[0]), "auto", env_id)
    close_quietly(env_id, [found.env])
    settings = default_settings(acts, seen)
    if found.kind == "parallel":
        config = with_settings(AgentsConfig(), {"env_id": env_id, **settings}, where="defaults")
        return config, f"defaults for {len(agents)} agents that act at once: nobody has tuned {env_id}"
    settings |= {"n_envs": 32, "normalize_observations": False}
    config = with_settings(SelfPlayConfig(), {"env_id": env_id, **settings}, where="defaults")
    return config, (
        "defaults for self-play: one policy for both players (for agents that learn together, have the environment "
        f"pass through pettingzoo.utils.aec_to_parallel); nobody has tuned {env_id}"
    )
