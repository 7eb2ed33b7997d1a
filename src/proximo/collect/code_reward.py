"""A reward that runs what a model writes: its program and the row's tests, in the sandbox that the user names.

Proximo runs no program of a model anywhere else, and none at all without that sandbox.
"""

from __future__ import annotations

import os
import secrets
import selectors
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import warnings
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from proximo.collect.child_process import n_cores
from proximo.collect.data import DataNote
from proximo.collect.rewards import CLOSE_SECONDS, LONGEST_TIMEOUT, START_SECONDS, Prompt, Scores
from proximo.errors import UserError, in_range, nearest

MOST_OUTPUT = 2**20
"""Bytes that a program may write to its output, errors counted, before it is stopped."""

EXAMPLE = (
    "bwrap --unshare-all --die-with-parent --new-session --clearenv --ro-bind /usr /usr --symlink usr/bin /bin "
    "--symlink usr/lib /lib --symlink usr/lib64 /lib64 --proc /proc --dev /dev --tmpfs /tmp --ro-bind {folder} "
    "{folder} --chdir {folder} /usr/bin/python3 {file}"
)
"""A sandbox without network that shows the program nothing but /usr and its own folder."""

_GLANCE = 0.05
"""Seconds between two looks at whether a program has ended, where its output does not tell."""

_ENVIRONMENT = ("PATH", "HOME", "USER", "LOGNAME", "LANG", "TMPDIR", "XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS")
"""What the sandbox command is told of our environment, beside LC_*, DOCKER_* and CONTAINER*: no keys of the user's."""


class Ran(NamedTuple):
    """What came of one program."""

    began: bool
    """Whether the sandbox brought the program to its first line."""
    passed: bool
    """Whether it came to its end, behind the tests, and the exit code was 0."""
    ending: str
    """How it ended, in words, with the last line that it wrote."""


