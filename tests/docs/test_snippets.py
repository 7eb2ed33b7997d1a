"""Every snippet and command of the README and of the pages under docs/ is run, in the order of its page.

shorter.py says what is done otherwise than a reader would: fewer steps, real things for placeholders, and which
commands are only looked at. A block under `<!-- not run: REASON -->` is left out.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, SHELL, Snippet, page_name, snippets_in, snippets_of
from tests.docs.shorter import limited, why_not_run

RUNNER = Path(__file__).with_name("run_page.py")

KNOWN_LANGUAGES = {*SHELL, "python", "toml", "json", "jsonl", "text", "yaml", "jinja", "diff"}


def has_something_to_run(page: Path) -> bool:
    return any(
        snippet.not_run is None and (snippet.language in ("python", "toml", "json", "jsonl") or snippet.commands)
        for snippet in snippets_of(page)
    )


RUNNABLE = {page_name(page): page for page in PAGES if has_something_to_run(page)}


def run_page(page: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    folder.mkdir()
    words = [sys.executable, "-W", "ignore", str(RUNNER), str(page), str(folder)]
    alone = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1", "SDL_VIDEODRIVER": "dummy"}
    quiet = subprocess.DEVNULL
    return subprocess.run(words, capture_output=True, text=True, timeout=600, env=os.environ | alone, stdin=quiet)


@pytest.fixture(scope="module")
def pages_run(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """All pages that are asked for, two at a time, while the tests wait for them one after the other."""
    asked = [item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")]
    root = tmp_path_factory.mktemp("pages")
    with ThreadPoolExecutor(2) as pool:
        yield {
            name: pool.submit(run_page, RUNNABLE[name], root / name.replace("/", "-"))
            for name in dict.fromkeys(asked)
            if name in RUNNABLE
        }
        pool.shutdown(cancel_futures=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", RUNNABLE)
def test_snippets_of(name: str, pages_run: dict[str, Future[subprocess.CompletedProcess[str]]]):
    done = pages_run[name].result()
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def test_what_is_not_run_has_a_reason_and_is_little(capsys: pytest.CaptureFixture[str]):
    snippets = [snippet for page in PAGES for snippet in snippets_of(page)]
    marked = [snippet for snippet in snippets if snippet.not_run is not None]
    looked_at = [
        (snippet, line, command, reason)
        for snippet in snippets
        if snippet.not_run is None
        for line, words in snippet.commands
        if (reason := why_not_run(command := " ".join(words)))
    ]
    commands = sum(len(snippet.commands) for snippet in snippets)
    with capsys.disabled():
        print(f"\n{len(snippets)} snippets with {commands} commands; not run: {len(marked)} snippets")
        print("\n".join(f"  {snippet.page}:{snippet.line}  {snippet.not_run}" for snippet in marked))
        print(f"only looked at: {len(looked_at)} commands")
        print(
            "\n".join(f"  {snippet.page}:{line}  {command}  ({reason})" for snippet, line, command, reason in looked_at)
        )
    assert all(snippet.not_run for snippet in marked)
    assert len(marked) <= 8, "mend some of them instead"
    assert 3 * len(looked_at) <= commands, "run some of them instead"


def test_blocks_are_of_languages_that_are_known():
    unknown = [
        f"{snippet.page}:{snippet.line} {snippet.language}"
        for page in PAGES
        for snippet in snippets_of(page)
        if snippet.language not in KNOWN_LANGUAGES
    ]
    assert not unknown


class TestReading:
    """The reader of pages, on pages whose snippets are known."""

    def snippet(self, text: str) -> Snippet:
        (found,) = snippets_in(text, "page.md")
        return found

    def test_a_block_knows_its_line_language_and_text(self):
        found = self.snippet("# Title\n\n```python\nx = 1\n```\n")
        assert (found.line, found.language, found.text, found.not_run) == (4, "python", "x = 1\n", None)

    def test_an_indented_block_loses_its_indent(self):
        assert self.snippet("- point\n\n  ```python\n  if x:\n      y = 1\n  ```\n").text == "if x:\n    y = 1\n"

    def test_a_mark_counts_only_right_above_a_block(self):
        assert self.snippet("<!-- not run: needs a GPU -->\n```\nproximo doctor\n```\n").not_run == "needs a GPU"
        assert self.snippet("<!-- not run: needs a GPU -->\nwords\n```\nproximo doctor\n```\n").not_run is None

    def test_commands_are_told_from_output_and_comments(self):
        text = "$ proximo doctor   # looks\npip install -e . && proximo train A \\\n    --seed 1\n30 trials: done\n"
        assert self.snippet(f"```\n{text}```\n").commands == [
            (2, ["proximo", "doctor"]),
            (3, ["pip", "install", "-e", "."]),
            (3, ["proximo", "train", "A", "--seed", "1"]),
        ]

    def test_a_block_may_be_a_file(self):
        assert self.snippet("```python\n# my_env.py\nx = 1\n```\n").file_name == "my_env.py"
        assert self.snippet("```python\nx = 1  # my_env.py\n```\n").file_name is None

    def test_a_failing_snippet_fails_its_page_and_names_the_line(self, tmp_path: Path):
        page = tmp_path / "page.md"
        page.write_text("words\n\n```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n")
        folder = tmp_path / "folder"
        folder.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", RUN_ANYWHERE, str(page), str(folder)], capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 1
        assert "page.md:8: AssertionError" in done.stderr

    @pytest.mark.parametrize(
        ("given", "added"),
        [({}, {"total_steps": 4096}), ({"total_steps": "20000"}, {"total_steps": 4096}), ({"total_steps": 512}, {})],
    )
    def test_limits_are_set_where_a_page_asks_for_more(self, given, added):
        assert limited("train", given) == added


RUN_ANYWHERE = """
import sys
from pathlib import Path
from tests.docs import pages, run_page
pages.page_name = lambda path: path.name
run_page.main(Path(sys.argv[1]), Path(sys.argv[2]))
"""
