"""Where the rewards of a language model's responses come from: functions, and sums of several sources.

A source is called with a whole batch and gives one score per response, or None where there is none. A missing
score is never a zero: the caller masks the response and counts it.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from proximo.collect.child_process import as_parent
from proximo.collect.reward_process import Answer, Function, Signature
from proximo.errors import UserError, in_range

Prompt = str | list[dict[str, str]]
"""Text, or chat messages with role and content."""

START_SECONDS = 120.0
"""How long the process of a reward function may take to start and import what it needs."""

CLOSE_SECONDS = 5.0
"""How long it may take to end before it is killed."""

LONGEST_TIMEOUT = 86_400.0
"""A day, in seconds: no call of a reward function takes longer, and the clocks of threads end somewhere."""

MAX_PROBLEMS = 5
"""How many different problems of one batch are told."""


class Scores(NamedTuple):
    """One score per response, in order."""

    values: list[float | None]
    """Finite numbers, or None for no score; 0.0 is a score like any other."""
    problems: list[str]
    """What went wrong, in short: the first few different ones, each with the index of its response."""

    @staticmethod
    def of(results: Iterable[tuple[float | None, str]]) -> Scores:
        """Put scores together from one (value, problem or "") per response."""
        results = list(results)
        first: dict[str, int] = {}
        for index, (_, problem) in enumerate(results):
            if problem:
                first.setdefault(problem, index)
        problems = [f"response {index}: {problem}" for problem, index in first.items()]
        return Scores([value for value, _ in results], problems[:MAX_PROBLEMS])


class Reward(Protocol):
    """A source of reward."""

    name: str
    """Short and without spaces, where it can be."""

    def __call__(self, prompts: list[Prompt], responses: list[str], columns: dict[str, list[Any]]) -> Scores:
        """Score a batch; `columns` are the other columns of the data, one value per response."""
        ...

    def close(self) -> None:
        """Let go of processes and threads."""
        ...


def check_columns(reward: Reward, columns: Collection[str]) -> None:
    """Ask a reward that needs certain columns of the data, or all parts of a sum, whether these will do.

    Raises:
        UserError: if the data lacks one.
    """
    for part in reward.rewards if isinstance(reward, WeightedReward) else [reward]:
        check = getattr(part, "check_columns", None)
        if check is not None:
            check(columns)


def kind_of_reward(place: str) -> Literal["judge", "model", "function", "code"]:
    """What kind of reward a setting names: a folder that exists is a model, whatever its name.

    Raises:
        UserError: for a Python file without the name of a function in it, and for code without a column.
    """
    if place == "judge":
        return "judge"
    if Path(place).is_dir():
        return "model"
    if place in ("code", "code:"):
        raise UserError("The reward code runs programs with tests. Name the column of the tests, such as code:tests.")
    if place.startswith("code:"):
        return "code"
    if ":" in place:
        return "function"
    if place.endswith(".py") or Path(place).is_file():
        raise UserError(f"The reward {place} is a file. Name the function in it: {place}:score")
    return "model"


class FunctionReward:
    """A function from a file or a module, called in a process of its own.

    So it cannot take the training down, and one that hangs can be killed: its batch then has no scores, and the
    next call starts the process again. What the function prints goes to standard error. When it raises on a batch,
    it is called once for each response, so that only those it cannot score are lost.
    """

    def __init__(self, place: str, *, timeout: float = 60.0) -> None:
        """Start the process and import the function there.

        Args:
            place: `file.py:score` or `package.module:score`, with `score(prompts, responses, **columns)`, plain or
                `async`. It is given the columns that its signature takes.
            timeout: seconds that one call may take, for the whole batch.

        Raises:
            UserError: if there is no such function, it cannot be imported, or has another signature.
        """
        if sys.platform == "win32":
            raise UserError("Reward functions in a file or module need Linux or macOS. Pass the function object here.")
        in_range("timeout", timeout, above=0, at_most=LONGEST_TIMEOUT, usual="60 (seconds)")
        where, _, function = place.rpartition(":")
        self.name = f"{Path(where).stem if where.endswith('.py') else where}.{function}"
        self._place = place
        self._timeout = timeout
        self._folder = Path.cwd()  # a later start must find the same file
        self._process: _Process | None = None
        self._signature = self._start()

    def __call__(self, prompts: list[Prompt], responses: list[str], columns: dict[str, list[Any]]) -> Scores:
        """Score a batch.

        Raises:
            UserError: if the function returns anything but a list with one entry per response, or wants a column
                that the data does not have.
        """
        if self._process is not None and not self._process.alive():
            self.close()
        if self._process is None:
            self._signature = self._start()
        columns = self._signature.select(columns, self._place)
        return _score(self._ask, self._timeout, prompts, responses, columns)

    def check_columns(self, columns: Collection[str]) -> None:
        """Raise UserError if the data lacks a column that the function cannot be called without."""
        self._signature.check(columns, self._place)

    def close(self) -> None:
        """End the process, and whatever it has started."""
        if self._process is not None:
            self._process.end(CLOSE_SECONDS)
            self._process = None

    def _start(self) -> Signature:
        """Start the process; return what the function takes."""
        process = _Process(self._place, self._folder)
        limit = max(START_SECONDS, self._timeout)
        try:
            said = json.loads(process.exchange(b"", time.monotonic() + limit))
            signature = None if "refused" in said else Signature(**said)
        except TimeoutError as error:
            raise UserError(f"{self._place} could not be imported within {limit:g} s.") from error
        except EOFError as error:
            raise UserError(f"{self._place} could not be imported: {process.ending()} meanwhile.") from error
        except (ValueError, TypeError) as error:
            raise UserError(f"{self._place} could not be imported: its process sent {_GARBLED}.") from error
        else:
            if signature is None:
                raise UserError(said["refused"])
            self._process = process
            return signature
        finally:
            if self._process is not process:
                process.end(0.0)

    def _ask(
        self, prompts: list[Prompt], responses: list[str], columns: dict[str, list[Any]], deadline: float
    ) -> Answer:
        process = self._process
        assert process is not None
        request = _as_json(prompts, responses, columns, self._place)
        answered = False
        try:
            answer = Answer(**json.loads(process.exchange(request, deadline)))
            if answer.scores is not None and len(answer.scores) != len(responses):
                raise ValueError(f"{len(answer.scores)} scores for {len(responses)} responses")
            answered = True
        except TimeoutError:
            answer = Answer(lost=f"no answer within {self._timeout:g} s")
        except EOFError:
            answer = Answer(lost=process.ending())
        except (ValueError, TypeError):
            answer = Answer(lost=f"its process sent {_GARBLED}")
        finally:
            if not answered:  # also when interrupted: a late answer must not be taken for that of the next call
                self._process = None
                process.end(0.0)
        return answer


_GARBLED = "something that is no answer (does the function write to file descriptors that it has not opened?)"


class CallableReward:
    """A function object, called in a thread of this process.

    A thread cannot be killed: a function that hangs goes on doing so, and the next call raises.
    """

    def __init__(self, function: Callable[..., Any], *, timeout: float = 60.0) -> None:
        """Take `function(prompts, responses, **columns)`, plain or `async`, and the seconds that a call may take.

        Raises:
            UserError: if it has another signature.
        """
        in_range("timeout", timeout, above=0, at_most=LONGEST_TIMEOUT, usual="60 (seconds)")
        self.name: str = getattr(function, "__name__", type(function).__name__)
        if not callable(function):
            raise UserError(f"A reward must be a function, not a {type(function).__name__}.")
        self._function = Function(function, self.name)
        self._timeout = timeout
        self._thread: threading.Thread | None = None

    def __call__(self, prompts: list[Prompt], responses: list[str], columns: dict[str, list[Any]]) -> Scores:
        """Score a batch.

        Raises:
            UserError: if the function still hangs in an earlier call, returns anything but a list with one entry
                per response, or wants a column that the data does not have.
        """
        if self._thread is not None and self._thread.is_alive():
            raise UserError(
                f"The reward function {self.name} still hangs in an earlier call, after its {self._timeout:g} s. "
                "Mend it, raise its timeout, or name it by its place (my_file.py:score): "
                "then it runs in a process of its own, which can be killed."
            )
        columns = self._function.signature.select(columns, self.name)
        return _score(self._ask, self._timeout, prompts, responses, columns)

    def check_columns(self, columns: Collection[str]) -> None:
        """Raise UserError if the data lacks a column that the function cannot be called without."""
        self._function.signature.check(columns, self.name)

    def close(self) -> None:
        """Close the function's event loop, unless it hangs in it."""
        if self._thread is None or not self._thread.is_alive():
            self._function.close()

    def _ask(
        self, prompts: list[Prompt], responses: list[str], columns: dict[str, list[Any]], deadline: float
    ) -> Answer:
        answers: list[Answer] = []
        self._thread = threading.Thread(
            target=lambda: answers.append(self._function.answer(prompts, responses, columns)), daemon=True
        )
        self._thread.start()
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if answers:
            return answers[0]
        return Answer(lost=f"no answer within {self._timeout:g} s (in this process it cannot be stopped, and goes on)")


