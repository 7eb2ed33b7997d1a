"""Vector environments of other frameworks (JAX, Warp, torch, ...) behind `DeviceEnvs`, over DLPack, without copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from torch import Tensor

from proximo.collect.device_envs import DeviceStep
from proximo.collect.envs import EnvironmentFault, Snapshot, close_quietly, episode_seed
from proximo.errors import UserError

Autoreset = Literal["next_step", "same_step", "disabled"]

_MODES: dict[AutoresetMode, Autoreset] = {
    AutoresetMode.NEXT_STEP: "next_step",
    AutoresetMode.SAME_STEP: "same_step",
    AutoresetMode.DISABLED: "disabled",
}
_FINAL = ("final_obs", "final_observation")


class DLPackEnvs:
    """A vector environment with Gymnasium's API, whose arrays support `__dlpack__` and lie on `device`.

    That is `reset(seed=) -> observations, info` and `step(actions) -> observations, rewards, terminated, truncated,
    info`, over N environments. Its arrays are looked at where they lie; only float64 observations (which become
    float32, as everywhere here) and NumPy arrays that are read-only are copied.

    Autoreset: `next_step`, the step after an episode's end only resets (it is marked as not valid). `same_step`:
    `info["final_obs"]` (or `"final_observation"`), an array `[N, *O]`, has the true final observations; give it at
    every step, for where it is left out the host must wait to see whether an episode ended. `disabled`: ended
    environments are reset here, by `reset(options={"reset_mask": done})` with `done` in the framework's own
    arrays, and the host waits at every step.

    Such environments cannot be brought back to a moment within an episode: a resumed run begins fresh episodes in
    all of them. They are not captured in CUDA graphs. Observations are not held against the bounds of their space.
    """

    def __init__(
        self,
        envs: Any,
        *,
        device: torch.device | str,
        seed: int = 0,
        to_actions: Callable[[Tensor], Any] | None = None,
        autoreset: Autoreset | None = None,
        observation_space: spaces.Space | None = None,
        action_space: spaces.Space | None = None,
        name: str = "the environment",
    ) -> None:
        """Wrap `envs`.

        Args:
            envs: has `num_envs`, `reset`, `step`, and, where not given here, `single_observation_space` and
                `single_action_space` of Gymnasium.
            device: where its arrays are.
            seed: of the first reset.
            to_actions: from a tensor of actions `[N, *A]` to what `envs.step` takes, such as
                `jax.dlpack.from_dlpack`; by default the tensor itself. The tensor is not written to afterwards.
            autoreset: by default what `envs.metadata["autoreset_mode"]` says.
            observation_space: of one environment.
            action_space: of one environment.
            name: for messages.

        Raises:
            UserError: if something of this is missing.
        """
        self._envs, self._seed, self._name = envs, seed, name
        self._to_actions = to_actions or (lambda actions: actions)
        self.device = torch.empty(0, device=device).device
        self.n_envs = int(self._attribute("num_envs"))
        self.observation_space = observation_space or self._attribute("single_observation_space")
        self.action_space = action_space or self._attribute("single_action_space")
        if not isinstance(self.observation_space, spaces.Box):
            raise UserError(f"{name}: the observation space is {self.observation_space}; it must be a Box.")
        self.generator: torch.Generator | None = None
        self.capturable = False
        self.faults: list[EnvironmentFault] = []
        self.n_restarts = 0
        self._mode = autoreset or self._mode_of(envs)
        self._reset_due = torch.zeros(self.n_envs, dtype=torch.bool, device=self.device)
        self._n_steps = 0

    def reset(self) -> Tensor:
        """Begin the first episode of each environment; return observations `[N, *O]`."""
        return self._reset_all(fresh_start=0)

    def step(self, actions: Tensor) -> DeviceStep:
        """Step each environment with its row of `actions`.

        Raises:
            UserError: if an array is on another device or of another shape than it must be, or knows no DLPack.
        """
        self._n_steps += 1
        raw, raw_rewards, raw_terminated, raw_truncated, info = self._envs.step(self._to_actions(actions))
        observations = self._observations("observations", raw)
        rewards = self._of("rewards", raw_rewards, ())
        terminated = self._of("terminated", raw_terminated, ()).to(torch.bool)
        truncated = self._of("truncated", raw_truncated, ()).to(torch.bool)
        valid = ~self._reset_due
        done = (terminated | truncated) & valid
        final = observations
        if self._mode == "next_step":
            self._reset_due = done
        elif self._mode == "same_step":
            final = self._final(observations, done, info)
        elif bool(done.any()):
            mask = raw_terminated | raw_truncated
            final = observations.clone()
            after, _ = self._envs.reset(options={"reset_mask": mask})
            observations = self._observations("observations", after)
        return DeviceStep(observations, rewards, terminated, truncated, final, valid)

    def snapshot(self) -> Snapshot:
        """Only how far it got: what is inside cannot be reached."""
        return Snapshot({}, {"n_steps": self._n_steps})

    def restore(self, snapshot: Snapshot) -> tuple[Tensor, list[int]]:
        """Begin fresh episodes everywhere, other ones than at the start."""
        self._n_steps = int(snapshot.values["n_steps"])
        return self._reset_all(fresh_start=self._n_steps), list(range(self.n_envs))

    def close(self) -> None:
        """Close it, where it can be; if that fails, it is told on standard error."""
        if hasattr(self._envs, "close"):
            close_quietly(self._name, [self._envs])

    def _reset_all(self, fresh_start: int) -> Tensor:
        self._reset_due = torch.zeros_like(self._reset_due)
        raw, _ = self._envs.reset(seed=episode_seed(self._seed, 0, fresh_start))
        return self._observations("observations", raw)

    def _final(self, observations: Tensor, done: Tensor, info: Any) -> Tensor:
        """The true next observations under `same_step`: those of `info` where an episode ended."""
        given = next((info[key] for key in _FINAL if key in info), None)
        if given is None:
            if not bool(done.any()):
                return observations
            raise UserError(
                f"{self._name}: an episode ended, but info has no {' or '.join(map(repr, _FINAL))}, without which "
                "nobody knows what a truncated episode was worth. Put the true final observations there, [N, *O]."
            )
        if isinstance(given, np.ndarray) and given.dtype == object:  # Gymnasium's own: None where none ended
            final = observations.clone()
            for index in done.nonzero().flatten().tolist():
                final[index] = torch.as_tensor(given[index])
            return final
        rows = done.view(-1, *[1] * (observations.ndim - 1))
        return torch.where(rows, self._observations("final observations", given), observations)

    def _observations(self, word: str, array: Any) -> Tensor:
        assert self.observation_space.shape is not None
        tensor = self._of(word, array, self.observation_space.shape)
        return tensor.to(torch.float32) if tensor.dtype == torch.float64 else tensor

    def _of(self, word: str, array: Any, shape: tuple[int, ...]) -> Tensor:
        """Look at an array `[N, *shape]` as a tensor, where it lies."""
        if isinstance(array, dict | tuple | list):
            raise UserError(
                f"{self._name}: the {word} are a {type(array).__name__}, but must be one array [N, *O]. Join its parts "
                "in a wrapper of your own."
            )
        tensor = self._looked_at(word, array)
        if tensor.device != self.device:
            raise UserError(
                f"{self._name}: the {word} are on {tensor.device}, but the environments were said to be on "
                f"{self.device}. Make them there, or give the device where they are: DLPackEnvs(..., device=...)."
            )
        expected = (self.n_envs, *shape)
        if tuple(tensor.shape) != expected:
            raise UserError(
                f"{self._name}: the {word} have shape {tuple(tensor.shape)}, but {self.n_envs} environments with "
                f"this space must give {expected}."
            )
        return tensor

    def _looked_at(self, word: str, array: Any) -> Tensor:
        if isinstance(array, Tensor):
            return array.detach()
        try:
            return torch.from_dlpack(array)
        except Exception as error:
            if isinstance(array, np.ndarray) and not array.flags.writeable:
                return torch.from_numpy(array.copy())
            raise UserError(
                f"{self._name}: the {word} are a {type(array).__name__}, which torch cannot look at by DLPack "
                f"({str(error).splitlines()[0] if str(error) else type(error).__name__}). Give arrays with __dlpack__ "
                "(JAX, Warp, CuPy, torch, NumPy)."
            ) from error

    def _attribute(self, attribute: str) -> Any:
        if hasattr(self._envs, attribute):
            return getattr(self._envs, attribute)
        argument = attribute.removeprefix("single_")
        hint = f", or give {argument}= to DLPackEnvs" if argument.endswith("_space") else ""
        raise UserError(
            f"{self._name}: {type(self._envs).__name__} has no {attribute}. Wrap it in a class that has it{hint}."
        )

    def _mode_of(self, envs: Any) -> Autoreset:
        said = (getattr(envs, "metadata", None) or {}).get("autoreset_mode")
        if said is None:
            raise UserError(
                f"{self._name}: {type(envs).__name__} does not say how it resets. Give DLPackEnvs "
                "autoreset='same_step' where the step that ends an episode also begins the next (JAX, Brax, Isaac "
                "Lab, ManiSkill), 'next_step' where the step after it only resets, 'disabled' where nothing resets."
            )
        return _MODES[AutoresetMode(said)]
