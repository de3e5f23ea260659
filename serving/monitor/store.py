"""The tables `requests` and `samples`: every request in numbers, and a uniform sample of conversations.

samples holds a reservoir of at most N conversations per day (UTC) and model: each of the day's answered
requests is in it with the same probability (Vitter 1985, algorithm R). How many were seen is kept in
`reservoirs`, so that this stays true over restarts. A sample that was flagged and then loses its place goes
to `flagged_samples`, which has the same columns; the reservoir stays uniform.
"""

from __future__ import annotations

import contextlib
import json
import random
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from data_prep.pii import Redactor
from serving.monitor.database import connect

BUSY_SECONDS = 2.0
"""So long a write waits for another writer of the file."""
PRUNE_SECONDS = 3600.0
DAY_SECONDS = 86400.0
_SAMPLE = """(
    request_id TEXT PRIMARY KEY, day TEXT, time REAL, model TEXT, version TEXT, messages TEXT, answer TEXT,
    prompt_tokens INTEGER, completion_tokens INTEGER, finish_reason TEXT, redactions TEXT, flag TEXT,
    comment TEXT
)"""
SCHEMA = (
    "PRAGMA synchronous=NORMAL",
    "PRAGMA secure_delete=ON",
    """CREATE TABLE IF NOT EXISTS requests (
    id TEXT PRIMARY KEY, time REAL, model TEXT, version TEXT, endpoint TEXT, status INTEGER, stream INTEGER,
    key TEXT, prompt_tokens INTEGER, completion_tokens INTEGER, finish_reason TEXT, first_token_s REAL,
    seconds REAL
)""",
    f"CREATE TABLE IF NOT EXISTS samples {_SAMPLE}",
    f"CREATE TABLE IF NOT EXISTS flagged_samples {_SAMPLE}",
    """CREATE TABLE IF NOT EXISTS reservoirs (
    day TEXT, model TEXT, seen INTEGER, capacity INTEGER, PRIMARY KEY (day, model)
)""",
    "CREATE INDEX IF NOT EXISTS requests_time ON requests (time)",
    "CREATE INDEX IF NOT EXISTS samples_day ON samples (day, model)",
)


@dataclass(frozen=True)
class RequestRow:
    """A row of `requests`: names and numbers, no text. time: unix seconds of its arrival."""

    id: str
    time: float
    model: str
    version: str
    endpoint: str
    status: int
    stream: bool
    key: str
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finish_reason: str | None = None
    first_token_s: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Conversation:
    """What was asked, and the first answer. messages: [{"role", "content"}, ...].

    completion_tokens, finish_reason: of this answer; its request's are those of all that were asked for.
    """

    messages: Sequence[dict[str, str]]
    answer: str
    completion_tokens: int | None = None
    finish_reason: str | None = None

    @property
    def characters(self) -> int:
        """Length of all texts."""
        return len(self.answer) + sum(len(message["content"]) for message in self.messages)

    def redacted(self) -> tuple[Conversation, dict[str, int]]:
        """The same without personal data that has a form of its own, and the counts by type."""
        redactor = Redactor()
        messages = [{**message, "content": redactor.redact(message["content"])} for message in self.messages]
        answer = redactor.redact(self.answer)
        return replace(self, messages=messages, answer=answer), dict(redactor.counts)


@dataclass(frozen=True)
class Entry:
    """One request that has ended. text: only of one that was answered to the end."""

    request: RequestRow
    text: Conversation | None = None


