"""The dataset directory: its columns, how it is written byte for byte, and how a split is read back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from data_prep.records import KINDS, Kind, Record
from posttrain.errors import DataError

if TYPE_CHECKING:
    import datasets
    import pyarrow

Split = Literal["train", "eval"]
SPLITS: tuple[Split, ...] = ("train", "eval")
COMMON_COLUMNS = ("id", "source", "group", "meta")
CONTENT_COLUMNS: dict[Kind, tuple[str, ...]] = {
    "text": ("text",),
    "conversation": ("messages",),
    "preference": ("prompt", "chosen", "rejected"),
    "unpaired_preference": ("prompt", "completion", "label"),
    "prompt": ("prompt",),
}
ROW_GROUP = 65_536
"""Rows of a row group of a parquet file."""
DATASET_FILES = ("train.parquet", "eval.parquet", "rejects.jsonl", "card.md", "report.html", "dataset.json")
"""Of a data set whose sides are no longer than `shard_rows`."""


def columns(kind: Kind) -> list[str]:
    """Column names of a dataset of `kind`, in order."""
    return [*COMMON_COLUMNS, *CONTENT_COLUMNS[kind]]


def schema(kind: Kind) -> pyarrow.Schema:
    """Arrow schema of a dataset of `kind`. Turns are list<struct<role: string, content: string>>."""
    import pyarrow as pa

    turns = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    types = {name: pa.string() for name in (*COMMON_COLUMNS, "text")} | {"label": pa.bool_()}
    return pa.schema([(name, types.get(name, turns)) for name in columns(kind)])


def to_row(record: Record) -> dict[str, Any]:
    """The record as one row of its kind's columns."""
    return {
        "id": record.id,
        "source": record.source,
        "group": record.group,
        "meta": record.meta,
        **record.content_columns(),
    }


