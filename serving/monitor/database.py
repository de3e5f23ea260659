"""The SQLite file that several connections of this process, and readers of others, have open together."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path


def connect(
    path: Path, statements: Sequence[str], *, timeout_s: float, check_same_thread: bool = True
) -> sqlite3.Connection:
    """A connection in autocommit mode to a file in WAL mode, after these statements (PRAGMA, CREATE TABLE).

    The file is made readable by its owner only. Raises OSError or sqlite3.Error.
    """
    # Opened by hand only to make it: closing any descriptor of the file gives up this process's POSIX locks
    # on it, those of its other connections included. Then a reader elsewhere would think itself the last one,
    # and delete the write-ahead log that is still being written (sqlite.org/howtocorrupt.html, 2.2).
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    os.chmod(path, 0o600)
    connection = sqlite3.connect(
        path, timeout=timeout_s, isolation_level=None, check_same_thread=check_same_thread
    )
    try:
        for statement in ("PRAGMA journal_mode=WAL", *statements):
            connection.execute(statement)
    except sqlite3.Error:
        connection.close()
        raise
    return connection
