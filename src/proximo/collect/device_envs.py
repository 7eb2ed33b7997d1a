"""Environments that live on a torch device: tensors in, tensors out, and nothing waits for the host."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from proximo.collect.envs import EnvironmentFault, Snapshot, episode_seed
from proximo.collect.make import EnvFactory, names_code
from proximo.errors import UserError, in_words


class DeviceStep(NamedTuple):
    """One step of N environments, after any automatic reset; every tensor on the environments' device.

    | field              | shape   | what                                                                  |
    |--------------------|---------|-----------------------------------------------------------------------|
    | observations       | [N, *O] | what to act on next: of the next episode where one has ended          |
    | rewards            | [N]     | the environment's own                                                 |
    | terminated         | [N]     | bool: the environment's own end                                       |
    | truncated          | [N]     | bool: cut from outside; an episode that is both is terminated         |
    | final_observations | [N, *O] | the true next observation, also where an episode ended                |
    | valid              | [N]     | bool: False for a step that only reset: no experience                 |

    The tensors may be overwritten by the next call.
    """

    observations: Tensor
    rewards: Tensor
    terminated: Tensor
    truncated: Tensor
    final_observations: Tensor
    valid: Tensor


class DeviceEnvs(Protocol):
    """N environments on a device that step together and reset by themselves; as `envs.VectorEnvs`, in tensors."""

    n_envs: int
    device: torch.device
    observation_space: spaces.Space
    action_space: spaces.Space
    generator: torch.Generator | None
    """All randomness of `step`, on `device`; None where it draws elsewhere, or nothing."""
    capturable: bool
    """Whether `step` can be part of a CUDA graph: its state stays where it is, no shape hangs on a value, and no
    number goes to the host."""
    faults: list[EnvironmentFault]
    n_restarts: int

    def reset(self) -> Tensor:
        """Begin the first episode of each environment; return observations `[N, *O]`."""
        ...

    def step(self, actions: Tensor) -> DeviceStep:
        """Step each environment with its row of `actions` `[N, *A]`, of the environment's own kind."""
        ...

    def snapshot(self) -> Snapshot:
        """Describe the present moment, on the host."""
        ...

    def restore(self, snapshot: Snapshot) -> tuple[Tensor, list[int]]:
        """Return to a moment: its observations, and the environments that had to begin a fresh episode."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...


class TorchCartPole:
    """Gymnasium's CartPole-v1 (Barto, Sutton and Anderson 1983) for N poles at once, in float32 on any torch device.

    Dynamics, bounds, rewards (1 a step, the last one too) and the limit of 500 steps are those of Gymnasium 1.4,
    which computes in float64: trajectories agree to rounding. An episode that ends begins anew within the step.
    Actions are 0 (push to the left) and 1, `[N]`; observations `[N, 4]`: position (m), velocity (m/s), angle (rad),
    angular velocity (rad/s).
    """

    def __init__(
        self, n_envs: int, device: torch.device | str = "cpu", seed: int = 0, *, max_episode_steps: int = 500
    ) -> None:
        """Set `n_envs` poles up on `device`; `seed` draws where each episode begins."""
        self.n_envs = n_envs
        self.device = _full_name(device)
        high = np.array([2 * _X_LIMIT, np.inf, 2 * _ANGLE_LIMIT, np.inf], np.float32)
        self.observation_space: spaces.Space = spaces.Box(-high, high)
        self.action_space: spaces.Space = spaces.Discrete(2)
        self.generator: torch.Generator | None = torch.Generator(self.device).manual_seed(seed)
        self.capturable = True
        self.faults: list[EnvironmentFault] = []
        self.n_restarts = 0
        self._limit = max_episode_steps
        self._state = torch.zeros(n_envs, 4, device=self.device)
        self._n_steps = torch.zeros(n_envs, dtype=torch.int64, device=self.device)
        self._ones = torch.ones(n_envs, device=self.device)
        self._valid = torch.ones(n_envs, dtype=torch.bool, device=self.device)

    def reset(self) -> Tensor:
        """Begin an episode everywhere; return observations `[N, 4]`."""
        self._state.copy_(self._beginnings())
        self._n_steps.zero_()
        return self._state

    def step(self, actions: Tensor) -> DeviceStep:
        """Push each cart for 0.02 s."""
        after = _euler_step(self._state, actions)
        self._n_steps.add_(1)
        terminated = (after[:, 0].abs() > _X_LIMIT) | (after[:, 2].abs() > _ANGLE_LIMIT)
        truncated = self._n_steps >= self._limit
        done = terminated | truncated
        self._state.copy_(torch.where(done.unsqueeze(1), self._beginnings(), after))
        self._n_steps.masked_fill_(done, 0)
        return DeviceStep(self._state, self._ones, terminated, truncated, after, self._valid)

    def snapshot(self) -> Snapshot:
        """Everything: a run that goes on from it goes on exactly."""
        assert self.generator is not None
        tensors = {"state": self._state, "n_steps": self._n_steps, "generator": self.generator.get_state()}
        return Snapshot({name: tensor.cpu().numpy().copy() for name, tensor in tensors.items()}, {})

    def restore(self, snapshot: Snapshot) -> tuple[Tensor, list[int]]:
        """Be as at `snapshot`; no environment begins a fresh episode.

        Raises:
            ValueError: if it is of another number of environments.
        """
        assert self.generator is not None
        for name, own in (("state", self._state), ("n_steps", self._n_steps)):
            kept = torch.from_numpy(snapshot.arrays[name])
            if (kept.shape, kept.dtype) != (own.shape, own.dtype):
                raise ValueError(f"its {name} is {kept.dtype} of shape {list(kept.shape)}, not {list(own.shape)}")
            own.copy_(kept)
        self.generator.set_state(torch.from_numpy(snapshot.arrays["generator"]))
        return self._state, []

    def close(self) -> None:
        """Nothing is held."""

    def _beginnings(self) -> Tensor:
        return torch.empty_like(self._state).uniform_(-0.05, 0.05, generator=self.generator)


_GRAVITY, _CART_MASS, _POLE_MASS, _HALF_LENGTH = 9.8, 1.0, 0.1, 0.5  # m/s^2, kg, kg, m
_MASS, _POLE_MOMENT = _CART_MASS + _POLE_MASS, _POLE_MASS * _HALF_LENGTH
_FORCE, _SECONDS = 10.0, 0.02  # N, s
_X_LIMIT, _ANGLE_LIMIT = 2.4, 12 * 2 * math.pi / 360  # m, rad


def _euler_step(state: Tensor, actions: Tensor) -> Tensor:
    """The state `[N, 4]` 0.02 s later, by the explicit Euler method."""
    _, velocity, angle, spin = state.unbind(1)
    force = torch.where(actions == 1, _FORCE, -_FORCE)
    cos, sin = angle.cos(), angle.sin()
    push = (force + _POLE_MOMENT * spin.square() * sin) / _MASS
    inertia = _HALF_LENGTH * (4.0 / 3.0 - _POLE_MASS * cos.square() / _MASS)
    spin_change = (_GRAVITY * sin - cos * push) / inertia
    velocity_change = push - _POLE_MOMENT * spin_change * cos / _MASS
    change = torch.stack((velocity, velocity_change, spin, spin_change), 1)
    return state + _SECONDS * change


def make_device_envs(
    env_id: str,
    factory: EnvFactory,
    n_envs: int,
    device: str,
    seed: int,
    env_kwargs: dict[str, Any],
    *,
    max_episode_steps: int | None = None,
) -> DeviceEnvs:
    """Make environments on a device: those of CartPole-v1, or what a factory of the caller's makes.

    A factory is called as `factory(n_envs=, device=, seed=, **env_kwargs)` and returns a `DeviceEnvs`: one of its
    own, or a `dlpack_envs.DLPackEnvs` around another framework's.

    Raises:
        UserError: if there is no such version of the environment, or the factory makes something else.
    """
    drawn = episode_seed(seed, 0, 0)
    if env_id == "CartPole-v1":
        if env_kwargs:
            raise UserError(f"CartPole-v1 on a device takes no arguments, but env_kwargs is {env_kwargs!r}.")
        return TorchCartPole(n_envs, device, drawn, max_episode_steps=max_episode_steps or 500)
    if env_id in gym.registry or (names_code(env_id) and env_id.rpartition(":")[2] in gym.registry):
        raise UserError(
            f"{env_id} has no version that lives on a device; CartPole-v1 has. Use --vectorization serial, workers or "
            "native, or name a factory of your own: my_file.py:make_envs, called as make_envs(n_envs=, device=, seed=)."
        )
    if max_episode_steps is not None:
        raise UserError(
            f"max_episode_steps is {max_episode_steps}, but environments on a device keep their own limit. Leave it "
            f"out, and give the limit to {env_id}, by env_kwargs perhaps."
        )
    try:
        envs = factory(n_envs=n_envs, device=device, seed=drawn, **env_kwargs)
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise UserError(
            f"{env_id} could not be made with n_envs={n_envs}, device={device!r}, seed={drawn}"
            f"{f' and {env_kwargs}' if env_kwargs else ''}: {in_words(error)}"
        ) from error
    return _checked(env_id, envs, n_envs, device)


def _checked(env_id: str, envs: Any, n_envs: int, device: str) -> DeviceEnvs:
    """Refuse what is no `DeviceEnvs`, or not the one asked for."""
    missing = [name for name in _NEEDED if not hasattr(envs, name)]
    if missing:
        raise UserError(
            f"{env_id} made a {type(envs).__name__}, which does not live on a device: it lacks {', '.join(missing)} "
            "(proximo.collect.device_envs.DeviceEnvs has them all). Wrap another framework's vector environment in "
            "proximo.collect.dlpack_envs.DLPackEnvs; for Gymnasium's, use --vectorization serial."
        )
    if envs.n_envs != n_envs or _full_name(envs.device) != _full_name(device):
        raise UserError(
            f"{env_id} made {envs.n_envs} environments on {envs.device}, but it was asked for {n_envs} on {device}."
        )
    return envs


_NEEDED = (
    *("n_envs", "device", "observation_space", "action_space", "generator", "capturable", "faults", "n_restarts"),
    *("reset", "step", "snapshot", "restore", "close"),
)


def _full_name(device: torch.device | str) -> torch.device:
    """`cuda` as `cuda:0`, as tensors have it."""
    return torch.empty(0, device=device).device
