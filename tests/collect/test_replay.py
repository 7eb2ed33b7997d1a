"""A recorded fault is played again and recognised; files that are none are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from proximo.collect.envs import EnvironmentFault
from proximo.collect.replay import load_record, replay_record
from proximo.collect.serial_envs import SerialEnvs
from proximo.errors import UserError
from tests.environments import Faulty, Recording

FAULTS = ["reset raises", "reset returns no pair", "reset returns NaN", "raises", "returns four values", "no reward"]
FAULTS += ["NaN reward", "NaN observation", "another shape", "out of bounds"]
RECORD = {"seed": 5, "actions": [[0.5], [0.1]], "step": 2, "problem": "the reward is nan"}


def fault_of(fault: str, **policy: Any) -> dict[str, Any]:
    """Step as training does until the environment fails; its record as it would come back from a file."""
    envs = SerialEnvs(lambda: Faulty(fault), 2, seed=3, first_index=4, **policy)
    try:
        envs.reset()
        for i in range(20):
            envs.step(np.array([[0.1 * i], [-0.3]], np.float32))
    except EnvironmentFault as error:
        return json.loads(json.dumps({"env_id": "my.py:Env", **error.record}))
    raise AssertionError("nothing failed")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_recorded_fault_appears_again(fault: str) -> None:
    record = fault_of(fault)
    text = replay_record(lambda: Faulty(fault, episode=0), record)
    assert "the same problem appears again" in text
    assert f"At step {record['step']}" in text
    assert record["problem"].splitlines()[0] in text


def test_what_was_returned_or_raised_is_shown() -> None:
    returned = replay_record(lambda: Faulty("NaN reward", episode=0), fault_of("NaN reward"))
    assert "  reward       nan" in returned
    assert "  action       [" in returned
    raised = replay_record(lambda: Faulty("raises", episode=0), fault_of("raises"))
    assert 'raise ZeroDivisionError("the arm is stuck")' in raised


def test_the_recorded_seed_and_actions_are_played() -> None:
    made: list[Recording] = []
    replay_record(lambda: Recording(log=made), {**RECORD, "actions": [2, 0]})
    (env,) = made
    assert env.seeds == [5]
    assert env.actions == [2, 0]
    assert env.actions[0].dtype == np.int64


def test_a_mended_environment_shows_the_problem_no_more() -> None:
    assert "does not appear again" in replay_record(lambda: Faulty("", episode=0), fault_of("NaN reward"))


def test_another_problem_or_step_is_told_as_such() -> None:
    record = fault_of("NaN reward")
    other = replay_record(lambda: Faulty("raises", episode=0), record)
    assert "another problem appears at that step: step() raised ZeroDivisionError" in other
    sooner = replay_record(lambda: Faulty("NaN reward", at=1, episode=0), record)
    assert "a problem appears at another step, 1: the reward is nan" in sooner


def test_an_episode_that_ends_before_is_told() -> None:
    text = replay_record(lambda: gym.wrappers.TimeLimit(Faulty(""), 2), fault_of("NaN reward"))
    assert "ended before, at step 2" in text
    assert "truncated    True" in text


def test_bounds_are_not_looked_at_where_training_did_not() -> None:
    class OutsideFirst(Faulty):
        def step(self, action: Any) -> Any:
            observation, *rest = super().step(action)
            return observation + 5, *rest

    text = replay_record(lambda: OutsideFirst("NaN reward", episode=0), fault_of("NaN reward"))
    assert "the same problem appears again" in text


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("not json", "not JSON"),
        ("[1]", "holds a list"),
        ('{"seed": 1, "actions": [], "problem": "p"}', "'step' is None"),
        ('{"seed": null, "actions": [1], "step": 1, "problem": "p"}', "cannot be replayed"),
        ('{"seed": -1, "actions": [1], "step": 1, "problem": "p"}', "'seed' is -1"),
        ('{"seed": 1, "actions": 4, "step": 1, "problem": "p"}', "'actions' is 4"),
        ('{"seed": 1, "actions": [1], "step": 1, "problem": ""}', "'problem' is ''"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "replay-env0-episode1.json"
    path.write_text(content)
    with pytest.raises(UserError, match=says):
        load_record(path)


def test_a_missing_file_gets_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "replay-env0-episode1.json").write_text(json.dumps(RECORD))
    with pytest.raises(UserError, match=r"Did you mean .*replay-env0-episode1\.json"):
        load_record(tmp_path / "replay-env0-episode2.json")
    assert load_record(tmp_path / "replay-env0-episode1.json") == RECORD


@pytest.mark.parametrize("actions", [[1, 2], [[0.1, 0.2]], [[0.1], [0.1, 0.2]], ["left"]])
def test_a_record_of_another_environment_is_refused(actions: list[Any]) -> None:
    with pytest.raises(UserError, match="do not fit those of the environment"):
        replay_record(lambda: Faulty(""), {**RECORD, "actions": actions})


@pytest.mark.parametrize("path", ["~nosuchuser/x.json", "a\0b.json", "x" * 300, "x" * 300 + "/y.json"])
def test_paths_that_no_system_has_are_readable_errors(path):
    with pytest.raises(UserError):
        load_record(path)
