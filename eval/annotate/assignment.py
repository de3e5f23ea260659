"""Who gets which item: the least taken first, never over `overlap`, each annotator an item once.

An open assignment is a lease. When it runs out its place returns to the others; whoever had it gets it back,
with the draft, as long as there is room. Everything here happens in a writing transaction, of which there is
one at a time, so `items.taken` is the number of open and voted assignments whenever a transaction begins.
Nothing depends on which models' answers an item has, and the same statements run for gold checks and others.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import Any

from eval.annotate.database import Row, Session
from eval.annotate.store import Study


@dataclass(frozen=True)
class Task:
    """What an annotator sees. answers: as A and B. ratings, comment: of the draft, or of the vote undone."""

    assignment: str
    nonce: str
    prompt: list[dict[str, str]]
    answers: tuple[str, str]
    ratings: dict[str, str]
    comment: str


def expire(session: Session, study: Study, now: float) -> None:
    """Give back the places whose leases have run out, or were given by a clock that was far ahead."""
    over = "state = 'open' AND (lease <= :now OR lease > :ahead)"
    times = {"now": now, "ahead": now + 2 * study.config.lease_minutes * 60}
    session.run(
        "UPDATE items SET taken = taken - "
        f"(SELECT COUNT(*) FROM assignments WHERE item = items.id AND {over}) "
        f"WHERE study = :study AND id IN (SELECT item FROM assignments WHERE {over})",
        study=study.id,
        **times,
    )
    session.run(
        f"UPDATE assignments SET state = 'expired' WHERE {over} "
        "AND item IN (SELECT id FROM items WHERE study = :study)",
        study=study.id,
        **times,
    )


def current(session: Session, study: Study, annotator: str, now: float) -> Task | None:
    """The item the annotator is at, or the next one; None when there is nothing left for him."""
    expire(session, study, now)
    open_ones = session.run(
        "SELECT id FROM assignments WHERE annotator = :annotator AND state = 'open' ORDER BY shown DESC, id",
        annotator=annotator,
    )
    if open_ones:
        assignment = open_ones[0]["id"]
        renew(session, study, assignment, now)
        return task(session, study, assignment)
    assignment = _resume(session, study, annotator, now) or _new(session, study, annotator, now)
    return None if assignment is None else task(session, study, assignment)


def renew(session: Session, study: Study, assignment: str, now: float) -> None:
    """Begin the lease of an open assignment anew."""
    session.run(
        "UPDATE assignments SET lease = :lease WHERE id = :id AND state = 'open'",
        lease=_lease(study, now),
        id=assignment,
    )


def take_back(session: Session, study: Study, assignment: Row, now: float) -> bool:
    """Open an assignment again that had lost its place; False when there is none left.

    assignment: a row with `id`, `item`, `taken` and `is_gold`.
    """
    if not has_room(study, assignment):
        return False
    session.run("UPDATE items SET taken = taken + 1 WHERE id = :item", item=assignment["item"])
    reopen(session, study, assignment["id"], now)
    return True


def has_room(study: Study, item: Row) -> bool:
    """Whether one more vote on it is wanted: a gold check takes any number. item: `taken` and `is_gold`."""
    return bool(item["is_gold"] or item["taken"] < study.config.overlap)


def reopen(session: Session, study: Study, assignment: str, now: float) -> None:
    """Open an assignment that has its place, as if it were shown now for the first time."""
    session.run(
        "UPDATE assignments SET state = 'open', lease = :lease, shown = :now, ended = NULL, "
        "skip_reason = NULL, skip_comment = NULL WHERE id = :id",
        lease=_lease(study, now),
        now=now,
        id=assignment,
    )


def _lease(study: Study, now: float) -> float:
    """When a lease ends that begins now."""
    return now + study.config.lease_minutes * 60


def _resume(session: Session, study: Study, annotator: str, now: float) -> str | None:
    """An expired assignment of his own whose item still has room."""
    rows = session.run(
        "SELECT s.id, s.item, i.taken, i.is_gold FROM assignments s JOIN items i ON i.id = s.item "
        "WHERE s.annotator = :annotator AND s.state = 'expired' AND (i.is_gold = 1 OR i.taken < :overlap) "
        "ORDER BY s.shown DESC, s.id LIMIT 1",
        annotator=annotator,
        overlap=study.config.overlap,
    )
    if not rows or not take_back(session, study, rows[0], now):
        return None
    return str(rows[0]["id"])


def _new(session: Session, study: Study, annotator: str, now: float) -> str | None:
    given = session.run("SELECT COUNT(*) AS n FROM assignments WHERE annotator = :a", a=annotator)[0]["n"]
    drawn = _is_gold_drawn(study, annotator, given)
    # Both are looked for whatever was drawn, so that a gold check takes no less time.
    found = {
        is_gold: session.run(
            "SELECT id FROM items WHERE study = :study AND is_gold = :is_gold AND taken < :overlap AND NOT "
            "EXISTS (SELECT 1 FROM assignments s WHERE s.item = items.id AND s.annotator = :annotator) "
            "ORDER BY taken, place LIMIT 1",
            study=study.id,
            is_gold=is_gold,
            overlap=2**31 - 1 if is_gold else study.config.overlap,
            annotator=annotator,
        )
        for is_gold in (0, 1)
    }
    if not found[0]:
        return None
    item = (found[1] if drawn and found[1] else found[0])[0]["id"]
    assignment = secrets.token_hex(16)
    session.run(
        "INSERT INTO assignments (id, item, annotator, swapped, state, lease, shown) "
        "VALUES (:id, :item, :annotator, :swapped, 'open', :lease, :now)",
        id=assignment,
        item=item,
        annotator=annotator,
        swapped=int(study.keyed("order", annotator, item), 16) & 1,
        lease=_lease(study, now),
        now=now,
    )
    session.run("UPDATE items SET taken = taken + 1 WHERE id = :item", item=item)
    return assignment


def nonce_of(session: Session, study: Study, assignment: str) -> str:
    """Names the one vote that may be given on an assignment now; another one after a vote is withdrawn."""
    votes = session.run("SELECT COUNT(*) AS n FROM votes WHERE assignment = :id", id=assignment)
    return study.keyed("nonce", assignment, votes[0]["n"])[:32]


def task(session: Session, study: Study, assignment: str) -> Task:
    """What the page of an assignment shows."""
    (row,) = session.run(
        "SELECT s.swapped, i.prompt, i.first_answer, i.second_answer, d.ratings, d.comment "
        "FROM assignments s JOIN items i ON i.id = s.item LEFT JOIN drafts d ON d.assignment = s.id "
        "WHERE s.id = :id",
        id=assignment,
    )
    first, second = json.loads(row["first_answer"]), json.loads(row["second_answer"])
    return Task(
        assignment=assignment,
        nonce=nonce_of(session, study, assignment),
        prompt=json.loads(row["prompt"]),
        answers=(second, first) if row["swapped"] else (first, second),
        ratings=json.loads(row["ratings"] or "{}"),
        comment=json.loads(row["comment"] or '""'),
    )


def progress(session: Session, study: Study, annotator: str) -> dict[str, Any]:
    """done: the annotator's votes; left: items that wait for him, with the open one and gold checks to come.

    A gold check counts before it is drawn as after: neither done nor left says which it was.
    """
    (row,) = session.run(
        "SELECT COUNT(*) AS given, SUM(CASE WHEN s.state = 'voted' THEN 1 ELSE 0 END) AS done, "
        "SUM(CASE WHEN s.state = 'open' OR (s.state = 'expired' AND (i.is_gold = 1 OR i.taken < :overlap)) "
        "THEN 1 ELSE 0 END) AS waiting FROM assignments s JOIN items i ON i.id = s.item "
        "WHERE s.annotator = :annotator",
        annotator=annotator,
        overlap=study.config.overlap,
    )
    unseen = session.run(
        "SELECT is_gold, COUNT(*) AS n FROM items WHERE study = :study AND (is_gold = 1 OR taken < :overlap) "
        "AND NOT EXISTS (SELECT 1 FROM assignments s WHERE s.item = items.id AND s.annotator = :annotator) "
        "GROUP BY is_gold",
        study=study.id,
        overlap=study.config.overlap,
        annotator=annotator,
    )
    left = {found["is_gold"]: found["n"] for found in unseen}
    coming = _coming(study, annotator, row["given"], left.get(0, 0), left.get(1, 0))
    return {"done": row["done"] or 0, "left": (row["waiting"] or 0) + coming}


def _coming(study: Study, annotator: str, given: int, regular: int, gold: int) -> int:
    """How many items `_new` will give, if others take none."""
    coming = 0
    while regular:
        if gold and _is_gold_drawn(study, annotator, given + coming):
            gold -= 1
        else:
            regular -= 1
        coming += 1
    return coming


def _is_gold_drawn(study: Study, annotator: str, given: int) -> bool:
    """Whether the item after so many is to be a gold check."""
    return int(study.keyed("gold", annotator, given)[:16], 16) / 2**64 < study.config.gold_share