class CodeReward:
    """1.0 where the program in a response passes the tests of its row, else 0.0.

    The program is the first fenced block of code of the response, or all of it where there is none. It is written to a
    folder of its own, with the tests behind it, and run by the sandbox command. A program that is stopped, because it
    takes too long or writes too much, has not passed. Where the sandbox did not begin the program there is no score.
    """

    def __init__(self, place: str, sandbox: str, *, timeout: float = 10.0) -> None:
        """Try the sandbox with programs of our own, one that passes its tests and one that does not.

        Args:
            place: `code:COLUMN`, with the column of the data that has the tests: Python text, or a list of such.
            sandbox: a command, split as a shell would and run without one; {file} is the program, {folder} where it is.
            timeout: seconds that one program may take.

        Raises:
            UserError: if there is no sandbox, it cannot be run, or does not tell the two programs apart.
        """
        self.name = place
        self.column = place.partition(":")[2]
        if not self.column:
            raise UserError(f"The reward {place} names no column with tests. Write code:tests for the column tests.")
        in_range("sandbox_timeout", timeout, above=0, at_most=LONGEST_TIMEOUT, usual="10 (seconds)")
        self._command = _split(place, sandbox)
        self._timeout = timeout
        self._stopped = threading.Event()
        self._try_out(sandbox)

    def __call__(self, prompts: list[Prompt], responses: list[str], columns: dict[str, list[Any]]) -> Scores:
        """Score a batch, as many programs at a time as there are cores.

        Raises:
            UserError: if the data has no such column.
        """
        del prompts
        if not responses:
            return Scores([], [])
        self.check_columns(columns)
        tests = columns[self.column]
        pool = ThreadPoolExecutor(n_cores())
        try:
            return Scores.of(pool.map(self._score, responses, tests))
        except BaseException:  # interrupted: what is running ends now
            self._stopped.set()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            self._stopped.clear()

    def check_columns(self, columns: Collection[str]) -> None:
        """Raise UserError if the data has no column with the tests."""
        if self.column not in columns:
            close = nearest(self.column, columns)
            hint = f" Did you mean code:{close[0]}?" if close else ""
            raise UserError(
                f"The reward {self.name} needs the column {self.column!r} with tests, but the data has no such column "
                f"(it has: {', '.join(columns) or 'none besides the prompts'}).{hint}"
            )

    def close(self) -> None:
        """Nothing stays open between two calls."""

    def _score(self, response: str, tests: Any) -> tuple[float | None, str]:
        """The score of one response, or None and in a few words why there is none."""
        lines = tests if isinstance(tests, list) else [tests]
        if not lines or not all(isinstance(line, str) and line.strip() for line in lines):
            return None, f"the column {self.column} has no tests (wanted is text, or a list of texts)"
        ran = self._run(program_in(response), "\n".join(lines), self._timeout)
        if not ran.began:
            return None, f"the sandbox did not begin the program, or the tests are no Python: {ran.ending}"
        return float(ran.passed), ""

    def _run(self, answer: str, tests: str, timeout: float) -> Ran:
        """Run one program in a folder of its own, which is gone afterwards, as is all that the program has started."""
        token = secrets.token_hex(16)
        try:
            with _own_folder() as folder:
                file = folder / "program.py"
                file.write_text(_program(answer, tests, token))
                words = [word.replace("{file}", str(file)).replace("{folder}", str(folder)) for word in self._command]
                output, ending, code = _run_command(words, folder, timeout, self._stopped)
        except OSError as error:  # no room for the folder, no process to be had
            return Ran(False, False, f"{type(error).__name__}: {error}")
        text = output.decode(errors="replace")
        began, ended = _mark("begin", token) in text, _mark("end", token) in text
        said = text.replace(_mark("begin", token), "").replace(_mark("end", token), "").strip()
        last = f" ({said.splitlines()[-1][:200]})" if said else ""
        return Ran(began, began and ended and code == 0, ending + last)

    def _try_out(self, sandbox: str) -> None:
        """Find a sandbox that does not work, or passes everything, before a model is trained by it."""
        limit = max(START_SECONDS, self._timeout)  # a container may have to be fetched
        with _own_folder() as outside:
            leaves = outside / "left_by_the_trial"
            leaving = f"try:\n    open({str(leaves)!r}, 'w')\nexcept OSError:\n    pass"
            good = self._run(f"def double(x):\n    return 2 * x\n{leaving}", "assert double(2) == 4", limit)
            is_open = leaves.exists()
        if not good.passed:
            raise UserError(
                f"The sandbox does not work: of a trial program that passes its tests, this came: {good.ending}. "
                f"The command is: {sandbox}\nIt must run the Python program {{file}} (in {{folder}}), and hand on its "
                "output and its exit code."
            )
        bad = self._run("def double(x):\n    return x", "assert double(2) == 4", limit)
        if not bad.began or bad.passed:
            raise UserError(
                f"The sandbox does not work: of a trial program that fails its tests, this came: {bad.ending}. It must "
                f"hand on an exit code other than 0, and Python must not leave out asserts. The command is: {sandbox}"
            )
        if is_open:
            note = f"the sandbox command lets programs write files outside of their own folder: {sandbox}"
            warnings.warn(DataNote(note), stacklevel=4)


def program_in(response: str) -> str:
    """The first fenced block of code of a response, to its end where the fence is not closed; else all of it."""
    lines = response.split("\n")
    opening = next((number for number, line in enumerate(lines) if line.lstrip().startswith("```")), None)
    if opening is None:
        return response
    fence = lines[opening].lstrip()
    size = len(fence) - len(fence.lstrip("`"))
    inside = lines[opening + 1 :]
    words = (line.strip() for line in inside)
    closes = (number for number, word in enumerate(words) if len(word) >= size and not word.strip("`"))
    return textwrap.dedent("\n".join(inside[: next(closes, len(inside))]))


def _program(answer: str, tests: str, token: str) -> str:
    """A Python file that says when it begins, runs the answer and then the tests, and says when both are done.

    Neither can be taken for the other, and an answer that ends the program by itself has not passed, nor one that
    prints the file, where the marks are written backwards. Tests that are no Python are found out before the answer
    runs.
    """
    return (
        "import os as _os\n"
        f"_tests = compile({tests!a}, 'tests', 'exec')\n"
        f"_os.write(1, b'{_mark('begin', token)[::-1]}'[::-1])\n"
        f"exec(compile({answer!a}, 'answer', 'exec'))\n"
        "exec(_tests)\n"
        f"_os.write(1, b'{_mark('end', token)[::-1]}'[::-1])\n"
    )


