"""What the site does beyond mkdocs: links to the source lead to pages of it, and formulas are MathML."""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path
from typing import Any

import latex2mathml.converter
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]

_OUTSIDE = re.compile(r"\]\((?P<path>(?:\.\./)+[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
_FORMULA = re.compile(r'<(?P<tag>span|div) class="arithmatex">(?P<text>.*?)</(?P=tag)>', re.S)
_LANGUAGES = {".py": "python", ".toml": "toml", ".md": "markdown", ".json": "json", ".sh": "bash"}


def on_files(files: Any, config: Any) -> Any:
    """Add a page for every file outside docs/ that a page links to."""
    for page in files.documentation_pages():
        for match in _OUTSIDE.finditer(page.content_string):
            place = _place(page.src_uri, match["path"])
            if (ROOT / place).is_file() and _shown_at(place) not in files.src_uris:
                files.append(File.generated(config, _shown_at(place), content=_listing(place)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links to files outside docs/ to their pages; `#L12` is line 12, as on GitHub."""

    def led(match: re.Match[str]) -> str:
        place = _place(page.file.src_uri, match["path"])
        if not (ROOT / place).is_file():
            return match[0]
        to = posixpath.relpath(_shown_at(place), posixpath.dirname(page.file.src_uri) or ".")
        line = re.fullmatch(r"#L(\d+)(-L\d+)?", match["anchor"] or "")
        return f"]({to}{f'#__codelineno-0-{line[1]}' if line else ''})"

    return markdown if page.file.src_uri.startswith("source/") else _OUTSIDE.sub(led, markdown)


def on_page_content(html_text: str, **_: Any) -> str:
    """Make MathML of formulas: browsers draw it without a script, and without a network."""

    def drawn(match: re.Match[str]) -> str:
        text = html.unescape(match["text"]).strip()
        display = "block" if match["tag"] == "div" else "inline"
        return latex2mathml.converter.convert(text.removeprefix("\\(").removeprefix("\\[")[:-2], display=display)

    return _FORMULA.sub(drawn, html_text)


def _place(page: str, link: str) -> str:
    return posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))


def _shown_at(place: str) -> str:
    return f"source/{place}.md"


def _listing(place: str) -> str:
    text = (ROOT / place).read_text(encoding="utf-8")
    fence = "`" * (3 + max(map(len, re.findall(r"`{3,}", text)), default=0))
    language = _LANGUAGES.get(Path(place).suffix, "text")
    return f'---\nsearch:\n  exclude: true\n---\n\n# {place}\n\n{fence}{language} linenums="1"\n{text}\n{fence}\n'
