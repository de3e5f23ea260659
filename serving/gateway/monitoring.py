"""What the gateway hands to the monitor: requests that have ended, and the feedback of clients."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import FastAPI, Request
from pydantic import Field

from serving.gateway.config import MonitoringConfig
from serving.gateway.errors import ApiError, shown, unavailable
from serving.gateway.exchange import Exchange
from serving.gateway.metrics import Metrics
from serving.gateway.schemas import ApiModel, Text
from serving.monitor.store import Conversation, Entry, RequestRow, Store
from serving.monitor.writer import Monitor, QueueFullError, Reason

if TYPE_CHECKING:
    from serving.gateway.service import Service

ENDPOINTS = frozenset({"/v1/chat/completions", "/v1/completions"})
"""Requests to these are kept, if they came with a valid key."""
PREFIXES = ("chatcmpl-", "cmpl-")
FEEDBACK_SECONDS = 10.0
Rating = Literal["up", "down"]


class Feedback(ApiModel):
    """POST /v1/feedback. request_id: an answer's `id`, or its X-Request-Id."""

    request_id: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,80}$")
    rating: Rating
    comment: Annotated[Text, Field(max_length=2000)] | None = None


def open_monitor(config: MonitoringConfig, metrics: Metrics) -> Monitor | None:
    """The monitor that this configuration asks for, if any. Raises UserError: the database."""
    store = None
    if config.database is not None:
        store = Store(Path(config.database), config.samples, config.retention_days, config.redact)
    elif not config.log_text:
        return None

    def dropped(reason: Reason, count: int) -> None:
        metrics.unmonitored.labels(reason).inc(count)

    return Monitor(store, config.log_text == "redacted", dropped)


def record(monitor: Monitor, exchange: Exchange) -> None:
    """Keep a request that has ended. Its text only if it was answered to the end."""
    if exchange.key is None or exchange.endpoint not in ENDPOINTS:
        return
    tally, seconds = exchange.tally, time.monotonic() - exchange.started
    row = RequestRow(
        id=exchange.request_id,
        time=time.time() - seconds,
        model=exchange.model,
        version=exchange.version,
        endpoint=exchange.endpoint,
        status=exchange.status,
        stream=exchange.stream,
        key=exchange.key.name,
        prompt_tokens=tally.prompt_tokens if tally else None,
        completion_tokens=tally.completion_tokens if tally else None,
        finish_reason=tally.finish_reason if tally else None,
        first_token_s=exchange.first_token_s,
        seconds=round(seconds, 4),
    )
    text = None
    first = exchange.answer_tally
    if exchange.status == 200 and exchange.messages is not None and exchange.answer is not None and first:
        text = Conversation(exchange.messages, exchange.answer, first.completion_tokens, first.finish_reason)
    monitor.put(Entry(row, text))


def add_feedback(app: FastAPI, service: Service, monitor: Monitor | None) -> None:
    """Add POST /v1/feedback, which counts among the requests of its key."""

    @app.post("/v1/feedback")
    async def feedback(request: Request, body: Feedback) -> Any:
        """Say whether an answer was good: one that is among the samples, with the key that asked for it."""
        exchange: Exchange = request.state.exchange
        assert exchange.key is not None, "the guard lets nobody in without a key"
        state = service.limiter.admit(exchange.key)
        try:
            for name in _names(body.request_id):
                if monitor is not None and await _flag(monitor, name, exchange.key.name, body):
                    return {"object": "feedback", "request_id": name, "rating": body.rating}
        finally:
            service.limiter.release(state)
        raise ApiError(
            404,
            f"no sample is kept of a request '{shown(body.request_id)}' of this key",
            param="request_id",
            code="sample_not_found",
        )


def _names(request_id: str) -> list[str]:
    """Ids under which a request may be kept: an answer's id is the request's behind a prefix."""
    return [request_id, *(request_id.removeprefix(p) for p in PREFIXES if request_id.startswith(p))]


async def _flag(monitor: Monitor, name: str, key: str, body: Feedback) -> bool:
    busy = unavailable("the feedback cannot be kept now; try again", "feedback_failed")
    try:
        async with asyncio.timeout(FEEDBACK_SECONDS):
            return await asyncio.wrap_future(monitor.flag(name, key, body.rating, body.comment))
    except (sqlite3.Error, QueueFullError, TimeoutError) as error:
        raise busy from error
