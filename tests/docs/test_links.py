"""Links of the README and of the pages under docs/: files and anchors that are there, and flags that commands have."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.flags import flags_of
from tests.docs.pages import PAGES, ROOT, page_name

TEXTS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]

_LINK = re.compile(r"!?\[[^\]]*\]\((?P<to>[^)\s]+)\)")
_CODE = re.compile(r"^( *)```.*?^\1```|`[^`\n]+`", re.M | re.S)
_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]+(?![a-z0-9._-])")  # with a dot or a line below it is OpenRLHF's


def links_of(path: Path) -> Iterator[str]:
    for match in _LINK.finditer(_CODE.sub("", path.read_text(encoding="utf-8"))):
        if not match["to"].startswith(("http://", "https://", "mailto:")):
            yield match["to"]


def anchors_of(path: Path) -> set[str]:
    """The anchors of headings, as GitHub and mkdocs both make them."""
    text = re.sub(r"^( *)```.*?^\1```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ +(.*?) *$", text, re.M)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", TEXTS, ids=page_name)
def test_links_lead_somewhere(page: Path):
    wrong = []
    for to in links_of(page):
        path, _, anchor = to.partition("#")
        target = (page.parent / path).resolve() if path else page
        inside = target.is_relative_to(ROOT) and target.exists()
        is_line = re.fullmatch(r"L\d+(-L\d+)?", anchor) is not None and target.suffix != ".md"
        if not inside or (anchor and not is_line and target.suffix == ".md" and anchor not in anchors_of(target)):
            wrong.append(to)
    assert not wrong


def test_a_wrong_link_would_be_seen(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("# A `b` c!\n\n[x](#a-b-c) [y](nowhere.md) `[z](not-a-link.md)`\n\n```\n[z](not.md)\n```\n")
    assert list(links_of(page)) == ["#a-b-c", "nowhere.md"]
    assert anchors_of(page) == {"a-b-c"}


COMMANDS = (
    "train",
    "resume",
    "evaluate",
    "watch",
    "export",
    "report",
    "check-env",
    "doctor",
    "clone",
    "record",
    "tune",
)
COMMANDS += ("sft", "reward", "align", "dpo", "sample", "chat", "demo", "convert")


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_flags_in_the_text_are_flags_of_a_command(page: Path):
    text = re.sub(r"^( *)```.*?^\1```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    said = " ".join(
        code for code in re.findall(r"`([^`\n]+)`", text) if "pip" not in code and "benchmarks/" not in code
    )
    known = frozenset().union(*(flags_of(command) for command in COMMANDS)) | OF_OTHERS
    unknown = {flag for flag in _FLAG.findall(said) if flag not in known and flag.replace("--no-", "--") not in known}
    assert not unknown


_SCRIPTS = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "benchmarks").glob("**/*.py")))
OF_OTHERS = {"--memory", "--version", "--strict", "--logdir", "--project"} | set(
    re.findall(r'"(--[a-z][a-z-]+)"', _SCRIPTS)
)
"""Flags of docker, mkdocs, TensorBoard and Trackio, and of our benchmarks."""
