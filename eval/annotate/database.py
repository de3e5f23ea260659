"""The database of studies: an SQLite file, or PostgreSQL by URL. Plain SQL with :named parameters for both.

One connection a thread. What writes does so one at a time, as SQLite wants it anyway, which is what makes an
assignment atomic: under SQLite by BEGIN IMMEDIATE, under PostgreSQL by an advisory lock of the transaction. A
COMMIT that returned is on the disk (synchronous FULL, synchronous_commit on).
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qs, unquote, urlsplit

from posttrain.errors import PosttrainError, UserError

Row = dict[str, Any]
BUSY_SECONDS = 5.0
"""So long a writer waits for another process that writes the same SQLite file."""
ANSWER_SECONDS = 30
"""So long a statement waits for PostgreSQL, which may have gone without a word."""
LOCK = 0x70_74_61_6E
"""The advisory lock of PostgreSQL under which one transaction writes at a time."""


class UnavailableError(PosttrainError):
    """The database did not take a statement: locked, gone, full. Nothing of the transaction is kept."""


class Session(Protocol):
    """A connection inside a transaction."""

    def run(self, sql: str, **values: Any) -> list[Row]:
        """Execute one statement; the rows it gives."""
        ...

    def close(self) -> None:
        """End the connection."""
        ...


class Database:
    """The connections of this process to one database.

    Raises UserError at the first use: no such place, not a database, locked, a wrong password.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.open, self.failures = _dialect(url)
        self.postgres = url.startswith(("postgresql:", "postgres:"))
        self._held = threading.local()
        self._all: list[Session] = []
        self._guard = threading.Lock()

    def _session(self) -> Session:
        held: Session | None = vars(self._held).get("session")
        if held is None:
            held = self.open()
            self._held.session = held
            with self._guard:
                self._all.append(held)
        return held

    def _drop(self, session: Session) -> None:
        self._held.session = None
        with self._guard:
            self._all = [other for other in self._all if other is not session]
        with contextlib.suppress(*self.failures):
            session.close()

    @contextlib.contextmanager
    def writing(self) -> Iterator[Session]:
        """A transaction that changes something, alone in the whole database. Committed when the block ends.

        Raises UnavailableError when the database does not take it; the next transaction connects anew.
        """
        begin = ["BEGIN", f"SELECT pg_advisory_xact_lock({LOCK})"] if self.postgres else ["BEGIN IMMEDIATE"]
        with self._transaction(begin) as session:
            yield session

    @contextlib.contextmanager
    def reading(self) -> Iterator[Session]:
        """A transaction that sees one state of everything. Raises UnavailableError."""
        begin = ["BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"] if self.postgres else ["BEGIN"]
        with self._transaction(begin) as session:
            yield session

    @contextlib.contextmanager
    def _transaction(self, begin: list[str]) -> Iterator[Session]:
        session = self._begun(begin)
        try:
            yield session
            session.run("COMMIT")
        except self.failures as error:
            self._drop(session)
            raise UnavailableError(f"{shown(self.url)}: {_reason(error)}") from error
        except BaseException:
            try:
                session.run("ROLLBACK")
            except self.failures:
                self._drop(session)
            raise

    def _begun(self, begin: list[str]) -> Session:
        """A session in a transaction. Raises UnavailableError.

        A connection that was held may have ended with the server since: nothing was asked of it in this
        transaction yet, so another one is tried. Not where the database answered that it is busy.
        """
        held = "session" in vars(self._held) and self._held.session is not None
        try:
            session = self._session()
        except UserError as error:
            # Not the user's mistake any more once it had worked; the command checks before it serves.
            raise UnavailableError(str(error)) from error
        try:
            for statement in begin:
                session.run(statement)
        except self.failures as error:
            self._drop(session)
            if held and self.postgres and not _is_busy(error):
                return self._begun(begin)
            raise UnavailableError(f"{shown(self.url)}: {_reason(error)}") from error
        return session

    def check(self) -> None:
        """Connect once. Raises UserError where that fails, as a command says it."""
        self._session()

    def close(self) -> None:
        """End every connection; no thread may be using one."""
        with self._guard:
            sessions, self._all = self._all, []
        self._held = threading.local()
        for session in sessions:
            with contextlib.suppress(*self.failures):
                session.close()


def shown(url: str) -> str:
    """The URL without its password."""
    parts = urlsplit(url)
    if "@" not in parts.netloc:
        return url
    user, _, place = parts.netloc.rpartition("@")
    return parts._replace(netloc=f"{user.partition(':')[0]}@{place}", query="").geturl()


def _is_busy(error: BaseException) -> bool:
    """Whether PostgreSQL gave up waiting for a lock (lock_not_available)."""
    details = error.args[0] if error.args else None
    return isinstance(details, dict) and details.get("C") == "55P03"


def _reason(error: BaseException) -> str:
    details = error.args[0] if error.args else str(error)
    return str(details.get("M", details)) if isinstance(details, dict) else str(details)


