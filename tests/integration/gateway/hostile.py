"""Requests to the gateway as bytes, and what it has to say to those that mean harm or are mistakes."""

from __future__ import annotations

import http.client
import json
import re
import socket
from typing import Any

ASKED = [{"role": "user", "content": "Where is my order?"}]
GOOD = {"model": "support", "messages": ASKED, "temperature": 0, "max_tokens": 2}
CHAT = "/v1/chat/completions"
KEY = {"Authorization": "Bearer pt-alice"}
JSON = {"Content-Type": "application/json"}
LEAKS = re.compile(r'Traceback|File "|\.py|site-packages|/home|/tmp|127\.0\.0\.1')


def ask(
    gateway: Any, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body."""
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=60)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
    finally:
        connection.close()


def post(gateway: Any, body: Any, path: str = CHAT, **headers: str) -> tuple[int, dict[str, str], bytes]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return ask(gateway, "POST", path, data, {**KEY, **JSON, **headers})


def raw(gateway: Any, data: bytes) -> bytes:
    """Everything that comes back for these bytes until the other side closes."""
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=60) as connection:
        connection.sendall(data)
        received = b""
        while piece := connection.recv(65536):
            received += piece
        return received


def head(*lines: str) -> bytes:
    """A request line and headers of a chat request with alice's key."""
    first = (
        f"POST {CHAT} HTTP/1.1",
        "Host: x",
        "Authorization: Bearer pt-alice",
        "Content-Type: application/json",
    )
    return "\r\n".join([*first, *lines, "", ""]).encode()


def explains(body: bytes) -> dict[str, Any]:
    """The error object of a body, which says nothing about the machine."""
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert not LEAKS.search(body.decode())
    return error


MALFORMED = {
    "nothing": b"",
    "not JSON": b"hello",
    "half an object": b'{"model": "support", "messages": [',
    "a list": b"[]",
    "null": b"null",
    "a number": b"1",
    "invalid UTF-8": b'{"model": "support", "messages": [{"role": "user", "content": "\xff\xfe"}]}',
    "a NUL byte": b'{"model": "sup\x00port"}',
    "UTF-16": json.dumps({"model": "support", "messages": ASKED[:0]}).encode("utf-16"),
    "deep lists": b"[" * 2000 + b"]" * 2000,
    "deep objects": b'{"a":' * 600 + b"1" + b"}" * 600,
    "deep content": b'{"model": "support", "messages": [{"role": "user", "content": '
    + b"[" * 1900
    + b"]" * 1900
    + b"}]}",
    "a number of 3000 digits": b'{"model": "support", "messages": [], "seed": ' + b"9" * 3000 + b"}",
    "a million in the exponent": b'{"model": "support", "messages": [], "temperature": 1e1000000}',
    "gzip": b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03",
}


def chat(**fields: Any) -> dict[str, Any]:
    return GOOD | fields


def said(content: Any, **more: Any) -> dict[str, Any]:
    return chat(messages=[{"role": "user", "content": content, **more}])
