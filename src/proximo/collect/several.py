"""Environments of several agents (PettingZoo's): telling them from others, and what their spaces are for a policy.

Nothing here imports PettingZoo: whoever has such an environment has imported it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from gymnasium import spaces

from proximo.collect.packed_env import ActionMask, packed_spaces
from proximo.errors import UserError, in_words
from proximo.models.packing import MASK_KEY, PackedActions, PackedObservations

Kind = Literal["parallel", "turns"]

INSTALL = 'pip install -c constraints.txt -e ".[agents]"'


class SeveralAgentsError(UserError):
    """An environment of several agents where one of a single agent is expected; `env` is the environment."""

    def __init__(self, message: str, env: Any, kind: Kind) -> None:
        """Keep the environment, for whoever can use it, and its kind."""
        super().__init__(message)
        self.env = env
        self.kind: Kind = kind


def kind_of(env: Any) -> Kind | None:
    """`parallel` for a PettingZoo `ParallelEnv`, `turns` for an `AECEnv`, None for everything else."""
    for base in type(env).__mro__:
        if base.__module__.startswith("pettingzoo.") and base.__name__ in ("ParallelEnv", "AECEnv"):
            return "parallel" if base.__name__ == "ParallelEnv" else "turns"
    return None


def refuse_several(env: Any, env_id: str) -> None:
    """Raise if `env` is of several agents.

    Raises:
        SeveralAgentsError: saying what can be done with it.
    """
    kind = kind_of(env)
    if kind == "parallel":
        raise SeveralAgentsError(
            f"{env_id} is an environment of several agents (PettingZoo's ParallelEnv), and this is for "
            "single agents: proximo train learns it, from a class or a function that makes it, and resume, evaluate "
            "and watch know such runs; "
            "pettingzoo.test.parallel_api_test(env) checks it.",
            env,
            kind,
        )
    if kind == "turns":
        raise SeveralAgentsError(
            f"{env_id} is an environment in which agents take turns (PettingZoo's AECEnv), and this is "
            "for single agents: proximo train learns it by self-play, and resume, evaluate and watch know such runs; "
            "pettingzoo.test.api_test(env) checks it.",
            env,
            kind,
        )


def make_several(factory: Callable[..., Any], env_id: str, env_kwargs: dict[str, Any], wanted: Kind) -> Any:
    """Make one environment of several agents.

    Raises:
        UserError: if it cannot be made, or is of another kind.
    """
    try:
        env = factory(**env_kwargs)
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise UserError(f"{env_id} could not be made with {env_kwargs or 'no arguments'}: {in_words(error)}") from error
    kind = kind_of(env)
    if kind != wanted:
        is_now = {"parallel": "a ParallelEnv", "turns": "an AECEnv", None: f"a {type(env).__name__}"}[kind]
        was = "ParallelEnv" if wanted == "parallel" else "AECEnv"
        raise UserError(f"{env_id} made {is_now}; this run needs a PettingZoo {was}.")
    return env


def agents_of(env: Any, env_id: str) -> tuple[str, ...]:
    """All agents that an environment may have, by their names.

    Raises:
        UserError: if it does not say, or not in strings.
    """
    names = getattr(env, "possible_agents", None)
    if not isinstance(names, (list, tuple)) or not names:
        raise UserError(
            f"{env_id} has no possible_agents. Set it in __init__ to the list of all agents that there may ever be."
        )
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise UserError(f"{env_id}: the agent {wrong[0]!r} of possible_agents is no string. Name agents by strings.")
    if len(set(names)) < len(names):
        raise UserError(f"{env_id}: possible_agents has a name twice: {list(names)}.")
    return tuple(names)


def spaces_of(env: Any, env_id: str, agent: str) -> tuple[spaces.Space, spaces.Space]:
    """The observation space and the action space of an agent, as the environment declares them.

    Raises:
        UserError: if one is missing.
    """
    found = []
    for word in ("observation_space", "action_space"):
        try:
            space = getattr(env, word)(agent)
        except Exception as error:
            raise UserError(f"{env_id}: {word}({agent!r}) raised {in_words(error)}") from error
        if not isinstance(space, spaces.Space):
            raise UserError(f"{env_id}: {word}({agent!r}) is a {type(space).__name__}, not a gymnasium space.")
        found.append(space)
    return found[0], found[1]


def policy_spaces(
    observations: spaces.Space, actions: spaces.Space, action_mask: ActionMask, where: str
) -> tuple[spaces.Box, spaces.Space]:
    """The spaces that a policy has for these, with `where` before whatever is wrong with them.

    Raises:
        UserError: if a space cannot be learned from.
    """
    try:
        seen, acts = packed_spaces(observations, actions, action_mask)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    assert isinstance(seen, spaces.Box)
    return seen, acts


def mask_in_info(observations: spaces.Space, actions: spaces.Space, info: Any) -> ActionMask:
    """Where an agent is told what is possible, by its spaces and the `info` it got when the episode began."""
    seen, _ = packed_spaces(observations, actions, "auto")
    if isinstance(seen, PackedObservations) and seen.options:
        return "observation"
    return "info" if isinstance(info, dict) and info.get(MASK_KEY) is not None else "none"


def row_of(space: spaces.Box, observation: Any, info: Any, *, is_over: bool) -> np.ndarray:
    """One observation as a policy of this space sees it, `[*O]`; where an episode is over no mask is needed.

    Raises:
        PackingError: if it does not fit its space, or no action is possible.
        ValueError: if it is no array of the right shape.
    """
    if isinstance(space, PackedObservations):
        mask = info.get(MASK_KEY) if isinstance(info, dict) else None
        return space.pack(observation, mask, ignores_mask=is_over)
    array = np.asarray(observation)
    if array.dtype.kind not in "fiub":
        raise ValueError(f"the observation is a {type(observation).__name__}, not an array of numbers of {space}")
    if array.shape != space.shape:
        raise ValueError(f"the observation has shape {array.shape}, not {space.shape}")
    return array


def blank_row(space: spaces.Box) -> np.ndarray:
    """An observation of nothing `[*O]`, with every action possible."""
    return space.blank(1)[0] if isinstance(space, PackedObservations) else np.zeros(space.shape, row_dtype(space))


def row_dtype(space: spaces.Box) -> np.dtype:
    """The kind of number that observations are kept in."""
    return np.dtype(np.float32 if space.dtype == np.float64 else space.dtype)


def action_of(space: spaces.Space, row: np.ndarray) -> Any:
    """A row of actions as the environment takes it."""
    if isinstance(space, PackedActions):
        return space.unpack(row)
    return int(row) if isinstance(space, spaces.Discrete) else np.array(row)
