"""What every request passes before the application sees it: identity, key, room, size and time.

An ASGI middleware around the whole application. Of a request without a valid key, and on the paths that want
none, only the headers are read. What is not listed in PUBLIC or PAGE_PATHS wants a key, so a path that is
added is private at first.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any

from serving.gateway.config import GatewayConfig, is_loopback
from serving.gateway.errors import CLIENT_GONE, ApiError, unavailable
from serving.gateway.exchange import PAGE_PATHS, Exchange
from serving.gateway.keys import ANONYMOUS, KeyRing
from serving.gateway.logs import log
from serving.gateway.metrics import Metrics
from serving.gateway.monitoring import record
from serving.gateway.tracing import Tracing
from serving.monitor.writer import Monitor

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

PUBLIC = frozenset({"/health", "/health/live", "/health/ready", "/openapi.json"})
METRICS = "/metrics"
ADMIN = "/admin/"
ANSWER_SHARE = 0.95
"""Of request_seconds an answer may take so much; the rest is for telling the client that it took too long."""
HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9.-]+))(?::\d+)?")
MAX_HEAD_BYTES = 16 * 1024
DISCARDED_BYTES = 16 * 2**20
"""Of too large a body so much is read and thrown away, so that the client gets to read the answer."""


class ClientGoneError(Exception):
    """The client closed the connection before the answer."""


class Guard:
    """The middleware. keys: replaced by a reload. monitor, tracing: who else hears of a request, if any."""

    def __init__(
        self,
        app: App,
        config: GatewayConfig,
        keys: KeyRing,
        metrics: Metrics,
        monitor: Monitor | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self.app = app
        self.config = config
        self.keys = keys
        self.metrics = metrics
        self.monitor = monitor
        self.tracing = tracing
        self.in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI call."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(reversed(scope["headers"]))
        exchange = Exchange.of(scope["method"], scope["path"], headers)
        exchange.deadline = exchange.started + ANSWER_SHARE * self.config.limits.request_seconds
        exchange.keeps_text = self.monitor is not None and self.monitor.keeps_text
        if self.tracing is not None and exchange.endpoint.startswith("/v1/"):
            exchange.spans = self.tracing.begin(exchange.method, exchange.endpoint, exchange.traceparent)
        scope.setdefault("state", {})["exchange"] = exchange
        sender = Sender(send, exchange)
        try:
            await self._serve(scope, receive, sender, exchange)
        except ApiError as error:
            exchange.reason = error.reason
            await sender.error(error)
        except ClientGoneError:
            exchange.status, exchange.reason = 499, CLIENT_GONE
        except TimeoutError:
            exchange.reason = "timeout"
            seconds = self.config.limits.request_seconds
            await sender.error(ApiError(504, f"the request took longer than {seconds:g} s", code="timeout"))
        finally:
            self._record(exchange)

    async def _serve(self, scope: Scope, receive: Receive, sender: Sender, exchange: Exchange) -> None:
        async with asyncio.timeout(self.config.limits.request_seconds):
            check_head(scope)
            if self._is_public(scope["path"]):
                # Nothing there takes a body: one that is sent all the same is not read.
                sender.close = has_body(scope)
                await self.app(scope, replay(b"", receive), sender)
                return
            self._authenticate(scope, exchange)
            with self._room(scope):
                body = await self._body(scope, receive)
                await self.app(scope, replay(body, receive), sender)

    def _is_public(self, path: str) -> bool:
        if path in PAGE_PATHS:
            return self.config.serves_page
        return path in PUBLIC or (path == METRICS and not self.config.private_metrics)

    def _authenticate(self, scope: Scope, exchange: Exchange) -> None:
        path: str = scope["path"]
        if path.startswith(ADMIN) or path == METRICS:
            if self.keys.admin_sha256 is None:
                raise ApiError(404, "there is nothing at this path", code="not_found")
            if not self.keys.is_admin(presented_key(scope)):
                raise _unauthenticated("this needs the admin key")
            return
        if self.config.authentication == "none":
            check_host(scope)
            exchange.key = ANONYMOUS
            return
        presented = presented_key(scope)
        exchange.key = self.keys.find(presented)
        if exchange.key is None:
            what = "is not valid" if presented else "is missing"
            raise _unauthenticated(f"the API key {what}; send it as `Authorization: Bearer KEY`")

    @contextlib.contextmanager
    def _room(self, scope: Scope) -> Iterator[None]:
        """Count a request of the API as in flight, or refuse it."""
        if not scope["path"].startswith("/v1/"):
            yield
            return
        if self.in_flight >= self.config.limits.max_in_flight:
            raise unavailable("the gateway is busy; try again", "overloaded")
        self.in_flight += 1
        self.metrics.in_flight.set(self.in_flight)
        try:
            yield
        finally:
            self.in_flight -= 1
            self.metrics.in_flight.set(self.in_flight)

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body. Raises ApiError 400, 408 or 413, or ClientGoneError."""
        limit = self.config.limits.max_body_bytes
        too_large = ApiError(
            413,
            f"the body is larger than {limit} bytes",
            code="request_too_large",
            headers={"Connection": "close"},
        )
        declared = [value for name, value in scope["headers"] if name == b"content-length"]
        if declared and int(declared[0]) > limit + DISCARDED_BYTES:
            raise too_large
        body, size = bytearray(), 0
        try:
            async with asyncio.timeout(self.config.limits.body_seconds):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGoneError
                    piece, more = message.get("body", b""), message.get("more_body", False)
                    size += len(piece)
                    if size <= limit:
                        body += piece
                    elif size > limit + DISCARDED_BYTES:
                        raise too_large
        except TimeoutError:
            seconds = self.config.limits.body_seconds
            raise ApiError(
                408,
                f"the body did not arrive within {seconds:g} s",
                code="timeout",
                headers={"Connection": "close"},
            ) from None
        if size > limit:
            raise too_large
        return bytes(body)

    def _record(self, exchange: Exchange) -> None:
        status = str(exchange.status)
        self.metrics.requests.labels(exchange.endpoint, exchange.model, exchange.version, status).inc()
        self.metrics.seconds.labels(exchange.endpoint).observe(time.monotonic() - exchange.started)
        if exchange.reason == CLIENT_GONE:
            self.metrics.disconnects.inc()
        if exchange.status == 429 and exchange.key is not None:
            self.metrics.limited.labels(exchange.key.name, exchange.reason).inc()
        exchange.spans.end(exchange)
        if self.monitor is not None:
            record(self.monitor, exchange)
        log("request", fields=exchange.fields())


