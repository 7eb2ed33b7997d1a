"""The folder that a report is written to: our own files are replaced, nobody else's ever."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from proximo.errors import UserError
from proximo.runs import files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARK = "<!-- Written by Proximo; proximo report writes it anew. -->"
"""First line of a report that may be replaced."""
_SOFTWARE = "Proximo"
_PICTURE_MARK = b"tEXtSoftware\x00" + _SOFTWARE.encode()


def is_report(folder: Path) -> bool:
    """Whether a folder is a report on several runs, and no run."""
    try:
        text = (folder / "report.md").read_bytes()[: len(MARK)]
        return text == MARK.encode() and not (folder / "config.toml").exists()
    except OSError:
        return False


def png_bytes(figure: Figure) -> bytes:
    """Draw a figure as a PNG that says who made it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    # Figure.savefig would draw everything twice, the first time to no purpose.
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": _SOFTWARE})
    return buffer.getvalue()


def prepare_folder(folder: Path, paths: Sequence[Path]) -> None:
    """Make `folder`, and see that each of `paths`, the files to be written, is free or ours.

    Raises:
        UserError: if the folder cannot be made, or a file that Proximo did not write has one of the names.
    """
    try:
        files.make_folders(folder)
        strangers = [path.name for path in paths if _is_taken(path)]
    except OSError as error:
        raise UserError(
            f"The report's folder {folder} cannot be made or read: {files.reason(error)}. "
            "Choose a folder that this user may write to."
        ) from error
    if strangers:
        raise UserError(
            f"{folder} already has {', '.join(strangers)}, which Proximo did not write, so nothing was touched. "
            "Choose another folder for the report, or move what is there."
        )


def write_ours(path: Path, data: bytes) -> None:
    """Put a file of ours in its place, whole or not at all.

    Raises:
        UserError: if the disk refuses.
    """
    try:
        files.replace_file(path, data)
    except OSError as error:
        raise UserError(
            f"{path} could not be written: {files.reason(error)}. Free some space there, or choose another folder."
        ) from error


def _is_taken(path: Path) -> bool:
    """Whether something that we did not write has this name."""
    if not path.exists() and not path.is_symlink():
        return False
    if not path.is_file():
        return True
    with path.open("rb") as file:
        beginning = file.read(512)
    return not (beginning.startswith(MARK.encode()) or _PICTURE_MARK in beginning)
