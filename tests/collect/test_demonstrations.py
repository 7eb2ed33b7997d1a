from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from proximo.collect import demonstrations
from proximo.collect.demonstrations import read_demonstrations, write_recording
from proximo.collect.packed_env import packed
from proximo.collect.record import recording_of, with_notebook
from proximo.errors import UserError


class Task(gym.Env):
    """Nothing but spaces, and steps that tell what they were given."""

    def __init__(self, observations: spaces.Space, actions: spaces.Space, *, tells_mask: bool = False) -> None:
        self.observation_space, self.action_space = observations, actions
        self.tells_mask, self.t, self.given = tells_mask, 0, []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        self.t = 0
        self.observation_space.seed(seed)
        return self.observation_space.sample(), self.info()

    def step(self, action):
        self.t += 1
        self.given.append(action)
        return self.observation_space.sample(), 0.5 * self.t, self.t == 3, False, self.info()

    def info(self) -> dict[str, Any]:
        return {"action_mask": np.array([1, self.t % 2, 1], np.int8)} if self.tells_mask else {}


BOX = spaces.Box(-1, 1, (2,), np.float32)
DISCRETE = Task(BOX, spaces.Discrete(3, start=5))
CONTINUOUS = Task(BOX, spaces.Box(-2, 2, (1,), np.float32))


def good(n: int = 6, **changes: Any) -> dict[str, np.ndarray]:
    """Two episodes of three steps: one ends, the other is cut off."""
    arrays = {
        "observations": np.linspace(-1, 1, 2 * n).reshape(n, 2),
        "actions": 5 + np.arange(n) % 3,
        "rewards": np.arange(n, dtype=float),
        "terminations": np.arange(n) == 2,
        "truncations": np.arange(n) == n - 1,
    }
    return {name: array for name, array in (arrays | changes).items() if array is not None}


def saved(path: Path, **arrays: Any) -> Path:
    np.savez(path / "data.npz", **arrays)
    return path / "data.npz"


def test_the_file_that_people_write_in_five_lines(tmp_path: Path) -> None:
    data = read_demonstrations(saved(tmp_path, **good()), DISCRETE)
    assert data.observations.dtype == np.float32
    np.testing.assert_allclose(data.observations, good()["observations"].astype(np.float32))
    assert data.actions.tolist() == [5, 6, 7, 5, 6, 7]
    assert data.ends.tolist() == [2, 5]
    assert data.lengths.tolist() == [3, 3]
    assert data.episode_of.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.returns.tolist() == [3.0, 12.0]
    assert data.terminated.tolist() == [False, False, True, False, False, False]
    assert data.final_observations is None


def test_a_last_episode_without_an_end_counts_as_cut_off(tmp_path: Path) -> None:
    data = read_demonstrations(saved(tmp_path, **good(truncations=np.zeros(6))), DISCRETE)
    assert data.ends.tolist() == [2, 5]
    assert not data.terminated[5]


@pytest.mark.parametrize(
    ("task", "changes", "said"),
    [
        (DISCRETE, {"observations": np.ones((6, 3))}, r"shape \(6, 3\); for Box.* shape \(6, 2\)"),
        (DISCRETE, {"observations": np.full((6, 2), np.nan)}, r"step 0 \(episode 0, its step 0\): .* is nan"),
        (DISCRETE, {"observations": np.where(np.arange(12).reshape(6, 2) == 9, 3.0, 0)}, r"step 4 .*outside its space"),
        (DISCRETE, {"observations": np.full((6, 2), "a")}, "must be numbers"),
        (DISCRETE, {"observations": np.ones((5, 2))}, r"shape \(5, 2\)"),
        (DISCRETE, {"actions": np.array([5, 6, 7, 8, 5, 5])}, r"step 3 \(episode 1, its step 0\): 8 is not in"),
        (DISCRETE, {"actions": np.array([5, 6, 6.5, 5, 5, 5])}, r"6.5 is not in"),
        (DISCRETE, {"actions": np.arange(5)}, r"shape \(5,\)"),
        (CONTINUOUS, {"actions": np.full((6, 1), 2.1)}, r"step 0 .*2.1 is not in"),
        (CONTINUOUS, {"actions": np.full((6, 1), np.nan)}, "nan is not in"),
        (DISCRETE, {"rewards": np.full(6, np.inf)}, r"rewards\[0\] is inf"),
        (DISCRETE, {"rewards": np.ones((6, 1))}, "rewards is an array"),
        (DISCRETE, {"terminations": np.full(6, 2)}, "must be 0 or 1"),
        (DISCRETE, {"rewards": None}, "has no array 'rewards'"),
        (DISCRETE, {"observations": None}, "has no array 'observations'"),
        (DISCRETE, {"final_observations": np.ones((3, 2))}, r"\(3, 2\)"),
        (DISCRETE, {"spaces": np.array("{")}, "no JSON of two spaces"),
        (DISCRETE, {"spaces": np.array('{"observation_space": 3}')}, "no JSON of two spaces"),
        (DISCRETE, {name: array[:0] for name, array in good().items()}, "no steps"),
    ],
)
def test_what_does_not_fit_is_said_in_one_message(
    tmp_path: Path, task: gym.Env, changes: dict[str, Any], said: str
) -> None:
    own = {"actions": np.zeros((6, 1))} if task is CONTINUOUS else {}
    with pytest.raises(UserError, match=said) as told:
        read_demonstrations(saved(tmp_path, **good(**(own | changes))), task)
    assert "data.npz" in str(told.value)


