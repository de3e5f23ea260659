"""Rows onto their sides, and what the outputs need of them: columns, lines that are hashed, figures."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_prep.config import CurateConfig
from data_prep.dataset import SPLITS, Split, columns, content_line
from data_prep.dedup import content_key
from data_prep.figures import Figures
from data_prep.operations.base import Dropped, Row
from data_prep.sharded.arrow import dicts_of, rows_of
from data_prep.sharded.log import StepLog
from data_prep.sharded.store import Store, replacing, write_bytes, write_table
from data_prep.split import side

REPEATED = "repeated_in_eval"
GROUP_BYTES = 8


def own_groups(config: CurateConfig, rows: list[Row]) -> list[Row]:
    """The rows under the groups they are split by: where that is the content, the content as it is now."""
    if config.split.by != "record":
        return rows
    return [replace(row, record=replace(row.record, group=content_key(row.record)[:16])) for row in rows]


def put(
    config: CurateConfig, store: Store, segment: int, chunk: int, table: pa.Table, log: StepLog
) -> dict[str, Any]:
    """Write the files of each side of one chunk, and return what is said of them.

    A repetition that would be evaluated is dropped: nothing is evaluated twice.
    """
    said: dict[str, Any] = {"sides": {}, "mixture": {}}
    figures = Figures(config.kind)
    names: dict[str, Split] = {}
    places: dict[Split, list[int]] = {split: [] for split in SPLITS}
    log.tally.rows_in += table.num_rows
    gone: list[int] = []
    groups, copies = table.column("group").to_pylist(), table.column("copy").to_pylist()
    for place, (group, copy) in enumerate(zip(groups, copies, strict=True)):
        if group not in names:
            names[group] = side(group, config.split.salt, config.split.eval_fraction)
        if names[group] == "eval" and copy:
            gone.append(place)
        else:
            places[names[group]].append(place)
    for row in rows_of(table.take(gone), config.kind) if gone else ():
        log.dropped(row, Dropped(REPEATED, "a repetition, in the eval side"))
    for split in SPLITS:
        chosen = (
            table if len(places[split]) == table.num_rows else table.take(pa.array(places[split], pa.int64()))
        )
        said["sides"][split] = chosen.num_rows
        log.tally.rows_out += chosen.num_rows
        said["mixture"][split] = Counter(chosen.column("name").to_pylist())
        _write_side(config, store, segment, chunk, split, chosen, figures)
    said["figures"] = figures.as_json()
    return said


def _write_side(
    config: CurateConfig,
    store: Store,
    segment: int,
    chunk: int,
    split: Split,
    table: pa.Table,
    figures: Figures,
) -> None:
    write_table(store.file(segment, chunk, f"{split}.arrow"), table.select(columns(config.kind)))
    rows = dicts_of(table, config.kind)
    figures.add(rows, split)
    lines = store.file(segment, chunk, f"{split}.lines")
    with replacing(lines) as beside, pa.CompressedOutputStream(str(beside), "lz4") as stream:
        for begin in range(0, len(rows), 1000):
            stream.write(b"".join(content_line(split, row) for row in rows[begin : begin + 1000]))
    hashes = {hashlib.blake2b(row["group"].encode(), digest_size=GROUP_BYTES).digest() for row in rows}
    write_bytes(store.file(segment, chunk, f"{split}.groups"), b"".join(sorted(hashes)))


def distinct(files: Sequence[Path]) -> int:
    """How many different groups the files of one side name."""
    found = np.empty(sum(file.stat().st_size for file in files) // GROUP_BYTES, dtype=np.uint64)
    begin = 0
    for file in files:
        hashes = np.fromfile(file, dtype=np.uint64)
        found[begin : begin + len(hashes)] = hashes
        begin += len(hashes)
    found.sort()
    return len(found) and 1 + int(np.count_nonzero(found[1:] != found[:-1]))
