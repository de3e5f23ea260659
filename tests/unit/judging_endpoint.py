"""An OpenAI-compatible endpoint on this machine that answers as a test tells it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

KEY = "sk-planted-secret-0123456789"
Reply = tuple[int, str]


class Endpoint(ThreadingHTTPServer):
    """Gives each request's text to `answer`, which returns status and reply. seen: texts and headers."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer: Callable[[str, int], Reply] = lambda text, count: (200, "[[5]]")
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.go_on = threading.Event()


class _Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][0]["content"]
        self.server.seen.append((text, {name.lower(): value for name, value in self.headers.items()}))
        count = sum(seen == text for seen, _ in self.server.seen)
        status, reply = self.server.answer(text, count)
        message = {"role": "assistant", "content": reply}
        good = {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": "j",
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
        }
        data = json.dumps(good if status == 200 else {"error": {"message": f"no: {KEY}"}}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("retry-after-ms", "1")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    server = Endpoint()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.go_on.set()
    server.shutdown()
    thread.join()
    server.server_close()
