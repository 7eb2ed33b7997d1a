"""Runs the snippets of one page, one after the other, as a reader would: in an empty folder, in one session.

    python run_page.py PAGE.md FOLDER

A process of its own for each page. The first snippet that fails ends it, with the page and the line.
"""

from __future__ import annotations

import importlib
import json
import linecache
import os
import re
import runpy  # noqa: TID251  # scripts that a page runs: they are of this repository
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.docs.pages import Snippet, snippets_of  # noqa: E402
from tests.docs.shorter import PLACEHOLDERS, RUN_PLACEHOLDER, limited, why_not_run  # noqa: E402


class SnippetError(Exception):
    """A snippet does not do what the page says."""


def main(page: Path, folder: Path) -> None:
    """Run all snippets of a page in a folder."""
    snippets = snippets_of(page)
    os.chdir(folder)
    sys.path.insert(0, "")
    shutil.copytree(ROOT / "examples", "examples", ignore=shutil.ignore_patterns("__pycache__"))
    text = "\n".join(snippet.text for snippet in snippets)
    prepare(text)
    shorten_functions()
    names: dict[str, Any] = {"__name__": "__main__"}
    for snippet in snippets:
        if snippet.not_run is None:
            run_snippet(snippet, names)


def run_snippet(snippet: Snippet, names: dict[str, Any]) -> None:
    """Run one block: Python in the names of the page, commands through the command line, settings as settings."""
    if snippet.file_name:
        Path(snippet.file_name).write_text(snippet.text, encoding="utf-8")
    if snippet.language == "python":
        at(snippet, snippet.line, lambda: run_python(snippet, names))
    elif snippet.language == "diff":
        at(snippet, snippet.line, lambda: apply_to_copy(snippet.text))
    elif snippet.language == "toml":
        at(snippet, snippet.line, lambda: check_settings(snippet.text))
    elif snippet.language in ("json", "jsonl"):
        at(snippet, snippet.line, lambda: [json.loads(line) for line in json_values(snippet)])
    for line, words in snippet.commands:
        at(snippet, line, lambda words=words: run_command(words))


def at(snippet: Snippet, line: int, run: Callable[[], Any]) -> None:
    """Run, and say where in the page it failed."""
    began = time.monotonic()
    try:
        run()
    except BaseException as error:
        traceback.print_exc()
        print(f"\n{snippet.page}:{line}: {type(error).__name__}: {error}\n\n{snippet.text}", file=sys.stderr)
        sys.exit(1)
    print(f"{snippet.page}:{line}: {time.monotonic() - began:.1f} s", flush=True)


def run_python(snippet: Snippet, names: dict[str, Any]) -> None:
    if snippet.file_name:
        importlib.invalidate_caches()
        sys.modules.pop(snippet.file_name.removesuffix(".py"), None)
        importlib.import_module(snippet.file_name.removesuffix(".py"))
        return
    place = f"{snippet.page}:{snippet.line}"
    linecache.cache[place] = (len(snippet.text), None, snippet.text.splitlines(True), place)
    exec(compile(snippet.text, place, "exec"), names)  # noqa: S102  # a page of this repository


CHANGED = Path("changed_source")
"""A copy of the source that changes of the page are applied to; commands after them run with it."""


def apply_to_copy(text: str) -> None:
    """Change the copy of the source as a block says."""
    if not CHANGED.exists():
        shutil.copytree(ROOT / "src", CHANGED / "src", ignore=shutil.ignore_patterns("__pycache__"))
    words = ["git", "apply", "--verbose", "-"]
    alone = {"GIT_CEILING_DIRECTORIES": str(Path.cwd().parent), "GIT_DIR": str(CHANGED.absolute() / "none")}
    subprocess.run(words, input=text, text=True, cwd=CHANGED, check=True, env=os.environ | alone)


def json_values(snippet: Snippet) -> list[str]:
    return snippet.text.splitlines() if snippet.language == "jsonl" else [snippet.text]


def check_settings(text: str) -> None:
    """Settings in TOML must be those of a command."""
    import tomllib

    from proximo.errors import UserError
    from proximo.language import config_of
    from proximo.training.config import ControlConfig, with_settings

    settings = tomllib.loads(text)
    refused = []
    readers = [lambda: with_settings(ControlConfig(), settings, where="toml")]
    for stage in ("align", "sft", "reward", "dpo"):
        readers.append(lambda stage=stage: config_of(stage, dict(settings), where="toml"))
    for read in readers:
        try:
            read()
        except UserError as error:
            refused.append(str(error))
        else:
            return
    raise SnippetError("these are settings of no command:\n" + "\n".join(refused))


TRAINING = ("train", "resume", "align", "sft", "reward", "dpo")

MADE: list[Path] = []
"""The runs that commands of the page have made."""

# --- commands -----------------------------------------------------------------------------------------------------


def run_command(words: list[str]) -> None:
    """Run a command, shorter and with real things for placeholders; or look at it, where it is not to be run."""
    told = " ".join(words)
    only_looked_at = why_not_run(told) is not None
    if words[0] in ("python", "python3") and not words[1].startswith("-"):
        script = Path(words[1]) if not only_looked_at else ROOT / words[1]
        if not script.is_file():
            raise SnippetError(f"there is no {words[1]}")
        if not only_looked_at:
            sys.argv = words[1:]
            runpy.run_path(str(script), run_name="__main__")
    elif words[0] == "proximo" and only_looked_at:
        look_at(words[1:])
    elif words[0] == "proximo":
        call([each for word in words[1:] for each in real(word)])
    elif not only_looked_at:
        raise SnippetError(f"tests/docs/shorter.py does not say what to do with {told!r}")


