"""Studies and annotators in the database."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import time
from dataclasses import dataclass
from typing import Any

from eval.annotate import schema
from eval.annotate.database import Database, Row, Session, UnavailableError, shown
from eval.annotate.study import NAME, Loaded, StudyConfig
from posttrain.errors import UserError

PREFIX = "pa-"
ROLES = ("annotator", "admin")


@dataclass(frozen=True)
class Study:
    """A study as it is in the database."""

    id: str
    config: StudyConfig
    source: dict[str, Any]
    secret: bytes

    def keyed(self, purpose: str, *parts: object) -> str:
        """HMAC-SHA256 of what is decided by chance, under the study's secret, in hexadecimal."""
        message = json.dumps([purpose, *map(str, parts)]).encode("utf-8")
        return hmac.new(self.secret, message, hashlib.sha256).hexdigest()


def sha256(secret: str) -> str:
    """Hash of a token of 256 random bits, which nobody can search for."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def dump(value: Any) -> str:
    """JSON in ASCII: what PostgreSQL refuses as text (NUL, lone surrogates) is escaped."""
    return json.dumps(value, ensure_ascii=True, separators=(",", ":"))


def create_study(database: Database, config: StudyConfig, loaded: Loaded, now: float | None = None) -> Study:
    """Put a study into the database, which is made where there is none.

    Which of two answers is the first one is drawn, and so is the order of items: neither says whose they are.
    Raises UserError when the name is taken.
    """
    schema.create(database)
    study, secret = secrets.token_hex(16), secrets.token_hex(32)
    source = {"files": loaded.sources, "left_out": dict(sorted(loaded.left_out.items()))}
    places = list(range(len(loaded.items)))
    secrets.SystemRandom().shuffle(places)
    with database.writing() as session:
        if session.run("SELECT 1 FROM studies WHERE name = :name", name=config.name):
            raise UserError(
                f"{shown(database.url)}: holds a study {config.name} already\n"
                "    give this one another `name`"
            )
        session.run(
            "INSERT INTO studies (id, name, config, source, secret, created) "
            "VALUES (:id, :name, :config, :source, :secret, :created)",
            id=study,
            name=config.name,
            config=config.model_dump_json(),
            source=dump(source),
            secret=secret,
            created=time.time() if now is None else now,
        )
        for place, item in zip(places, loaded.items, strict=True):
            order = (1, 0) if secrets.randbits(1) else (0, 1)
            gold = item.gold
            if order == (1, 0) and gold in ("first", "second"):
                gold = "second" if gold == "first" else "first"
            session.run(
                "INSERT INTO items (id, study, place, name, prompt, first_answer, second_answer, "
                "first_model, second_model, gold, is_gold) VALUES (:id, :study, :place, :name, :prompt, "
                ":first_answer, :second_answer, :first_model, :second_model, :gold, :is_gold)",
                id=secrets.token_hex(16),
                study=study,
                place=place,
                name=item.name,
                prompt=dump(item.prompt),
                first_answer=dump(item.answers[order[0]]),
                second_answer=dump(item.answers[order[1]]),
                first_model=item.models[order[0]],
                second_model=item.models[order[1]],
                gold=gold,
                is_gold=int(gold is not None),
            )
    return Study(study, config, source, bytes.fromhex(secret))


def open_study(database: Database, name: str | None = None) -> Study:
    """The study of that name, or the only one. Raises UserError."""
    schema.require(database)
    try:
        with database.reading() as session:
            rows = session.run("SELECT * FROM studies ORDER BY name")
    except UnavailableError as error:
        raise UserError(str(error)) from error
    names = [row["name"] for row in rows]
    chosen = [row for row in rows if name in (None, row["name"])]
    if len(chosen) != 1:
        what = f"no study {name}" if name else f"{len(rows)} studies" if rows else "no study"
        raise UserError(
            f"{shown(database.url)}: holds {what}\n    "
            + (f"name one with --study: {', '.join(names)}" if rows else "make one with `annotate create`")
        )
    (row,) = chosen
    config = StudyConfig.model_validate_json(row["config"])
    return Study(row["id"], config, json.loads(row["source"]), bytes.fromhex(row["secret"]))


def add_annotator(database: Database, study: Study, name: str, role: str = "annotator") -> str:
    """Add somebody; the token to log in with is returned, not kept. Raises UserError: name taken, or none."""
    if not re.fullmatch(NAME, name):
        raise UserError(f"NAME: {name!r} is no name\n    use letters, digits, '.', '_' and '-', at most 64")
    token = PREFIX + secrets.token_urlsafe(32)
    with database.writing() as session:
        insert_annotator(session, study, name, role, sha256(token))
    return token


def insert_annotator(
    session: Session, study: Study, name: str, role: str, token_sha256: str | None, id: str | None = None
) -> str:
    """The row of an annotator; its id. Raises UserError for a name that is taken."""
    if session.run(
        "SELECT 1 FROM annotators WHERE study = :study AND name = :name", study=study.id, name=name
    ):
        raise UserError(
            f"NAME: {name} is there already\n    choose another, or see `posttrain annotate annotators list`"
        )
    made = id or secrets.token_hex(16)
    session.run(
        "INSERT INTO annotators (id, study, name, role, token_sha256, created) "
        "VALUES (:id, :study, :name, :role, :token, :created)",
        id=made,
        study=study.id,
        name=name,
        role=role,
        token=token_sha256,
        created=time.time(),
    )
    return made


def revoke_annotator(database: Database, study: Study, name: str) -> None:
    """Let `name` log in no more: sessions end, open items return, votes stay. Raises UserError: unknown."""
    with database.writing() as session:
        rows = session.run(
            "UPDATE annotators SET revoked = :now WHERE study = :study AND name = :name AND revoked IS NULL "
            "RETURNING id",
            now=time.time(),
            study=study.id,
            name=name,
        )
        if not rows:
            raise UserError(
                f"NAME: there is no {name} to revoke\n    see `posttrain annotate annotators list`"
            )
        session.run("DELETE FROM sessions WHERE annotator = :annotator", annotator=rows[0]["id"])
        session.run(
            "UPDATE assignments SET lease = 0 WHERE annotator = :annotator AND state = 'open'",
            annotator=rows[0]["id"],
        )


def list_annotators(database: Database, study: Study) -> list[Row]:
    """name, role, created, revoked, votes, of everybody, by name."""
    with database.reading() as session:
        return session.run(
            "SELECT a.name, a.role, a.created, a.revoked, (SELECT COUNT(*) FROM assignments s "
            "WHERE s.annotator = a.id AND s.state = 'voted') AS votes "
            "FROM annotators a WHERE a.study = :study ORDER BY a.name",
            study=study.id,
        )


def find_by_token(session: Session, study: Study, token: str) -> Row | None:
    """Whose token it is. Compares with every hash of the study, the same work whatever the outcome."""
    digest, found = sha256(token), None
    for row in session.run(
        "SELECT id, name, role, token_sha256, revoked FROM annotators "
        "WHERE study = :study AND token_sha256 IS NOT NULL",
        study=study.id,
    ):
        if hmac.compare_digest(digest, row["token_sha256"]) and row["revoked"] is None:
            found = row
    return found