def content_line(split: Split, row: dict[str, Any]) -> bytes:
    """What the content hash covers of one row: canonical JSON. The hash is the sha256 of the lines of all
    rows in their order, train before eval.
    """
    line = json.dumps([split, row], ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return line.encode("utf-8") + b"\n"


def content_hash(rows: Mapping[Split, Sequence[dict[str, Any]]]) -> str:
    """sha256 over the lines of rows that are in memory."""
    digest = hashlib.sha256()
    for split in SPLITS:
        for row in rows[split]:
            digest.update(content_line(split, row))
    return digest.hexdigest()


def write_split(path: Path, kind: Kind, rows: Iterable[dict[str, Any]]) -> None:
    """Write one parquet file. The same rows give the same bytes under the same pyarrow version."""
    import pyarrow as pa

    write_tables(path, kind, [pa.Table.from_pylist(list(rows), schema=schema(kind))])


def write_tables(path: Path, kind: Kind, tables: Iterable[pyarrow.Table]) -> None:
    """Write one parquet file in row groups of ROW_GROUP, however the rows come in tables.

    As many rows as a group are held. The same rows give the same bytes under the same pyarrow version.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    held: list[pyarrow.Table] = []
    with pq.ParquetWriter(path, schema(kind), compression="zstd", store_schema=True) as writer:

        def write(least: int) -> None:
            table = pa.concat_tables(held).combine_chunks()
            begin = 0
            while table.num_rows - begin >= least:
                group = table.slice(begin, ROW_GROUP)
                if group.num_rows:
                    writer.write_table(group, ROW_GROUP)
                begin += ROW_GROUP
            held[:] = [table.slice(begin)] if begin < table.num_rows else []

        for table in tables:
            held.append(table)
            if sum(each.num_rows for each in held) >= ROW_GROUP:
                write(ROW_GROUP)
        if held:
            write(1)


def split_names(split: Split, rows: int, shard_rows: int) -> list[str]:
    """File names of one side: train.parquet, or train-00000-of-00003.parquet and so on above `shard_rows`."""
    count = max(1, -(-rows // shard_rows))
    if count == 1:
        return [f"{split}.parquet"]
    return [f"{split}-{number:05}-of-{count:05}.parquet" for number in range(count)]


def split_files(path: Path, split: Split) -> list[Path]:
    """The parquet files of one side of a dataset directory in order; none where one is missing."""
    whole = path / f"{split}.parquet"
    if whole.is_file():
        return [whole]
    shards = sorted(path.glob(f"{split}-[0-9][0-9][0-9][0-9][0-9]-of-[0-9][0-9][0-9][0-9][0-9].parquet"))
    count = int(shards[0].stem.rpartition("-")[2]) if shards else 0
    names = [f"{split}-{number:05}-of-{count:05}.parquet" for number in range(count)]
    return shards if [file.name for file in shards] == names else []


def read_info(path: Path) -> dict[str, Any] | None:
    """dataset.json of a dataset directory, None where there is none. Raises DataError when it is not JSON."""
    file = path / "dataset.json"
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file}: not valid JSON ({error})\n    run the curate stage again") from error


def read_kind(path: Path) -> str | None:
    """The kind of rows that dataset.json of a dataset directory names; None where it is not there."""
    info = read_info(Path(path))
    return info.get("kind") if info else None


def read_split(path: Path, split: Split, kind: Kind | None = None) -> datasets.Dataset:
    """Read one side of a dataset directory, in memory and without a cache folder.

    path: a directory with train.parquet and eval.parquet, or with their shards. kind: the kind the caller
    needs; None takes any.
    Raises DataError: directory or file missing, not parquet, wrong kind or columns, no rows.
    """
    import datasets
    import datasets.table
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    files = split_files(path, split)
    if not files:
        raise DataError(_missing(path, path / f"{split}.parquet"))
    tables = []
    for file in files:
        try:
            tables.append(pq.read_table(file))
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(
                f"{file}: cannot be read as parquet ({error})\n    run the curate stage again"
            ) from error
        _check_kind(path, file, tables[-1], kind)
    table = pa.concat_tables(tables)
    if table.num_rows == 0:
        raise DataError(
            f"{files[0]}: has no rows\n"
            "    change the split or the sources of this data set and curate it again"
        )
    return datasets.Dataset(datasets.table.InMemoryTable(table))


def _missing(path: Path, file: Path) -> str:
    if not path.exists():
        return (
            f"{path}: no such dataset directory\n    run the curate stage that writes it, or correct the path"
        )
    found = sorted(entry.name for entry in path.iterdir())[:8] if path.is_dir() else [path.name]
    return (
        f"{file}: no such file, so {path} is not a dataset directory "
        f"(it holds: {', '.join(found) or 'nothing'})\n"
        "    point to a directory written by the curate stage, with train.parquet and eval.parquet"
    )


def _check_kind(path: Path, file: Path, table: pyarrow.Table, kind: Kind | None) -> None:
    info = read_info(path)
    present = set(table.column_names)
    found = info.get("kind") if info else next((k for k in ("preference", *KINDS) if _fits(k, present)), None)
    if kind is not None and found != kind:
        raise DataError(
            f"{path}: this data set holds {found or 'no known kind'} rows, but {kind} rows are needed here "
            f"(columns {', '.join(columns(kind))})\n    curate the sources with `kind: {kind}`"
        )
    if found not in KINDS:
        raise DataError(
            f"{path}: holds no known kind of rows (kind {found}, columns {', '.join(sorted(present))})\n"
            "    point to a directory written by the curate stage"
        )
    if not _fits(found, present):
        lacking = [name for name in CONTENT_COLUMNS[found] if name not in present]
        raise DataError(
            f"{file}: lacks the column {', '.join(lacking)} of a {found} data set "
            f"(it has {', '.join(sorted(present))})\n    run the curate stage again"
        )


def _fits(kind: str, present: set[str]) -> bool:
    return kind in CONTENT_COLUMNS and set(CONTENT_COLUMNS[kind]) <= present
