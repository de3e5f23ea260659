"""What is known about one request, from its first header to its log line."""

from __future__ import annotations

import re
import time
import uuid
from dataclasses import dataclass, field

from serving.gateway.answers import Tally
from serving.gateway.keys import ApiKey
from serving.gateway.tracing import NO_SPANS, Spans

PAGE_FILES = (
    "page.css",
    "conversation.css",
    "page.js",
    "settings.js",
    "panes.js",
    "dom.js",
    "api.js",
    "icon.svg",
)
PAGE_PATHS = frozenset({"/", *(f"/{name}" for name in PAGE_FILES)})
"""The web page and its files."""
ENDPOINTS = PAGE_PATHS | frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/feedback",
        "/v1/models",
        "/v1/votes",
        "/v1/page",
        "/health",
        "/health/live",
        "/health/ready",
        "/metrics",
        "/openapi.json",
        "/admin/routes",
        "/admin/reload",
        "/admin/rollback",
        "/admin/weights",
    }
)
REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
TRACEPARENT = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


@dataclass
class Exchange:
    """One request. Times in seconds of time.monotonic(); status 0: nothing was sent.

    messages, answer: what was asked, and the first answer once it is whole; only where something wants them.
    answer_tally: what came of the first answer; tally: of all.
    """

    endpoint: str
    method: str
    request_id: str
    traceparent: str | None = None
    started: float = field(default_factory=time.monotonic)
    deadline: float = float("inf")
    key: ApiKey | None = None
    model: str = ""
    version: str = ""
    stream: bool = False
    status: int = 0
    reason: str | None = None
    tally: Tally | None = None
    first_token_s: float | None = None
    spans: Spans = NO_SPANS
    keeps_text: bool = False
    messages: list[dict[str, str]] | None = None
    answer: str | None = None
    answer_tally: Tally | None = None

    @classmethod
    def of(cls, method: str, path: str, headers: dict[bytes, bytes]) -> Exchange:
        """From the request line and headers; a client's ids are kept only if they look like ids."""
        endpoint = path if path in ENDPOINTS else "/v1/models" if path.startswith("/v1/models/") else "other"
        wanted = headers.get(b"x-request-id", b"").decode("latin-1")
        trace = headers.get(b"traceparent", b"").decode("latin-1")
        return cls(
            endpoint=endpoint,
            method=method
            if method in ("GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE")
            else "other",
            request_id=wanted if REQUEST_ID.fullmatch(wanted) else f"req-{uuid.uuid4().hex}",
            traceparent=trace if TRACEPARENT.fullmatch(trace) else None,
        )

    def fields(self) -> dict[str, object]:
        """For the log: names, numbers and ids, never text of the request."""
        found: dict[str, object] = {
            "request_id": self.request_id,
            "method": self.method,
            "endpoint": self.endpoint,
            "status": self.status,
            "seconds": round(time.monotonic() - self.started, 4),
            "key": self.key.name if self.key else None,
        }
        if self.model:
            found |= {"model": self.model, "version": self.version, "stream": self.stream}
        if self.tally is not None:
            found |= self.tally.usage() | {"finish_reason": self.tally.finish_reason}
        optional = {
            "first_token_s": self.first_token_s,
            "reason": self.reason,
            "traceparent": self.traceparent,
            "trace_id": self.spans.trace_id,
        }
        return found | {name: value for name, value in optional.items() if value is not None}
