"""Votes that were given in Argilla or Label Studio, on items that exchange.py wrote for them."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from eval.annotate.assignment import has_room, nonce_of
from eval.annotate.database import Database, Session
from eval.annotate.exchange import LABELS, NOBODY, RATING_LABELS, Tool
from eval.annotate.store import Study, insert_annotator
from eval.annotate.votes import Opinion, as_seen, insert_vote
from posttrain.errors import DataError, UserError

FROM_LABEL = {label: name for name, label in LABELS.items()} | {"left": "first", "right": "second"}
FROM_RATING = {label: name for name, label in RATING_LABELS.items()}


@dataclass(frozen=True)
class Returned:
    """A vote in a file of another tool. annotator: a name, or an Argilla user's id as `id`."""

    item: str
    annotator: str
    preferred: str
    opinion: Opinion = field(default_factory=Opinion)
    seconds: float = 0.0
    time: float | None = None
    id: str | None = None


def read(path: Path, tool: Tool) -> tuple[list[Returned], Counter[str]]:
    """The votes in a file, and what is none, by reason. Raises UserError, DataError naming the row."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except ValueError as error:
        raise DataError(f"{path}: is not JSON ({error})\n    export it as JSON from {tool}") from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: must hold a list\n    export it as JSON from {tool}")
    found: list[Returned] = []
    left_out: Counter[str] = Counter()
    parse = _annotations if tool == "label-studio" else _responses
    for number, row in enumerate(rows, start=1):
        try:
            found += parse(row, left_out)
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            raise DataError(
                f"{path}: row {number}: is no row of {tool} as `annotate export --to {tool}` makes them "
                f"({type(error).__name__}: {error})\n    keep the item's name and the fields of the questions"
            ) from error
    return found, left_out


def _annotations(row: Any, left_out: Counter[str]) -> list[Returned]:
    found = []
    for annotation in row.get("annotations", []):
        if annotation.get("was_cancelled"):
            left_out["cancelled"] += 1
            continue
        preferred, ratings, comment = None, {}, ""
        for result in annotation["result"]:
            name, value = result["from_name"], result["value"]
            if result["type"] == "pairwise":
                preferred = FROM_LABEL[value["selected"]]
            elif name == "preference":
                preferred = FROM_LABEL[value["choices"][0]]
            elif name.startswith("rating-"):
                ratings[name.removeprefix("rating-")] = FROM_RATING[value["choices"][0]]
            elif name == "comment":
                comment = "\n".join(value["text"])
        if preferred is None:
            left_out["no_preference"] += 1
            continue
        created = annotation.get("created_at")
        found.append(
            Returned(
                item=row["data"]["item"],
                annotator=_person(annotation.get("completed_by")),
                preferred=preferred,
                opinion=Opinion(ratings, comment),
                seconds=float(annotation.get("lead_time") or 0.0),
                time=datetime.fromisoformat(created).timestamp() if created else None,
            )
        )
    return found


def _person(completed_by: Any) -> str:
    if isinstance(completed_by, dict):
        email = str(completed_by.get("email") or completed_by["id"]).removesuffix(NOBODY)
        return re.sub(r"[^A-Za-z0-9_.-]", "-", email)[:64]
    return f"label-studio-{int(completed_by)}"


def _responses(row: Any, left_out: Counter[str]) -> list[Returned]:
    by_user: dict[str, dict[str, str]] = {}
    for question, answers in row["responses"].items():
        for answer in answers:
            by_user.setdefault(uuid.UUID(answer["user_id"]).hex, {})[question] = answer["value"]
    found = []
    for user, given in by_user.items():
        if "preference" not in given:
            left_out["no_preference"] += 1
            continue
        ratings = {
            name.removeprefix("rating-"): FROM_RATING[value]
            for name, value in given.items()
            if name.startswith("rating-")
        }
        opinion = Opinion(ratings, given.get("comment", ""))
        found.append(
            Returned(row["id"], f"argilla-{user}", FROM_LABEL[given["preference"]], opinion, id=user)
        )
    return found


def add(database: Database, study: Study, votes: list[Returned]) -> Counter[str]:
    """Keep votes of another tool; how many were added, or why not. Annotators are made, without a token.

    Raises DataError for an item that the study does not have; then nothing is kept.
    """
    counts: Counter[str] = Counter()
    now = time.time()
    with database.writing() as session:
        for vote in votes:
            counts[_add(session, study, vote, now)] += 1
    return counts


def _add(session: Session, study: Study, vote: Returned, now: float) -> str:
    items = session.run(
        "SELECT id, taken, is_gold FROM items WHERE study = :study AND name = :name",
        study=study.id,
        name=vote.item,
    )
    if not items:
        raise DataError(
            f"the study {study.config.name} has no item {vote.item!r}\n    import into the study it came from"
        )
    people = session.run(
        "SELECT id FROM annotators WHERE study = :study AND (name = :name OR id = :id)",
        study=study.id,
        name=vote.annotator,
        id=vote.id or "",
    )
    person = (
        people[0]["id"]
        if people
        else insert_annotator(session, study, vote.annotator, "annotator", None, vote.id)
    )
    (item,) = items
    before = session.run(
        "SELECT v.preferred FROM assignments s LEFT JOIN votes v ON v.assignment = s.id "
        "AND v.withdrawn IS NULL WHERE s.item = :item AND s.annotator = :annotator",
        item=item["id"],
        annotator=person,
    )
    if before:
        return "there_already" if before[0]["preferred"] == vote.preferred else "voted_otherwise"
    if not has_room(study, item):
        return "over_overlap"
    moment = now if vote.time is None else vote.time
    assignment = uuid.uuid4().hex
    session.run(
        "INSERT INTO assignments (id, item, annotator, swapped, state, lease, shown, ended) "
        "VALUES (:id, :item, :annotator, 0, 'voted', :now, :shown, :now)",
        id=assignment,
        item=item["id"],
        annotator=person,
        now=moment,
        shown=moment - vote.seconds,
    )
    nonce, choice = nonce_of(session, study, assignment), as_seen(vote.preferred, 0)
    insert_vote(session, nonce, assignment, choice, vote.preferred, vote.opinion, vote.seconds, moment)
    session.run("UPDATE items SET taken = taken + 1 WHERE id = :item", item=item["id"])
    return "added"
