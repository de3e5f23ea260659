"""What an operation is: rows in, one verdict a row out.

Rows carry typed records (``data_prep/records.py``), not Arrow batches: that a dialogue alternates and that
two sides differ is checked where a record is made, so no operation can hand on one that cannot be trained on.
At the borders between processes rows travel as Arrow (``to_arrow``, ``from_arrow``), with the columns of the
dataset directory and those that only matter on the way.

The shapes are what lets another engine run them unchanged. A map operation is a pure function of a batch
whose verdicts do not depend on where batches begin, so N processes or Ray's ``map_batches`` may cut them as
they like. A corpus operation is a row-local `view`, one `decide` over all views in order, and verdicts that
are again row-local: only the views have to come together in one place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from data_prep.dataset import schema, to_row
from data_prep.records import (
    ConversationRecord,
    Kind,
    Message,
    PreferenceRecord,
    PromptRecord,
    Record,
    TextRecord,
    UnpairedPreferenceRecord,
)

if TYPE_CHECKING:
    import pyarrow


@dataclass(frozen=True, slots=True)
class Row:
    """A record on its way. file, line: where it was read; source: the source's name in the configuration.

    ties: rows that share one of these strings land on the same side of the split. copy: 0 for the row itself,
    1, 2, ... for repetitions made by mixing.
    """

    record: Record
    file: str
    line: int
    source: str = ""
    ties: tuple[str, ...] = ()
    copy: int = 0


@dataclass(frozen=True, slots=True)
class Kept:
    """The row stays, as this record. notes: what is counted of it; review: for the review list."""

    record: Record
    notes: tuple[str, ...] = ()
    review: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Dropped:
    """The row goes. reason: a short countable slug; detail: the value and the bound."""

    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Stays:
    """A corpus operation keeps the row: `copies` times in all, tied to others, with tags and notes."""

    copies: int = 1
    ties: tuple[str, ...] = ()
    tags: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Decided:
    """Of a corpus operation: one verdict a view, in order, and figures of its own for the ledger."""

    verdicts: Sequence[Stays | Dropped]
    facts: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class MapOperation(Protocol):
    """Row-local: the verdict on a row depends on nothing but the row and the settings."""

    def apply(self, batch: Sequence[Row]) -> Sequence[Kept | Dropped]:
        """One verdict a row, in order."""
        ...


@runtime_checkable
class CorpusOperation(Protocol):
    """Needs all rows, but only a view of each."""

    def view(self, row: Row) -> Any:
        """What `decide` needs of one row; as small as can be."""
        ...

    def decide(self, views: Sequence[Any]) -> Decided:
        """The verdicts on all rows, from their views in order."""
        ...


Operation = MapOperation | CorpusOperation


def tagged(record: Record, **tags: Any) -> Record:
    """The record with these tags in its meta, under `tags`."""
    if not tags:
        return record
    meta = json.loads(record.meta)
    meta["tags"] = {**meta.get("tags", {}), **tags}
    return replace(record, meta=json.dumps(meta, ensure_ascii=False, sort_keys=True))


def to_arrow(rows: Sequence[Row], kind: Kind) -> pyarrow.Table:
    """Rows as a table: the columns of a data set of `kind`, then file, line, name, ties and copy."""
    import pyarrow as pa

    extra = [
        ("file", pa.string()),
        ("line", pa.int64()),
        ("name", pa.string()),
        ("ties", pa.list_(pa.string())),
        ("copy", pa.int64()),
    ]
    plain = [
        {
            **to_row(row.record),
            "file": row.file,
            "line": row.line,
            "name": row.source,
            "ties": list(row.ties),
            "copy": row.copy,
        }
        for row in rows
    ]
    columns = schema(kind)
    for name, type in extra:
        columns = columns.append(pa.field(name, type))
    return pa.Table.from_pylist(plain, schema=columns)


def from_arrow(table: pyarrow.Table, kind: Kind) -> list[Row]:
    """The rows of a table that `to_arrow` made. Raises InvalidRecord where a row is no valid record."""
    return [
        Row(_record(kind, at), at["file"], at["line"], at["name"], tuple(at["ties"]), at["copy"])
        for at in table.to_pylist()
    ]


def _record(kind: Kind, at: Mapping[str, Any]) -> Record:
    common = {name: at[name] for name in ("id", "source", "group", "meta")}
    if kind == "text":
        return TextRecord(at["text"], **common)
    turns = {
        name: tuple(Message(**turn) for turn in at[name])
        for name in ("messages", "prompt", "chosen", "rejected", "completion")
        if name in at
    }
    if kind == "unpaired_preference":
        return UnpairedPreferenceRecord(turns["prompt"], turns["completion"], at["label"], **common)
    classes = {"conversation": ConversationRecord, "preference": PreferenceRecord, "prompt": PromptRecord}
    return classes[kind](**turns, **common)
