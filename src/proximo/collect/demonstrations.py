"""Recorded episodes: the file format, Minari datasets, and the check that a policy can be cloned from them.

A file of recorded episodes is an .npz of plain arrays, all N steps one after the other, episode by episode:

| array                | shape     |                                                                              |
|----------------------|-----------|------------------------------------------------------------------------------|
| `observations`       | `[N, *O]` | what was seen before each action; of a Dict or Tuple one array for each part, |
|                      |           | `observations/arm/0`                                                         |
| `actions`            | `[N, *A]` | what the environment was given, in the same way                              |
| `rewards`            | `[N]`     | the environment's own                                                        |
| `terminations`       | `[N]`     | 0 and 1: the environment ended the episode with this step                     |
| `truncations`        | `[N]`     | 0 and 1: it was cut off after this step                                       |
| `final_observations` | `[E, *O]` | what was seen after the last step of each of the E episodes; may be left out  |
| `action_masks`       | `[N, K]`  | which of the K options were possible; only where `info` says so              |
| `spaces`             | scalar    | JSON of both spaces, to be compared; may be left out                          |

It is never unpickled: arrays of objects are refused.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from proximo.collect.envs import SpacePolicy
from proximo.collect.returned_values import SpaceCheck
from proximo.errors import UserError, in_words, nearest, shown
from proximo.models.packing import (
    MASK_KEY,
    Leaf,
    PackedActions,
    PackedObservations,
    PackingError,
    checked_mask,
    leaves,
    named,
    rebuilt,
)
from proximo.models.spaces import space_from_json, space_to_json
from proximo.runs import files

INSTALL_MINARI = 'pip install -c constraints.txt -e ".[minari]"'

_SLACK = 1e-5
"""An action may pass its bound by float rounding, as an observation may; it is then put on the bound."""


@dataclass(frozen=True)
class Recording:
    """Episodes one after the other, in an environment's own values: every array in them has N steps.

    `observations` and `actions` are nested as their spaces are. A step that is the last of its episode has a
    `terminations` or `truncations` of 1.
    """

    observations: Any
    actions: Any
    rewards: np.ndarray
    terminations: np.ndarray
    truncations: np.ndarray
    final_observations: Any = None
    """What followed the last step of each episode; None where nobody has kept it."""
    action_masks: np.ndarray | None = None
    observation_space: spaces.Space | None = None
    action_space: spaces.Space | None = None


@dataclass(frozen=True)
class Demonstrations:
    """Recorded episodes that were checked, as the arrays that a policy has for them."""

    observations: np.ndarray
    """`[N, *O]`: rows of the policy's observation space."""
    actions: np.ndarray
    """`[N, *A]`: rows as the environment's, inside its space."""
    rewards: np.ndarray
    """`[N]`, float64."""
    terminated: np.ndarray
    """`[N]`: the environment's own end."""
    ends: np.ndarray
    """`[E]`: the last step of each episode, in order; the last one is N - 1."""
    final_observations: np.ndarray | None
    """`[E, *O]`; None where nobody has kept them."""

    @property
    def lengths(self) -> np.ndarray:
        """Steps of each episode, `[E]`."""
        return np.diff(self.ends, prepend=-1)

    @property
    def episode_of(self) -> np.ndarray:
        """The number of each step's episode, `[N]`."""
        return np.repeat(np.arange(len(self.ends)), self.lengths)

    @property
    def returns(self) -> np.ndarray:
        """Undiscounted return of each episode, `[E]`."""
        return np.add.reduceat(self.rewards, self.ends - self.lengths + 1)

    def step_in_words(self, step: int) -> str:
        """Where a step is."""
        return _place_of(step, self.ends)


def read_demonstrations(
    place: str | Path, env: gym.Env, *, on_space_violation: SpacePolicy = "raise"
) -> Demonstrations:
    """Read recorded episodes for the task of `env`: a file, the folder of a Minari dataset, or the id of one.

    Raises:
        UserError: if there is none, it is damaged, or does not fit the spaces of `env`; with the first place.
    """
    seen, actions = (_source(space) for space in (env.observation_space, env.action_space))
    path = files.expanded(place)
    if path.is_dir():
        recording = _read_minari(path)
    elif path.is_file() or path.suffix in (".npz", ".npy"):
        recording = _read_file(path, seen, actions)
    else:
        recording = _read_minari_by_id(str(place))
    try:
        return _checked(recording, env, on_space_violation)
    except (UserError, PackingError) as error:
        raise UserError(f"{place}: {error}") from error


# --- files ----------------------------------------------------------------------------------------------------------


