"""The records that drift compares: from a data set, from a jsonl file, or from the gateway's database.

A record is what a model was asked and what it answered. A conversation of a data set counts once, up to its
last answer; a preference pair counts with the chosen answer; an answer labelled bad does not count.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from data_prep.dataset import read_info, read_split
from posttrain.errors import DataError
from posttrain.hashing import hash_dataset
from serving.monitor.database import connect_to_read

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Record:
    """One request and its answer.

    answer: None where the data has prompts only, "" where the model said nothing. day: UTC. time: unix
    seconds. group: records of one group are not independent (one conversation, one customer). extra: the
    other keys of a jsonl line or row.
    """

    messages: Messages
    answer: str | None
    finish_reason: str | None = None
    score: float | None = None
    day: str | None = None
    time: float | None = None
    group: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """What a tag function gets: {"messages", "answer", "finish_reason", ...}."""
        return {
            **self.extra,
            "messages": self.messages,
            "answer": self.answer,
            "finish_reason": self.finish_reason,
        }


@dataclass(frozen=True)
class Selection:
    """Which records of a source. since: unix seconds. model and version: as the gateway names them."""

    day: str | None = None
    since: float | None = None
    model: str | None = None
    version: str | None = None

    def __str__(self) -> str:
        parts = [f"day {self.day}"] if self.day else []
        if self.since is not None:
            parts.append(f"since {datetime.fromtimestamp(self.since, UTC):%Y-%m-%d %H:%M} UTC")
        parts += [
            f"{name} {value}"
            for name, value in (("model", self.model), ("version", self.version))
            if value is not None
        ]
        return ", ".join(parts) or "all records"


def read_reference(path: Path) -> tuple[list[Record], dict[str, Any]]:
    """The records of a dataset directory (its train split) or of a jsonl file, and where they are from.

    The second value is {"path", "kind", "content_hash"}. Raises DataError.
    """
    content = {"path": str(path)}
    if path.is_file():
        return read_jsonl(path), {**content, "kind": "jsonl", "content_hash": hash_dataset(path)}
    rows = read_split(path, "train")
    kind = (read_info(path) or {}).get("kind")
    if kind is None:
        kind = next(
            name for name in ("chosen", "messages", "completion", "text", "prompt") if name in rows[0]
        )
        kind = {
            "chosen": "preference",
            "messages": "conversation",
            "completion": "unpaired_preference",
        }.get(kind, kind)
    if kind == "text":
        raise DataError(
            f"{path}: holds plain text, which has neither prompts nor answers\n"
            "    name a data set of conversations, preferences or prompts"
        )
    records = [record for row in rows if (record := _from_row(kind, row)) is not None]
    return records, {**content, "kind": kind, "content_hash": hash_dataset(path)}


def _from_row(kind: str, row: Mapping[str, Any]) -> Record | None:
    group = row["group"]
    if kind == "conversation":
        messages, answer = _split_answer(row["messages"])
        return None if answer is None else Record(messages, answer, group=group)
    if kind == "prompt":
        return Record(list(row["prompt"]), None, group=group)
    if kind == "unpaired_preference" and not row["label"]:
        return None
    said = row["chosen"] if kind == "preference" else row["completion"]
    return Record(list(row["prompt"]), said[-1]["content"], group=group)


def _split_answer(messages: Sequence[dict[str, str]]) -> tuple[Messages, str | None]:
    """The messages before the last assistant turn, and that turn's text; None where there is none."""
    for index in range(len(messages) - 1, -1, -1):
        if messages[index]["role"] == "assistant":
            return list(messages[:index]), messages[index]["content"]
    return list(messages), None


def read_jsonl(path: Path) -> list[Record]:
    """One record a line: {"messages", "answer"}, and optionally finish_reason, score, day and anything else.

    Without "answer" the last assistant message is the answer. Raises DataError with file and line.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            found = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: is neither UTF-8 text nor an SQLite database ({error})\n"
            "    name the gateway's monitoring.database, or a jsonl file"
        ) from error
    return [_parsed(line, f"{path}:{number}") for number, line in found]


def _parsed(line: str, where: str) -> Record:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise DataError(f'{where}: is not an object\n    write {{"messages": [...], "answer": "..."}}')
    messages = checked_messages(value.get("messages"), where)
    answer = value.get("answer")
    if answer is None:
        messages, answer = _split_answer(messages)
    score = value.get("score")
    if not isinstance(answer, (str, type(None))):
        raise DataError(f"{where}: answer is {type(answer).__name__}, not text")
    if isinstance(score, bool) or not isinstance(score, (int, float, type(None))):
        raise DataError(f"{where}: score is {score!r}, not a number")
    named = {"messages", "answer", "finish_reason", "score", "day", "group"}
    return Record(
        messages,
        answer,
        value.get("finish_reason"),
        None if score is None else float(score),
        value.get("day"),
        None,
        value.get("group"),
        {key: item for key, item in value.items() if key not in named},
    )


def checked_messages(value: Any, where: str) -> Messages:
    """`value` if it is a list of {"role": text, "content": text}. Raises DataError."""
    fits = isinstance(value, list) and value
    if not fits or not all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in value
    ):
        raise DataError(f'{where}: messages is not a list of {{"role": "...", "content": "..."}}')
    return value


def is_database(path: Path) -> bool:
    """Whether the file begins as SQLite's do."""
    with path.open("rb") as stream:
        return stream.read(16) == b"SQLite format 3\x00"


def read_samples(path: Path, selection: Selection) -> list[Record]:
    """The rows of the gateway's table `samples` for the selection's model and version, oldest first.

    Of every day: the days before are the trend. Read-only; the gateway may be writing.
    Raises DataError: no such table, or several models and none chosen.
    """
    chosen = {"model = ?": selection.model, "version = ?": selection.version}
    chosen = {condition: value for condition, value in chosen.items() if value is not None}
    query = f"SELECT {{}} FROM samples WHERE {' AND '.join(['1', *chosen])}"
    values = list(chosen.values())
    try:
        with closing(connect_to_read(path)) as database:
            models = [row[0] for row in database.execute(query.format("DISTINCT model"), values)]
            columns = (
                "request_id, day, time, model, version, messages, answer, finish_reason, redactions, flag"
            )
            rows = database.execute(f"{query.format(columns)} ORDER BY time, request_id", values).fetchall()
    except sqlite3.Error as error:
        raise DataError(
            f"{path}: the samples cannot be read ({error})\n"
            "    name the file of the gateway's monitoring.database, or a jsonl file"
        ) from error
    if len(models) > 1:
        raise DataError(
            f"{path}: holds samples of the models {', '.join(sorted(map(str, models)))}\n"
            "    choose one with --model: each has its own training data"
        )
    return [_from_sample(row, path) for row in rows]


def _from_sample(row: Sequence[Any], path: Path) -> Record:
    request, day, time, model, version, messages, answer, finish_reason, redactions, flag = row
    where = f"{path}: sample {request}"
    try:
        turns = checked_messages(json.loads(messages), where)
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{where}: messages is not valid JSON ({error})") from error
    extra = {
        "request_id": request,
        "model": model,
        "version": version,
        "redactions": redactions,
        "flag": flag,
    }
    return Record(turns, answer, finish_reason, None, day, time, None, extra)


def days_of(records: Iterable[Record]) -> dict[str, list[Record]]:
    """The records by day, in order; those without a day are left out."""
    days: dict[str, list[Record]] = {}
    for record in records:
        if record.day is not None:
            days.setdefault(record.day, []).append(record)
    return dict(sorted(days.items()))
