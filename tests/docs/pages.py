"""The snippets and links of the README and the pages under docs/."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]

COMMANDS = ("proximo", "python", "python3", "pip", "pytest", "ruff", "mkdocs", "jupyter", "git", "minari")
"""What a line of a block without a language begins with where it is a command; other lines are output."""

SHELL = ("", "bash", "sh", "console", "shell")

_FENCE = re.compile(
    r"^(?P<indent> *)(?P<ticks>`{3,})(?P<language>[\w+-]*)[^\n]*\n(?P<text>.*?)^(?P=indent)(?P=ticks) *$", re.M | re.S
)
_MARK = re.compile(r"<!-- *not run: *(?P<reason>[^\n]*?) *-->\s*\Z")
_FILE = re.compile(r"# (?P<name>[\w-]+\.(?:py|toml|ya?ml))\n")


@dataclass(frozen=True)
class Snippet:
    """A block between fences."""

    page: str
    line: int
    """Of its first line of text."""
    language: str
    text: str
    not_run: str | None
    """The reason that stands above it, where it is marked as not run."""

    @property
    def commands(self) -> list[tuple[int, list[str]]]:
        """The commands of a block of a shell, each with its line, as words."""
        if self.language not in SHELL:
            return []
        found, held, at = [], "", self.line
        for number, line in enumerate(self.text.splitlines(), start=self.line):
            at = at if held else number
            held += line.removesuffix("\\")
            if line.endswith("\\"):
                continue
            for part in re.split(r"\s+&&\s+", re.sub(r"(^|\s)#\s.*$", "", held.removeprefix("$ "))):
                if part.split(" ")[0] in COMMANDS:
                    found.append((at, shlex.split(part)))
            held = ""
        return found

    @property
    def file_name(self) -> str | None:
        """The file that a block is, where its first line is a comment that names one: `# my_reward.py`."""
        named = _FILE.match(self.text)
        return named["name"] if named and self.language in ("python", "toml", "yaml") else None


def page_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def snippets_of(path: Path) -> list[Snippet]:
    """All blocks of a page, in their order."""
    return snippets_in(path.read_text(encoding="utf-8"), page_name(path))


def snippets_in(text: str, page: str) -> list[Snippet]:
    found = []
    for match in _FENCE.finditer(text):
        mark = _MARK.search(text, 0, match.start())
        width = len(match["indent"])
        inner = "".join(line[width:] if line[:width].isspace() else line for line in match["text"].splitlines(True))
        first = text.count("\n", 0, match.start()) + 2
        found.append(Snippet(page, first, match["language"], inner, mark["reason"] if mark else None))
    return found
