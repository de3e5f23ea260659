"""The tables of an annotation database, and the version they have.

Votes are never changed: a vote that its annotator takes back stays, with the time of that in `withdrawn`.
Texts that people or models wrote are JSON, in ASCII, so that both databases take what only one of them would.
"""

from __future__ import annotations

from eval.annotate.database import Database, Session, UnavailableError, shown
from posttrain.errors import UserError

VERSION = 1
TABLES = (
    """CREATE TABLE IF NOT EXISTS schema_version (version INTEGER NOT NULL)""",
    # secret: keys of the order of answers, of forms and of gold checks. source: where the items came from.
    """CREATE TABLE IF NOT EXISTS studies (
    id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, config TEXT NOT NULL, source TEXT NOT NULL,
    secret TEXT NOT NULL, created DOUBLE PRECISION NOT NULL)""",
    # place: a random order. gold: the known answer (first, second, tie, both_bad), null where there is none.
    # taken: open and voted assignments, which assignment.py keeps; gold items have no bound.
    """CREATE TABLE IF NOT EXISTS items (
    id TEXT PRIMARY KEY, study TEXT NOT NULL REFERENCES studies(id), place INTEGER NOT NULL,
    name TEXT NOT NULL, prompt TEXT NOT NULL, first_answer TEXT NOT NULL, second_answer TEXT NOT NULL,
    first_model TEXT NOT NULL, second_model TEXT NOT NULL, gold TEXT, is_gold INTEGER NOT NULL,
    taken INTEGER NOT NULL DEFAULT 0, UNIQUE (study, name))""",
    "CREATE INDEX IF NOT EXISTS items_next ON items (study, is_gold, taken, place)",
    # token_sha256: null for those whose votes were imported, who cannot log in.
    """CREATE TABLE IF NOT EXISTS annotators (
    id TEXT PRIMARY KEY, study TEXT NOT NULL REFERENCES studies(id), name TEXT NOT NULL,
    role TEXT NOT NULL, token_sha256 TEXT UNIQUE, created DOUBLE PRECISION NOT NULL,
    revoked DOUBLE PRECISION, UNIQUE (study, name))""",
    """CREATE TABLE IF NOT EXISTS sessions (
    sha256 TEXT PRIMARY KEY, annotator TEXT NOT NULL REFERENCES annotators(id),
    expires DOUBLE PRECISION NOT NULL)""",
    # state: open, voted, skipped, expired. swapped: whether the second answer stands left, as A.
    # shown: when the annotator began; ended: when he voted or skipped.
    """CREATE TABLE IF NOT EXISTS assignments (
    id TEXT PRIMARY KEY, item TEXT NOT NULL REFERENCES items(id),
    annotator TEXT NOT NULL REFERENCES annotators(id), swapped INTEGER NOT NULL, state TEXT NOT NULL,
    lease DOUBLE PRECISION NOT NULL, shown DOUBLE PRECISION NOT NULL, ended DOUBLE PRECISION,
    skip_reason TEXT, skip_comment TEXT, UNIQUE (item, annotator))""",
    "CREATE INDEX IF NOT EXISTS assignments_of ON assignments (annotator, state)",
    "CREATE INDEX IF NOT EXISTS assignments_open ON assignments (lease) WHERE state = 'open'",
    # nonce: of the form the vote came from. choice: a, b, tie, both_bad, as seen; preferred: first, ...
    """CREATE TABLE IF NOT EXISTS votes (
    nonce TEXT PRIMARY KEY, assignment TEXT NOT NULL REFERENCES assignments(id), choice TEXT NOT NULL,
    preferred TEXT NOT NULL, ratings TEXT NOT NULL, comment TEXT NOT NULL,
    seconds DOUBLE PRECISION NOT NULL, time DOUBLE PRECISION NOT NULL, withdrawn DOUBLE PRECISION)""",
    "CREATE UNIQUE INDEX IF NOT EXISTS votes_standing ON votes (assignment) WHERE withdrawn IS NULL",
    """CREATE TABLE IF NOT EXISTS drafts (
    assignment TEXT PRIMARY KEY REFERENCES assignments(id), ratings TEXT NOT NULL, comment TEXT NOT NULL)""",
)


def create(database: Database) -> None:
    """Make the tables where they are not there yet. Raises UserError: another version's, or not allowed."""
    database.check()
    try:
        with database.writing() as session:
            if database.postgres:
                session.run("CREATE SCHEMA IF NOT EXISTS annotate")
            elif _foreign_tables(session):
                raise UserError(
                    f"{shown(database.url)}: is the database of something else\n"
                    "    name a new file, or one that was made by `posttrain annotate create`"
                )
            for statement in TABLES:
                session.run(statement)
            found = session.run("SELECT version FROM schema_version")
            if not found:
                session.run("INSERT INTO schema_version (version) VALUES (:version)", version=VERSION)
                return
        _check(database, found[0]["version"])
    except UnavailableError as error:
        raise UserError(f"{error}\n    the user of the database must be allowed to make tables") from error


def require(database: Database) -> None:
    """Raise UserError unless the tables are there, of this version."""
    database.check()
    try:
        with database.reading() as session:
            if not database.postgres and not _has_version(session):
                raise _missing(database)
            found = session.run("SELECT version FROM schema_version")
    except UnavailableError as error:
        if "schema_version" in str(error):
            raise _missing(database) from error
        raise UserError(str(error)) from error
    _check(database, found[0]["version"])


def _has_version(session: Session) -> bool:
    return bool(session.run("SELECT 1 FROM sqlite_master WHERE name = 'schema_version'"))


def _foreign_tables(session: Session) -> bool:
    others = session.run("SELECT 1 FROM sqlite_master WHERE type = 'table' LIMIT 1")
    return bool(others) and not _has_version(session)


def _missing(database: Database) -> UserError:
    return UserError(
        f"{shown(database.url)}: holds no study\n    make one with `posttrain annotate create STUDY.yaml`"
    )


def _check(database: Database, version: int) -> None:
    if version != VERSION:
        raise UserError(
            f"{shown(database.url)}: has version {version} of the tables, this posttrain version {VERSION}\n"
            "    use the posttrain that made it, or a new database"
        )
