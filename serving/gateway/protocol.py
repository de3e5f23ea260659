"""uvicorn's HTTP/1.1 protocol with two more manners: a bound on connections and a time to send headers in.

Without them, connections that never ask for anything would be kept for ever, each with its buffers.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from serving.gateway.config import LimitsConfig
from serving.gateway.errors import ApiError, unavailable
from serving.gateway.metrics import Metrics

MAX_HEADER_BYTES = 32 * 1024
LINGER_SECONDS = 1.0
MAX_LINGERING = 128
"""Refused connections that are still read from; it keeps a flood from using up the process's files."""


def raw_response(error: ApiError) -> bytes:
    """A whole HTTP/1.1 response, for a connection that has no request yet."""
    phrases = {400: "Bad Request", 408: "Request Timeout", 503: "Service Unavailable"}
    body = json.dumps(error.body()).encode("utf-8")
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        **error.headers,
    }
    lines = [f"HTTP/1.1 {error.status} {phrases[error.status]}", *(f"{k}: {v}" for k, v in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("ascii") + body


def bounded_protocol(limits: LimitsConfig, metrics: Metrics) -> type[asyncio.Protocol]:
    """The protocol class for uvicorn's `http` setting."""

    lingering: set[asyncio.Protocol] = set()

    class BoundedProtocol(H11Protocol):
        """One connection."""

        header_timer: asyncio.TimerHandle | None = None
        refused = False

        def connection_made(self, transport: Any) -> None:
            """Refuse it when there are too many, else wait for its first headers."""
            if len(self.connections) >= limits.max_connections:
                metrics.refused_connections.inc()
                self._refuse(transport)
                return
            super().connection_made(transport)
            metrics.connections.set(len(self.connections))
            self.header_timer = self.loop.call_later(limits.header_seconds, self._no_headers)

        def data_received(self, data: bytes) -> None:
            """Headers are timed from the connection's start, or from the first byte of a further request."""
            if self.refused:
                return
            if self.header_timer is None and (self.cycle is None or self.cycle.response_complete):
                self.header_timer = self.loop.call_later(limits.header_seconds, self._no_headers)
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop_timer()

        def on_response_complete(self) -> None:
            """A whole request and its answer are over."""
            self._stop_timer()
            super().on_response_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            """The connection is gone."""
            if self.refused:
                lingering.discard(self)
                return
            self._stop_timer()
            super().connection_lost(exc)
            metrics.connections.set(len(self.connections))

        def _refuse(self, transport: Any) -> None:
            """Say so, and read on for a moment: closing with data unread would take the answer back."""
            self.refused = True
            transport.write(raw_response(unavailable("too many connections; try again", "overloaded")))
            if len(lingering) >= MAX_LINGERING:
                transport.close()
                return
            transport.write_eof()
            lingering.add(self)
            asyncio.get_running_loop().call_later(LINGER_SECONDS, transport.abort)

        def _stop_timer(self) -> None:
            if self.header_timer is not None:
                self.header_timer.cancel()
                self.header_timer = None

        def _no_headers(self) -> None:
            self.header_timer = None
            if not self.transport.is_closing():
                message = f"the headers did not arrive within {limits.header_seconds:g} s"
                self.transport.write(raw_response(ApiError(408, message, code="timeout")))
                self.transport.close()

        def send_400_response(self, msg: str) -> None:
            """Malformed HTTP. Behind an answer that is under way nothing can be said."""
            self._stop_timer()
            if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
                self.transport.write(raw_response(ApiError(400, "malformed HTTP request", code="malformed")))
            self.transport.close()

    return BoundedProtocol