class Store:
    """A connection that writes the tables. Used by one thread at a time.

    samples: N of the reservoirs; where it was raised, that counts from the next day on. retention_days: how
    long rows and samples are kept.
    """

    def __init__(
        self,
        path: Path,
        samples: int,
        retention_days: float,
        redact: bool = True,
        *,
        rng: random.Random | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open the file, or make it, readable by its owner only.

        Raises UserError when it cannot be written or is no database.
        """
        self.samples = samples
        self.retention_days = retention_days
        self.redact = redact
        self.rng = rng or random.Random()
        self.clock = clock
        self._pruned = float("-inf")
        # Made where an error can still end the program, then used by the thread that writes.
        self.connection = connect(path, SCHEMA, timeout_s=BUSY_SECONDS, check_same_thread=False)

    def write(self, entries: Sequence[Entry]) -> None:
        """Write them all, or none. Raises sqlite3.Error."""
        with self._transaction():
            for entry in entries:
                name = self._insert(entry.request)
                if entry.text is not None and self.samples:
                    self._sample(name, entry.request, entry.text)

    def flag(self, request_id: str, key: str, flag: str, comment: str | None) -> bool:
        """Flag the sample of a request that this key sent; False where there is none.

        Raises sqlite3.Error.
        """
        comment = Redactor().redact(comment) if comment and self.redact else comment
        with self._transaction():
            owned = "SELECT 1 FROM requests WHERE id = ? AND key = ?"
            if self.connection.execute(owned, (request_id, key)).fetchone() is None:
                return False
            changed = 0
            for table in ("samples", "flagged_samples"):
                statement = f"UPDATE {table} SET flag = ?, comment = ? WHERE request_id = ?"
                changed += self.connection.execute(statement, (flag, comment, request_id)).rowcount
        return changed > 0

    def prune_when_due(self) -> None:
        """`prune`, once in PRUNE_SECONDS. Raises sqlite3.Error."""
        if self.clock() - self._pruned >= PRUNE_SECONDS:
            self._pruned = self.clock()
            self.prune()

    def prune(self) -> None:
        """Delete what is older than the retention, so that it cannot be read off the disk either.

        Raises sqlite3.Error.
        """
        oldest = self.clock() - self.retention_days * DAY_SECONDS
        with self._transaction():
            for table in ("requests", "samples", "flagged_samples"):
                self.connection.execute(f"DELETE FROM {table} WHERE time < ?", (oldest,))
            self.connection.execute("DELETE FROM reservoirs WHERE day < ?", (day_of(oldest),))
        self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        """Close the file."""
        self.connection.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self.connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.connection.execute("COMMIT")
        except BaseException:
            # A full disk has ended it already.
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK")
            raise

    def _insert(self, request: RequestRow) -> str:
        """The id of the new row: the request's, or that with a suffix, since clients may repeat theirs."""
        statement = f"INSERT OR IGNORE INTO requests VALUES ({', '.join('?' * 13)})"
        values = astuple(request)
        if self.connection.execute(statement, values).rowcount:
            return request.id
        name = f"{request.id}.{uuid.uuid4().hex}"
        self.connection.execute(statement, (name, *values[1:]))
        return name

    def _sample(self, name: str, request: RequestRow, text: Conversation) -> None:
        day, model = day_of(request.time), request.model
        row = self.connection.execute(
            "SELECT seen, capacity FROM reservoirs WHERE day = ? AND model = ?", (day, model)
        ).fetchone()
        seen, capacity = row or (0, self.samples)
        capacity = min(capacity, self.samples)
        seen += 1
        self.connection.execute("REPLACE INTO reservoirs VALUES (?, ?, ?, ?)", (day, model, seen, capacity))
        held = self._held(day, model)
        for _ in range(held - capacity):
            self._evict(day, model, self.rng.randrange(held))
            held -= 1
        if held >= capacity:
            place = self.rng.randrange(seen)
            if place >= capacity:
                return
            self._evict(day, model, place)
        redactions: dict[str, int] = {}
        if self.redact:
            text, redactions = text.redacted()
        self.connection.execute(
            f"INSERT INTO samples VALUES ({', '.join('?' * 13)})",
            (
                name,
                day,
                request.time,
                model,
                request.version,
                json.dumps(list(text.messages), ensure_ascii=False),
                text.answer,
                request.prompt_tokens,
                text.completion_tokens,
                text.finish_reason,
                json.dumps(redactions, sort_keys=True),
                None,
                None,
            ),
        )

    def _held(self, day: str, model: str) -> int:
        statement = "SELECT count(*) FROM samples WHERE day = ? AND model = ?"
        return int(self.connection.execute(statement, (day, model)).fetchone()[0])

    def _evict(self, day: str, model: str, place: int) -> None:
        """Take away the sample at this place in the order of insertion; a flagged one is kept aside."""
        statement = (
            "SELECT request_id FROM samples WHERE day = ? AND model = ? ORDER BY rowid LIMIT 1 OFFSET ?"
        )
        name = self.connection.execute(statement, (day, model, place)).fetchone()
        self.connection.execute(
            "INSERT INTO flagged_samples SELECT * FROM samples WHERE request_id = ? AND flag IS NOT NULL",
            name,
        )
        self.connection.execute("DELETE FROM samples WHERE request_id = ?", name)


def day_of(seconds: float) -> str:
    """YYYY-MM-DD of unix seconds, UTC."""
    return datetime.fromtimestamp(seconds, UTC).date().isoformat()