class WeightedReward:
    """The weighted sum of several sources; a response that lacks one of the scores has no sum."""

    def __init__(self, rewards: Sequence[Reward], weights: Sequence[float]) -> None:
        """Take the sources and a weight for each; they are closed together with the sum.

        Raises:
            UserError: if there is not one finite weight for each source, or no source at all.
        """
        if not rewards or len(rewards) != len(weights):
            raise UserError(
                f"There are {len(rewards)} rewards and {len(weights)} reward weights; give one weight for each reward."
            )
        for reward, weight in zip(rewards, weights, strict=True):
            in_range(f"the weight of the reward {reward.name}", weight, usual="1.0")
        self.name = "+".join(reward.name for reward in rewards)
        self.parts: list[list[float | None]] = []
        """The scores of each source in the last call, before weighting."""
        self.rewards = list(rewards)
        self._weights = list(weights)

    def __call__(self, prompts: list[Prompt], responses: list[str], columns: dict[str, list[Any]]) -> Scores:
        """Score a batch with every source, one after the other."""
        return self.summed([reward(prompts, responses, columns) for reward in self.rewards])

    def summed(self, scores: Sequence[Scores]) -> Scores:
        """The weighted sum of what the sources have said, in their order."""
        self.parts = [values for values, _ in scores]
        sums: list[float | None] = []
        for row in zip(*self.parts, strict=True):
            known = [value for value in row if value is not None]
            complete = len(known) == len(row)
            sums.append(sum(w * value for w, value in zip(self._weights, known, strict=True)) if complete else None)
        problems = [
            f"{reward.name}: {problem}"
            for reward, score in zip(self.rewards, scores, strict=True)
            for problem in score.problems
        ]
        return Scores(sums, problems)

    def close(self) -> None:
        """Close every source."""
        for reward in self.rewards:
            reward.close()


