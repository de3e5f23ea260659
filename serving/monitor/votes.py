"""Votes of people who compared two answers, in the table `votes` of the monitoring database.

A vote is committed, and written through to the disk, before `add` returns. One thread writes, so that nothing
else waits for the disk. The file holds what people wrote: a new one is readable by its owner only.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.pii import Redactor
from posttrain.errors import UserError
from serving.monitor.database import connect

BUSY_SECONDS = 10.0
"""So long a vote waits for another writer of the file."""
SCHEMA = (
    "PRAGMA synchronous=FULL",
    """CREATE TABLE IF NOT EXISTS votes (
    id TEXT PRIMARY KEY, time REAL, model TEXT, messages TEXT, version_a TEXT, version_b TEXT,
    answer_a TEXT, answer_b TEXT, choice TEXT, sampling TEXT, key TEXT, comment TEXT
)""",
)
INSERT = "INSERT INTO votes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"


@dataclass(frozen=True)
class Vote:
    """What a client sent, and the name of the key it sent it with.

    version_a, version_b: NAME@VERSION; choice: a, b, tie or both_bad.
    """

    model: str
    messages: Sequence[Mapping[str, str]]
    version_a: str
    version_b: str
    answer_a: str
    answer_b: str
    choice: str
    sampling: Mapping[str, Any]
    key: str
    comment: str | None


class VoteStore:
    """The table, and the thread that writes it."""

    def __init__(self, path: Path, redact: bool = True) -> None:
        """Open the file, or make it. redact: replace personal data that has a form of its own.

        Raises UserError when it cannot be written or is no database.
        """
        self.path = path
        self.redact = redact
        self._thread = ThreadPoolExecutor(1, "votes")
        try:
            self._connection = self._thread.submit(self._open).result()
        except UserError:
            self._thread.shutdown()
            raise

    async def add(self, vote: Vote) -> str:
        """Keep a vote and return its id. Raises sqlite3.Error when it could not be written."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._insert, vote)

    def _insert(self, vote: Vote) -> str:
        name = f"vote-{uuid.uuid4().hex}"
        # One redactor for the whole vote: the same value has the same pseudonym in all its texts.
        clean = Redactor().redact if self.redact else str
        messages = [{**message, "content": clean(message["content"])} for message in vote.messages]
        # In an order of their own, so that a pair has the same texts on whichever sides its answers stood.
        answers = {answer: clean(answer) for answer in sorted((vote.answer_a, vote.answer_b))}
        row = (
            name,
            time.time(),
            vote.model,
            json.dumps(messages, ensure_ascii=False),
            vote.version_a,
            vote.version_b,
            answers[vote.answer_a],
            answers[vote.answer_b],
            vote.choice,
            json.dumps(vote.sampling),
            vote.key,
            None if vote.comment is None else clean(vote.comment),
        )
        self._connection.execute(INSERT, row)
        return name

    def _open(self) -> sqlite3.Connection:
        return connect(self.path, SCHEMA, timeout_s=BUSY_SECONDS)

    def close(self) -> None:
        """Write what is under way and close the file."""
        self._thread.submit(self._connection.close).result()
        self._thread.shutdown()
