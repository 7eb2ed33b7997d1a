"""What a peer does: train with the settings of a JSON object on the command line, save, and say how long things took.

    python benchmarks/peers/stable_baselines.py '{"peer": "sb3", "env_id": "CartPole-v1", "total_steps": 10000, ...}'

`sb3` is Stable-Baselines3; `sbx` its sibling in JAX, of the same interface. Everything is their own, as their
documentation has it: `make_vec_env`, `VecNormalize`, `make_atari_env`. Threads of SBX are left to XLA, which uses all.
`benchmarks/speed.py` calls this with the interpreter that `--peer-python` names.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = {"sb3": ("stable_baselines3",), "sbx": ("sbx-rl", "jax", "stable_baselines3")}


def main() -> None:
    wanted = json.loads(sys.argv[1])
    if wanted["threads"]:
        os.environ["OMP_NUM_THREADS"] = str(wanted["threads"])
    import torch

    if wanted["threads"]:
        torch.set_num_threads(wanted["threads"])
    model = find_ppo(wanted["peer"])(**algorithm_settings(wanted))
    clock = make_clock()
    model.learn(wanted["total_steps"], callback=clock)
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder) / "model")
    told = {
        "steps": model.num_timesteps,
        "steps_per_iteration": wanted["n_envs"] * wanted["rollout_length"],
        "seconds_per_iteration": [after - before for before, after in itertools.pairwise(clock.began)],
        "seconds_collecting": clock.collecting,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "gymnasium", "numpy", *PACKAGES[wanted["peer"]])},
    }
    print(json.dumps(told))


def find_ppo(peer: str) -> Any:
    if peer == "sb3":
        from stable_baselines3 import PPO  # type: ignore[import-not-found]
    else:
        from sbx import PPO  # type: ignore[import-not-found]
    return PPO


def algorithm_settings(wanted: dict[str, Any]) -> dict[str, Any]:
    """Our names of settings in the peer's."""
    rate, clip = wanted["learning_rate"], wanted["clip_epsilon"]
    is_linear = wanted["learning_rate_schedule"] == "linear"
    clips_linear = wanted["clip_schedule"] == "linear"
    settings = dict(
        policy="CnnPolicy" if wanted["cnn"] else "MlpPolicy",
        env=make_envs(wanted),
        n_steps=wanted["rollout_length"],
        batch_size=wanted["batch_size"],
        n_epochs=wanted["n_epochs"],
        gamma=wanted["gamma"],
        gae_lambda=wanted["gae_lambda"],
        learning_rate=(lambda left: left * rate) if is_linear else rate,
        clip_range=(lambda left: left * clip) if clips_linear else clip,
        ent_coef=wanted["entropy_coef"],
        vf_coef=wanted["value_coef"],
        max_grad_norm=wanted["max_grad_norm"],
        device="cpu",
        seed=wanted["seed"],
    )
    if not wanted["cnn"]:  # their default, named all the same: 2x64, nothing shared, and tanh
        settings["policy_kwargs"] = dict(net_arch=dict(pi=[64, 64], vf=[64, 64]))
    return settings


def make_envs(wanted: dict[str, Any]) -> Any:
    from stable_baselines3.common.env_util import (  # type: ignore[import-not-found]
        make_atari_env,
        make_vec_env,
    )
    from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize  # type: ignore[import-not-found]

    if wanted["cnn"]:
        import ale_py
        import gymnasium

        gymnasium.register_envs(ale_py)
        return VecFrameStack(make_atari_env(wanted["env_id"], wanted["n_envs"], seed=wanted["seed"]), 4)
    envs = make_vec_env(wanted["env_id"], wanted["n_envs"], seed=wanted["seed"])
    if wanted["normalize_observations"] or wanted["normalize_rewards"]:
        envs = VecNormalize(
            envs,
            norm_obs=wanted["normalize_observations"],
            norm_reward=wanted["normalize_rewards"],
            gamma=wanted["gamma"],
        )
    return envs


def make_clock() -> Any:
    """A callback that notes when iterations begin and how long each rollout takes."""
    from stable_baselines3.common.callbacks import BaseCallback  # type: ignore[import-not-found]

    class Clock(BaseCallback):
        def __init__(self) -> None:
            super().__init__()
            self.began: list[float] = []
            self.collecting: list[float] = []

        def _on_rollout_start(self) -> None:
            self.began.append(time.perf_counter())

        def _on_rollout_end(self) -> None:
            self.collecting.append(time.perf_counter() - self.began[-1])

        def _on_training_end(self) -> None:
            self.began.append(time.perf_counter())

        def _on_step(self) -> bool:
            return True

    return Clock()


if __name__ == "__main__":
    main()
