"""Rows of files -> records through the filters, with what exact deduplication and ids need of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from data_prep.config import CurateConfig
from data_prep.dedup import content_key
from data_prep.ingest import Reject, parsed
from data_prep.operations.base import Row
from data_prep.operations.view_columns import place
from data_prep.projections import from_last_user_turns
from data_prep.records import Record, excerpt
from data_prep.sharded.plan import Part
from data_prep.split import default_group

KEYS = pa.schema([("key", pa.binary(16)), ("place", pa.string()), ("at", pa.int32()), ("id", pa.uint64())])
"""Of every row that is left: the first 16 bytes of its content key, file and line, its place among the rows
read, the hash of the id that it wants.
"""


@dataclass
class Parsed:
    """Of one chunk. read: rows; dropped: (place among the rows read, why, the row that a filter dropped)."""

    read: int = 0
    rows: list[Row] = field(default_factory=list)
    dropped: list[tuple[int, Reject, Row | None]] = field(default_factory=list)
    _keys: list[bytes] = field(default_factory=list)
    _at: list[int] = field(default_factory=list)

    def keys(self) -> pa.Table:
        """The table of KEYS."""
        places = list(map(place, self.rows))
        ids = id_hashes([row.record.id for row in self.rows])
        return pa.table(
            [pa.array(self._keys, pa.binary(16)), places, pa.array(self._at, pa.int32()), ids], KEYS
        )


def id_hash(name: str) -> int:
    """64 bits of a hash of an id."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def id_hashes(names: Sequence[str]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """`id_hash` of each."""
    return np.array([id_hash(name) for name in names], dtype=np.uint64)


def parse(config: CurateConfig, parts: Sequence[Part]) -> Parsed:
    """Make records of rows, and drop those that a filter or their form speaks against."""
    found = Parsed()
    for part in parts:
        source = config.sources[part.source]
        for line, row in part.rows:
            record: Record | Reject = (
                row
                if isinstance(row, Record)
                else parsed(source, config.kind, part.name, part.format, line, row)
            )
            _add(config, found, part.name, line, source.label, record)
            found.read += 1
    return found


def _add(
    config: CurateConfig, found: Parsed, file: str, line: int, label: str, record: Record | Reject
) -> None:
    if isinstance(record, Reject):
        found.dropped.append((found.read, record, None))
        return
    group = record.group or default_group(record)
    if config.last_user_turns is not None:
        record = from_last_user_turns(record, config.last_user_turns)
    verdict = _filtered(config, record)
    if verdict is not None:
        text = excerpt(record.turns()[0][1])
        held = replace(record, id=record.id or content_key(record)[:16], group=group)
        row = Row(held, file, line, label)
        found.dropped.append((found.read, Reject(file, line, *verdict, text), row))
        return
    key = content_key(record)
    if config.split.by == "record":
        group = key[:16]
    found.rows.append(Row(replace(record, id=record.id or key[:16], group=group), file, line, label))
    found._keys.append(bytes.fromhex(key[:32]))
    found._at.append(found.read)


def _filtered(config: CurateConfig, record: Record) -> tuple[str, str] | None:
    """(reason, detail) when a filter drops the record."""
    shortest, longest = config.filters.min_chars, config.filters.max_chars
    if shortest is None and longest is None:
        return None
    chars = sum(len(text) for _, text in record.turns())
    if shortest is not None and chars < shortest:
        return "too_short", f"{chars} characters, filters.min_chars is {shortest}"
    if longest is not None and chars > longest:
        return "too_long", f"{chars} characters, filters.max_chars is {longest}"
    return None
