"""The SQLite file that several connections of this process, and readers of others, have open together."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from posttrain.errors import UserError

CHECK_SECONDS = 2.0


def connect(
    path: Path, statements: Sequence[str], *, timeout_s: float, check_same_thread: bool = True
) -> sqlite3.Connection:
    """A connection in autocommit mode to a file in WAL mode, after these statements (PRAGMA, CREATE TABLE).

    The file is made readable by its owner only; what is no database is left as it is. Raises UserError
    when it cannot be written or is no database.
    """
    try:
        return _open(path, statements, timeout_s, check_same_thread)
    except (sqlite3.Error, OSError) as error:
        raise _unusable(path, error) from error


def _open(
    path: Path, statements: Sequence[str], timeout_s: float, check_same_thread: bool
) -> sqlite3.Connection:
    # Opened by hand only to make it: closing any descriptor of the file gives up this process's POSIX locks
    # on it, those of its other connections included. Then a reader elsewhere would think itself the last one,
    # and delete the write-ahead log that is still being written (sqlite.org/howtocorrupt.html, 2.2).
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    connection = sqlite3.connect(
        path, timeout=timeout_s, isolation_level=None, check_same_thread=check_same_thread
    )
    try:
        connection.execute("PRAGMA schema_version").fetchone()
        for name in (path, f"{path}-wal", f"{path}-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.chmod(name, 0o600)
        for statement in ("PRAGMA journal_mode=WAL", *statements):
            connection.execute(statement)
    except (sqlite3.Error, OSError):
        connection.close()
        raise
    return connection


def connect_to_read(path: Path) -> sqlite3.Connection:
    """A connection that changes nothing; the gateway may be writing. Raises sqlite3.Error."""
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)


def check_usable(path: Path) -> None:
    """Raises UserError where a gateway could not write this file. Makes and changes nothing."""
    try:
        if path.exists():
            address = f"{path.absolute().as_uri()}?mode=rw"
            with closing(
                sqlite3.connect(address, timeout=CHECK_SECONDS, isolation_level=None, uri=True)
            ) as connection:
                connection.execute("BEGIN IMMEDIATE")
                connection.execute("ROLLBACK")
        elif not path.parent.is_dir():
            raise FileNotFoundError(f"there is no directory {path.parent}")
        elif not os.access(path.parent, os.W_OK | os.X_OK):
            raise PermissionError(f"nothing can be written in {path.parent}")
    except (sqlite3.Error, OSError) as error:
        raise _unusable(path, error) from error


def _unusable(path: Path, error: Exception) -> UserError:
    """What is said of a file that cannot be written or is no database."""
    return UserError(
        f"monitoring.database: {path} cannot be used ({error})\n"
        "    name a file that posttrain may write, in a directory that exists"
    )
