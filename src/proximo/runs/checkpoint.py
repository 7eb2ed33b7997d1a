"""Checkpoints that survive a kill at any moment, and that are safe to load from a stranger.

A save writes a temporary folder, flushes every file, writes the manifest last, and only then gives the
folder its name; `latest` is moved after that. Whatever moment the power fails at, the folders named
`step_...` are whole. A load reads safetensors and JSON, nothing else, and only what the manifest's
hashes vouch for.

One process at a time saves into a folder.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from proximo.errors import DiskError, UserError
from proximo.runs import contents, files, names
from proximo.runs.contents import Tensors
from proximo.runs.directory import RunDirectory, read_config
from proximo.runs.manifest import (
    MANIFEST_NAME,
    STATE_NAME,
    TENSORS_SUFFIX,
    FileRecord,
    Manifest,
    check_contents,
    manifest_bytes,
    read_manifest,
    read_verified,
    record,
)

_SPARE_BYTES = 1 << 20  # for the manifest, file headers and the file system's own books
_LISTED = 8


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and verified; every tensor is on the CPU and owns its memory."""

    path: Path
    step: int
    tensors: Tensors
    state: dict[str, Any]
    versions: dict[str, str]
    """The versions, threads and processor that wrote it."""
    skipped: tuple[str, ...] = ()
    """Newer checkpoints that `newest_checkpoint` had to pass over, each with the reason."""


def save_checkpoint(folder: Path, step: int, tensors: Tensors, state: dict[str, Any]) -> Path:
    """Save `tensors` and `state` in a new `folder/step_<step>`, let `latest` name it, and return its path.

    `tensors` maps the name of a file to its tensors; `state` holds what JSON can (integers of any size,
    floats exactly, NaN and infinity too). Tensors may live on any device and share memory. A name that
    exists is never written again: the same step saved twice gets `-2` after its name.

    Raises DiskError if the disk is full or refuses: nothing half-written is left, older checkpoints are
    as they were, and the caller may go on and try again later. Raises TypeError or ValueError for what
    a checkpoint cannot hold, and UserError if `latest` is no plain file, before anything is written.
    """
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"step must be an integer of at least 0, not {step!r}")
    contents.check_tensors(tensors)
    contents.check_state(state)
    names.check_pointer(folder / names.LATEST)
    state_bytes = contents.state_bytes(state)
    needed = len(state_bytes) + sum(
        tensor.numel() * tensor.element_size() for group in tensors.values() for tensor in group.values()
    )
    try:
        files.make_folders(folder)
        _check_space(folder, needed + _SPARE_BYTES)
        path = _write(folder, step, tensors, state_bytes)
    except OSError as error:
        raise DiskError(
            f"The checkpoint of step {step} could not be saved in {folder}: {files.reason(error)}. "
            "Earlier checkpoints are untouched. Free some space there, or let this user write there."
        ) from error
    _point(folder / names.LATEST, path.name, f"{path} is whole.")
    return path


def mark_best(folder: Path, checkpoint_path: Path) -> None:
    """Let `best` name this checkpoint of `folder`; `prune_checkpoints` then keeps it.

    Raises ValueError if it is no checkpoint of `folder`, and DiskError if the disk refuses.
    """
    name = checkpoint_path.name
    if name not in names.all_in(folder) or checkpoint_path.parent.resolve() != folder.resolve():
        raise ValueError(f"{checkpoint_path} is no checkpoint of {folder}")
    _point(folder / names.BEST, name, "The best checkpoint is still the one it named.")


