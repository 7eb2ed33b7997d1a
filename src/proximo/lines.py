"""Text for terminals: lines that are too long are broken between words; commands and rows of tables stay whole."""

from __future__ import annotations

import os
import re
import shutil
import textwrap
from typing import Any

_PROGRAMS = r"(?:proximo|pip|python|python3|cd|export|tensorboard|trackio|wandb) "

_COMMAND_LINE = re.compile(rf"\s*(?:-> )?{_PROGRAMS}")

_COMMAND_INSIDE = re.compile(rf"(?<=[:(`] ){_PROGRAMS}.*?(?=[.,)`](?:\s|$)|$)|(?<=`){_PROGRAMS}.*?(?=`)")

_MARK = re.compile(r"\s*(?:[-!*] |-> )?")

_WIDEST_LABEL = 30


def width_of(stream: Any) -> int | None:
    """The columns of the terminal that a stream goes to; None for a pipe or a file."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or None if stream.isatty() else None
    except (OSError, ValueError, AttributeError):
        return None


def page_width() -> int:
    """Columns for text that is laid out: those of the terminal, at most 100."""
    return min(100, shutil.get_terminal_size((100, 24)).columns)


def fitted(text: str, width: int | None) -> str:
    """The text with lines of at most `width` columns, where words and commands allow; unchanged for None."""
    if width is None:
        return text
    return "\n".join(_broken(line, max(width, 20)) for line in text.split("\n"))


def _broken(line: str, width: int) -> str:
    if len(line) <= width or line.startswith("|") or _COMMAND_LINE.match(line):
        return line
    kept = _COMMAND_INSIDE.sub(lambda found: found[0].replace(" ", "\0"), line)
    hang = " " * min(_hang(line), width // 2)
    parts = textwrap.wrap(
        kept, width, subsequent_indent=hang, break_long_words=False, break_on_hyphens=False, drop_whitespace=True
    )
    return "\n".join(part.replace("\0", " ") for part in parts)


def _hang(line: str) -> int:
    """Where the text begins: after the indent, a dash, or a label with two spaces behind it."""
    mark = _MARK.match(line)
    gaps = [found.end() for found in re.finditer(r"\S\s{2,}(?=\S)", line[: _WIDEST_LABEL + 1])]
    return max([mark.end() if mark else 0, *gaps])