class Sender:
    """Adds the headers that every answer has, and notes the status. close: end the connection after it."""

    def __init__(self, send: Send, exchange: Exchange) -> None:
        self.send = send
        self.exchange = exchange
        self.close = False

    async def __call__(self, message: Message) -> None:
        """ASGI's send."""
        if message["type"] == "http.response.start":
            self.exchange.status = message["status"]
            message["headers"] = [
                *message.get("headers", []),
                (b"x-request-id", self.exchange.request_id.encode("ascii")),
                (b"x-content-type-options", b"nosniff"),
                *([(b"connection", b"close")] if self.close else []),
            ]
        await self.send(message)

    async def error(self, error: ApiError) -> None:
        """Send an error, unless an answer has begun: then the connection is cut by ending without its end."""
        if self.exchange.status:
            return
        body = json.dumps(error.body()).encode("utf-8")
        named = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
        headers = [(name.lower().encode("ascii"), value.encode("ascii")) for name, value in named.items()]
        await self({"type": "http.response.start", "status": error.status, "headers": headers})
        await self({"type": "http.response.body", "body": body})


def check_head(scope: Scope) -> None:
    """Raises ApiError 431 when the request line and headers are larger than any honest client's."""
    size = len(scope["raw_path"]) + len(scope["query_string"])
    size += sum(len(name) + len(value) for name, value in scope["headers"])
    if size > MAX_HEAD_BYTES:
        raise ApiError(
            431,
            f"the request line and headers have {size} bytes, at most {MAX_HEAD_BYTES} are accepted",
            code="headers_too_large",
            headers={"Connection": "close"},
        )


def check_host(scope: Scope) -> None:
    """Raises ApiError 403 for the name of another site.

    A site can make its name point to a loopback address (DNS rebinding); then its pages could ask, and read
    the answers, with the browser of whoever opens them. They still send that name.
    """
    hosts = [HOST.fullmatch(value.decode("latin-1")) for name, value in scope["headers"] if name == b"host"]
    if not all(host and is_loopback((host[1] or host[2]).lower()) for host in hosts):
        raise ApiError(
            403,
            "without keys only requests to localhost or a loopback address are answered",
            code="wrong_host",
        )


def has_body(scope: Scope) -> bool:
    """Whether the headers announce a body."""
    headers = dict(scope["headers"])
    return b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"


def presented_key(scope: Scope) -> str:
    """The bearer token; "" when there is none, or several."""
    values = [value for name, value in scope["headers"] if name == b"authorization"]
    if len(values) != 1:
        return ""
    scheme, _, token = values[0].decode("latin-1").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body that was read, then what the client does next."""
    pending = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return pending.pop() if pending else await receive()

    return next_message


def _unauthenticated(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
