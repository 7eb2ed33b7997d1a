"""`PackedEnv`: an environment of any spaces as one whose observations and actions are arrays, action masks and all."""

from __future__ import annotations

from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from proximo.errors import UserError
from proximo.models.packing import MASK_KEY, PackedActions, PackedObservations, options_of

ActionMask = Literal["auto", "none", "info", "observation"]
"""Where an environment says which actions are possible: in `info["action_mask"]` or `observation["action_mask"]`."""


class PackedEnv(gym.Wrapper):
    """Hands over observations as rows of `PackedObservations`, and takes actions as rows of `PackedActions`."""

    def __init__(self, env: gym.Env, observations: spaces.Space, actions: spaces.Space) -> None:
        """Put rows where a space of the environment's is not what it had."""
        super().__init__(env)
        self.observation_space = observations
        self.action_space = actions
        self._rows = observations if isinstance(observations, PackedObservations) else None
        self._actions = actions if isinstance(actions, PackedActions) else None
        self._is_told = self._rows is not None and bool(self._rows.options) and not self._rows.mask_is_observed

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """Begin an episode.

        Raises:
            PackingError: if the observation does not fit its space, or no action is possible.
        """
        result = self.env.reset(seed=seed) if options is None else self.env.reset(seed=seed, options=options)
        if not (isinstance(result, tuple) and len(result) == 2):
            return result  # the caller says what is wrong with it
        return self._packed(result[0], result[1]), result[1]

    def step(self, action: Any) -> Any:
        """Take one action; an episode that is over has no more use for a mask.

        Raises:
            PackingError: if the observation does not fit its space, or no action is possible.
        """
        result = self.env.step(action if self._actions is None else self._actions.unpack(np.asarray(action)))
        if not (isinstance(result, tuple) and len(result) == 5):
            return result
        observation, reward, terminated, truncated, info = result
        return (
            self._packed(observation, info, is_over=bool(terminated) or bool(truncated)),
            reward,
            terminated,
            truncated,
            info,
        )

    def around(self, env: gym.Env) -> PackedEnv:
        """The same around another environment, such as the one inside a wrapper."""
        return PackedEnv(env, self.observation_space, self.action_space)

    def _packed(self, observation: Any, info: Any, *, is_over: bool = False) -> Any:
        if self._rows is None:
            return observation
        mask = info.get(MASK_KEY) if self._is_told and isinstance(info, dict) else None
        return self._rows.pack(observation, mask, ignores_mask=is_over)


def packed(env: gym.Env, action_mask: ActionMask = "auto") -> gym.Env:
    """The environment itself where its spaces are arrays and nothing is forbidden, else a `PackedEnv` around it.

    `auto` looks for the mask in the observation; it is not in `info` before a reset (see `mask_of`).

    Raises:
        UserError: if a space is of a kind that cannot be learned from, or there is nothing that could be masked.
    """
    observations, actions = packed_spaces(env.observation_space, env.action_space, action_mask)
    if observations is env.observation_space and actions is env.action_space:
        return env
    return PackedEnv(env, observations, actions)


def packed_spaces(
    observations: spaces.Space, actions: spaces.Space, action_mask: ActionMask = "auto"
) -> tuple[spaces.Space, spaces.Space]:
    """The spaces that a policy has for an environment with these: the same where they are arrays.

    Raises:
        UserError: as `packed`.
    """
    options = _options(actions, action_mask)
    observed = action_mask == "observation" or (action_mask == "auto" and _has_mask(observations, sum(options)))
    if isinstance(actions, (spaces.Dict, spaces.Tuple)):
        actions = PackedActions(actions)
    if action_mask == "info" or observed:
        return PackedObservations(observations, options, mask_is_observed=observed), actions
    return observations if isinstance(observations, spaces.Box) else PackedObservations(observations), actions


def mask_of(env: gym.Env, seed: int) -> ActionMask:
    """Where an environment as `packed` makes it says which actions are possible; it is reset to find out."""
    seen, actions = env.observation_space, env.action_space
    if isinstance(seen, PackedObservations) and seen.options:
        return "observation"
    if not _options(actions.source if isinstance(actions, PackedActions) else actions, "auto"):
        return "none"
    try:
        _, info = env.reset(seed=seed)
    except Exception:  # whoever trains on it will be told
        return "none"
    return "info" if isinstance(info, dict) and info.get(MASK_KEY) is not None else "none"


def _options(space: spaces.Space, action_mask: ActionMask) -> tuple[int, ...]:
    try:
        options = options_of(space)
    except UserError:
        if action_mask in ("info", "observation"):
            raise
        return ()
    if not options and action_mask in ("info", "observation"):
        raise UserError(f"action_mask is {action_mask!r}, but the actions {space} hold no choice that could be masked.")
    return options


def _has_mask(space: spaces.Space, n_options: int) -> bool:
    """Whether observations have a mask with a number for each option."""
    mask = space.spaces.get(MASK_KEY) if isinstance(space, spaces.Dict) else None
    return mask is not None and n_options > 0 and int(np.prod(mask.shape or (0,))) == n_options