def finish_save(
    folder: Path, checkpoint: Checkpoint, *, keep_last: int, keep_every: int | None = None, best: bool = False
) -> None:
    """Do what a save that was killed between its steps has left undone: move `latest` and `best`, and prune.

    For whoever goes on from `checkpoint`, the newest that verifies; `best` says that it was to be marked so. After
    a save that came to its end, or where a newer checkpoint is damaged, nothing is changed.

    Raises DiskError if the disk refuses, and as `prune_checkpoints` does.
    """
    if checkpoint.skipped:
        return
    if names.pointed(folder, names.LATEST) != checkpoint.path.name:
        _point(folder / names.LATEST, checkpoint.path.name, f"{checkpoint.path} is whole.")
    if best and names.pointed(folder, names.BEST) != checkpoint.path.name:
        mark_best(folder, checkpoint.path)
    prune_checkpoints(folder, keep_last, keep_every)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint, whole and verified: safe with files from anyone, as nothing is ever unpickled.

    The manifest is checked first, then the size and SHA-256 of every file, and only then is any of them
    parsed. Needs memory for the files and for the tensors at once.

    Raises UserError that names the file and says what is wrong with it.
    """
    try:
        return _load(path)
    except UserError as error:
        raise UserError(
            f"The checkpoint {path} was not loaded: {error}. Restore it from a copy, or use another checkpoint."
        ) from error


def newest_checkpoint(folder: Path) -> Checkpoint:
    """Read the newest checkpoint of `folder` that verifies; its `skipped` says what was passed over, and why.

    The newest has the highest step, whether or not `latest` names it: a kill between a save and the move
    of `latest` costs nothing. The caller must show `skipped` to the person.

    Raises UserError if there is no checkpoint, or none that verifies.
    """
    present = names.all_in(folder)
    skipped = _lost_latest(folder, present)
    for name in present:
        try:
            return replace(_load(folder / name), skipped=tuple(skipped))
        except UserError as error:
            skipped.append(f"{name}: {error}")
    if not skipped:
        raise UserError(
            f"There is no checkpoint in {folder}: the run was stopped before it saved its first one. "
            f"Begin a new run with its settings: {_command_that_begins(RunDirectory(folder.parent))}"
        )
    raise UserError(
        f"No checkpoint in {folder} can be used:\n"
        + "\n".join(f"  {line}" for line in skipped)
        + "\nRestore one from a copy; the run does not start afresh by itself."
    )


def _command_that_begins(run: RunDirectory) -> str:
    """What to type to begin a run anew: a run of a language stage says in its settings which stage it is."""
    try:
        stage = read_config(run).get("stage", "train")
    except UserError:
        stage = "train"
    return f"proximo {shlex.quote(str(stage))} --config {shlex.quote(str(run.config_path))}"


def named_checkpoint(folder: Path, name: str | int) -> Checkpoint:
    """Read one checkpoint of `folder`: "latest", "best", a step, or the name of its folder.

    Raises UserError that lists what exists if there is no such checkpoint, and as `load_checkpoint` does.
    """
    present = names.all_in(folder)
    wanted = str(name).strip()
    if wanted in (names.LATEST, names.BEST):
        matches = [each for each in present if each == names.pointed(folder, wanted)]
    elif wanted.isdecimal():
        matches = [each for each in present if names.step_of(each) == int(wanted)]
    else:
        matches = [each for each in present if each == wanted]
    if matches:
        return load_checkpoint(folder / matches[0])
    if not present:
        raise UserError(f"There is no checkpoint {wanted!r} in {folder}: it has none at all.")
    listed = ", ".join(present[:_LISTED])
    older = f" and {len(present) - _LISTED} older" if len(present) > _LISTED else ""
    raise UserError(
        f"There is no checkpoint {wanted!r} in {folder}. It has {listed}{older}. "
        "Name one of these, its step, or latest, or best where one was marked."
    )


def prune_checkpoints(folder: Path, keep_last: int, keep_every: int | None = None) -> tuple[Path, ...]:
    """Delete all but the last `keep_last` checkpoints and the one named best; return what was deleted.

    With `keep_every`, the first one at or after each multiple of so many steps is kept too, for good.

    First the newest is read back from the disk and hashed. If it is damaged the next older one that
    verifies counts as the newest; damaged checkpoints newer than that are left alone. No damaged one counts
    among the last `keep_last`. Leftovers of saves that were killed go too.

    Raises ValueError if `keep_last` or `keep_every` is below 1, and UserError, with nothing deleted, if `best` is
    damaged; DiskError if no checkpoint verifies, then too with nothing deleted, or if the disk refuses.
    """
    if keep_last < 1 or (keep_every is not None and keep_every < 1):
        raise ValueError(f"keep_last and keep_every must be at least 1, not {keep_last} and {keep_every}")
    present = names.all_in(folder)
    try:
        best = names.pointed(folder, names.BEST)
        sound = _from_first_sound(folder, present)
        kept = [name for name in sound if _problem(folder / name, _manifest) is None][:keep_last]
        kept += [] if keep_every is None else _milestones(sound, keep_every)
        doomed = [folder / name for name in sound if name not in kept and name != best]
        for path in doomed:
            _delete(path)
        files.sweep(folder)
    except OSError as error:
        raise DiskError(
            f"Old checkpoints in {folder} could not all be deleted: {files.reason(error)}. "
            "The newest ones are untouched. Let this user write there, or delete them by hand."
        ) from error
    return tuple(doomed)


def _point(pointer: Path, name: str, consolation: str) -> None:
    """Let `latest` or `best` name a checkpoint; the message says too what is as it should be."""
    try:
        files.replace_file(pointer, f"{name}\n".encode())
    except OSError as error:
        raise DiskError(
            f"{pointer} could not be written: {files.reason(error)}. {consolation} "
            "Free some space there, or let this user write there."
        ) from error


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DiskError(
            f"The checkpoint needs {needed / 1e6:,.1f} MB in {folder}, and {free / 1e6:,.1f} MB are free. "
            "Earlier checkpoints are untouched. Free some space there, or keep fewer checkpoints."
        )


def _write(folder: Path, step: int, tensors: Tensors, state_bytes: bytes) -> Path:
    """Write the whole checkpoint under a temporary name, then give it its own, and return that."""
    temporary = files.temporary_beside(folder / "any")
    try:
        temporary.mkdir()
        records: dict[str, FileRecord] = {}
        for stem, group in tensors.items():
            # One file at a time: memory holds one of them beside the tensors.
            data = contents.tensors_bytes(group)
            records[f"{stem}{TENSORS_SUFFIX}"] = record(data)
            files.write_synced(temporary / f"{stem}{TENSORS_SUFFIX}", data)
        records[STATE_NAME] = record(state_bytes)
        files.write_synced(temporary / STATE_NAME, state_bytes)
        files.write_synced(temporary / MANIFEST_NAME, manifest_bytes(step, records))
        files.sync_folder(temporary)
        path = folder / names.free(folder, step)
        files.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return path


def _lost_latest(folder: Path, present: list[str]) -> list[str]:
    """Return a complaint if `latest` is damaged, or names a checkpoint newer than all that are there."""
    try:
        named = names.pointed(folder, names.LATEST)
    except UserError as error:
        return [f"{names.LATEST}: {error}"]
    if named is not None and (not present or names.order(named) > names.order(present[0])):
        return [f"{named}: {names.LATEST} names it, and it is not there"]
    return []


def _manifest(path: Path) -> Manifest:
    """Read the manifest of a checkpoint, and check that a folder named for a step is of that step."""
    manifest = read_manifest(path)
    if names.is_name(path.name) and names.step_of(path.name) != manifest.step:
        raise UserError(f"it was renamed: {MANIFEST_NAME} says that it is of step {manifest.step}")
    return manifest


def _load(path: Path) -> Checkpoint:
    """Load as `load_checkpoint` does, with errors that leave out the checkpoint's own path."""
    try:
        manifest = _manifest(path)
        verified = read_verified(path, manifest)
    except OSError as error:
        raise UserError(_unreadable(path, error)) from error
    state = contents.parse_state(verified.pop(STATE_NAME))
    tensors: Tensors = {}
    for name in list(verified):
        tensors[name.removesuffix(TENSORS_SUFFIX)] = contents.parse_tensors(name, verified.pop(name))
    return Checkpoint(path, manifest.step, tensors, state, manifest.versions)


