"""The folder of a run: where it is, what lies where in it, and how it is found again.

Nothing here ever deletes or overwrites a run.
"""

from __future__ import annotations

import datetime
import itertools
import os
import re
import shlex
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from proximo.errors import UserError, nearest
from proximo.runs import files

RUNS_ROOT = Path("runs")
LOCK_NAME = ".lock"

_LONGEST_TASK_NAME = 80
_NEWEST_SHOWN = 5


@dataclass(frozen=True)
class RunDirectory:
    """The folder of one run, and the names of what is in it."""

    path: Path

    @property
    def config_path(self) -> Path:
        """`config.toml`: everything needed to run it again. A folder that has it is a run."""
        return self.path / "config.toml"

    @property
    def metrics_path(self) -> Path:
        """`metrics.jsonl`: one JSON object per iteration."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """`checkpoints/`: one folder per checkpoint, and `latest` and `best`, which name one."""
        return self.path / "checkpoints"

    @property
    def report(self) -> Path:
        """`report/`: pictures and the diagnosis."""
        return self.path / "report"

    @property
    def videos(self) -> Path:
        """`videos/`: what the policy looks like."""
        return self.path / "videos"

    @property
    def tensorboard(self) -> Path:
        """`tensorboard/`: event files, where they were asked for."""
        return self.path / "tensorboard"

    @property
    def loggers(self) -> Path:
        """`loggers/`: what W&B and Trackio have been sent, where they were asked for."""
        return self.path / "loggers"


def new_run(task: str, seed: int, run_dir: Path | str | None = None) -> RunDirectory:
    """Create the folder of a new run: `run_dir`, or `runs/<task>/<date and time>-seed<seed>`.

    Raises UserError if `run_dir` exists and is not an empty folder, which is then left untouched, or if the
    folder cannot be created or written to.
    """
    path = files.expanded(run_dir) if run_dir is not None else None
    try:
        path = _new_default_folder(task, seed) if path is None else _claimed(path)
    except OSError as error:
        where = path if path is not None else _absolute(RUNS_ROOT)
        raise UserError(
            f"The run directory {where} cannot be created: {files.reason(error)}"
            f"{f' ({error.filename})' if error.filename else ''}. "
            "Choose a folder that this user may write to, with --run-dir DIR."
        ) from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(
            f"The run directory {path} cannot be written to by this user. "
            "Choose another folder with --run-dir DIR, or change its permissions."
        )
    return RunDirectory(path)


def open_run(path: Path | str) -> RunDirectory:
    """Find the run that `path` means: its folder, or anything inside such as `checkpoints/` or a checkpoint.

    Raises UserError if `path` does not exist (with the nearest names that do), holds several runs (with the
    newest few), or is no run.
    """
    path = files.expanded(path)
    try:
        return _found(path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {files.reason(error)}. Name another folder, or let this user read it."
        ) from error


def _found(path: Path) -> RunDirectory:
    if not os.path.lexists(path):
        raise UserError(_missing(path))
    if RunDirectory(path).config_path.is_file():
        return _own_files(RunDirectory(path))
    whole = _absolute(path)
    for folder in whole.parents:
        run = RunDirectory(folder)
        # Only the names a run has itself: a config.toml further up may be about anything.
        inside = (run.checkpoints, run.report, run.videos, run.metrics_path, run.config_path)
        if run.config_path.is_file() and any(whole.is_relative_to(each) for each in inside):
            return _own_files(run)
    if path.is_dir() and _never_began(path):
        raise UserError(
            f"{path} is not a run: it has no config.toml. If a run was stopped here before it had written that, there "
            "is nothing to go on with: begin it again with the same command; the folder may stay as it is."
        )
    runs = _newest_runs(path) if path.is_dir() else []
    if runs:
        raise UserError(f"{path} is not a run, but a folder that holds runs. Name one of them:\n{_listed(runs)}")
    raise UserError(
        f"{path} is not a run: it has no config.toml. A run is a folder that proximo train made, such as "
        "runs/CartPole-v1/2026-01-31T12-00-00-seed1."
    )


def _own_files(run: RunDirectory) -> RunDirectory:
    """Refuse a run whose parts are links: resuming it would write, and prune, somewhere else."""
    parts = (run.checkpoints, run.metrics_path, run.config_path, run.report, run.videos, run.tensorboard, run.loggers)
    for part in (*parts, run.path / LOCK_NAME):
        if part.is_symlink():
            raise UserError(f"{part} is a link to {part.readlink()}; a run's own files are expected there.")
        if part.exists() and not (part.is_file() or part.is_dir()):  # a pipe would be waited for for ever
            raise UserError(f"{part} is no plain file; a run's own files are expected there. Delete it.")
    return run


def _absolute(path: Path) -> Path:
    try:
        return path.absolute()
    except FileNotFoundError:
        raise UserError("The current folder has been deleted. Go to another one (cd) and try again.") from None


def write_config(run: RunDirectory, settings: Mapping[str, Any]) -> None:
    """Write `settings` to `config.toml`, as a whole or not at all; TOML has no null, so None is left out.

    Raises TypeError for what TOML cannot hold, and UserError if the disk refuses.
    """
    text = tomli_w.dumps(_without_none(settings))
    try:
        files.replace_file(run.config_path, text.encode())
    except OSError as error:
        raise UserError(
            f"{run.config_path} could not be written: {files.reason(error)}. "
            "Free some space there, or let this user write there."
        ) from error


def read_config(run: RunDirectory) -> dict[str, Any]:
    """Return the settings in `config.toml`; raise UserError if it is missing, unreadable or no TOML."""
    path = run.config_path
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))  # some editors put a mark in front
    except OSError as error:
        raise UserError(f"{path} cannot be read: {files.reason(error)}. Is {run.path} a run?") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no valid TOML: {error}. Mend that place, or restore the file.") from error


def is_language_run(path: Path | str) -> bool:
    """Whether a run is of a language model; raises UserError as `open_run` and `read_config` do."""
    return "stage" in read_config(open_run(path))


def _claimed(path: Path) -> Path:
    """Create the folder that the user named, or take it if it is empty."""
    if path.is_dir():
        if _never_began(path):
            return path
        if RunDirectory(path).config_path.is_file():
            raise UserError(
                f"{path} already holds a run, and nothing is ever written over one. Go on with it by "
                f"`proximo resume {shlex.quote(str(path))}`, or choose another name with --run-dir."
            )
        raise UserError(f"{path} exists and is not empty. Choose a new or empty folder with --run-dir.")
    if os.path.lexists(path):
        raise UserError(f"{path} exists and is no folder. Choose another name with --run-dir.")
    files.make_folders(path)
    return path


def _never_began(path: Path) -> bool:
    """Whether a folder holds nothing but what a run leaves that was killed before it had settings."""
    return all(each.name == LOCK_NAME or each.name.startswith(files.TEMPORARY_PREFIX) for each in path.iterdir())


def _new_default_folder(task: str, seed: int) -> Path:
    parent = RUNS_ROOT / folder_name(task)
    files.make_folders(parent)
    # Local time without colons: readable to the person, and a legal name on every system.
    name = f"{datetime.datetime.now():%Y-%m-%dT%H-%M-%S}-seed{seed}"
    for attempt in itertools.count(1):
        path = parent / (name if attempt == 1 else f"{name}-{attempt}")
        try:
            path.mkdir()
        except FileExistsError:
            continue
        files.sync_folder(parent)
        return path
    raise AssertionError("itertools.count ends never")


def folder_name(task: str) -> str:
    """Make `ALE/Pong-v5`, `my_file.py:MyEnv` or anything else a plain name of a folder."""
    plain = re.sub(r"[^A-Za-z0-9._]+", "-", task).strip("-._")
    # The end is the telling part of a long path.
    return plain[-_LONGEST_TASK_NAME:].strip("-._") or "task"


def _newest_runs(folder: Path) -> list[Path]:
    """Return the runs one or two levels below, newest first."""
    dated: list[tuple[float, Path]] = []
    for pattern in ("*/config.toml", "*/*/config.toml"):
        for config in folder.glob(pattern):
            try:
                dated.append((config.stat().st_mtime, config.parent))
            except OSError:  # gone or forbidden since it was listed: not worth offering
                continue
    return [path for _, path in sorted(dated, reverse=True)]


def _listed(runs: list[Path]) -> str:
    more = [f"  and {len(runs) - _NEWEST_SHOWN} older"] if len(runs) > _NEWEST_SHOWN else []
    return "\n".join([*(f"  {path}" for path in runs[:_NEWEST_SHOWN]), *more])


def _missing(path: Path) -> str:
    """Say that `path` does not exist, and what does that looks like it."""
    parents = [path.parent, *path.parent.parents]
    index, existing = next((i, each) for i, each in enumerate(parents) if each.is_dir() or each == each.parent)
    wanted = path.name if index == 0 else parents[index - 1].name
    alike: list[Path] = []
    for folder in (existing, RUNS_ROOT):
        try:
            names = [each.name for each in folder.iterdir() if not each.name.startswith(".")]
        except OSError:
            continue
        alike += [folder / name for name in nearest(wanted, names) if folder / name not in alike]
    message = f"There is no {path}: {existing / wanted} does not exist."
    if alike:
        return f"{message} Did you mean one of these?\n{_listed(alike)}"
    runs = _newest_runs(RUNS_ROOT)
    return f"{message} The newest runs are:\n{_listed(runs)}" if runs else f"{message} There are no runs here yet."


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_without_none(item) for item in value]
    return value