def _score(
    ask: Callable[[list[Prompt], list[str], dict[str, list[Any]], float], Answer],
    timeout: float,
    prompts: list[Prompt],
    responses: list[str],
    columns: dict[str, list[Any]],
) -> Scores:
    """Ask for a batch and, if the function raises on it, for each response by itself, all within `timeout`."""
    for name, values in [("prompts", prompts), *columns.items()]:
        if len(values) != len(responses):
            raise ValueError(f"{name}: {len(values)} values for {len(responses)} responses")
    if not responses:
        return Scores([], [])
    deadline = time.monotonic() + timeout
    answer = ask(prompts, responses, columns, deadline)
    if not answer.raised or len(responses) == 1:
        return Scores.of(_results(answer, len(responses)))
    results: list[tuple[float | None, str]] = []
    for index in range(len(responses)):
        if not answer.lost:  # once out of time, or without a process, the rest is lost with it
            own = {name: [values[index]] for name, values in columns.items()}
            answer = ask([prompts[index]], [responses[index]], own, deadline)
        results += _results(answer, 1)
    return Scores.of(results)


def _results(answer: Answer, count: int) -> list[tuple[float | None, str]]:
    if answer.refused:
        raise UserError(answer.refused)
    return [(None, answer.raised or answer.lost)] * count if answer.scores is None else answer.scores


def _as_json(prompts: list[Prompt], responses: list[str], columns: dict[str, list[Any]], place: str) -> bytes:
    for name, values in columns.items():
        try:
            json.dumps(values)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"The column {name!r}, which {place} takes, cannot be sent to its process: {error}. "
                "Columns hold text, numbers, true, false, null, and lists and objects of these."
            ) from error
    return json.dumps({"prompts": prompts, "responses": responses, "columns": columns}).encode() + b"\n"


class _Process:
    """The process of a reward function, and the lines to and fro."""

    def __init__(self, place: str, folder: Path) -> None:
        # -P: files in the user's folder must not take the place of the standard library's while we start.
        command = [sys.executable, "-P", "-m", "proximo.collect.reward_process", place, str(as_parent())]
        self._process = subprocess.Popen(
            command,
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=folder,
            start_new_session=True,  # a group of its own, to be killed as a whole
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout
        os.set_blocking(self._input.fileno(), False)

    def alive(self) -> bool:
        """Whether the process has not ended by itself meanwhile."""
        return self._process.poll() is None

    def exchange(self, request: bytes, deadline: float) -> bytes:
        """Send a line and wait for one, until `deadline` by the monotonic clock.

        Raises:
            TimeoutError: if there is none by then.
            EOFError: if the process has ended.
        """
        unsent, received = memoryview(request), bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(self._output, selectors.EVENT_READ)
            if unsent:
                selector.register(self._input, selectors.EVENT_WRITE)
            while not received.endswith(b"\n"):
                # Look before giving up: after a stop (Ctrl-Z) the deadline is past, and the answer may be there.
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise TimeoutError
                for key, _ in ready:
                    if key.fileobj is self._output:
                        piece = os.read(key.fd, 1 << 16)
                        if not piece:
                            raise EOFError
                        received += piece
                        continue
                    try:
                        unsent = unsent[os.write(key.fd, unsent) :]
                    except BrokenPipeError as error:
                        raise EOFError from error
                    if not unsent:
                        selector.unregister(self._input)
        return bytes(received)

    def ending(self) -> str:
        """How the process ended, in words."""
        try:
            code = self._process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            return "its process closed its output"
        if code < 0:
            known = {s.value: s.name for s in signal.Signals}
            return f"its process was ended by {known.get(-code, f'signal {-code}')}"
        return f"its process ended with exit code {code}"

    def end(self, seconds: float) -> None:
        """Give the process `seconds` to end by itself, then kill it, and its whole group in any case."""
        self._input.close()
        with suppress(subprocess.TimeoutExpired):
            if seconds:
                self._process.wait(seconds)
        with suppress(ProcessLookupError, PermissionError):  # nothing is left of the group
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._output.close()
