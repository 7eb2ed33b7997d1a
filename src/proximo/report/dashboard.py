"""The page of a run while it goes on: served on this machine alone, to a browser that asks for what is new.

The server only reads what the run writes anyway, its metrics and samples. It answers GET, for four names, to whoever
asks for it by the name of this machine: a page from elsewhere that has its own name lead here is refused. Nothing of
the training waits for it, and it ends with the run.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import BoundedSemaphore, Lock, Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit

from proximo.errors import UserError, tell
from proximo.report.page import live_page_bytes, summary_html
from proximo.report.page_settings import Baseline
from proximo.report.records import RunRecord
from proximo.report.summary import summarize, summarize_language
from proximo.runs.directory import RunDirectory, read_config
from proximo.runs.metrics import read_metrics

HOST = "127.0.0.1"
MOST_BYTES = 1_000_000
"""Of a file, in one answer; the browser asks again for the rest."""
MOST_CONNECTIONS = 32
"""At once; each takes a file descriptor, which the run needs for its checkpoints."""
SUMMARY_EVERY = 5.0
"""Seconds between two summaries at least: each reads all metrics."""
SUMMARY_SHARE = 0.005
"""Of the time, spent on summaries at most."""
_OURSELVES = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d{1,5})?", re.IGNORECASE)
"""The names of this machine, with any port: a port that is forwarded to ours has another number."""
_FILES = {"/metrics": "metrics.jsonl", "/samples": "samples.jsonl"}


class Dashboard(ThreadingHTTPServer):
    """The server of one run. `address` is what a person types."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, run: RunDirectory, baseline: Baseline | None, port: int) -> None:
        """Listen on a port; 0 is any that is free. Raises OSError where it is taken."""
        super().__init__((HOST, port), _Handler)
        self.run = run
        self.baseline = baseline
        self._lock = Lock()
        self._free = BoundedSemaphore(MOST_CONNECTIONS)
        self._summary = ""
        self._summary_due = 0.0

    @property
    def address(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.server_address[1]}/"

    def record(self) -> RunRecord:
        """What the run has written by now."""
        return RunRecord(self.run.path.name, self.run, read_config(self.run), read_metrics(self.run.metrics_path))

    def page(self) -> bytes:
        """The page, whose script fetches the rest."""
        record = self.record()
        summary = summarize(record) if record.stage is None else summarize_language(record)
        empty = RunRecord(record.name, record.run, record.settings, [])
        return live_page_bytes(empty, summary, self.baseline)

    def summary(self) -> bytes:
        """The part at the top; made anew now and then, for it costs more the longer the run is."""
        with self._lock:
            began = time.monotonic()
            if began >= self._summary_due:
                record = self.record()
                summary = summarize(record) if record.stage is None else summarize_language(record)
                self._summary = summary_html([record], [summary])
                took = time.monotonic() - began
                self._summary_due = began + max(SUMMARY_EVERY, took / SUMMARY_SHARE)
            return self._summary.encode(errors="replace")

    def process_request(self, request: Any, client_address: Any) -> None:
        """Begin a thread that answers; close the connection where there are too many."""
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer, and make room for another."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that has gone away is nothing to speak of."""


class _Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    timeout = 10
    server_version = "Proximo"
    sys_version = ""

    def do_GET(self) -> None:
        """Answer for the page, its summary, and new lines of the two files; for nothing else."""
        server = self.server
        assert isinstance(server, Dashboard)
        if not _OURSELVES.fullmatch(self.headers.get("Host", "")):
            self._answer(403, b"This page is for the machine it is on.\n", "text/plain")
            return
        try:
            asked = urlsplit(self.path)
        except ValueError:
            self._answer(400, b"This is no address.\n", "text/plain")
            return
        try:
            if asked.path == "/":
                self._answer(200, server.page(), "text/html")
            elif asked.path == "/summary":
                self._answer(200, server.summary(), "text/html")
            elif asked.path in _FILES:
                path, first = server.run.path / _FILES[asked.path], _offset(asked.query)
                first, lines, following = new_lines(path, first)
                ends = {"X-From": str(first), "X-Next": str(following)}
                self._answer(200, lines, "application/x-ndjson", ends)
            else:
                self._answer(404, b"There is nothing of this name.\n", "text/plain")
        except (UserError, ValueError) as error:
            self._answer(500, f"{error}\n".encode(errors="replace"), "text/plain")

    def _answer(self, status: int, body: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Content-Security-Policy": "frame-ancestors 'none'",
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuse in plain words what is no GET, or no request at all."""
        self.close_connection = True
        self._answer(code, f"{message or explain or 'This is not understood.'}\n".encode(), "text/plain")

    def log_message(self, format: str, *args: Any) -> None:
        """Standard error belongs to the run."""


def new_lines(path: Path, first: int) -> tuple[int, bytes, int]:
    """The whole lines of a file from an offset on, `MOST_BYTES` at most; a line that is not yet whole is left out.

    Returns:
        The offset that the lines begin at, which is 0 where the file has become shorter than `first`: it is no longer
        the same. The lines. The offset to ask for next: beyond a line that is longer than an answer may be, which is
        passed over.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            first = first if 0 <= first <= size else 0
            file.seek(first)
            read = file.read(MOST_BYTES)
            lines = read[: read.rfind(b"\n") + 1]
            following = first + len(lines)
            while not lines and len(read) == MOST_BYTES:
                read = file.read(MOST_BYTES)
                if b"\n" in read:
                    following = file.tell() - len(read) + read.index(b"\n") + 1
                    break
    except OSError:
        return 0, b"", 0
    return first, lines, following


def _offset(query: str) -> int:
    """The number after `from=`; 0 for none."""
    given = parse_qs(query).get("from", ["0"])[0]
    return int(given) if given.isdecimal() and len(given) < 16 else 0


@contextmanager
def serving(run: RunDirectory, port: int, baseline: Baseline | None) -> Iterator[None]:
    """Serve the page of a run and say where, as long as the block goes on; port 0 is any that is free.

    Where the port is taken another one is used; where none can be, training goes on without.
    """
    server = _listening(run, baseline, port)
    if server is None:
        yield
        return
    tell(f"dashboard   {server.address}   (open it in a browser; it ends with the run)")
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.25}, name="dashboard", daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


def _listening(run: RunDirectory, baseline: Baseline | None, port: int) -> Dashboard | None:
    for tried in dict.fromkeys((port, 0)):
        try:
            return Dashboard(run, baseline, tried)
        except OSError as error:
            refused = error.strerror or str(error)
            if tried:
                tell(f"proximo: port {tried} cannot be used for the dashboard ({refused}); another one is taken.")
            else:
                tell(f"proximo: there is no dashboard, for no port can be used ({refused}).")
    return None