def _dialect(url: str) -> tuple[Any, tuple[type[BaseException], ...]]:
    """How to connect, and what a failing statement raises. Raises UserError for another kind of URL."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return lambda: SqliteSession(Path(url)), (sqlite3.Error,)
    if scheme == "sqlite":
        path = rest.removeprefix("/") if rest.startswith("/") else rest
        return lambda: SqliteSession(Path(path)), (sqlite3.Error,)
    if scheme in ("postgresql", "postgres"):
        try:
            from pg8000.exceptions import DatabaseError, InterfaceError
        except ModuleNotFoundError as error:
            raise UserError(
                f"{shown(url)}: needs {error.name}\n    pip install 'posttrain[postgres]'"
            ) from error
        return lambda: PostgresSession(url), (DatabaseError, InterfaceError, OSError)
    raise UserError(
        f"{shown(url)}: no database of this kind is known\n"
        "    name a file (study.db, sqlite:///path/study.db) or postgresql://user:password@host:5432/name"
    )


class SqliteSession:
    """One connection to an SQLite file, which is made, readable by its owner only, where there is none."""

    def __init__(self, path: Path) -> None:
        try:
            # Opened by hand only to make it: closing a descriptor gives up this process's locks on the file.
            with contextlib.suppress(FileExistsError):
                os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
            self.connection = sqlite3.connect(
                path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
        except (sqlite3.Error, OSError) as error:
            raise _unusable(path, error) from error
        self.connection.row_factory = sqlite3.Row
        try:
            for statement in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
                self.connection.execute(f"PRAGMA {statement}")
            self.connection.execute("BEGIN IMMEDIATE")
            self.connection.execute("ROLLBACK")
        except sqlite3.Error as error:
            self.connection.close()
            raise _unusable(path, error) from error

    def run(self, sql: str, **values: Any) -> list[Row]:
        return [dict(row) for row in self.connection.execute(sql, values)]

    def close(self) -> None:
        self.connection.close()


def _unusable(path: Path, error: Exception) -> UserError:
    if not path.parent.is_dir():
        return UserError(f"{path}: there is no directory {path.parent}\n    make it first")
    if path.is_dir():
        return UserError(f"{path}: is a directory\n    name a file in it")
    if "locked" in str(error):
        return UserError(
            f"{path}: is locked by another program\n    end it, or wait until it has finished, and try again"
        )
    return UserError(
        f"{path}: cannot be used as an SQLite database ({error})\n    name a file that was made by "
        "`posttrain annotate create`, or a new one, where this user may write"
    )


class PostgresSession:
    """One connection to PostgreSQL; the tables are in its schema `annotate`."""

    def __init__(self, url: str) -> None:
        import ssl

        from pg8000.exceptions import DatabaseError, InterfaceError
        from pg8000.native import Connection

        try:
            parts = urlsplit(url)
            port = parts.port or 5432
        except ValueError as error:
            raise UserError(f"{shown(url)}: {error}\n    write postgresql://user@host:5432/name") from error
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        unknown = sorted(set(query) - {"host", "sslmode"})
        if unknown or query.get("sslmode", "prefer") not in ("disable", "prefer", "require", "verify-full"):
            raise UserError(
                f"{shown(url)}: of what follows ? only host=/socket/folder and "
                "sslmode=disable|prefer|require|verify-full are known"
            )
        user = unquote(parts.username or "") or os.environ.get("PGUSER") or os.environ.get("USER", "postgres")
        folder = query.get("host", "")
        secure: dict[str, Any] = {"disable": False, "prefer": None, "require": True}
        mode = query.get("sslmode", "disable" if folder else "prefer")
        try:
            self.connection = Connection(
                user,
                host=parts.hostname or "localhost",
                port=port,
                database=unquote(parts.path.removeprefix("/")) or user,
                password=unquote(parts.password) if parts.password else os.environ.get("PGPASSWORD"),
                unix_sock=f"{folder}/.s.PGSQL.{port}" if folder.startswith("/") else None,
                ssl_context=secure.get(mode, ssl.create_default_context()),
                timeout=ANSWER_SECONDS,
                application_name="posttrain annotate",
            )
        except (DatabaseError, InterfaceError, OSError) as error:
            raise UserError(
                f"{shown(url)}: cannot be connected to ({_reason(error)})\n    start the server, or correct "
                "user, password (PGPASSWORD keeps it out of the command), host, port and database name"
            ) from error
        try:
            for statement in (
                "SET synchronous_commit TO on",
                "SET client_min_messages TO warning",
                f"SET lock_timeout TO {int(BUSY_SECONDS * 1000)}",
                "SET search_path TO annotate",
            ):
                self.connection.run(statement)
        except (DatabaseError, InterfaceError, OSError) as error:
            raise UserError(f"{shown(url)}: {_reason(error)}") from error

    def run(self, sql: str, **values: Any) -> list[Row]:
        # Through a prepared form only where there are values: BEGIN and COMMIT need none.
        rows = self.connection.run(sql, **values)
        if not rows:
            return []
        names = [column["name"] for column in self.connection.columns]
        return [dict(zip(names, row, strict=True)) for row in rows]

    def close(self) -> None:
        self.connection.close()
