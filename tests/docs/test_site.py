"""The site: it builds without a warning, needs no network, and its links to the source lead to pages of it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

pytest.importorskip("mkdocs")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_of_the_docs_is_there(site):
    pages = {path.relative_to(ROOT / "docs").with_suffix("").as_posix() for path in (ROOT / "docs").glob("**/*.md")}
    assert pages <= {path.relative_to(site).with_suffix("").as_posix() for path in site.glob("**/*.html")}


def test_every_page_has_its_place_in_the_navigation():
    named = set(re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M))
    assert named == {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").glob("**/*.md")}


def test_nothing_is_fetched_from_elsewhere(site):
    fetched = re.compile(
        r'<(?:script|img|iframe|source|video)[^>]*\bsrc="(?:https?:)?//|<link[^>]*\bhref="(?:https?:)?//'
    )
    found = {path.name for path in site.glob("**/*.html") if fetched.search(path.read_text(encoding="utf-8"))}
    assert not found


def test_links_to_the_source_lead_to_its_pages(site):
    text = (site / "extending.html").read_text(encoding="utf-8")
    assert 'href="source/examples/corridor.py.html"' in text
    listing = (site / "source/examples/corridor.py.html").read_text(encoding="utf-8")
    assert "Corridor" in listing
    assert 'id="__codelineno-0-1"' in listing


class TestHooks:
    def test_formulas_become_mathml(self):
        from docs.site_hooks import on_page_content

        drawn = on_page_content('<p>so <span class="arithmatex">\\(x_1 &lt; 2\\)</span></p>')
        assert "<math" in drawn
        assert "<msub>" in drawn
        assert "arithmatex" not in drawn

    def test_lines_of_the_source_are_anchors_of_its_page(self):
        from types import SimpleNamespace

        from docs.site_hooks import on_page_markdown

        page = SimpleNamespace(file=SimpleNamespace(src_uri="a.md"))
        said = "[x](../pyproject.toml#L12-L14) [y](../nothing.py) [z](b.md)"
        wanted = "[x](source/pyproject.toml.md#__codelineno-0-12) [y](../nothing.py) [z](b.md)"
        assert on_page_markdown(said, page=page) == wanted
