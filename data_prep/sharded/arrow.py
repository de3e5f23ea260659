"""Rows as Arrow tables and back, column by column, which is faster than row by row.

A row that comes out of a chunk file was checked when its record was made, so it is not checked again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa

from data_prep.dataset import COMMON_COLUMNS, CONTENT_COLUMNS, columns, schema
from data_prep.operations.base import Row
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

_CLASSES: dict[Kind, type[Record]] = {
    cls.kind: cls
    for cls in (TextRecord, ConversationRecord, PreferenceRecord, UnpairedPreferenceRecord, PromptRecord)
}
_WAY = (
    pa.field("file", pa.string()),
    pa.field("line", pa.int64()),
    pa.field("name", pa.string()),
    pa.field("ties", pa.list_(pa.string())),
    pa.field("copy", pa.int64()),
)
_PLAIN = ("text", "label")


def row_schema(kind: Kind) -> pa.Schema:
    """The columns of a data set of `kind`, then file, line, name (of the source), ties and copy."""
    return pa.schema([*schema(kind), *_WAY])


def table_of(rows: Sequence[Row], kind: Kind) -> pa.Table:
    """Rows as a table."""
    types = row_schema(kind)
    records = [row.record for row in rows]
    arrays: list[pa.Array] = [
        pa.array([vars(at)[name] for at in records], pa.string()) for name in COMMON_COLUMNS
    ]
    for name in CONTENT_COLUMNS[kind]:
        values = [vars(at)[name] for at in records]
        type = types.field(name).type
        arrays.append(pa.array(values, type) if name in _PLAIN else _turns(values, type))
    arrays += [
        pa.array([row.file for row in rows], pa.string()),
        pa.array([row.line for row in rows], pa.int64()),
        pa.array([row.source for row in rows], pa.string()),
        pa.array([row.ties for row in rows], pa.list_(pa.string())),
        pa.array([row.copy for row in rows], pa.int64()),
    ]
    return pa.Table.from_arrays(arrays, schema=types)


def _turns(values: Sequence[Sequence[Message]], type: pa.DataType) -> pa.Array:
    offsets = np.zeros(len(values) + 1, dtype=np.int32)
    np.cumsum([len(turns) for turns in values], out=offsets[1:])
    flat = list(chain.from_iterable(values))
    struct = pa.StructArray.from_arrays(
        [
            pa.array([turn.role for turn in flat], pa.string()),
            pa.array([turn.content for turn in flat], pa.string()),
        ],
        names=["role", "content"],
    )
    return pa.ListArray.from_arrays(pa.array(offsets), struct, type=type)


def rows_of(table: pa.Table, kind: Kind) -> list[Row]:
    """The rows of a table that `table_of` made."""
    names = columns(kind)
    held = [_column(table, name, _message) for name in names]
    cls = _CLASSES[kind]
    records = [_trusted(cls, names, values) for values in zip(*held, strict=True)]
    way = [table.column(field.name).to_pylist() for field in _WAY]
    return [
        Row(record, file, line, name, tuple(ties), copy)
        for record, file, line, name, ties, copy in zip(records, *way, strict=True)
    ]


def dicts_of(table: pa.Table, kind: Kind) -> list[dict[str, Any]]:
    """The rows as the columns of a data set of `kind`, in plain Python values."""
    names = columns(kind)
    held = [_column(table, name, _plain_message) for name in names]
    return [dict(zip(names, values, strict=True)) for values in zip(*held, strict=True)]


def _plain_message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


_new, _set = object.__new__, object.__setattr__


def _message(role: str, content: str) -> Message:
    turn = _new(Message)
    _set(turn, "role", role)
    _set(turn, "content", content)
    return turn


def _trusted(cls: type[Record], names: Sequence[str], values: Sequence[Any]) -> Record:
    record = _new(cls)
    vars(record).update(zip(names, values, strict=True))
    return record


def _column(table: pa.Table, name: str, turn: Callable[[str, str], Any]) -> list[Any]:
    """The values of a column; turns as tuples, or lists where they are plain."""
    column = table.column(name)
    if not pa.types.is_list(column.type):
        return column.to_pylist()
    array = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    flat = array.flatten()
    turns = [
        turn(role, content)
        for role, content in zip(
            flat.field("role").to_pylist(), flat.field("content").to_pylist(), strict=True
        )
    ]
    offsets = (array.offsets.to_numpy() - array.offsets[0].as_py()).tolist() if len(array) else [0]
    held: Callable[[list[Any]], Any] = list if turn is _plain_message else tuple
    return [held(turns[begin:end]) for begin, end in zip(offsets, offsets[1:], strict=False)]