def call(words: list[str]) -> None:
    from proximo import cli

    name = "compare" if words[0] == "evaluate" and "--against" in words else words[0]
    flags = {} if name == "evaluate" and is_help(words) else limited(name, settings_of(words), " ".join(words))
    if name == "align" and "--algorithm" not in words and "--config" not in words:
        flags.pop("responses_per_prompt", None)
    words = [*words, *(word for flag, most in flags.items() for word in (f"--{flag.replace('_', '-')}", str(most)))]
    code: object = 0
    if CHANGED.exists():
        run = [sys.executable, "-m", "proximo", *words]
        code = subprocess.run(
            run, env=os.environ | {"PYTHONPATH": str(CHANGED.absolute() / "src")}, check=False
        ).returncode
    else:
        try:
            cli.main(words)
        except SystemExit as ended:
            code = ended.code or 0
    if code != 0:
        raise SnippetError(f"proximo {' '.join(words)} ended with code {code}")
    if name in TRAINING and not is_help(words):
        MADE.append(newest(Path()))


def is_help(words: list[str]) -> bool:
    return any(word in ("-h", "--help") for word in words)


def look_at(words: list[str]) -> None:
    """Its flags must be flags of the command."""
    from tests.docs.flags import flags_of

    given = {word.partition("=")[0] for word in words if word.startswith("--")}
    unknown = given - flags_of(words[0])
    if unknown:
        raise SnippetError(f"proximo {words[0]} has no {', '.join(sorted(unknown))}")


def settings_of(words: list[str]) -> dict[str, Any]:
    """The flags of a command with their values."""
    pairs = zip(words, [*words[1:], ""], strict=True)
    found = dict(
        word.partition("=")[::2] if "=" in word else (word, value) for word, value in pairs if word[:2] == "--"
    )
    return {name.removeprefix("--").replace("-", "_"): value for name, value in found.items()}


def real(word: str) -> list[str]:
    """What stands for a placeholder; a pattern as a shell would write it out."""
    if (run := RUN_PLACEHOLDER.fullmatch(word)) and run["number"]:
        return [numbered_run(int(run["number"]))]
    if run:
        return [str(MADE[-1] if MADE else newest(Path("runs")))]
    if word.endswith("/..."):
        return [str(newest(Path(word.removesuffix("/..."))))]
    if "*" in word and (found := sorted(map(str, Path().glob(word)))):
        return found
    return [PLACEHOLDERS.get(word, word)]


def numbered_run(number: int) -> str:
    """One of several short runs of the same task, that differ in their seeds."""
    import proximo

    folder = Path("runs", "numbered", str(number))
    if not folder.exists():
        proximo.train("CartPole-v1", total_steps=4096, seed=number, run_dir=folder, quiet=True)
    return str(folder)


def newest(folder: Path) -> Path:
    """The run that was made last in this folder."""
    runs = [path.parent for path in folder.glob("**/config.toml") if "trials" not in path.parts]
    if not runs:
        raise SnippetError(f"no snippet before this one has made a run in {folder}")
    return max(runs, key=lambda path: (path / "config.toml").stat().st_mtime)


# --- what a page takes for granted --------------------------------------------------------------------------------


def prepare(text: str) -> None:
    """Make what a page takes for granted: it is made only where its name occurs."""
    import proximo
    from tests.docs import given

    made = set(re.findall(r"(?:--run-dir[ =]|run_dir=\")runs/([\w-]+)", text))
    for name in sorted(set(re.findall(r"\bruns/([a-z][\w-]*)\b", text)) - made - set(given.LANGUAGE_RUNS)):
        task = "Pendulum-v1" if name in ("pendulum", "expert") else "CartPole-v1"
        proximo.train(task, total_steps=4096, run_dir=f"runs/{name}", quiet=True)
    is_first = re.search(r"^proximo train|proximo\.train\(", text, re.M) is None
    if is_first and re.search(r"runs/CartPole-v1/\.\.\.|\bRUN\b", text):
        proximo.train("CartPole-v1", total_steps=4096, quiet=True)
    if re.search(r"\bMODEL\b|\.jsonl|proximo\.(align|sft|dpo)|proximo (align|sft|dpo|chat)", text):
        given.write_language()
    for name, write in given.LANGUAGE_RUNS.items():
        if re.search(rf"\bruns/{name}\b", text) and name not in made:
            write(Path("runs", name))


def shorten_functions() -> None:
    """The functions of the same names are limited as the commands are; whoever chats says nothing."""
    import proximo
    from proximo import cli_models

    for name in ("train", "tune", "evaluate", "record", "align", "sft", "reward", "dpo"):
        setattr(proximo, name, shortened(name, getattr(proximo, name)))
    cli_models._asked = lambda *_: ""


def shortened(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def shorter(*arguments: Any, **given: Any) -> Any:
        limits = limited(name, given)
        if name == "align" and given.get("algorithm", "ppo") == "ppo":
            limits.pop("responses_per_prompt", None)
        quiet = {} if name in ("evaluate", "record") else {"quiet": True}
        return function(*arguments, **(quiet | given | limits))

    return shorter


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
