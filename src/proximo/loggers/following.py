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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from proximo.errors import UserError, in_words, tell
from proximo.loggers.events import HIGHEST_STEP, OURS, EventFile
from proximo.runs import files
from proximo.runs.directory import RunDirectory
from proximo.runs.metrics import read_metrics

LOOK_EVERY = 1.0
"""Seconds between two looks at metrics.jsonl."""

WAIT_AT_END = 60.0
"""Seconds that a service gets to send what is left when the run is over."""

QUIET_AT_END = 1.0
"""Seconds of that before it is said."""

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


@dataclass(frozen=True)
class ResumeLoggers:
    """Where the metrics of a run that goes on are to go."""

    tensorboard: bool | None = None
    """None goes on with what the run has: the files are its own."""
    wandb: bool = False
    trackio: bool = False

    def of(self, run: RunDirectory) -> Loggers:
        """The loggers of this run; services that it was sent to, and is not any more, are told.

        A run may be a stranger's, and services know whom they belong to: nothing is sent there unasked.

        Raises:
            UserError: if one is neither True nor False, or its package is missing.
        """
        asked = {"tensorboard": run.tensorboard.is_dir()} | {k: v for k, v in asdict(self).items() if v is not None}
        loggers = taken_from(asked, where="proximo.resume()")
        refuse_missing(loggers)
        for name, called in SERVICES.items():
            if _memory(run, name).is_file() and not getattr(loggers, name):
                tell(f"note: {called} gets no more of this run. To go on sending: --{name} (Python: {name}=True).")
        return loggers


def flags_to_go_on(loggers: Loggers) -> list[str]:
    """What is to be added to `proximo resume` for the same loggers."""
    return [f"--{name}" for name in SERVICES if getattr(loggers, name)]


def step_of(row: Mapping[str, Any]) -> int | None:
    """The step of a row: environment steps, or iterations where there are none; None if that is no step."""
    step = row.get("env_steps", row.get("iteration"))
    return step if isinstance(step, int) and 0 <= step <= HIGHEST_STEP else None


def _seconds_of(row: Mapping[str, Any]) -> float:
    """The clock of a row; 0 where it shows no time, which a file that was edited may have there."""
    seconds = row.get("seconds")
    return seconds if isinstance(seconds, int | float) and 0 <= seconds <= _LONGEST else 0.0


_LONGEST = 1e10
"""Seconds, three centuries: what is longer is no clock."""


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
        """Begin one; of a resumed run that has one already, after the rows that are there."""
        reader = MetricsReader(run.metrics_path)
        goes_on = resumed and any(run.tensorboard.glob(OURS))  # where there are none: all rows, from the first one on
        before = reader.new_rows() if goes_on else []
        self._reader, self._say = MetricsReader(run.metrics_path, reader.position if goes_on else 0), say
        last = max((step_of(row) or 0 for row in before), default=0)
        self._file = EventFile(run.tensorboard, from_step=last + 1 if goes_on else 0)
        say(f"TensorBoard: tensorboard --logdir {shlex.quote(str(run.tensorboard))}")

    def look(self) -> bool:
        """Write what is new."""
        try:
            write_events(self._file, self._reader.new_rows(), self._reader.path)
            return True
        except Exception as error:  # a full disk, say
            self._say(_off("TensorBoard", error))
            return False

    def close(self) -> None:
        """Write what is left."""
        self.look()


def write_events(file: EventFile, rows: Sequence[Mapping[str, Any]], path: Path) -> int:
    """Write new rows of `path` as events; the newest one is as old as the file, the others by their own clocks.

    Returns:
        How many were written: rows without a step that TensorBoard could take are left out.

    Raises:
        OSError: if the disk refuses.
    """
    if not rows:
        return 0
    began = path.stat().st_mtime - _seconds_of(rows[-1])
    written = [(began + _seconds_of(row), step, row) for row in rows if (step := step_of(row)) is not None]
    file.add(written)
    return len(written)


def export_events(run: RunDirectory, folder: Path) -> Path:
    """Write all rows of a run into one event file in `folder`, in place of those that were exported there before.

    Returns:
        The file.

    Raises:
        UserError: if metrics.jsonl is damaged, or the disk refuses; what was exported before is then still there.
    """
    rows = read_metrics(run.metrics_path)
    file = None
    try:
        before = list(folder.glob(OURS))
        file = EventFile(folder)
        n_written = write_events(file, rows, run.metrics_path)
        for path in before:
            path.unlink()
    except OSError as error:
        if file is not None:
            with suppress(OSError):
                file.path.unlink()
        raise UserError(
            f"The events for TensorBoard could not be written to {folder}: {files.reason(error)}. Name another folder."
        ) from error
    if n_written < len(rows):
        tell(
            f"note: {len(rows) - n_written} of {len(rows)} rows of {run.metrics_path} are not in TensorBoard: their "
            f"step is no whole number from 0 to {HIGHEST_STEP}."
        )
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
        began = time.monotonic()
        by, quiet_until = began + WAIT_AT_END, began + QUIET_AT_END
        try:
            while self.look() and time.monotonic() < by:
                if time.monotonic() >= quiet_until:
                    quiet_until = by
                    self._say(f"waiting for {SERVICES[self._name]} (Ctrl-C stops it)")
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
