"""The files of the data set, joined from what workers wrote of each chunk; none of them is held in memory."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_prep.dataset import SPLITS, Split, split_names, write_tables
from data_prep.records import Kind
from data_prep.sharded.arrow import dicts_of
from data_prep.sharded.store import Store, read_table

BLOCK = 1 << 20


def content_hash(store: Store, segment: int, chunks: int) -> str:
    """sha256 over the lines of all rows, train before eval (`data_prep.dataset.content_line`)."""
    digest = hashlib.sha256()
    for split in SPLITS:
        for chunk in range(chunks):
            with pa.CompressedInputStream(str(store.file(segment, chunk, f"{split}.lines")), "lz4") as stream:
                while block := stream.read(BLOCK):
                    digest.update(block)
    return digest.hexdigest()


def write_side(
    folder: Path, store: Store, segment: int, rows: Sequence[int], split: Split, kind: Kind, shard_rows: int
) -> list[str]:
    """Write the parquet files of one side, and return their names. rows: of this side in each chunk."""
    names = split_names(split, sum(rows), shard_rows)
    tables = (read_table(store.file(segment, chunk, f"{split}.arrow")) for chunk in range(len(rows)))
    if len(names) == 1:
        write_tables(folder / names[0], kind, tables)
        return names
    cut = _cut(tables, shard_rows)
    for name in names:
        write_tables(folder / name, kind, next(cut))
    return names


def _cut(tables: Iterator[pa.Table], rows: int) -> Iterator[Iterator[pa.Table]]:
    """The tables' rows in runs of so many; a run is read to its end before the next one is asked for."""
    rest: list[pa.Table] = []

    def run() -> Iterator[pa.Table]:
        left = rows
        while left:
            table = rest.pop() if rest else next(tables, None)
            if table is None:
                return
            if table.num_rows > left:
                rest.append(table.slice(left))
            yield table.slice(0, left)
            left -= min(left, table.num_rows)

    while True:
        yield run()


def samples(
    store: Store, segment: int, rows: Sequence[int], kind: Kind, places: Sequence[int]
) -> list[dict[str, Any]]:
    """The rows at these places of the train side."""
    found: list[dict[str, Any]] = []
    begin = 0
    for chunk, count in enumerate(rows):
        local = [place - begin for place in places if begin <= place < begin + count]
        if local:
            found += dicts_of(read_table(store.file(segment, chunk, "train.arrow")).take(local), kind)
        begin += count
    return found


def join_lines(file: Path, store: Store, what: str, segments: Sequence[int], chunks: int) -> bool:
    """Write what the steps said of the rows: step by step, in each in the order of the rows.

    what: rejects, reviews or dropped_rows. Returns whether there is anything.
    """
    with file.open("wb") as out:
        for segment in segments:
            sizes = [_sizes(store, segment, chunk, what) for chunk in range(chunks)]
            for number in sorted(sizes[0], key=int) if sizes else ():
                for chunk, of_steps in enumerate(sizes):
                    _copy(store.file(segment, chunk, what), of_steps, number, out)
        return out.tell() > 0


def _sizes(store: Store, segment: int, chunk: int, what: str) -> dict[str, int]:
    """How many bytes each step said of a chunk."""
    found = store.result(segment, chunk)
    assert found is not None
    sizes: dict[str, int] = found[what]
    return sizes


def _copy(file: Path, sizes: Mapping[str, int], number: str, out: Any) -> None:
    if not sizes[number]:
        return
    with file.open("rb") as stream:
        stream.seek(sum(size for step, size in sizes.items() if int(step) < int(number)))
        left = sizes[number]
        while left:
            block = stream.read(min(BLOCK, left))
            out.write(block)
            left -= len(block)


def move(staging: Path, directory: Path, names: Sequence[str]) -> None:
    """Rename files into place, in this order."""
    for name in names:
        shutil.move(staging / name, directory / name)
