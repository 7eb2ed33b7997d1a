"""docs/how-ppo-works.md: what it says that lines print is what they print, and its code is that of the source."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import inspect
import io
import re
import textwrap
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "how-ppo-works.md"
TEXT = PAGE.read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", TEXT, re.M | re.S)
EXCERPTS = re.findall(r"^From \[`(\S+)`\]\(\.\./src/proximo/(\S+)\):\n\n```python\n(.*?)^```$", TEXT, re.M | re.S)
PROMISES = re.compile(r"# -> (.*)$", re.M)


def statements(snippet: str) -> list[str]:
    """Each statement with the comment that follows it, on its line or alone on the next."""
    lines = snippet.splitlines()
    nodes = ast.parse(snippet).body
    ends = [node.lineno - 1 for node in nodes[1:]] + [len(lines)]
    return ["\n".join(lines[node.lineno - 1 : end]) for node, end in zip(nodes, ends, strict=True)]


def as_one_line(said: str) -> str:
    return re.sub(r"\s+", " ", said.strip()).replace("[ ", "[").replace("] ]", "]]")


def broken_promises(snippets: list[str]) -> list[str]:
    """Run all snippets in one session; where a line prints something else than the comment behind it says."""
    names: dict[str, object] = {}
    broken = []
    for snippet in snippets:
        for statement in statements(snippet):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(statement, PAGE.name, "exec"), names)  # noqa: S102  # a page of this repository
            promised = as_one_line(" ".join(PROMISES.findall(statement)))
            if as_one_line(printed.getvalue()) != promised:
                broken.append(f"{statement}\n   printed {as_one_line(printed.getvalue())}")
    return broken


def test_lines_print_what_the_page_says() -> None:
    try:
        broken = broken_promises(SNIPPETS)
    finally:
        torch.set_printoptions(profile="default")
    assert broken == []
    assert len(PROMISES.findall(TEXT)) > 40


@pytest.mark.parametrize("line", ["print(2 + 2)  # -> 5", "print(4)", "x = 4  # -> 4"])
def test_a_page_that_says_otherwise_fails(line: str) -> None:
    assert len(broken_promises([line])) == 1


@pytest.mark.parametrize(("function", "file", "code"), EXCERPTS)
def test_code_on_the_page_is_the_source_s(function: str, file: str, code: str) -> None:
    module = importlib.import_module("proximo." + file.removesuffix(".py").replace("/", "."))
    source = textwrap.dedent(inspect.getsource(functools.reduce(getattr, function.split("."), module)))
    lines = [line.strip() for line in source.splitlines()]
    wanted = [line.strip() for line in code.strip().splitlines()]
    places = range(len(lines) - len(wanted) + 1)
    assert any(lines[at : at + len(wanted)] == wanted for at in places), f"{file} {function} no longer has\n{code}"


def test_every_excerpt_is_found_by_this_test() -> None:
    assert len(EXCERPTS) == len(re.findall(r"^From \[", TEXT, re.M)) >= 8


def test_functions_that_are_linked_are_in_the_file_that_is_linked() -> None:
    links = re.findall(r"\[`(\w+)`\]\(\.\./(src/[\w/]+\.py)\)", TEXT)
    links += [
        (name, path)
        for row in re.findall(r"^\| [^|]+ \|([^|]+)\|([^|]+)\|", TEXT, re.M)
        for name, path in zip(
            re.findall(r"`(\w+)`", row[0]), re.findall(r"\((?:\.\./)(src/[^)]+)\)", row[1]), strict=False
        )
    ]
    assert len(links) > 30
    missing = [link for link in links if not re.search(rf"(def|class) {link[0]}\b", (ROOT / link[1]).read_text())]
    assert missing == []


def test_links_lead_somewhere() -> None:
    places = re.findall(r"\]\(([^)#]+)(?:#[\w-]+)?\)", TEXT)
    assert [place for place in places if not (PAGE.parent / place).exists()] == []


def test_settings_that_are_named_exist() -> None:
    """Those of the table, by their names in the command line's help."""
    from proximo.training.config import ControlConfig, settings_of

    known = set(settings_of(ControlConfig()))
    named = {name for cells in re.findall(r"\|([^|]+)\|$", TEXT, re.M) for name in re.findall(r"`([a-z_]+)`", cells)}
    assert {"clip_epsilon", "gae_lambda", "target_kl"} <= named
    assert named <= known
