"""What annotators do with an item: vote, skip, leave a draft, take the last of it back.

A vote is named by the nonce of its form. The same vote sent twice is one vote; another one from the same form
is refused, and so is one from a form whose vote was taken back. Changing one's mind is `undo`, then a new
vote: both stay in the database.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

from eval.annotate import assignment as assignments
from eval.annotate.database import Database, Row, Session
from eval.annotate.store import Study, dump

CHOICES = ("a", "b", "tie", "both_bad")
RATINGS = ("a", "same", "b")
SKIP_REASONS = ("unclear", "cannot_judge", "broken", "offensive", "other")
MAX_COMMENT_CHARACTERS = 4000


class RefusedError(Exception):
    """What was sent does not count; the message tells the annotator why. status: of the answer."""

    def __init__(self, message: str, status: int = 409) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Opinion:
    """What a form holds beside the choice. ratings: criterion -> a, same or b."""

    ratings: dict[str, str] = field(default_factory=dict)
    comment: str = ""


def vote(
    database: Database,
    study: Study,
    annotator: str,
    assignment: str,
    nonce: str,
    choice: str,
    opinion: Opinion,
    now: float,
) -> bool:
    """Keep a vote; it is on the disk when this returns. False: the same vote was there already.

    Raises RefusedError: not his, another vote stands, taken back, no place left on the item.
    """
    if choice not in CHOICES:
        raise RefusedError("That is no choice.", 400)
    with database.writing() as session:
        assignments.expire(session, study, now)
        row = _own(session, study, annotator, assignment)
        before = session.run("SELECT * FROM votes WHERE nonce = :nonce", nonce=nonce)
        if before:
            return _repeated(before[0], assignment, choice, opinion)
        if row["state"] == "voted":
            raise RefusedError("You have voted on this item. To change your vote, undo it first.")
        if nonce != assignments.nonce_of(session, study, assignment):
            raise RefusedError("This form is out of date.")
        if row["state"] == "skipped":
            raise RefusedError("You have skipped this item. To vote on it, undo that first.")
        shown = row["shown"]
        if row["state"] == "expired" and not assignments.take_back(session, study, row, now):
            raise RefusedError("The item was left open for too long, and others have voted on it meanwhile.")
        ratings = {name: as_stored(value, row["swapped"]) for name, value in opinion.ratings.items()}
        stored = Opinion(ratings, opinion.comment)
        preferred = as_stored(choice, row["swapped"])
        insert_vote(session, nonce, assignment, choice, preferred, stored, max(now - shown, 0.0), now)
        _end(session, assignment, "voted", now)
    return True


def insert_vote(
    session: Session,
    nonce: str,
    assignment: str,
    choice: str,
    preferred: str,
    opinion: Opinion,
    seconds: float,
    time: float,
) -> None:
    """The row of a vote. preferred and the opinion's ratings are as `as_stored` has them."""
    session.run(
        "INSERT INTO votes (nonce, assignment, choice, preferred, ratings, comment, seconds, time) "
        "VALUES (:nonce, :assignment, :choice, :preferred, :ratings, :comment, :seconds, :time)",
        nonce=nonce,
        assignment=assignment,
        choice=choice,
        preferred=preferred,
        ratings=dump(opinion.ratings),
        comment=dump(opinion.comment),
        seconds=seconds,
        time=time,
    )


def skip(
    database: Database, study: Study, annotator: str, assignment: str, reason: str, comment: str, now: float
) -> None:
    """Give an item back for good, with the reason. Again is no mistake. Raises RefusedError."""
    if reason not in SKIP_REASONS:
        raise RefusedError("Choose a reason for skipping the item.", 400)
    with database.writing() as session:
        assignments.expire(session, study, now)
        row = _own(session, study, annotator, assignment)
        if row["state"] == "skipped":
            return
        if row["state"] == "voted":
            raise RefusedError("You have voted on this item. To skip it, undo that first.")
        if row["state"] == "open":
            session.run("UPDATE items SET taken = taken - 1 WHERE id = :item", item=row["item"])
        session.run(
            "UPDATE assignments SET skip_reason = :reason, skip_comment = :comment WHERE id = :id",
            reason=reason,
            comment=dump(comment),
            id=assignment,
        )
        _end(session, assignment, "skipped", now)


def draft(
    database: Database, study: Study, annotator: str, assignment: str, opinion: Opinion, now: float
) -> None:
    """Keep what is not voted yet, and the item for its annotator. Raises RefusedError."""
    with database.writing() as session:
        row = _own(session, study, annotator, assignment)
        if row["state"] in ("voted", "skipped"):
            raise RefusedError("You are done with this item.")
        assignments.renew(session, study, assignment, now)
        _save_draft(session, assignment, opinion)


def undo(database: Database, study: Study, annotator: str, last: str, now: float) -> None:
    """Take the last vote, or the last skip, back: its item is open again, with its comment and ratings.

    last: which that is, from `last_done`, so that sending it twice undoes one. Raises RefusedError: something
    was done since, or others took the place of what was skipped.
    """
    with database.writing() as session:
        assignments.expire(session, study, now)
        row = last_done(session, annotator)
        if row is None or row["key"] != last:
            if _undone(session, annotator, last):
                return
            raise RefusedError("This is not the last thing you did. Load the page again.")
        if row["state"] == "skipped":
            if not assignments.take_back(session, study, row, now):
                raise RefusedError("Others have voted on the item that you skipped.")
            _save_draft(session, row["id"], Opinion(comment=json.loads(row["skip_comment"])))
            return
        session.run("UPDATE votes SET withdrawn = :now WHERE nonce = :nonce", now=now, nonce=last)
        # Its place is taken already: the vote had it.
        assignments.reopen(session, study, row["id"], now)
        ratings = json.loads(row["ratings"])
        seen = {name: as_seen(value, row["swapped"]) for name, value in ratings.items()}
        _save_draft(session, row["id"], Opinion(seen, json.loads(row["comment"])))