def check_output(path: Path | str) -> Path:
    """The file that episodes shall be written to.

    Raises:
        UserError: if it is there already, is not named .npz, or its folder is not there.
    """
    path = files.expanded(path)
    if path.suffix != ".npz":
        raise UserError(f"The output is {path}; recorded episodes go into a file FILE.npz. Name it so.")
    if os.path.lexists(path):
        raise UserError(f"{path} exists, and nothing is written over. Choose another --output.")
    if not path.parent.is_dir():
        raise UserError(f"There is no folder {path.parent}. Make it, or choose another --output.")
    return path


def write_recording(path: Path, recording: Recording) -> None:
    """Write a file of recorded episodes, as a whole or not at all.

    Raises:
        UserError: if a key of a space has a / that makes two arrays one, or the disk refuses.
    """
    assert recording.observation_space is not None
    assert recording.action_space is not None
    described = {
        "observation_space": space_to_json(recording.observation_space),
        "action_space": space_to_json(recording.action_space),
    }
    arrays: dict[str, np.ndarray] = {"spaces": np.array(json.dumps(described))}
    for word in ("rewards", "terminations", "truncations", "action_masks"):
        if getattr(recording, word) is not None:
            arrays[word] = getattr(recording, word)
    for word, space in (
        ("observations", recording.observation_space),
        ("actions", recording.action_space),
        ("final_observations", recording.observation_space),
    ):
        for leaf in leaves(space, word):
            name = _array_name(word, leaf)
            if name in arrays:
                raise UserError(f"Two parts of {space} have the name {name!r} in a file. Rename a key.")
            arrays[name] = leaf.of(getattr(recording, word), word)
    data = io.BytesIO()
    np.savez_compressed(data, **arrays)  # pyright: ignore[reportArgumentType]
    try:
        files.replace_file(path, data.getvalue())
    except OSError as error:
        raise UserError(
            f"{path} could not be written: {files.reason(error)}. Free some space there, or let this user write there."
        ) from error


def _array_name(word: str, leaf: Leaf) -> str:
    return "/".join([word, *map(str, leaf.path)])


