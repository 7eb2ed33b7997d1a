"""A small server on this machine that speaks as an OpenAI-compatible chat endpoint does: a judge for tests."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-this-is-the-secret"

Reply = str | int | bytes
"""What the judge writes, an HTTP status, or a whole body."""


class Endpoint:
    """Answers with what `reply(user message)` gives; keeps the requests."""

    def __init__(self) -> None:
        self.reply: Callable[[str], Reply] = lambda message: '{"score": 5}'
        self.delay = 0.0
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.requests.append(body | {"path": self.path})
                endpoint.keys.append(self.headers["Authorization"])
                time.sleep(endpoint.delay)
                reply = endpoint.reply(body["messages"][-1]["content"])
                if isinstance(reply, int):  # as unfriendly as can be: the key comes back in the body
                    status, said = reply, f"no, not with {self.headers['Authorization']}".encode()
                elif isinstance(reply, bytes):
                    status, said = 200, reply
                else:
                    status, said = 200, json.dumps({"choices": [{"message": {"content": reply}}]}).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(said)))
                self.end_headers()
                with suppress(ConnectionError):  # nobody waits any more
                    self.wfile.write(said)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def between(message: str, name: str) -> str:
    """The text that the message gives under this name, found by its code as a judge would."""
    found = re.search(rf"^===== {name} (\w+) =====\n(.*?)\n===== END OF {name} \1 =====$", message, re.DOTALL | re.M)
    assert found, message
    return found[2]


def longer_is_better(message: str) -> str:
    a, b = len(between(message, "RESPONSE A")), len(between(message, "RESPONSE B"))
    return json.dumps({"better": "A" if a > b else "B" if b > a else "tie"})
