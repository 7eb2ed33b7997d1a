"""The child's side of a reward function: import it, call it, and send its scores back as lines of JSON.

`python -m proximo.collect.reward_process PLACE PARENT` serves `FunctionReward` (in `rewards.py`) until its standard
input ends. Nothing here imports torch, so the process is up in a moment and small.
"""

from __future__ import annotations

import asyncio
import atexit
import faulthandler
import importlib
import importlib.util
import inspect
import json
import math
import os
import pkgutil
import queue
import signal
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from proximo.collect.child_process import end_with, kill_group
from proximo.errors import UserError, in_words, nearest

WANTED = "def score(prompts, responses, **columns) -> list of one float (or None) per response"
"""What a reward function looks like, for messages."""

_LONGEST_MESSAGE = 300
_ORPHAN_SECONDS = 2.0
"""How long the process may go on without the main one; less than `end_with` leaves it."""


class Answer(NamedTuple):
    """What came of one call of a reward function; exactly one field is set."""

    scores: list[tuple[float | None, str]] | None = None
    """Per response the score, or None and in a few words why there is none."""
    raised: str = ""
    """The exception, in words."""
    refused: str = ""
    """What the user must mend, in words: no later call can go well."""
    lost: str = ""
    """Why no answer came (out of time, or the process ended), in words."""


class Signature(NamedTuple):
    """Which columns of the data a reward function takes."""

    named: list[str]
    required: list[str]
    others: bool
    """Whether it takes all other columns too (`**columns`)."""
    occupied: list[str]
    """Its names for the prompts and the responses: columns of these names cannot be given."""

    @staticmethod
    def of(function: Callable[..., Any], place: str) -> Signature:
        """Read the signature.

        Raises:
            UserError: if the function cannot be called with the prompts, the responses, and columns by name.
        """
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):  # some functions written in C do not tell
            return Signature([], [], False, [])
        parameters = list(signature.parameters.values())
        positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][:2]
        by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        named = [p for p in parameters if p.kind in by_name and p not in positional]
        required = [p.name for p in named if p.default is p.empty]
        try:
            signature.bind([], [], **dict.fromkeys(required))
        except TypeError as error:
            raise UserError(
                f"{place} has the signature {signature}, which does not take the prompts and the responses as its "
                f"first two arguments and columns by name ({error}). Wanted is: {WANTED}."
            ) from error
        return Signature(
            [p.name for p in named],
            required,
            any(p.kind is p.VAR_KEYWORD for p in parameters),
            [p.name for p in positional if p.kind is p.POSITIONAL_OR_KEYWORD],
        )

    def check(self, columns: Collection[str], place: str) -> None:
        """Look for the columns that the function cannot be called without.

        Raises:
            UserError: if the data lacks one, with the nearest names.
        """
        for name in self.required:
            if name not in columns:
                close = nearest(name, columns)
                hint = f" Did you mean {' or '.join(close)}?" if close else ""
                raise UserError(
                    f"{place} takes {name!r}, but the data has no such column"
                    f" (it has: {', '.join(columns) or 'none besides the prompts'}).{hint}"
                    " Rename the parameter or the column, or give the parameter a default."
                )

    def select(self, columns: dict[str, list[Any]], place: str) -> dict[str, list[Any]]:
        """The columns that the function takes. Raises as `check` does."""
        self.check(columns, place)
        taken = {name for name in columns if name in self.named or (self.others and name not in self.occupied)}
        return {name: values for name, values in columns.items() if name in taken}


class Function:
    """A user's reward function, plain or `async`, with everything that can go wrong turned into a value."""

    def __init__(self, function: Callable[..., Any], place: str) -> None:
        """Take a function; `place` is what messages call it.

        Raises:
            UserError: if its signature is not that of a reward function.
        """
        self.signature = Signature.of(function, place)
        self._function = function
        self._place = place
        # One event loop for all calls: clients that the function keeps from call to call belong to a loop.
        self._runner = asyncio.Runner()

    def answer(self, prompts: list[Any], responses: list[str], columns: dict[str, list[Any]]) -> Answer:
        """Call the function with lists of its own, which it may change."""
        own = {name: list(values) for name, values in columns.items()}
        try:
            values = self._function(list(prompts), list(responses), **own)
            if inspect.isawaitable(values):
                values = self._runner.run(_finished(values))
        except BaseException as error:  # SystemExit and asyncio's CancelledError are no reason to end either
            return Answer(raised=describe(error))
        if not isinstance(values, list):
            hint = " (.tolist() makes a list of it)" if hasattr(values, "tolist") else ""
            got = "None" if values is None else f"a value of type {type(values).__name__}{hint}"
        elif len(values) != len(responses):
            got = f"a list of length {len(values)} for {len(responses)} response{'s' * (len(responses) != 1)}"
        else:
            return Answer(scores=[number(value) for value in values])
        return Answer(refused=f"{self._place} returned {got}. Wanted is: {WANTED}.")

    def close(self) -> None:
        """Close the event loop."""
        self._runner.close()


async def _finished(value: Awaitable[Any]) -> Any:
    return await value


