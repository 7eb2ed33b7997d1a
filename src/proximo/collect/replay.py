"""Playing an episode again in which training failed (`proximo check-env ENV --replay FILE`)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from proximo.collect.envs import EnvironmentFault
from proximo.collect.returned_values import shown
from proximo.collect.serial_envs import SerialEnvs
from proximo.errors import UserError, nearest
from proximo.runs.files import expanded


def load_record(path: str | Path) -> dict[str, Any]:
    """Read a file that training wrote when an environment failed.

    Raises:
        UserError: if it cannot be read, is no such file, or holds an episode that cannot be played again.
    """
    path = expanded(path)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        siblings = [sibling.name for sibling in path.parent.glob("*.json")] if os.access(path.parent, os.R_OK) else []
        close = nearest(path.name, siblings)
        hint = f" Did you mean {' or '.join(str(path.parent / name) for name in close)}?" if close else ""
        raise UserError(f"{path} could not be read: {error.strerror or error}.{hint}") from error
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(
            f"{path} is no replay file: it is not JSON ({error}). Training writes such a file, named "
            "replay-env...-episode....json, into the run's folder when an environment fails."
        ) from error
    _check_record(record, str(path))
    return record


def replay_record(make: Callable[[], gym.Env], record: dict[str, Any]) -> str:
    """Play a recorded episode again, and say whether its problem appears again at the recorded step.

    It is played in this process: an environment that killed its worker process may end this one too.

    Args:
        make: makes the environment as the run made it.
        record: `EnvironmentFault.record`, or what `load_record` returned.

    Raises:
        UserError: if the record is none, has no seed, or does not fit the environment.
    """
    _check_record(record, "the record")
    env = _Recorded(make(), record["seed"])
    actions = _actions(env.action_space, record)
    # Where training went on after values out of bounds, so does the replay.
    policy = "raise" if "outside its space" in record["problem"] else "warn"
    problem, step = "", 0
    try:
        envs = SerialEnvs(lambda: env, 1, seed=0, on_space_violation=policy)
        envs.reset()
        for step, action in enumerate(actions, start=1):  # noqa: B007
            result = envs.step(action[None])
            if result.terminated.any() or result.truncated.any():
                break
    except EnvironmentFault as fault:
        problem, step = fault.record["problem"], fault.record["step"]
    finally:
        env.close()
    told = {"seed": record["seed"]} | ({"action": record["actions"][step - 1]} if step else {})
    told |= dict(zip(("observation", "reward", "terminated", "truncated", "info"), env.last, strict=False))
    lines = [f"Recorded at step {record['step']}: {record['problem'].splitlines()[0]}", _verdict(record, problem, step)]
    lines += [f"At step {step}:", *(f"  {key:<12} {' '.join(str(value).split())}" for key, value in told.items())]
    return "\n".join([*lines, *problem.splitlines()[1:]])


class _Recorded(gym.Wrapper):
    """Begins with the recorded seed whatever it is asked for, and keeps what came back last."""

    def __init__(self, env: gym.Env, seed: int) -> None:
        super().__init__(env)
        self._seed = seed
        self.last: Any = ()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """Begin the recorded episode."""
        result = self.env.reset(seed=self._seed)
        self.last = self.last or result[:1]  # the reset after an end is of no interest
        return result

    def step(self, action: Any) -> Any:
        """Take one action."""
        self.last = ()
        self.last = self.env.step(action)
        return self.last


def _check_record(record: Any, name: str) -> None:
    if not isinstance(record, dict):
        raise UserError(f"{name} is no replay file: it holds a {type(record).__name__}, not an object.")
    if record.get("seed", 0) is None:
        raise UserError(
            f"{name} cannot be replayed: the environments of a native vector environment (--vectorization native) "
            "cannot be seeded one by one. Train with --vectorization serial to get a record that can be."
        )
    for key, kind in {"seed": int, "actions": list, "step": int, "problem": str}.items():
        value = record.get(key)
        if not isinstance(value, kind) or (isinstance(value, int) and value < 0) or value == "":
            raise UserError(f"{name} is no replay file: {key!r} is {shown(value)}.")


def _actions(space: spaces.Space, record: dict[str, Any]) -> np.ndarray:
    """The recorded actions `[T, *A]` as training gave them to the environment."""
    recorded = record["actions"]
    try:
        actions = np.array(recorded, dtype=np.int64 if isinstance(space, spaces.Discrete) else space.dtype)
    except (TypeError, ValueError, OverflowError):
        actions = np.array(None)
    if recorded and actions.shape != (len(recorded), *(space.shape or ())):
        of = f" The record is of {record['env_id']}." if "env_id" in record else ""
        raise UserError(
            f"The actions of the record, such as {shown(recorded[0])}, do not fit those of the environment, "
            f"{shown(space)}.{of}"
        )
    return actions


def _verdict(record: dict[str, Any], problem: str, step: int) -> str:
    """Whether it is the same problem at the same step."""
    first = problem.partition("\n")[0]
    if problem and step != record["step"]:
        return f"Replayed: a problem appears at another step, {step}: {first}"
    if problem and first != record["problem"].partition("\n")[0]:
        return f"Replayed: another problem appears at that step: {first}"
    if problem:
        return "Replayed: the same problem appears again."
    what = f"the episode ended before, at step {step}" if step < record["step"] else "the problem does not appear again"
    return (
        f"Replayed: {what}. Either the code has been changed since, or the environment draws on something that its "
        "seed does not fix; check-env without --replay looks for that."
    )