def test_an_action_may_pass_its_bound_by_rounding_and_is_put_on_it(tmp_path: Path) -> None:
    actions = np.array([2.00001, -2.00001, 0, 1, 2, -2])[:, None]
    data = read_demonstrations(saved(tmp_path, **good(actions=actions)), CONTINUOUS)
    np.testing.assert_array_equal(data.actions[:, 0], np.array([2, -2, 0, 1, 2, -2], np.float32))


def test_pickles_are_refused(tmp_path: Path) -> None:
    ran: list[str] = []

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return ran.append, ("ran",)

    episodes = np.empty(2, object)
    episodes[:] = [np.zeros(2), np.zeros(3)]
    for name, array in (("observations", episodes), ("extra", np.array([Trap()], object))):
        np.savez(tmp_path / "data.npz", **good(**{name: array}))
        with pytest.raises(UserError, match=r"pickles.*never opened"):
            read_demonstrations(tmp_path / "data.npz", DISCRETE)
    assert ran == []


@pytest.mark.parametrize("content", [b"", b"nothing", b"PK\x03\x04 cut", b"\x80\x04."])
def test_damaged_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "data.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"data.npz"):
        read_demonstrations(tmp_path / "data.npz", DISCRETE)
    whole = saved(tmp_path, **good()).read_bytes()
    for length in range(0, len(whole), len(whole) // 20):
        (tmp_path / "data.npz").write_bytes(whole[:length])
        with pytest.raises(UserError):
            read_demonstrations(tmp_path / "data.npz", DISCRETE)


def test_a_single_array_is_no_recording(tmp_path: Path) -> None:
    np.save(tmp_path / "data.npy", np.zeros(3))
    with pytest.raises(UserError, match=r"no readable .npz"):
        read_demonstrations(tmp_path / "data.npy", DISCRETE)


def test_a_missing_file_has_its_neighbours_named(tmp_path: Path) -> None:
    saved(tmp_path, **good())
    with pytest.raises(UserError, match=r"There is no file .*dato.npz. Did you mean data.npz"):
        read_demonstrations(tmp_path / "dato.npz", DISCRETE)


# --- recorded by ourselves, of any space ----------------------------------------------------------


NESTED = spaces.Dict({"arm": spaces.Tuple([BOX, spaces.Discrete(3)]), "bits": spaces.MultiBinary(2)})
ACTIONS = spaces.Dict({"aim": spaces.Box(-2, 2, (2,), np.float32), "button": spaces.Discrete(2)})
CHOICES = spaces.Discrete(3)


@pytest.mark.parametrize(
    ("seen", "actions", "tells_mask"),
    [
        (BOX, CHOICES, False),
        (NESTED, ACTIONS, False),
        (spaces.Discrete(4), spaces.MultiDiscrete([2, 3]), False),
        (BOX, CHOICES, True),
        (spaces.Box(0, 255, (40, 40, 3), np.uint8), spaces.MultiBinary(2), False),
    ],
)
def test_what_is_recorded_is_read_as_the_policy_saw_it(
    tmp_path: Path, seen: spaces.Space, actions: spaces.Space, tells_mask: bool
) -> None:
    mask = "info" if tells_mask else "none"
    task = Task(seen, actions, tells_mask=tells_mask)
    env, notebook = with_notebook(packed(task, mask))
    saw, did, after = [], [], []
    for _ in range(2):
        observation, _ = env.reset(seed=3)
        over = False
        while not over:
            saw.append(np.array(observation))
            action = env.action_space.sample()
            did.append(np.array(action))
            observation, _, over, _, _ = env.step(action)
        after.append(np.array(observation))
    write_recording(tmp_path / "data.npz", recording_of(notebook, notebook.episodes))
    data = read_demonstrations(tmp_path / "data.npz", packed(Task(seen, actions, tells_mask=tells_mask), mask))
    np.testing.assert_array_equal(data.observations, np.stack(saw))
    np.testing.assert_array_equal(data.actions, np.stack(did))
    np.testing.assert_array_equal(data.final_observations, np.stack(after))
    assert data.rewards.tolist() == [0.5, 1.0, 1.5] * 2
    assert data.ends.tolist() == [2, 5]
    assert data.terminated.tolist() == [False, False, True] * 2


def test_another_task_is_refused_by_the_spaces_that_were_written_down(tmp_path: Path) -> None:
    env, notebook = with_notebook(Task(BOX, spaces.Discrete(3)))
    env.reset(seed=0)
    env.step(0)
    write_recording(tmp_path / "data.npz", recording_of(notebook, notebook.episodes))
    with pytest.raises(UserError, match=r"recorded with actions .*of another task"):
        read_demonstrations(tmp_path / "data.npz", Task(BOX, spaces.Discrete(4)))
    with pytest.raises(UserError, match=r"recorded with observations .*of another task"):
        read_demonstrations(tmp_path / "data.npz", Task(spaces.Box(-1, 2, (2,)), spaces.Discrete(3)))


def test_masks_that_are_missing_or_forbid_all(tmp_path: Path) -> None:
    task = packed(Task(BOX, CHOICES, tells_mask=True), "info")
    actions = np.arange(6) % 3
    with pytest.raises(UserError, match=r"no action_masks.*--action-mask none"):
        read_demonstrations(saved(tmp_path, **good(actions=actions)), task)
    with pytest.raises(UserError, match="forbids every action"):
        read_demonstrations(saved(tmp_path, **good(actions=actions, action_masks=np.zeros((6, 3)))), task)


# --- Minari ---------------------------------------------------------------------------------------


class TestMinari:
    name: ClassVar[str] = "try/task-v0"

    @pytest.fixture
    def root(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A folder of datasets with one in it: two episodes, one ended and one cut off."""
        minari = pytest.importorskip("minari")
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
        from minari.data_collector.episode_buffer import EpisodeBuffer

        buffers = [
            EpisodeBuffer(
                observations={"at": np.linspace(-1, 1, 2 * (n + 1)).reshape(n + 1, 2).astype(np.float32)},
                actions=np.arange(n) % 3,
                rewards=list(np.arange(n, dtype=float)),
                terminations=[is_end and t == n - 1 for t in range(n)],
                truncations=[not is_end and t == n - 1 for t in range(n)],
                infos={},
            )
            for n, is_end in ((4, True), (3, False))
        ]
        minari.create_dataset_from_buffers(
            self.name, buffers, observation_space=spaces.Dict({"at": BOX}), action_space=CHOICES
        )
        return tmp_path

    @pytest.fixture
    def task(self) -> gym.Env:
        return packed(Task(spaces.Dict({"at": BOX}), CHOICES))

    @pytest.mark.filterwarnings("ignore")
    def test_by_id_and_by_folder(self, root: Path, task: gym.Env) -> None:
        for place in (self.name, root / self.name, root / self.name / "data"):
            data = read_demonstrations(place, task)
            assert data.ends.tolist() == [3, 6]
            assert data.terminated.tolist() == [False, False, False, True, False, False, False]
            assert data.actions.tolist() == [0, 1, 2, 0, 0, 1, 2]
            assert data.rewards.tolist() == [0, 1, 2, 3, 0, 1, 2]
            np.testing.assert_allclose(data.observations[4], [-1, -1 + 2 / 7], rtol=1e-6)
            np.testing.assert_allclose(data.final_observations, [[1 - 2 / 9, 1], [1 - 2 / 7, 1]], rtol=1e-6)

    @pytest.mark.filterwarnings("ignore")
    def test_what_is_wrong_is_said(self, root: Path, task: gym.Env, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"no Minari dataset of this name.*\n.*minari download try/tusk-v0"):
            read_demonstrations("try/tusk-v0", task)
        with pytest.raises(UserError, match=r"cannot be looked up.*Malformed|no Minari dataset of this name"):
            read_demonstrations("no id at all!", task)
        with pytest.raises(UserError, match="of another task"):
            read_demonstrations(self.name, Task(BOX, CHOICES))
        (tmp_path / "empty").mkdir()
        with pytest.raises(UserError, match="is no Minari dataset"):
            read_demonstrations(tmp_path / "empty", task)
        metadata = root / self.name / "data" / "metadata.json"
        whole = json.loads(metadata.read_text())
        # Without its spaces Minari would make the environment that the file names: code of a stranger's choice.
        metadata.write_text(json.dumps({k: v for k, v in whole.items() if k != "action_space"}))
        with pytest.raises(UserError, match="does not say its spaces"):
            read_demonstrations(self.name, task)
        metadata.write_text("{")
        with pytest.raises(UserError, match="cannot be read"):
            read_demonstrations(self.name, task)
        metadata.write_text(json.dumps(whole))
        (root / self.name / "data" / "main_data.hdf5").write_bytes(b"no HDF5")
        with pytest.raises(UserError, match="cannot be read"):
            read_demonstrations(self.name, task)

    def test_without_minari_the_command_that_installs_it(
        self, task: gym.Env, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setitem(__import__("sys").modules, "minari", None)
        with pytest.raises(UserError, match=r"need minari.*\n.*\.\[minari\]"):
            read_demonstrations("try/task-v0", task)
        assert ".[minari]" in demonstrations.INSTALL_MINARI