def last_done(session: Session, annotator: str) -> Row | None:
    """What `undo` would take back: an assignment, with `key`, the nonce of its vote, or its id if skipped."""
    rows = session.run(
        "SELECT s.id, s.item, s.state, s.swapped, s.skip_comment, i.taken, i.is_gold, v.ratings, v.comment, "
        "COALESCE(v.nonce, s.id) AS key FROM assignments s JOIN items i ON i.id = s.item "
        "LEFT JOIN votes v ON v.assignment = s.id AND v.withdrawn IS NULL "
        "WHERE s.annotator = :annotator AND s.state IN ('voted', 'skipped') "
        "ORDER BY s.ended DESC, s.id LIMIT 1",
        annotator=annotator,
    )
    return rows[0] if rows else None


def _undone(session: Session, annotator: str, last: str) -> bool:
    """Whether it was taken back before, and nothing was done with its item since."""
    return bool(
        session.run(
            "SELECT 1 FROM assignments s LEFT JOIN votes v ON v.assignment = s.id "
            "WHERE s.annotator = :annotator AND s.state IN ('open', 'expired') AND "
            "((v.nonce = :last AND v.withdrawn IS NOT NULL) OR s.id = :last)",
            annotator=annotator,
            last=last,
        )
    )


def as_stored(choice: str, swapped: int) -> str:
    """A choice among A and B as one among the stored answers: first, second, or what is neither."""
    sides = ("second", "first") if swapped else ("first", "second")
    return dict(zip(("a", "b"), sides, strict=True)).get(choice, choice)


def as_seen(preferred: str, swapped: int) -> str:
    """The inverse of `as_stored`."""
    return next(choice for choice in (*CHOICES, *RATINGS) if as_stored(choice, swapped) == preferred)


def _own(session: Session, study: Study, annotator: str, assignment: str) -> Row:
    """The assignment, if it is the annotator's and of this study. Raises RefusedError, the same otherwise."""
    rows = session.run(
        "SELECT s.id, s.item, s.state, s.swapped, s.shown, i.taken, i.is_gold FROM assignments s "
        "JOIN items i ON i.id = s.item WHERE s.id = :id AND s.annotator = :annotator AND i.study = :study",
        id=assignment,
        annotator=annotator,
        study=study.id,
    )
    if not rows:
        raise RefusedError("There is no such item for you.", 404)
    return rows[0]


def _repeated(before: Row, assignment: str, choice: str, opinion: Opinion) -> bool:
    if before["withdrawn"] is not None:
        raise RefusedError("This vote was taken back. Vote on the item as it is shown now.")
    # The draft's fields may have changed between two clicks; the choice is what counts as another vote.
    if before["assignment"] != assignment or before["choice"] != choice:
        raise RefusedError("You have voted on this item. To change your vote, undo it first.")
    return False


def _end(session: Session, assignment: str, state: str, now: float) -> None:
    # Later than what its annotator did before, also where the clock was set back: `undo` goes by this order.
    (row,) = session.run(
        "SELECT MAX(ended) AS before FROM assignments WHERE annotator = "
        "(SELECT annotator FROM assignments WHERE id = :id)",
        id=assignment,
    )
    ended = now if row["before"] is None else max(now, math.nextafter(row["before"], math.inf))
    session.run(
        "UPDATE assignments SET state = :state, ended = :ended WHERE id = :id",
        state=state,
        ended=ended,
        id=assignment,
    )
    session.run("DELETE FROM drafts WHERE assignment = :id", id=assignment)


def _save_draft(session: Session, assignment: str, opinion: Opinion) -> None:
    session.run(
        "INSERT INTO drafts (assignment, ratings, comment) VALUES (:id, :ratings, :comment) "
        "ON CONFLICT (assignment) DO UPDATE SET ratings = excluded.ratings, comment = excluded.comment",
        id=assignment,
        ratings=dump(opinion.ratings),
        comment=dump(opinion.comment),
    )


def standing_votes(session: Session, study: Study) -> list[dict[str, Any]]:
    """Every vote that counts, with its item and annotator, by item and name."""
    rows = session.run(
        "SELECT i.name AS item, i.is_gold, i.gold, i.prompt, i.first_answer, i.second_answer, i.first_model, "
        "i.second_model, a.name AS annotator, a.id AS annotator_id, s.swapped, v.choice, v.preferred, "
        "v.ratings, v.comment, v.seconds, v.time FROM votes v JOIN assignments s ON s.id = v.assignment "
        "JOIN items i ON i.id = s.item JOIN annotators a ON a.id = s.annotator "
        "WHERE i.study = :study AND v.withdrawn IS NULL",
        study=study.id,
    )
    for row in rows:
        for name in ("prompt", "first_answer", "second_answer", "ratings", "comment"):
            row[name] = json.loads(row[name])
    # Sorted here: the order of text differs between databases and their locales.
    return sorted(rows, key=lambda row: (row["item"], row["annotator"]))
