"""Studies for Argilla and Label Studio, and votes back from them.

Label Studio: its JSON of tasks (labelstud.io/guide/task_format), with a labeling configuration beside it.
Argilla: records as the SDK writes and reads them (`Record.to_dict`, `Dataset.records.to_json`). A is the
first answer of an item, which was drawn; neither file names a model. Items are recognised by
their name when votes return.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal
from xml.sax.saxutils import quoteattr

from eval.annotate.database import Database, Row, Session
from eval.annotate.store import Study, dump, insert_annotator
from eval.annotate.votes import Opinion, as_seen, standing_votes
from posttrain.errors import DataError, UserError
from posttrain.rundir import atomic_write_text

Tool = Literal["argilla", "label-studio"]
LABELS = {"first": "A", "second": "B", "tie": "tie", "both_bad": "both bad"}
RATING_LABELS = {"first": "A", "second": "B", "same": "same"}
FROM_LABEL = {label: name for name, label in LABELS.items()} | {"left": "first", "right": "second"}
FROM_RATING = {label: name for name, label in RATING_LABELS.items()}
NOBODY = "@annotators.invalid"
"""Makes an annotator's name an e-mail address, by which Label Studio knows people."""


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


def write(database: Database, study: Study, output: Path, tool: Tool) -> int:
    """Write all items, with the votes there are; the number of items. Raises UserError."""
    if output.suffix != ".json" or not output.parent.is_dir():
        raise UserError(f"{output}: must be a .json file in a directory that is there")
    with database.reading() as session:
        items = session.run(
            "SELECT name, prompt, first_answer, second_answer FROM items WHERE study = :study ORDER BY place",
            study=study.id,
        )
        votes: dict[str, list[Row]] = {}
        for vote in standing_votes(session, study):
            votes.setdefault(vote["item"], []).append(vote)
    make = _task if tool == "label-studio" else _record
    rows = [make(number, item, votes.get(item["name"], [])) for number, item in enumerate(items, start=1)]
    atomic_write_text(output, json.dumps(rows, ensure_ascii=False, indent=1) + "\n", 0o600)
    if tool == "label-studio":
        atomic_write_text(output.with_suffix(".xml"), labeling_config(study.config.criteria))
    return len(rows)


def labeling_config(criteria: list[str]) -> str:
    """Label Studio's configuration for the tasks."""
    asked = "".join(_choices(f"rating-{name}", RATING_LABELS, name) for name in criteria)
    return (
        '<View>\n  <Text name="prompt" value="$prompt"/>\n'
        '  <Header value="A"/>\n  <Text name="answer_a" value="$answer_a"/>\n'
        '  <Header value="B"/>\n  <Text name="answer_b" value="$answer_b"/>\n'
        f"{_choices('preference', LABELS, 'Which answer is better?')}{asked}"
        '  <TextArea name="comment" toName="prompt"/>\n</View>\n'
    )


def _choices(name: str, labels: dict[str, str], title: str) -> str:
    values = "".join(f"<Choice value={quoteattr(label)}/>" for label in labels.values())
    return (
        f"  <Header value={quoteattr(title)}/>\n"
        f'  <Choices name={quoteattr(name)} toName="prompt" choice="single">{values}</Choices>\n'
    )


def _fields(item: Row) -> dict[str, str]:
    turns = json.loads(item["prompt"])
    return {
        "prompt": "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns),
        "answer_a": json.loads(item["first_answer"]),
        "answer_b": json.loads(item["second_answer"]),
    }


def _task(number: int, item: Row, votes: list[Row]) -> dict[str, Any]:
    def result(name: str, kind: str, value: list[str]) -> dict[str, Any]:
        key = "text" if kind == "textarea" else kind
        return {
            "id": uuid.uuid4().hex[:10],
            "from_name": name,
            "to_name": "prompt",
            "type": kind,
            "value": {key: value},
        }

    annotations = []
    for vote in votes:
        results = [result("preference", "choices", [LABELS[vote["preferred"]]])]
        for name, rating in sorted(vote["ratings"].items()):
            results.append(result(f"rating-{name}", "choices", [RATING_LABELS[rating]]))
        if vote["comment"]:
            results.append(result("comment", "textarea", [vote["comment"]]))
        annotations.append(
            {
                "result": results,
                "completed_by": {"email": f"{vote['annotator']}{NOBODY}"},
                "lead_time": vote["seconds"],
                "created_at": datetime.fromtimestamp(vote["time"], UTC).isoformat(),
                "was_cancelled": False,
                "ground_truth": False,
            }
        )
    return {
        "id": number,
        "data": {"item": item["name"], **_fields(item)},
        "annotations": annotations,
        "predictions": [],
    }


def _record(number: int, item: Row, votes: list[Row]) -> dict[str, Any]:
    responses: dict[str, list[dict[str, str]]] = {}
    for vote in votes:
        user = str(uuid.UUID(hex=vote["annotator_id"]))
        given = {"preference": LABELS[vote["preferred"]]}
        given |= {f"rating-{name}": RATING_LABELS[value] for name, value in vote["ratings"].items()}
        if vote["comment"]:
            given["comment"] = vote["comment"]
        for question, value in sorted(given.items()):
            responses.setdefault(question, []).append({"value": value, "user_id": user})
    return {
        "id": item["name"],
        "fields": _fields(item),
        "metadata": {},
        "suggestions": {},
        "responses": responses,
        "vectors": {},
        "_server_id": None,
    }


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
    if not item["is_gold"] and item["taken"] >= study.config.overlap:
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
    session.run(
        "INSERT INTO votes (nonce, assignment, choice, preferred, ratings, comment, seconds, time) "
        "VALUES (:nonce, :assignment, :choice, :preferred, :ratings, :comment, :seconds, :time)",
        nonce=study.keyed("nonce", assignment, 0)[:32],
        assignment=assignment,
        choice=as_seen(vote.preferred, 0),
        preferred=vote.preferred,
        ratings=dump(vote.opinion.ratings),
        comment=dump(vote.opinion.comment),
        seconds=vote.seconds,
        time=moment,
    )
    session.run("UPDATE items SET taken = taken + 1 WHERE id = :item", item=item["id"])
    return "added"
