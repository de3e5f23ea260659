"""The thread that writes what is kept about the traffic, and the bounded queue in front of it.

The event loop only puts things into the queue. Where the queue is full, or the database cannot be written,
they are left out and counted: monitoring never makes a request wait or fail.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

from serving.gateway.logs import describe, log
from serving.monitor.store import Conversation, Entry, Store

MAX_ENTRIES = 4096
MAX_CHARACTERS = 32 * 2**20
"""What may wait: entries, and characters of their texts."""
BATCH = 256
CLOSE_SECONDS = 10.0
COMPLAIN_SECONDS = 60.0
IDLE_SECONDS = 300.0
"""Without any traffic the database is looked at so often, for what has to be deleted."""
Reason = Literal["queue_full", "database"]


@dataclass
class Flag:
    """A flag to set. found: whether there was such a sample."""

    request_id: str
    key: str
    flag: str
    comment: str | None
    found: Future[bool] = field(default_factory=Future)


class QueueFullError(Exception):
    """There is no room for a flag."""


class Monitor:
    """Takes requests that have ended, and flags. Its methods but `close` return at once.

    store: None where only text is logged. log_text: write the redacted text of every answered request to the
    log. dropped: called with the reason and the number of entries that were left out, from any thread.
    """

    def __init__(self, store: Store | None, log_text: bool, dropped: Callable[[Reason, int], None]) -> None:
        self.store = store
        self.log_text = log_text
        self.dropped = dropped
        self._queue: deque[Entry | Flag] = deque()
        self._characters = 0
        self._closed = False
        self._complained = float("-inf")
        self._ready = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="monitoring", daemon=True)
        self._thread.start()

    @property
    def keeps_text(self) -> bool:
        """Whether entries should come with their text."""
        return self.log_text or (self.store is not None and self.store.samples > 0)

    def put(self, entry: Entry) -> None:
        """Keep an entry, or count it as dropped."""
        if not self._append(entry):
            self.dropped("queue_full", 1)

    def flag(self, request_id: str, key: str, flag: str, comment: str | None) -> Future[bool]:
        """Flag a sample, behind everything that was put before. The future raises sqlite3.Error.

        Raises QueueFullError.
        """
        wish = Flag(request_id, key, flag, comment)
        if not self._append(wish):
            raise QueueFullError
        return wish.found

    def close(self, timeout_s: float = CLOSE_SECONDS) -> None:
        """Write what waits and end the thread; says so where that takes longer than `timeout_s`."""
        with self._ready:
            self._closed = True
            self._ready.notify()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            log("monitoring_unfinished", logging.WARNING, waiting=len(self._queue))

    def _append(self, item: Entry | Flag) -> bool:
        size = _characters(item)
        with self._ready:
            full = len(self._queue) >= MAX_ENTRIES or self._characters + size > MAX_CHARACTERS
            if full or self._closed:
                return False
            self._queue.append(item)
            self._characters += size
            self._ready.notify()
        return True

    def _run(self) -> None:
        try:
            self._prune()
            while (batch := self._next()) is not None:
                self._handle(batch)
                self._prune()
        except Exception as error:
            log("monitoring_stopped", logging.ERROR, error=describe(error))
        with self._ready:
            self._closed = True
        if self.store is not None:
            self.store.close()

    def _next(self) -> list[Entry | Flag] | None:
        """What waits, in order, or nothing after IDLE_SECONDS; None once it is closed and the queue empty."""
        with self._ready:
            self._ready.wait_for(lambda: self._queue or self._closed, IDLE_SECONDS)
            if self._closed and not self._queue:
                return None
            batch = [self._queue.popleft() for _ in range(min(BATCH, len(self._queue)))]
            self._characters -= sum(map(_characters, batch))
            return batch

    def _handle(self, batch: list[Entry | Flag]) -> None:
        entries: list[Entry] = []
        for item in batch:
            if isinstance(item, Entry):
                entries.append(item)
                if self.log_text and item.text is not None:
                    _log_text(item.request.id, item.text)
            else:
                self._write(entries)
                entries = []
                self._flag(item)
        self._write(entries)

    def _write(self, entries: list[Entry]) -> None:
        if self.store is None or not entries:
            return
        try:
            self.store.write(entries)
        except sqlite3.Error as error:
            self.dropped("database", len(entries))
            self._complain(error, len(entries))

    def _prune(self) -> None:
        if self.store is None:
            return
        try:
            self.store.prune_when_due()
        except sqlite3.Error as error:
            self._complain(error, 0)

    def _complain(self, error: sqlite3.Error, dropped: int) -> None:
        if time.monotonic() - self._complained > COMPLAIN_SECONDS:
            self._complained = time.monotonic()
            log("monitoring_failed", logging.ERROR, detail=str(error), dropped=dropped)

    def _flag(self, wish: Flag) -> None:
        if not wish.found.set_running_or_notify_cancel():
            return
        if self.store is None:
            wish.found.set_result(False)
            return
        try:
            found = self.store.flag(wish.request_id, wish.key, wish.flag, wish.comment)
        except sqlite3.Error as error:
            wish.found.set_exception(error)
        else:
            wish.found.set_result(found)


def _characters(item: Entry | Flag) -> int:
    return item.text.characters if isinstance(item, Entry) and item.text is not None else 0


def _log_text(request_id: str, text: Conversation) -> None:
    redacted, counts = text.redacted()
    log(
        "text",
        request_id=request_id,
        messages=list(redacted.messages),
        answer=redacted.answer,
        redactions=counts,
    )
