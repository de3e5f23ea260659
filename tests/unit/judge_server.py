"""A chat endpoint that misbehaves on demand, on a real socket: what judges must survive.

`script` decides what happens to the n-th request, by its number from 0 and its body; the default is a judge
that keeps to a rule about the answers between the marks of the bundled templates.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

BETWEEN = re.compile(r"=== \w{12} ([\w ]+) ===\n(.*?)(?=\n=== \w{12} )", re.DOTALL)


def verdict(winner: str) -> str:
    return json.dumps({"winner": winner, "reason": "a rule"})


def sections(body: dict[str, Any]) -> dict[str, str]:
    """The texts of a request by their headings: "conversation", "answer A", ..."""
    return dict(BETWEEN.findall(body["messages"][1]["content"]))


def good_word(body: dict[str, Any]) -> str:
    """Whoever says "please" wins; a tie if both do or neither."""
    found = sections(body)
    polite = ["please" in found[name] for name in ("answer A", "answer B")]
    return verdict("tie" if polite[0] == polite[1] else "AB"[polite.index(True)])


def gullible(body: dict[str, Any]) -> str:
    """Obeys whatever stands in an answer, as a weak judge would."""
    order = re.search(r"\b([AB]) wins\b", body["messages"][1]["content"])
    return verdict(order[1]) if order else good_word(body)


@dataclass
class Response:
    """status, headers and body as they go out; delay_event: wait for it before answering (a timeout)."""

    status: int = 200
    body: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    delay_event: threading.Event | None = None


def completion(text: str | None, finish: str = "stop", **message: Any) -> Response:
    """A proper chat completion with 100 prompt and 10 reply tokens."""
    said = {"role": "assistant", "content": text} | message
    body = {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "judge-1",
        "choices": [{"index": 0, "finish_reason": finish, "message": said}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
    }
    return Response(200, json.dumps(body))


Script = Callable[[int, dict[str, Any]], Response]


@dataclass
class Server:
    """base_url; every request body and its Authorization header, in order of arrival."""

    base_url: str
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)


@contextmanager
def serving(script: Script = lambda n, body: completion(good_word(body))) -> Iterator[Server]:
    """The endpoint, until the block ends."""
    lock = threading.Lock()
    ending = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(server.bodies)
                server.bodies.append(body)
                server.keys.append(self.headers.get("Authorization"))
            response = script(number, body)
            if response.delay_event is not None:
                while not (response.delay_event.wait(0.05) or ending.is_set()):
                    pass
            try:
                self.send_response(response.status)
                for name, value in {"Content-Type": "application/json", **response.headers}.items():
                    self.send_header(name, value)
                data = response.body.encode()
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except (BrokenPipeError, ConnectionResetError):
                return

        def log_message(self, *arguments: Any) -> None:
            return

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    server = Server(f"http://127.0.0.1:{httpd.server_address[1]}/v1")
    thread = threading.Thread(target=httpd.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        ending.set()
        httpd.shutdown()
        httpd.server_close()
        thread.join()
