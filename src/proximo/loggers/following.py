"""Reading a run's metrics.jsonl while it grows, and handing its rows on: to TensorBoard's files, W&B and Trackio.

The loop knows nothing of this. Event files are written by the run's own process, at most once a second; W&B and
Trackio, which may wait for a network, ask for a password or end in an exception, each have a process of their own
(`service.py`). Whatever goes wrong with one of them is told in one line, and the run goes on.
"""

from __future__ import annotations

import importlib.util
import json
import queue
import shlex
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from proximo.errors import UserError, in_words
from proximo.loggers.events import EventFile
from proximo.runs import files
from proximo.runs.directory import RunDirectory

LOOK_EVERY = 1.0
"""Seconds between two looks at metrics.jsonl."""

WAIT_AT_END = 60.0
"""Seconds that a service gets to send what is left when the run is over."""

SERVICES = {"wandb": "Weights & Biases", "trackio": "Trackio"}

Say = Callable[[str], object]


@dataclass(frozen=True)
class Loggers:
    """Where metrics go besides metrics.jsonl."""

    tensorboard: bool = False
    """Also write event files for TensorBoard, into the folder tensorboard/ of the run."""
    wandb: bool = False
    """Also send the metrics to Weights & Biases (extra: wandb); WANDB_MODE=offline keeps them on this machine."""
    trackio: bool = False
    """Also give the metrics to Trackio (extra: trackio), which keeps them on this machine."""


NO_LOGGERS = Loggers()


def taken_from(settings: dict[str, Any], *, where: str) -> Loggers:
    """Take the loggers out of flat settings.

    Raises:
        UserError: if one is neither True nor False.
    """
    chosen = {name: settings.pop(name) for name in asdict(NO_LOGGERS) if name in settings}
    for name, value in chosen.items():
        if not isinstance(value, bool):
            raise UserError(f"{where}: {name} is {value!r}; it must be True or False.")
    return Loggers(**chosen)


def refuse_missing(loggers: Loggers) -> None:
    """Refuse a service whose package is not installed.

    Raises:
        UserError: with the command that installs it.
    """
    for name, called in SERVICES.items():
        if getattr(loggers, name) and not _is_installed(name):
            raise UserError(
                f"--{name} sends the metrics to {called}, which needs the package {name}, and that is not installed. "
                f'Install it with: pip install -c constraints.txt -e ".[{name}]"'
            )


def _is_installed(name: str) -> bool:
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None  # a folder wandb/ that wandb has left here is no package


def loggers_of(run: RunDirectory) -> Loggers:
    """What a run that goes on was begun with."""
    services = {name: _memory(run, name).is_file() for name in SERVICES}
    return Loggers(tensorboard=run.tensorboard.is_dir(), **services)


def step_of(row: dict[str, Any]) -> int:
    """The step of a row: environment steps, or iterations where there are none."""
    step = row.get("env_steps", row.get("iteration"))
    return step if isinstance(step, int) else 0


class MetricsReader:
    """Gives the rows of a metrics file that have come since the last look."""

    def __init__(self, path: Path, position: int = 0) -> None:
        """Begin `position` bytes into the file."""
        self.path, self.position = path, position

    def new_rows(self) -> list[dict[str, Any]]:
        """The rows that are whole by now.

        Raises:
            OSError: if the file cannot be read.
        """
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self.position)
            lines = file.read().split(b"\n")[:-1]  # after the last newline: a row that is being written
        self.position += sum(len(line) + 1 for line in lines)
        rows = [json.loads(line) for line in lines if line.strip()]
        return [row for row in rows if isinstance(row, dict)]


@contextmanager
def following(run: RunDirectory, loggers: Loggers, say: Say, *, resumed: bool) -> Iterator[Callable[[], None]]:
    """Hand rows on while the run goes on; what is yielded is to be called now and then, and costs next to nothing.

    To be entered when metrics.jsonl holds the rows that count, no others: none yet, or cut back to the checkpoint.
    """
    sinks: list[Sink] = []
    if loggers.tensorboard:
        sinks += _tried(say, "TensorBoard", lambda: Board(run, say, resumed=resumed))
    for name, called in SERVICES.items():
        if getattr(loggers, name):
            sinks += _tried(say, called, lambda name=name: Service(run, name, say))
    last = time.monotonic()

    def follow() -> None:
        nonlocal last
        if sinks and time.monotonic() - last >= LOOK_EVERY:
            last = time.monotonic()
            for sink in list(sinks):
                if not sink.look():
                    sinks.remove(sink)

    try:
        yield follow
    finally:
        for sink in sinks:
            sink.close()