def number(value: Any) -> tuple[float | None, str]:
    """What a function has returned for one response as a score, or None and in a few words why not."""
    if value is None:
        return None, "the function returned None"
    if isinstance(value, (str, bytes, bytearray)):  # float("1") would do, but is surely not what was meant
        return None, f"the function returned {str(value)[:40]!r}, which is not a number"
    try:
        score = float(value)
    except Exception:
        return None, f"the function returned a value of type {type(value).__name__}, which is not a number"
    return (score, "") if math.isfinite(score) else (None, f"the function returned {score}")


def describe(error: BaseException) -> str:
    """The type and message of an exception, and the last line of the user's own code that led to it."""
    text = " ".join(in_words(error).split())
    text = text if len(text) <= _LONGEST_MESSAGE else text[:_LONGEST_MESSAGE] + "…"
    library = tuple(f"{sysconfig.get_path(name)}{os.sep}" for name in ("stdlib", "purelib", "platlib"))
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f.filename != __file__ and not f.filename.startswith((*library, "<frozen"))]
    if not own:
        return text
    return f"{text} ({Path(own[-1].filename).name}, line {own[-1].lineno}: {own[-1].line})"


def load(place: str) -> Callable[..., Any]:
    """Import the function that `file.py:score` or `package.module:score` names.

    Raises:
        UserError: if there is no such file, module or function, with the nearest names, or if it cannot be imported.
    """
    where, _, name = place.rpartition(":")
    if not where or not name:
        raise UserError(f"{place!r} names no reward function: write my_file.py:score or package.module:score.")
    module = _import_file(Path(where)) if where.endswith(".py") else _import_module(where)
    found = getattr(module, name, None)
    if callable(found):
        return found
    if found is not None:
        raise UserError(f"{place}: {name} is a {type(found).__name__}, not a function.")
    known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    raise UserError(f"{where} has no function named {name!r}.{_did_you_mean(nearest(name, known))}")


def _import_file(path: Path) -> Any:
    path = path.expanduser().resolve()
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise UserError(f"There is no file {path}.{_did_you_mean(nearest(path.name, siblings))}")
    name = f"_proximo_reward_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.append(str(path.parent))  # for good, as for a script: it may import its neighbours later
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"{path} could not be imported: {describe(error)}.") from error
    return module


def _import_module(name: str) -> Any:
    here = str(Path.cwd())
    sys.path.insert(0, here)  # first, as for `python -m`
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        close: list[str] = []
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            package, _, last = str(error.name).rpartition(".")
            places = getattr(sys.modules.get(package), "__path__", []) if package else [here]
            close = nearest(last, (found.name for found in pkgutil.iter_modules(places)))
        raise UserError(
            f"The module {name!r} could not be imported: {describe(error)}.{_did_you_mean(close)} "
            "It must be installed, or lie in the folder where the command is run."
        ) from error
    finally:
        sys.path.remove(here)
        sys.path.append(here)  # still to be found, but not in front of the standard library


def _did_you_mean(names: list[str]) -> str:
    return f" Did you mean {' or '.join(names)}?" if names else ""


# ------------------------------------------------------------------------------------------------- the process


def main(place: str, parent: int) -> None:
    """Say what the function takes, then answer requests until there are no more; `parent` is as in `end_with`."""
    end_with(parent)
    # As in an environment's worker: a scheduler's signals reach every process of a job, and a checkpoint is then
    # still to be made. What the function starts has the usual handlers again, or its pools could not be ended.
    usual = {s: signal.signal(s, lambda *_: None) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    os.register_at_fork(after_in_child=lambda: [signal.signal(s, handler) for s, handler in usual.items()])
    faulthandler.enable()
    incoming, outgoing = _take_pipes()
    own = os.getpid()

    def end_group() -> None:
        """End whatever the function has started, also where nobody is left to do that."""
        if os.getpid() == own:
            with suppress(OSError, ValueError):
                sys.stdout.flush()
            kill_group(own)

    atexit.register(end_group)  # the first to be registered is the last to be called

    def say(value: Answer | Signature) -> None:
        if os.getpid() != own:  # a fork that the function let come back here: only one of the two may answer
            os._exit(0)
        _send(outgoing, value)

    requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(incoming, requests), daemon=True).start()
    try:
        function = Function(load(place), place)
    except UserError as error:
        say(Answer(refused=str(error)))
        return
    say(function.signature)
    while (request := requests.get()) is not None:
        say(function.answer(**json.loads(request)))
    function.close()


def _take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Keep standard input and output to ourselves: what the function prints goes to standard error."""
    incoming, outgoing = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    return incoming, outgoing


def _receive(incoming: BinaryIO, requests: queue.SimpleQueue[bytes | None]) -> None:
    """Pass requests on; when the main process is gone, leave, and if the function hangs, leave all the same."""
    for line in incoming:
        requests.put(line)
    requests.put(None)
    time.sleep(_ORPHAN_SECONDS)
    kill_group(os.getpid())  # with whatever the function has started
    os._exit(1)


def _send(outgoing: BinaryIO, value: Answer | Signature) -> None:
    with suppress(BrokenPipeError):  # the main process is gone, and the end of our input says so next
        outgoing.write(json.dumps(value._asdict()).encode() + b"\n")
        outgoing.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
