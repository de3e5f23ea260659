"""What an operation is: rows in, one verdict a row out.

Rows carry typed records (``data_prep/records.py``), not Arrow batches: that a dialogue alternates and that
two sides differ is checked where a record is made, so no operation can hand on one that cannot be trained on.
At the borders between processes rows travel as Arrow (``data_prep/sharded/arrow.py``), with the columns of
the dataset directory and those that only matter on the way.

The shapes are what lets another engine run them unchanged. A map operation is a pure function of a batch
whose verdicts do not depend on where batches begin, so N processes or Ray's ``map_batches`` may cut them as
they like. A corpus operation is a row-local `view`, one `decide` over all views in order, and verdicts that
are again row-local: only the views have to come together in one place. Views and verdicts are Arrow tables,
so that both can lie on disk: `decide` holds a few tens of bytes a row, however long the rows are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa

from data_prep.records import Record


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


VERDICT_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("copies", pa.int64()),
        ("ties", pa.list_(pa.string())),
        ("tags", pa.string()),
        ("notes", pa.list_(pa.string())),
    ]
)
"""A verdict as a row of a table. row: place among the rows the operation was given; reason, detail: null
where the row stays; tags: a JSON object, null without any.
"""


def verdict_table(verdicts: Sequence[tuple[int, Stays | Dropped]]) -> pa.Table:
    """Verdicts with the places of their rows as a table of VERDICT_SCHEMA."""
    found: dict[str, list[Any]] = {name: [] for name in VERDICT_SCHEMA.names}
    for row, verdict in verdicts:
        stays = verdict if isinstance(verdict, Stays) else Stays()
        dropped = verdict if isinstance(verdict, Dropped) else None
        found["row"].append(row)
        found["reason"].append(dropped and dropped.reason)
        found["detail"].append(dropped and dropped.detail)
        found["copies"].append(stays.copies)
        found["ties"].append(stays.ties)
        found["tags"].append(json.dumps(dict(stays.tags), ensure_ascii=False) if stays.tags else None)
        found["notes"].append(stays.notes)
    return pa.Table.from_pydict(found, schema=VERDICT_SCHEMA)


def verdict_of(row: Mapping[str, Any]) -> Stays | Dropped:
    """The verdict of one row of a table of VERDICT_SCHEMA, as `to_pylist` gives it."""
    if row["reason"] is not None:
        return Dropped(row["reason"], row["detail"])
    tags = json.loads(row["tags"]) if row["tags"] is not None else {}
    return Stays(row["copies"], tuple(row["ties"]), tags, tuple(row["notes"]))


class Views(Protocol):
    """What a corpus operation needs of every row, in the order of the rows. Can be read again and again."""

    def __len__(self) -> int:
        """Rows."""
        ...

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The views in tables of any number of rows; columns: those that are read, all by default."""
        ...


@dataclass(frozen=True)
class MemoryViews:
    """Views that are held in memory."""

    held: Sequence[pa.Table]

    def __len__(self) -> int:
        return sum(table.num_rows for table in self.held)

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The tables as they were given."""
        return (table if columns is None else table.select(list(columns)) for table in self.held)


@dataclass(frozen=True)
class Decided:
    """Of a corpus operation: a stream of verdicts, and figures of its own for the ledger.

    verdicts: tables of VERDICT_SCHEMA, ascending by `row`, each row at most once. A row without a verdict
    stays as it is (`Stays()`). They can be read once, while the views and `scratch` are there.
    """

    verdicts: Iterable[pa.Table]
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

    def view(self, batch: Sequence[Row]) -> pa.Table:
        """What `decide` needs of each row: one row of the table a row, in order, the same in any batch, with
        the same columns for a batch without rows.
        """
        ...

    def decide(self, views: Views, scratch: Path) -> Decided:
        """The verdicts on all rows. scratch: an empty directory for files of its own.

        Holds a few tens of bytes a row at most; the facts are complete when it returns.
        """
        ...


Operation = MapOperation | CorpusOperation


def tagged(record: Record, **tags: Any) -> Record:
    """The record with these tags in its meta, under `tags`."""
    if not tags:
        return record
    meta = json.loads(record.meta)
    meta["tags"] = {**meta.get("tags", {}), **tags}
    return replace(record, meta=json.dumps(meta, ensure_ascii=False, sort_keys=True))