def _mark(what: str, token: str) -> str:
    """What a program says of itself, in words that nothing else can write by chance."""
    return f"<{what} {token}>"


def _split(place: str, sandbox: str) -> list[str]:
    """The words of a sandbox command, the first one as a whole path."""
    if sys.platform == "win32":
        raise UserError(f"The reward {place} needs Linux or macOS.")
    if not sandbox.strip():
        raise UserError(
            f"The reward {place} runs programs that the model writes, and such a program can do whatever you can do: "
            "delete files, read keys, use the network. Say with --sandbox in which command to run them, such as:\n"
            f'--sandbox "{EXAMPLE}"\ndocs/language.md has others.'
        )
    try:
        words = shlex.split(sandbox)
    except ValueError as error:
        raise UserError(f"The sandbox command cannot be split into words ({error}): {sandbox}") from error
    if "{file}" not in sandbox and "{folder}" not in sandbox:
        raise UserError(
            f"The sandbox command has neither {{file}} nor {{folder}} in it, so that it could not find the program "
            f"(which is {{folder}}/program.py): {sandbox}\nAn example is: {EXAMPLE}"
        )
    found = shutil.which(words[0])
    if found is None:
        raise UserError(
            f"The sandbox command begins with {words[0]!r}, and there is no such program here. Install it, or name it "
            "by its whole path."
        )
    return [str(Path(found).absolute()), *words[1:]]


def _run_command(
    words: list[str], folder: Path, timeout: float, stopped: threading.Event
) -> tuple[bytes, str, int | None]:
    """Run a command until it ends or, after `timeout` seconds, is stopped; then kill what is left of its process group.

    Returns:
        What it has written (a little more than `MOST_OUTPUT` at most), how it ended in words, and its exit code, which
        is None where it was stopped.
    """
    process = subprocess.Popen(
        words,
        bufsize=0,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=folder,
        env=_environment(os.environ),
        start_new_session=True,  # a group of its own, to be killed as a whole
    )
    output = bytearray()
    try:
        ending = _watch(process, output, timeout, stopped)
        code = None if ending else process.returncode
    finally:
        with suppress(ProcessLookupError, PermissionError):  # nothing is left of the group, or it is not ours
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            process.wait(CLOSE_SECONDS)
        if process.stdout is not None:
            process.stdout.close()
    return bytes(output), ending or f"exit code {code}", code


def _watch(process: subprocess.Popen[bytes], output: bytearray, timeout: float, stopped: threading.Event) -> str:
    """Read what a process writes until it has ended; why it must be stopped, in words, or "" where it has ended.

    What it has started may keep the output open for longer: nobody waits for that.
    """
    assert process.stdout is not None
    descriptor, is_open = process.stdout.fileno(), True
    deadline = time.monotonic() + timeout
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while True:
            if not is_open:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_GLANCE)
            has_ended = process.poll() is not None  # before the look: what it wrote is there by now
            ready = is_open and bool(selector.select(0.0 if has_ended else _GLANCE))
            if ready:
                piece = os.read(descriptor, 1 << 16)
                output += piece
                is_open = bool(piece)
            elif has_ended:
                return ""
            if len(output) > MOST_OUTPUT:
                return f"stopped after more than {MOST_OUTPUT:,} bytes of output"
            if stopped.is_set():
                return "stopped with the run"
            if not has_ended and time.monotonic() >= deadline:
                return f"stopped after {timeout:g} s"


def _environment(whole: Mapping[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in whole.items() if name.startswith(("LC_", "DOCKER_", "CONTAINER"))}
    kept |= {name: whole[name] for name in _ENVIRONMENT if name in whole}
    return kept | {"PYTHONHASHSEED": "0"}  # the same program goes the same way


@contextmanager
def _own_folder() -> Iterator[Path]:
    """A fresh temporary folder, which is taken away with whatever a program has left in it."""
    folder = Path(tempfile.mkdtemp(prefix="proximo-code-")).resolve()
    try:
        yield folder
    finally:
        with suppress(OSError, RecursionError):
            shutil.rmtree(folder, ignore_errors=True)
        if folder.exists():  # a thousand folders, each in the one before, which Python cannot take away
            with suppress(OSError, subprocess.TimeoutExpired):
                subprocess.run(["rm", "-rf", str(folder)], capture_output=True, timeout=START_SECONDS)