def _read_file(path: Path, seen: spaces.Space, actions: spaces.Space) -> Recording:
    """The arrays of a file, still unchecked, for an environment with these spaces."""
    arrays = _load_arrays(path)
    for word in ("rewards", "terminations", "truncations"):
        if word not in arrays:
            raise UserError(
                f"{path} has no array {word!r}: it has {_listed(arrays)}. Recorded episodes have observations, "
                "actions, rewards, terminations and truncations (docs/from-data.md)."
            )
    declared: dict[str, spaces.Space | None] = {"observation_space": None, "action_space": None}
    if "spaces" in arrays:
        try:
            described = files.parse_json(str(arrays["spaces"][()]).encode())
            declared = {name: space_from_json(described[name]) for name in declared}
        except (UserError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: its array 'spaces' is no JSON of two spaces ({in_words(error)}).") from error
        _check_same(str(path), declared["observation_space"], declared["action_space"], seen, actions)
    has_final = any(name.partition("/")[0] == "final_observations" for name in arrays)
    return Recording(
        _from_arrays(path, arrays, "observations", seen),
        _from_arrays(path, arrays, "actions", actions),
        arrays["rewards"],
        arrays["terminations"],
        arrays["truncations"],
        _from_arrays(path, arrays, "final_observations", seen) if has_final else None,
        arrays.get("action_masks"),
        declared["observation_space"],
        declared["action_space"],
    )


def _load_arrays(path: Path) -> dict[str, np.ndarray]:
    """Every array of an .npz, without ever unpickling anything.

    Raises:
        UserError: if it cannot be read, or holds objects.
    """
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else Path()
        close = nearest(path.name, [each.name for each in folder.glob("*.npz")])
        raise UserError(f"There is no file {path}." + (f" Did you mean {' or '.join(close)}?" if close else ""))
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {files.reason(error)}.") from error
    except Exception as error:  # a damaged archive raises errors of many kinds, and none is our mistake
        with path.open("rb") as file:
            is_archive = file.read(2) == b"PK"
        if "pickle" in str(error) and is_archive:
            raise UserError(
                f"{path} holds Python objects (pickles), which may run code and are never opened. Save plain arrays "
                "of numbers with np.savez: one row for each step, not a list of episodes of several lengths."
            ) from error
        raise UserError(
            f"{path} is no readable .npz file ({in_words(error)}). Restore it from a copy, or write it with np.savez."
        ) from error


def _from_arrays(path: Path, arrays: Mapping[str, np.ndarray], word: str, space: spaces.Space) -> Any:
    """A nested value of `space` from the arrays of its parts."""
    parts = {}
    for leaf in leaves(space, word):
        name = _array_name(word, leaf)
        if name not in arrays:
            raise UserError(
                f"{path} has no array {name!r}, which the environment's {space} asks for: it has {_listed(arrays)}."
            )
        parts[leaf.path] = arrays[name]
    return rebuilt(space, parts, ())


def _listed(arrays: Mapping[str, np.ndarray]) -> str:
    return ", ".join(sorted(arrays)[:20]) or "none at all"


# --- Minari ---------------------------------------------------------------------------------------------------------


def _minari() -> Any:
    try:
        import minari
    except ImportError as error:
        raise UserError(
            f"Minari datasets need minari, which cannot be imported ({error}).\nInstall it with: {INSTALL_MINARI}"
        ) from error
    return minari


def _read_minari_by_id(name: str) -> Recording:
    """A dataset among those that were downloaded; nothing is downloaded here."""
    minari = _minari()
    from minari.storage.datasets_root_dir import get_dataset_path

    try:
        folder = get_dataset_path(name)
        if not (folder / "data").is_dir():
            local = sorted(minari.list_local_datasets())
            close = nearest(name, local)
            raise UserError(
                f"There is no file or folder {name}, and no Minari dataset of this name in {get_dataset_path()}."
                + (f" Did you mean {' or '.join(close)}?" if close else "")
                + f"\nTo fetch one: minari download {name}. Datasets elsewhere: name their folder, or set "
                "MINARI_DATASETS_PATH."
            )
    except (OSError, ValueError) as error:
        raise UserError(f"The Minari dataset {name} cannot be looked up: {in_words(error)}.") from error
    return _read_minari(folder)


def _read_minari(folder: Path) -> Recording:
    """A dataset's episodes, one after the other, still unchecked."""
    data = folder if (folder / "metadata.json").is_file() else folder / "data"
    if not (data / "metadata.json").is_file():
        raise UserError(
            f"{folder} is no Minari dataset: there is no data/metadata.json in it. Name the dataset's folder, its id, "
            "or a file of recorded episodes."
        )
    minari = _minari()
    try:
        metadata = files.parse_json((data / "metadata.json").read_bytes(), allow_nan=True)
        # Without them Minari would make the environment that the file names, which may be code of a stranger's.
        if not {"observation_space", "action_space"} <= set(metadata):
            raise UserError(
                f"The Minari dataset {folder} does not say its spaces. Make it anew with a newer Minari, or write its "
                "arrays into a file (docs/from-data.md)."
            )
        dataset = minari.MinariDataset(data)
        return _joined(dataset.observation_space, dataset.action_space, dataset.iterate_episodes())
    except UserError:
        raise
    except Exception as error:  # whatever a damaged dataset makes of its readers
        raise UserError(f"The Minari dataset {folder} cannot be read: {in_words(error)}.") from error


def _joined(seen: spaces.Space, actions: spaces.Space, episodes: Iterator[Any]) -> Recording:
    """Minari's episodes, which have one observation more than steps, as one recording."""
    seen_leaves, action_leaves = list(leaves(seen, "observation")), list(leaves(actions, "action"))
    observed: dict[Any, list[np.ndarray]] = {leaf.path: [] for leaf in seen_leaves}
    final: dict[Any, list[np.ndarray]] = {leaf.path: [] for leaf in seen_leaves}
    acted: dict[Any, list[np.ndarray]] = {leaf.path: [] for leaf in action_leaves}
    rewards, terminations, truncations, masks = [], [], [], []
    for number, episode in enumerate(episodes):
        n_steps = len(episode.rewards)
        if n_steps == 0:
            continue
        for leaf in seen_leaves:
            value = np.asarray(leaf.of(episode.observations, "observation"))
            if len(value) != n_steps + 1:
                raise UserError(f"episode {number} has {len(value)} observations for {n_steps} steps, not one more.")
            observed[leaf.path].append(value[:-1])
            final[leaf.path].append(value[-1:])
        for leaf in action_leaves:
            acted[leaf.path].append(np.asarray(leaf.of(episode.actions, "action")))
        rewards.append(np.asarray(episode.rewards))
        terminations.append(np.asarray(episode.terminations))
        cut = np.array(episode.truncations)
        cut[-1] = cut[-1] or not terminations[-1][-1]  # an episode is over where the next one begins
        truncations.append(cut)
        mask = (episode.infos or {}).get(MASK_KEY)
        masks.append(None if mask is None else np.asarray(mask)[:n_steps])
    if not rewards:
        raise UserError("it has no steps.")
    return Recording(
        rebuilt(seen, {path: np.concatenate(some) for path, some in observed.items()}, ()),
        rebuilt(actions, {path: np.concatenate(some) for path, some in acted.items()}, ()),
        np.concatenate(rewards),
        np.concatenate(terminations),
        np.concatenate(truncations),
        rebuilt(seen, {path: np.concatenate(some) for path, some in final.items()}, ()),
        None if any(mask is None for mask in masks) else np.concatenate(masks),
        seen,
        actions,
    )


# --- checks ---------------------------------------------------------------------------------------------------------


def _source(space: spaces.Space) -> spaces.Space:
    """The environment's own space behind the rows of a policy."""
    return space.source if isinstance(space, (PackedObservations, PackedActions)) else space


def _check_same(
    place: str, seen: spaces.Space | None, acts: spaces.Space | None, own_seen: spaces.Space, own_acts: spaces.Space
) -> None:
    """Raise UserError where data says that it was recorded with other spaces than the environment's."""
    for word, theirs, own in (("observations", seen, own_seen), ("actions", acts, own_acts)):
        if theirs is not None and not _agree(theirs, own, word):
            raise UserError(
                f"{place} was recorded with {word} {theirs}, but the environment has {own}: it is of another task. "
                "Name the environment that it was recorded in."
            )


def _agree(one: spaces.Space, other: spaces.Space, what: str) -> bool:
    """The same spaces, whatever kind of numbers they are kept in."""
    mine, its = list(leaves(one, what)), list(leaves(other, what))
    return [leaf.path for leaf in mine] == [leaf.path for leaf in its] and all(
        _agree_in_part(a.space, b.space) for a, b in zip(mine, its, strict=True)
    )


def _agree_in_part(one: spaces.Space, other: spaces.Space) -> bool:
    if isinstance(one, spaces.Box) and isinstance(other, spaces.Box):
        return one.shape == other.shape and all(
            np.allclose(a.astype(np.float64), b.astype(np.float64), rtol=1e-6)
            for a, b in ((one.low, other.low), (one.high, other.high))
        )
    if isinstance(one, spaces.Discrete) and isinstance(other, spaces.Discrete):
        return (int(one.n), int(one.start)) == (int(other.n), int(other.start))
    return one == other


def _checked(recording: Recording, env: gym.Env, on_space_violation: SpacePolicy) -> Demonstrations:
    """Arrays for the policy of `env`.

    Raises:
        UserError, PackingError: with the first thing that is wrong.
    """
    seen, acts = env.observation_space, env.action_space
    own_seen, own_acts = _source(seen), _source(acts)
    _check_same("it", recording.observation_space, recording.action_space, own_seen, own_acts)
    rewards = _numbers_of("rewards", recording.rewards, len(recording.rewards) if np.ndim(recording.rewards) else 0)
    n_steps = len(rewards)
    if n_steps == 0:
        raise UserError("it has no steps.")
    terminated, truncated = (
        _flags(word, getattr(recording, word), n_steps) for word in ("terminations", "truncations")
    )
    over = terminated | truncated
    over[-1] = True  # what comes after is not known, as with one that was cut off
    ends = np.flatnonzero(over)
    observations = _observations(recording.observations, seen, n_steps, recording.action_masks, ends)
    _check_observations("observations", observations, seen, ends, on_space_violation)
    final = None
    if recording.final_observations is not None:
        final = _observations(recording.final_observations, seen, len(ends), None, None)
        _check_observations("final_observations", final, seen, None, on_space_violation)
    actions = _actions(recording.actions, acts, own_acts, n_steps, ends)
    return Demonstrations(observations, actions, rewards, terminated, ends, final)


def _numbers_of(word: str, value: Any, n_steps: int) -> np.ndarray:
    """`[N]` finite float64."""
    array = np.asarray(value)
    if array.dtype.kind not in "fiub" or array.shape != (n_steps,) or array.ndim != 1:
        raise UserError(f"{word} is {_kind(array)}; it must be one number for each step.")
    if not np.isfinite(array).all():
        step = int(np.flatnonzero(~np.isfinite(array))[0])
        raise UserError(f"{word}[{step}] is {array[step]}; every number must be finite.")
    return array.astype(np.float64)


def _flags(word: str, value: Any, n_steps: int) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.kind not in "fiub" or array.shape != (n_steps,) or not np.isin(array, (0, 1)).all():
        raise UserError(f"{word} is {_kind(array)}; it must be 0 or 1 (False or True) for each of {n_steps} steps.")
    return array.astype(bool)


def _kind(array: np.ndarray) -> str:
    return f"an array of {array.dtype} of shape {array.shape}"


def _place_of(step: int, ends: np.ndarray | None) -> str:
    if ends is None:
        return f"episode {step}"
    episode = int(np.searchsorted(ends, step))
    first = int(ends[episode - 1]) + 1 if episode else 0
    return f"step {step} (episode {episode}, its step {step - first})"


def _observations(
    value: Any, space: spaces.Space, n_rows: int, masks: np.ndarray | None, ends: np.ndarray | None
) -> np.ndarray:
    """Rows `[N, *O]` of the policy's space; `ends` is None for what follows the end, where no mask is needed."""
    if isinstance(space, PackedObservations):
        is_told = bool(space.options) and not space.mask_is_observed and ends is not None
        if is_told and masks is None:
            raise UserError(
                "the environment says in info which actions are possible, but this has no action_masks. Add them "
                f"([N, {space.n_options}], 0 and 1), or let the policy know nothing of masks: --action-mask none."
            )
        if is_told:
            masks = checked_mask(np.asarray(masks).reshape(n_rows, -1), space.options, (n_rows,))
        return space.pack_many(value, masks if is_told else None, (n_rows,), ignores_mask=ends is None)
    array, dtype = np.asarray(value), np.dtype(space.dtype or np.float32)
    shape = (n_rows, *(space.shape or ()))
    if array.dtype.kind not in "fiub" or array.shape != shape:
        raise UserError(f"observations is {_kind(array)}; for {space} it must be numbers of shape {shape}.")
    if dtype.kind in "iu" and not np.array_equal(array, array.astype(dtype)):
        raise UserError(f"observations holds numbers that are no {dtype}, which the observations {space} are of.")
    with np.errstate(over="ignore"):  # what becomes infinite is told
        return array.astype(np.float32 if dtype.kind == "f" else dtype)


def _check_observations(
    word: str, rows: np.ndarray, space: spaces.Space, ends: np.ndarray | None, on_space_violation: SpacePolicy
) -> None:
    check = SpaceCheck.of(space)
    if check.fits(rows):
        return
    for step, row in enumerate(rows):
        problem = check.first_problem(row)
        if problem is not None and not (problem[1] and on_space_violation == "warn"):
            hint = " If the environment does that too: --on-space-violation warn." if problem[1] else ""
            raise UserError(f"{word}, {_place_of(step, ends)}: {problem[0]}.{hint}")


def _actions(value: Any, space: spaces.Space, own: spaces.Space, n_steps: int, ends: np.ndarray) -> np.ndarray:
    """Rows `[N, *A]` inside the space."""
    parts = {leaf.path: _part(leaf, leaf.of(value, "action"), n_steps, ends) for leaf in leaves(own, "action")}
    inside = rebuilt(own, parts, ())
    return space.pack_many(inside, (n_steps,)) if isinstance(space, PackedActions) else inside


def _part(leaf: Leaf, value: Any, n_steps: int, ends: np.ndarray) -> np.ndarray:
    """One part of the actions: every number finite, a choice that there is, or within the bounds."""
    array, space, name = np.asarray(value), leaf.space, named("actions", leaf.path)
    shape = (n_steps, *(space.shape or ()))
    if array.dtype.kind not in "fiub" or array.shape != shape:
        raise UserError(f"{name} is {_kind(array)}; for {space} it must be numbers of shape {shape}.")
    low, high = _bounds_of(space)
    whole = not isinstance(space, spaces.Box)
    slack = 0.0 if whole else _SLACK * (1.0 + np.where(np.isfinite(high - low), high - low, 0.0))
    wrong = ~((array >= low - slack) & (array <= high + slack) & np.isfinite(array))
    if whole:
        wrong |= array % 1 != 0
    if wrong.any():
        place = np.argwhere(wrong)[0]
        raise UserError(
            f"{name}, {_place_of(int(place[0]), ends)}: {shown(array[tuple(place)].item())} is not in the "
            f"environment's {space}."
        )
    return array.astype(np.int64) if whole else array.astype(np.float64).clip(low, high).astype(space.dtype)


def _bounds_of(space: spaces.Space) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest that each number may be."""
    if isinstance(space, spaces.Box):
        return space.low.astype(np.float64), space.high.astype(np.float64)
    if isinstance(space, spaces.Discrete):
        return np.asarray(int(space.start)), np.asarray(int(space.start) + int(space.n) - 1)
    if isinstance(space, spaces.MultiDiscrete):
        return np.asarray(space.start), np.asarray(space.start) + space.nvec - 1
    return np.zeros(space.shape or ()), np.ones(space.shape or ())
