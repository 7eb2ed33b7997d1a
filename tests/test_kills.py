"""A run that is killed anywhere ends, after `proximo resume`, bit for bit where the undisturbed one ends.

A few kill points of many: `benchmarks/reliability.py kills` has the others.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from proximo.errors import UserError
from proximo.runs.checkpoint import newest_checkpoint
from tests import kills
from tests.kills import Point, Story, Task

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs fork, and /proc")

Place = Point | tuple[str, int]
"""A kill point, or the name of an operation on the disk and which of those of that name is meant."""

CARTPOLE, PENDULUM = "CartPole-v1, serial", "Pendulum-v1, serial"
BEFORE_THE_FIRST_CHECKPOINT: list[Place] = [
    ("mkdir run", 1),
    ("write half of run/.tmp", 1),  # the settings
    ("fsync run/checkpoints/.tmp/manifest.json", 1),
]
CONTROL_KILLS: list[tuple[str, list[Place]]] = [
    *((CARTPOLE, [place]) for place in BEFORE_THE_FIRST_CHECKPOINT),
    (CARTPOLE, [("write half of run/metrics.jsonl", 3)]),
    (CARTPOLE, [("rename run/checkpoints/.tmp", 2)]),  # a checkpoint that `latest` does not name yet
    (CARTPOLE, [("unlink run/checkpoints/.tmp/manifest.json", 1), Point("minibatch", 3), Point("step", 9)]),
    (PENDULUM, [("write half of run/checkpoints/.tmp/training.safetensors", 3)]),
    (PENDULUM, [("rename run/checkpoints/step_000000000000", 1), ("write run/checkpoints/.tmp/state.json", 1)]),
    (PENDULUM, [Point("step", 37)]),
    (PENDULUM, [Point("minibatch", 11)]),
    (PENDULUM, [Point("seconds", 0.03)]),
    ("CartPole-v1, workers", [Point("step", 50)]),
    ("Pendulum-v1, workers", [("rename run/checkpoints/.tmp", 2)]),
]
LANGUAGE_KILLS: list[tuple[str, list[Place]]] = [
    ("align, ppo", [("write half of run/checkpoints/.tmp/policy.safetensors", 3)]),
    ("align, ppo", [("replace run/.tmp", 3)]),  # samples of an iteration that is then done again
    ("align, grpo with lora", [Point("token", 14), Point("minibatch", 7)]),
    ("sft", [("open run/generation_config.json", 1)]),  # in the middle of writing the model
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kills")


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> dict[str, Story]:
    """The runs that nothing happened to, each made when it is first asked for."""
    return {}


def check(task: Task, places: list[Place], undisturbed: dict[str, Story], folder: Path, tmp_path: Path) -> Story:
    if task.name not in undisturbed:
        undisturbed[task.name] = kills.tell(task, folder / task.name)
    whole = undisturbed[task.name]
    assert whole.failure == ""
    points = [place if isinstance(place, Point) else point_at(*place, whole.operations) for place in places]
    story = kills.tell(task, tmp_path / "story", points)
    assert story.failure == ""
    assert len(story.died) == len(points)
    assert kills.differing(whole.end, story.end) == []
    return story


def point_at(said: str, which: int, operations: list[str]) -> Point:
    numbers = [number for number, each in enumerate(operations, start=1) if each == said]
    return Point("disk", numbers[which - 1])


@pytest.mark.parametrize(("name", "places"), CONTROL_KILLS)
def test_a_killed_control_run_ends_where_the_undisturbed_one_ends(name, places, undisturbed, folder, tmp_path):
    story = check(kills.CONTROL[name], places, undisturbed, folder, tmp_path)
    if places[0] in BEFORE_THE_FIRST_CHECKPOINT:
        assert story.resumed_from == ["nothing: began again"]
    elif not isinstance(places[0], Point):
        assert story.resumed_from[0].startswith("step ")


@pytest.mark.parametrize(("name", "places"), LANGUAGE_KILLS)
def test_a_killed_language_run_ends_where_the_undisturbed_one_ends(name, places, undisturbed, folder, tmp_path):
    pytest.importorskip("peft")
    check(kills.language_tasks(folder / "language")[name], places, undisturbed, folder, tmp_path)


def test_a_run_that_was_killed_at_once_says_how_to_begin_again(folder, tmp_path):
    pytest.importorskip("peft")
    task = kills.language_tasks(folder / "language")["sft"]
    settings = {**task.settings, "run_dir": str(tmp_path / "run")}
    kills.live((task.function, task.arguments, settings), Point("disk", 14), tmp_path)
    config = tmp_path / "run" / "config.toml"
    assert config.exists()
    with pytest.raises(UserError, match=f"Begin a new run with its settings: proximo sft --config {config}"):
        newest_checkpoint(tmp_path / "run" / "checkpoints")


def test_a_life_ends_by_a_signal_that_nothing_can_catch(tmp_path):
    task = kills.CONTROL[CARTPOLE]
    words = (task.function, task.arguments, {**task.settings, "run_dir": str(tmp_path / "run")})
    assert kills.live(words, Point("step", 1), tmp_path) == -9
    assert (tmp_path / "died").read_text() == "step 1"
    assert not os.path.lexists(tmp_path / "run" / "metrics.jsonl")
