"""The replies of endpoints, kept in SQLite by the hash of the request, so that nothing is paid for twice.

Every reply is on the disk before it is used (journal WAL, synchronous FULL). Keys and headers are never part
of a request as it is hashed or stored.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from posttrain.errors import UserError

_SCHEMA = """CREATE TABLE IF NOT EXISTS replies (
    request TEXT PRIMARY KEY, model TEXT NOT NULL, text TEXT NOT NULL, finish_reason TEXT, refusal TEXT,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, estimated INTEGER NOT NULL,
    time REAL NOT NULL)"""
_COLUMNS = "model, text, finish_reason, refusal, prompt_tokens, completion_tokens, estimated, time"


@dataclass(frozen=True)
class Reply:
    """What came back. estimated: the endpoint did not count tokens, so they are taken from the bytes."""

    model: str
    text: str
    finish_reason: str | None
    refusal: str | None
    prompt_tokens: int
    completion_tokens: int
    estimated: bool
    time: float


class ReplyStore:
    """Replies by request hash; safe to use from several threads. Raises UserError for an unusable file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(
                path, timeout=30.0, check_same_thread=False, isolation_level=None
            )
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
            self._connection.execute(_SCHEMA)
            self._connection.execute(f"SELECT request, {_COLUMNS} FROM replies LIMIT 0")
            path.chmod(0o600)
        except (OSError, sqlite3.Error) as error:
            raise UserError(
                f"{path}: cannot keep replies ({error}); name another file, or remove this one"
            ) from None

    def get(self, request: str) -> Reply | None:
        with self._lock:
            row = self._connection.execute(
                f"SELECT {_COLUMNS} FROM replies WHERE request = ?", (request,)
            ).fetchone()
        if row is None:
            return None
        text, finish_reason, refusal, prompt_tokens, completion_tokens, estimated, at = row[1:]
        return Reply(
            row[0], text, finish_reason, refusal, prompt_tokens, completion_tokens, bool(estimated), at
        )

    def put(self, request: str, reply: Reply) -> Reply:
        """Keep the reply; when it returns, the row is on the disk. The first reply stays, and is returned."""
        self.put_all({request: reply})
        return self.get(request) or reply

    def put_all(self, replies: Mapping[str, Reply]) -> None:
        """Keep many replies in one transaction, all of them or none."""
        rows = [(request, *vars(reply).values()) for request, reply in replies.items()]
        with self._lock, self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.executemany(
                f"INSERT OR IGNORE INTO replies (request, {_COLUMNS}) VALUES (?{', ?' * 8})", rows
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()
