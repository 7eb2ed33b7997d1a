"""The manifest of a checkpoint: which files belong to it, how long each is, and what is in each.

It is written last, so a folder with a manifest is a folder whose files were all written; and it is read
first, so that no file is opened that it does not vouch for. A manifest may come from a stranger: what it
says is checked before it is believed.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import platform
import re
import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch

from proximo.errors import UserError
from proximo.runs.files import parse_json

SCHEMA = 1
MANIFEST_NAME = "manifest.json"
STATE_NAME = "state.json"
TENSORS_SUFFIX = ".safetensors"

_STEM = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MOST_MANIFEST_BYTES = 1 << 20


@dataclass(frozen=True)
class FileRecord:
    """What the manifest promises of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`, checked."""

    step: int
    versions: dict[str, str]
    files: dict[str, FileRecord]


def is_stem(name: str) -> bool:
    """Return whether `name` can be the name of a tensor file, without its suffix."""
    return _STEM.fullmatch(name) is not None


def record(data: bytes) -> FileRecord:
    """Return what the manifest promises of a file with this content."""
    return FileRecord(len(data), hashlib.sha256(data).hexdigest())


def manifest_bytes(step: int, files: dict[str, FileRecord]) -> bytes:
    """Return the content of `manifest.json` for these files, with the versions that wrote them."""
    fields = {
        "schema": SCHEMA,
        "step": step,
        "versions": versions(),
        "files": {name: {"size": file.size, "sha256": file.sha256} for name, file in files.items()},
    }
    return _rendered(fields)


def read_manifest(folder: Path) -> Manifest:
    """Read and check `manifest.json`, and that exactly its files are there with the sizes it gives.

    Raises UserError that names the file and says what is wrong with it, and OSError if one cannot be read.
    Contents are not hashed here: `read_verified` and `check_contents` do that.
    """
    present = _plain_files(folder)
    if MANIFEST_NAME not in present:
        raise UserError(f"{MANIFEST_NAME} is missing: the folder is no checkpoint, or only a part of one")
    if present[MANIFEST_NAME] > _MOST_MANIFEST_BYTES:
        raise UserError(f"{MANIFEST_NAME} has {present[MANIFEST_NAME]:,} bytes, far more than any real one")
    manifest = _parsed((folder / MANIFEST_NAME).read_bytes())
    for name, file in manifest.files.items():
        if name not in present:
            raise UserError(f"{name} is missing")
        if present[name] != file.size:
            raise UserError(f"{name} is damaged: it has {present[name]:,} bytes, {MANIFEST_NAME} says {file.size:,}")
    extra = sorted(present.keys() - manifest.files.keys() - {MANIFEST_NAME})
    if extra:
        raise UserError(f"{extra[0]!r} does not belong to the checkpoint: {MANIFEST_NAME} does not list it")
    return manifest


def read_verified(folder: Path, manifest: Manifest) -> dict[str, bytes]:
    """Read every file once and return their contents, each equal to what the manifest promises.

    The bytes that were hashed are the bytes that are used: nobody can exchange a file in between.
    Raises UserError that names the first damaged file, and OSError if one cannot be read.
    """
    contents: dict[str, bytes] = {}
    for name, promised in manifest.files.items():
        data = (folder / name).read_bytes()
        _check_digest(name, hashlib.sha256(data).hexdigest(), promised)
        contents[name] = data
    return contents


def check_contents(folder: Path, manifest: Manifest) -> None:
    """Hash every file without keeping it in memory. Raises as `read_verified` does."""
    for name, promised in manifest.files.items():
        with (folder / name).open("rb") as file:
            _check_digest(name, hashlib.file_digest(file, "sha256").hexdigest(), promised)


def versions() -> dict[str, str]:
    """What the bits of a run hang on beside its settings: versions, torch's threads, the processor's instructions."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    names = ["proximo", "numpy", "gymnasium", *(name for name in ("numba", "scipy") if name in sys.modules)]
    found |= {name: _version(name) for name in names}
    found["threads"] = str(torch.get_num_threads())
    found["cpu"] = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


@functools.cache
def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # or run from a source tree that was never installed
        return "unknown"


def differences(before: dict[str, str]) -> str:
    """What is no longer as it was when a checkpoint was written, in words; empty if all is."""
    now = versions()
    changed = [
        f"{name} was {was} and is {now.get(name, 'none')}" for name, was in before.items() if now.get(name) != was
    ]
    return f"the numbers may differ from here on: {', '.join(changed)}" if changed else ""


def _rendered(fields: dict[str, Any]) -> bytes:
    """Return the one text that these fields have, closed by its own hash."""
    digest = hashlib.sha256(json.dumps(fields, indent=2).encode()).hexdigest()
    return (json.dumps({**fields, "sha256": digest}, indent=2) + "\n").encode()


def _plain_files(folder: Path) -> dict[str, int]:
    """Return the size of each file in `folder` but dot files; raise UserError for anything else that lies there."""
    sizes: dict[str, int] = {}
    for entry in folder.iterdir():
        status = entry.lstat()
        if stat.S_ISLNK(status.st_mode):
            raise UserError(f"{entry.name!r} is a link: a checkpoint holds plain files only")
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{entry.name!r} is no plain file: a checkpoint holds plain files only")
        if entry.name.startswith("."):  # file managers leave such files; no manifest can list one
            continue
        sizes[entry.name] = status.st_size
    return sizes


def _parsed(data: bytes) -> Manifest:
    try:
        fields = parse_json(data)
    except ValueError as error:
        raise UserError(f"{MANIFEST_NAME} is damaged: {error}") from None
    if not isinstance(fields, dict) or not _is_count(fields.get("schema")):
        raise UserError(f"{MANIFEST_NAME} is damaged: it is not the manifest of a checkpoint")
    if fields["schema"] != SCHEMA:
        raise UserError(
            f"{MANIFEST_NAME} has schema version {fields['schema']}, and this Proximo reads {SCHEMA}: "
            "load it with the Proximo that wrote it, or install a newer one"
        )
    # Comparing the whole text, not only the hash in it, also finds a lost newline or a key given twice.
    digest = fields.pop("sha256", None)
    if not isinstance(digest, str) or _rendered(fields) != data:
        raise UserError(f"{MANIFEST_NAME} is damaged or was edited: it does not match its own SHA-256")
    step, versions, files = fields.get("step"), fields.get("versions"), fields.get("files")
    if not _is_count(step):
        raise UserError(f"{MANIFEST_NAME} gives the step {step!r}, which is no step")
    if not isinstance(versions, dict) or not all(isinstance(version, str) for version in versions.values()):
        raise UserError(f"{MANIFEST_NAME} has no list of versions")
    if not isinstance(files, dict):
        raise UserError(f"{MANIFEST_NAME} has no list of files")
    records = {name: _checked_record(name, fields) for name, fields in files.items()}
    if STATE_NAME not in records:
        raise UserError(f"{MANIFEST_NAME} does not list {STATE_NAME}, which every checkpoint has")
    return Manifest(step, versions, records)


def _checked_record(name: str, fields: object) -> FileRecord:
    stem = name.removesuffix(TENSORS_SUFFIX)
    if name != STATE_NAME and (stem == name or not is_stem(stem)):
        raise UserError(
            f"{MANIFEST_NAME} lists {name!r}: a checkpoint holds {STATE_NAME} and plain names that end in "
            f"{TENSORS_SUFFIX}, and nothing else is ever opened"
        )
    if not isinstance(fields, dict):
        raise UserError(f"{MANIFEST_NAME} gives no size and SHA-256 for {name}")
    size, sha256 = fields.get("size"), fields.get("sha256")
    if not _is_count(size) or not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise UserError(f"{MANIFEST_NAME} gives no size and SHA-256 for {name}")
    return FileRecord(size, sha256)


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_digest(name: str, digest: str, promised: FileRecord) -> None:
    if digest != promised.sha256:
        raise UserError(
            f"{name} is damaged: its SHA-256 begins with {digest[:12]}, {MANIFEST_NAME} says {promised.sha256[:12]}"
        )
