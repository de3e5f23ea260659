"""Studies for Argilla and Label Studio; returned.py reads the votes that come back.

Label Studio: its JSON of tasks (labelstud.io/guide/task_format), with a labeling configuration beside it.
Argilla: records as the SDK writes and reads them (`Record.to_dict`, `Dataset.records.to_json`). A is the
first answer of an item, which was drawn; neither file names a model. Items are recognised by
their name when votes return.
"""

from __future__ import annotations

import json
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal
from xml.sax.saxutils import quoteattr

from eval.annotate.database import Database, Row
from eval.annotate.store import Study
from eval.annotate.votes import standing_votes
from posttrain.errors import UserError
from posttrain.rundir import atomic_write_text

Tool = Literal["argilla", "label-studio"]
LABELS = {"first": "A", "second": "B", "tie": "tie", "both_bad": "both bad"}
RATING_LABELS = {"first": "A", "second": "B", "same": "same"}
NOBODY = "@annotators.invalid"
"""Makes an annotator's name an e-mail address, by which Label Studio knows people."""


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