class Sink(Protocol):
    """What takes rows."""

    def look(self) -> bool:
        """Take what is new; whether it goes on doing so."""
        ...

    def close(self) -> None:
        """Take what is left, and end."""
        ...


def _tried(say: Say, called: str, make: Callable[[], Sink]) -> list[Sink]:
    try:
        return [make()]
    except Exception as error:
        say(_off(called, error))
        return []


def _off(called: str, error: object) -> str:
    words = in_words(error) if isinstance(error, BaseException) else str(error)
    return f"note: {called} gets nothing more: {words}. The run goes on, and metrics.jsonl has everything."


class Board:
    """TensorBoard's event file of this session."""

    def __init__(self, run: RunDirectory, say: Say, *, resumed: bool) -> None:
        """Begin one; of a resumed run, after the rows that are there."""
        reader = MetricsReader(run.metrics_path)
        before = reader.new_rows() if resumed else []
        self._reader, self._say = MetricsReader(run.metrics_path, reader.position if resumed else 0), say
        self._file = EventFile(run.tensorboard, from_step=step_of(before[-1]) + 1 if before else 1 if resumed else 0)
        say(f"TensorBoard: tensorboard --logdir {shlex.quote(str(run.tensorboard))}")

    def look(self) -> bool:
        """Write what is new."""
        try:
            write_events(self._file, self._reader)
            return True
        except Exception as error:  # a full disk, say
            self._say(_off("TensorBoard", error))
            return False

    def close(self) -> None:
        """Write what is left."""
        self.look()


def write_events(file: EventFile, reader: MetricsReader) -> None:
    """Write the rows that are new as events; the newest one is as old as the file, the others by their own clocks."""
    rows = reader.new_rows()
    if rows:
        newest, written = rows[-1].get("seconds") or 0.0, reader.path.stat().st_mtime
        file.add([(written - newest + (row.get("seconds") or 0.0), step_of(row), row) for row in rows])


def export_events(run: RunDirectory, folder: Path) -> Path:
    """Write all rows of a run into one event file in `folder`; return the file.

    Raises:
        UserError: if the disk refuses.
    """
    try:
        file = EventFile(folder)
        write_events(file, MetricsReader(run.metrics_path))
    except OSError as error:
        raise UserError(
            f"The events for TensorBoard could not be written to {folder}: {files.reason(error)}. Name another folder."
        ) from error
    return file.path


class Service:
    """The process that sends to W&B or Trackio, as the run sees it."""

    def __init__(self, run: RunDirectory, name: str, say: Say) -> None:
        """Start it. It reads metrics.jsonl itself, and remembers in `loggers/NAME.json` what it has sent."""
        self._name, self._say = name, say
        self._heard: queue.SimpleQueue[str] = queue.SimpleQueue()
        memory = _memory(run, name)
        if not memory.exists():
            memory.parent.mkdir(exist_ok=True)
            files.replace_file(memory, json.dumps({"id": uuid.uuid4().hex[:12], "sent": 0}).encode())
        words = [sys.executable, "-P", "-m", "proximo.loggers.service", name, str(run.path.absolute())]
        pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
        self._process: Any = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=nowhere, start_new_session=True)
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        for line in self._process.stdout:
            self._heard.put(line.decode(errors="replace").rstrip("\r\n"))

    def look(self) -> bool:
        """Say what it has to say; whether it is still there."""
        ended = self._process.poll()
        if ended is not None:
            self._listener.join(1.0)
        while not self._heard.empty():
            self._say(self._heard.get())
        if ended:
            self._say(_off(SERVICES[self._name], f"its process ended with code {ended}"))
        return ended is None

    def close(self) -> None:
        """Let it send what is left, for a while."""
        with suppress(OSError):
            self._process.stdin.close()
        by = time.monotonic() + WAIT_AT_END
        try:
            while self.look() and time.monotonic() < by:
                time.sleep(0.05)
        except KeyboardInterrupt:
            by = 0.0
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
            why = "it was interrupted" if not by else f"it was not done after {WAIT_AT_END:.0f} s"
            self._say(f"note: {SERVICES[self._name]} has not got everything: {why}. metrics.jsonl has.")
        self._listener.join(1.0)


def _memory(run: RunDirectory, name: str) -> Path:
    """Where a service remembers what it has sent."""
    return run.loggers / f"{name}.json"
