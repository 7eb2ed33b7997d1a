"""The settings of runs of several agents: those of every control run, and a few of their own."""

from __future__ import annotations

import typing
from dataclasses import dataclass
from typing import Any, Literal

from proximo.collect.parallel_envs import Sharing
from proximo.errors import UserError, in_range, one_of
from proximo.training.config import ControlConfig


@dataclass(frozen=True)
class AgentsConfig(ControlConfig):
    """A run in which all agents of a PettingZoo `ParallelEnv` learn at once.

    `n_envs`, `rollout_length` and `total_steps` count steps of the whole environment; each is experience of every agent
    that lives.
    """

    agents: Sharing = "shared"
    """`shared`: one policy for all agents, whose spaces must be equal; `by_space`: one for each kind of space;
    `independent`: one for each agent, with its own optimizer and normalizers."""
    agent_id: bool = True
    """Tell an agent that shares its policy which one it is, as part of its observation."""
    critic: Literal["own", "central"] = "own"
    """`own`: each agent's critic sees what the agent sees; `central`: also the state of the whole environment (its
    state(), or else the observations of all agents), as in MAPPO. Acting needs no critic."""

    def __post_init__(self) -> None:
        """Refuse impossible settings."""
        _check_shared(self, "environments of several agents")
        super().__post_init__()
        one_of("agents", self.agents, typing.get_args(Sharing))
        one_of("critic", self.critic, ("own", "central"))


@dataclass(frozen=True)
class SelfPlayConfig(ControlConfig):
    """A run in which one policy learns a game of two by playing against its own past."""

    snapshot_every: int = 5
    """Iterations between two snapshots of the policy, which join the pool of opponents."""
    latest_share: float = 0.5
    """Share of the games against the newest snapshot; the others are against one of the pool, each as likely."""
    pool_size: int = 50
    """Snapshots in the pool; when it is full every other one goes, and they come half as often."""

    def __post_init__(self) -> None:
        """Refuse impossible settings."""
        _check_shared(self, "games")
        super().__post_init__()
        in_range("snapshot_every", self.snapshot_every, at_least=1, whole=True, usual="5")
        in_range("latest_share", self.latest_share, at_least=0.0, at_most=1.0, usual="0.5")
        in_range("pool_size", self.pool_size, at_least=2, at_most=10_000, whole=True, usual="50")
        if self.environment.max_episode_steps is not None:
            raise UserError("max_episode_steps is not for games; leave it out, and let the game truncate itself.")


SEVERAL = (AgentsConfig, SelfPlayConfig)


def config_for(settings: dict[str, Any]) -> ControlConfig:
    """The kind of config that these settings of a run belong to, with its defaults."""
    if "latest_share" in settings:
        return SelfPlayConfig()
    return AgentsConfig() if "agents" in settings else ControlConfig()


def _check_shared(config: ControlConfig, what: str) -> None:
    task = config.environment
    if task.vectorization not in ("auto", "serial"):
        raise UserError(f"vectorization is {task.vectorization!r}, but {what} are stepped serially. Leave it out.")
    if task.n_workers is not None:
        raise UserError(f"n_workers is {task.n_workers}, but {what} are stepped in this process. Leave it out.")
    if task.on_environment_fault != "raise":
        raise UserError(f"on_environment_fault is restart, but {what} are not made anew. Leave it out.")
    if config.network.memory != "none":
        raise UserError(f"memory is {config.network.memory!r}, which is for single agents; {what} have none yet.")
    if config.intrinsic.explores:
        said = config.intrinsic.exploration
        raise UserError(f"exploration is {said!r}, which is for single agents; {what} have none yet. Leave it out.")
    if config.init_from is not None:
        raise UserError(f"init_from is {config.init_from!r}, which is for single agents; {what} begin from nothing.")
    if config.update_path in ("compiled", "graphed"):
        raise UserError(f"update_path is {config.update_path!r}; {what} have auto, eager and fused.")
