"""Structured logs: one JSON object a line. They hold no text of keys or query strings, and of prompts and
answers only the redacted lines that `monitoring.log_text` asks for (`serving/monitor/writer.py`). There is no
way to log text as it is.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, TextIO

LOGGER = logging.getLogger("posttrain.gateway")


class JsonFormatter(logging.Formatter):
    """time, level, event, then the fields given as `extra={"fields": {...}}`.

    Of an exception only its type and the places in the code are written: its message may quote a request.
    """

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage().strip(),
        }
        line |= record.__dict__.get("fields", {})
        if record.exc_info and record.exc_info[1] is not None:
            line["error"] = describe(record.exc_info[1])
        return json.dumps(line, ensure_ascii=False, default=str)


def describe(error: BaseException) -> dict[str, Any]:
    """Type and places, innermost last."""
    frames = traceback.extract_tb(error.__traceback__)[-8:]
    return {
        "type": type(error).__name__,
        "at": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames],
    }


def log(
    event: str, level: int = logging.INFO, fields: Mapping[str, object] | None = None, **more: object
) -> None:
    """Write one line."""
    LOGGER.log(level, event, extra={"fields": {**(fields or {}), **more}})


def configure(stream: TextIO = sys.stderr, level: int = logging.INFO) -> None:
    """Send this gateway's, uvicorn's and OpenTelemetry's lines to `stream`; no access log of uvicorn."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    for name in ("posttrain.gateway", "uvicorn", "uvicorn.error", "opentelemetry"):
        logger = logging.getLogger(name)
        logger.handlers = [handler] if name != "uvicorn.error" else []
        logger.propagate = name == "uvicorn.error"
        logger.setLevel(level if name == "posttrain.gateway" else logging.WARNING)
