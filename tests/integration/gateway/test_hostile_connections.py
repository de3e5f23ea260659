"""Connections that mean harm or were made by mistake, by size, form, time and number: each gets an answer,
and the gateway answers the next good request.
"""

from __future__ import annotations

import json
import re
import socket
from typing import Any

import pytest

from tests.integration.gateway.hostile import (
    CHAT,
    GOOD,
    ask,
    explains,
    head,
    post,
    raw,
    said,
)

pytestmark = pytest.mark.usefixtures("alive_afterwards")


def test_a_body_that_is_too_large_by_its_own_account(gateway):
    status, headers, answer = post(gateway, said("x" * 5000))
    assert status == 413
    assert headers["connection"] == "close"
    assert explains(answer)["code"] == "request_too_large"


def test_a_body_that_claims_to_be_huge_is_not_waited_for(gateway):
    assert raw(gateway, head("Content-Length: 99999999999")).startswith(b"HTTP/1.1 413 ")


def test_a_chunked_body_that_is_too_large(gateway):
    chunk = b"1000\r\n" + b"x" * 4096 + b"\r\n"
    assert raw(gateway, head("Transfer-Encoding: chunked") + chunk * 4 + b"0\r\n\r\n").startswith(
        b"HTTP/1.1 413 "
    )


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"hello\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 401),
        (b"GET /health/live HTTP/1.1\r\n\r\n", 400),
        (b"GET /health/live HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400),
        (b"GET /health/live HTTP/1.1\r\nHost: x\r\nX: a\x00b\r\n\r\n", 400),
        (b"GET /health/live HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 40000 + b"\r\n\r\n", 431),
        (b"GET /health/live HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 10000 + b"\r\n", 431),
        (b"GET /" + b"a" * 40000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431),
        (b"POST /health HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n", 400),
        (b"POST /health HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello", 400),
        (b"POST /health HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"GET /health/live HTTP/1.1\r\nHost: x\r\nX-Request-Id: a b\r\nConnection: close\r\n\r\n", 200),
        (b"GET /health/live HTTP/1.0\r\n\r\n", 200),
    ],
)
def test_malformed_http(gateway, data, status):
    received = raw(gateway, data)
    assert received.startswith(b"HTTP/1.1 %d " % status)
    if status == 400:
        assert explains(received.partition(b"\r\n\r\n")[2])["code"] == "malformed"


def test_an_id_that_is_none_is_replaced(gateway):
    for wanted in ("a b", "x" * 65, '"><script>', "é"):
        _, headers, _ = ask(
            gateway, "GET", "/health/live", headers={"X-Request-Id": wanted.encode().decode("latin-1")}
        )
        assert re.fullmatch(r"req-[0-9a-f]{32}", headers["x-request-id"])


def test_a_request_after_a_smuggled_one_is_its_own(gateway):
    """Of two lengths one wins: what follows the body is a request of its own, without the first one's key."""
    smuggled = b"0\r\n\r\nGET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    received = raw(gateway, head("Transfer-Encoding: chunked", "Content-Length: 4") + smuggled)
    assert b"200 OK" not in received
    assert b"support" not in received


def test_a_connection_that_says_nothing_is_closed(gateway):
    assert raw(gateway, b"").startswith(b"HTTP/1.1 408 ")


def test_headers_that_never_end_are_not_waited_for(gateway):
    assert raw(gateway, b"GET /health/live HTTP/1.1\r\nHost: x\r\nX: ").startswith(b"HTTP/1.1 408 ")


def test_a_body_that_never_comes_is_not_waited_for(gateway):
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer pt-alice\r\nContent-Length: 100\r\n\r\n{{"
    )
    received = raw(gateway, head.encode())
    assert received.startswith(b"HTTP/1.1 408 ")
    assert b'"code": "timeout"' in received


def stream_head(**fields: Any) -> bytes:
    body = json.dumps(GOOD | {"model": "long", "max_tokens": 200, "stream": True} | fields).encode()
    return head(f"Content-Length: {len(body)}") + body


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(gateway, stream, n):
    """The gateway notices, takes every answer of the request out of Triton, and books what was sent."""
    left = gateway.metric("posttrain_gateway_disconnects_total")
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=60) as connection:
        connection.sendall(stream_head(stream=stream, n=n))
        if stream:
            assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")
    line = gateway.wait_for("request")
    while line["model" if "model" in line else "endpoint"] != "long":
        line = gateway.wait_for("request")
    assert (line["status"], line["reason"]) == (200 if stream else 499, "client_gone")
    assert gateway.metric("posttrain_gateway_disconnects_total") == left + 1
    assert line["completion_tokens"] < 200 * n
    assert line["finish_reason"] is None
    assert gateway.metric("posttrain_gateway_in_flight") == 0


def test_too_many_requests_at_once_are_refused_politely(gateway):
    """20 long ones at once in a gateway for 16: some are told to come again, the others are answered."""
    held = [socket.create_connection(("127.0.0.1", gateway.port), timeout=60) for _ in range(20)]
    try:
        for connection in held:
            connection.sendall(stream_head())
        answers = [(connection, connection.recv(4096)) for connection in held]
        refused = [answer for _, answer in answers if answer.startswith(b"HTTP/1.1 503 ")]
        assert 1 <= len(refused) <= 4
        assert all(b"retry-after: 1" in answer.lower() for answer in refused)
        status, _, _ = ask(gateway, "GET", "/health/live")
        assert status == 200
        for connection, received in answers:
            if received in refused:
                continue
            assert received.startswith(b"HTTP/1.1 200 ")
            while b"[DONE]" not in received:
                piece = connection.recv(65536)
                assert piece, "the stream was cut"
                received += piece
    finally:
        for connection in held:
            connection.close()


def test_a_request_on_a_connection_too_many_gets_its_refusal(gateway):
    held = [socket.create_connection(("127.0.0.1", gateway.port), timeout=60) for _ in range(40)]
    try:
        status, headers, answer = post(gateway, GOOD)
    finally:
        for connection in held:
            connection.close()
    assert status == 503
    assert headers["retry-after"] == "1"
    assert explains(answer)["code"] == "overloaded"


def test_too_many_connections_are_refused_politely(gateway):
    """Of 300 connections that say nothing, 40 are held until their time is up, the others refused."""
    connections = [socket.create_connection(("127.0.0.1", gateway.port), timeout=60) for _ in range(300)]
    try:
        statuses = []
        for connection in connections:
            received = b""
            while piece := connection.recv(4096):
                received += piece
            statuses.append(int(received.split()[1]))
            assert json.loads(received.partition(b"\r\n\r\n")[2])["error"]["message"]
    finally:
        for connection in connections:
            connection.close()
    assert set(statuses) == {408, 503}
    assert statuses.count(503) >= 260
    assert gateway.metric("posttrain_gateway_refused_connections_total") >= 260