def _unreadable(path: Path, error: OSError) -> str:
    name = Path(error.filename).name if isinstance(error.filename, str) else path.name
    return f"{name} cannot be read ({files.reason(error)})"


def _problem(path: Path, check: Callable[[Path], object]) -> str | None:
    """Return what `check` finds wrong with a checkpoint, or None."""
    try:
        check(path)
    except UserError as error:
        return str(error)
    except OSError as error:
        return _unreadable(path, error)
    return None


def _verify(path: Path) -> Manifest:
    manifest = _manifest(path)
    check_contents(path, manifest)
    return manifest


def _from_first_sound(folder: Path, present: list[str]) -> list[str]:
    """Return `present` from the first that verifies completely on; raise UserError if none does."""
    problems: list[str] = []
    for index, name in enumerate(present):
        problem = _problem(folder / name, _verify)
        if problem is None:
            return present[index:]
        problems.append(f"\n  {name}: {problem}")
    if not problems:
        return []
    raise DiskError(f"Nothing in {folder} was deleted, for no checkpoint there verifies:{''.join(problems)}")


def _milestones(sound: list[str], every: int) -> list[str]:
    """Return the first of these, newest first, at or after each multiple of `every` steps."""
    first: dict[int, str] = {}
    for name in sound:
        first[names.step_of(name) // every] = name
    return list(first.values())


def _delete(path: Path) -> None:
    """Delete a checkpoint; one that is only half deleted no longer has the name of a checkpoint."""
    temporary = files.temporary_beside(path)
    files.rename(path, temporary)
    files.remove_tree(temporary)
