"""`posttrain data export`: a curated data set as one of TRL's dataset types, for whatever trains on those.

Types and styles are those of TRL's "Dataset formats and types". Conversational rows hold turns; standard rows
hold text that a tokenizer's chat template made of them. Rows are read, converted and written a batch at a
time.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from data_prep.config import ReadConfig
from data_prep.dataset import SPLITS, Split, columns, read_info, split_files
from data_prep.records import KINDS, Kind
from data_prep.streams import BadRow, FileFacts
from data_prep.table_rows import parquet_rows
from posttrain.errors import DataError, UserError

Row = dict[str, Any]
TYPES: dict[str, tuple[Kind, ...]] = {
    "language-modeling": ("conversation", "text"),
    "prompt-only": ("prompt", "conversation", "preference", "unpaired_preference"),
    "prompt-completion": ("conversation",),
    "preference": ("preference",),
    "preference-implicit": ("preference",),
    "unpaired-preference": ("unpaired_preference", "preference"),
    "stepwise-supervision": (),
}
"""TRL's dataset types, and the kinds of records that can give each."""
STYLES = ("conversational", "standard")
SUFFIXES = (".jsonl", ".parquet")
BATCH_ROWS = 1000


@dataclass(frozen=True)
class Exported:
    """What was written: the file, rows read of the data set and rows written."""

    file: str
    type: str
    style: str
    rows_in: int
    rows_out: int

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def export(
    data: Path,
    to: str,
    output: Path,
    *,
    style: str = "conversational",
    split: str = "train",
    tokenizer: str | None = None,
    force: bool = False,
) -> Exported:
    """Write a side of a dataset directory, or both, as rows of one of TYPES.

    output: .jsonl or .parquet; written aside and renamed into place. tokenizer: needed for style standard of
    anything but text. Raises UserError for what cannot be asked for, DataError where `data` is no dataset
    directory.
    """
    _check(to, output, style, split, force)
    kind = _kind(data)
    if kind not in TYPES[to]:
        possible = ", ".join(name for name, kinds in TYPES.items() if kind in kinds)
        why = "no kind of record holds the steps of an answer" if not TYPES[to] else f"{kind} rows cannot"
        raise UserError(f"{data}: cannot be exported as {to}: {why}\n    give --to one of {possible}")
    style = "standard" if kind == "text" else style
    template = _template(tokenizer, kind) if style == "standard" and kind != "text" else None
    sides: list[Split] = [side for side in SPLITS if split in (side, "both")]
    read = 0

    def rows() -> Iterator[Row]:
        nonlocal read
        for row in chain.from_iterable(_rows(data, side, kind) for side in sides):
            read += 1
            for made in convert(row, kind, to):
                yield template(made) if template else made

    written = _write(output, rows(), style, to)
    if not read:
        raise DataError(f"{data}: has no rows in {split}\n    choose another --split")
    return Exported(str(output), to, style, read, written)


def convert(row: Row, kind: Kind, to: str) -> list[Row]:
    """The conversational rows that one row of a dataset directory becomes; of text, the standard one.

    Tool definitions in the row's meta come along as the column `tools`, JSON text of a list.
    """
    made = _converted(row, kind, to)
    tools = json.loads(row["meta"]).get("tools")
    if tools:
        text = tools if isinstance(tools, str) else json.dumps(tools, ensure_ascii=False)
        made = [{**one, "tools": text} for one in made]
    return made


def _converted(row: Row, kind: Kind, to: str) -> list[Row]:
    if to == "language-modeling":
        return [{"text": row["text"]}] if kind == "text" else [{"messages": row["messages"]}]
    if kind == "conversation":
        prompt = {"prompt": row["messages"][:-1]}
        return [prompt if to == "prompt-only" else {**prompt, "completion": row["messages"][-1:]}]
    prompt = {"prompt": row["prompt"]}
    if to == "prompt-only":
        return [prompt]
    if to == "preference-implicit":
        return [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")}]
    if kind == "unpaired_preference":
        return [{**prompt, "completion": row["completion"], "label": row["label"]}]
    if to == "unpaired-preference":
        return [
            {**prompt, "completion": row["chosen"], "label": True},
            {**prompt, "completion": row["rejected"], "label": False},
        ]
    return [{**prompt, "chosen": row["chosen"], "rejected": row["rejected"]}]


def _check(to: str, output: Path, style: str, split: str, force: bool) -> None:
    for name, value, known in (
        ("--to", to, tuple(TYPES)),
        ("--style", style, STYLES),
        ("--split", split, (*SPLITS, "both")),
    ):
        if value not in known:
            raise UserError(f"{name} {value}: not known\n    give one of {', '.join(known)}")
    if output.suffix not in SUFFIXES:
        raise UserError(f"{output}: cannot write this file type\n    name it .jsonl or .parquet")
    if output.exists() and (not force or not output.is_file()):
        remedy = "give --force to replace it, or another --output" if output.is_file() else "name a file"
        raise UserError(f"{output}: is already there\n    {remedy}")
    if not output.parent.is_dir():
        raise UserError(f"{output.parent}: no such folder\n    make it, or correct --output")


def dataset_info(data: Path) -> dict[str, Any]:
    """dataset.json of a dataset directory or the run that holds it. Raises DataError where there is none."""
    info = read_info(data)
    if info is None:
        raise DataError(
            f"{data}: has no dataset.json, so it is not a dataset directory\n"
            "    give the directory of a curate stage"
        )
    return info


def _kind(data: Path) -> Kind:
    kind = dataset_info(data).get("kind")
    if kind not in KINDS:
        raise DataError(f"{data}: holds no known kind of rows ({kind})\n    run the curate stage again")
    return kind


def side_rows(data: Path, side: Split) -> Iterator[tuple[Path, Row]]:
    """(file, row) of every row of a side, a batch at a time. Raises DataError as `side_files`, and for a row
    that cannot be read.
    """
    for file in side_files(data, side):
        for number, row in parquet_rows(file, ReadConfig(max_row_bytes=2**31 - 1), FileFacts()):
            if isinstance(row, BadRow):
                raise DataError(f"{file}: row {number}: {row.detail}\n    run the curate stage again")
            yield file, row


def _rows(data: Path, side: Split, kind: Kind) -> Iterator[Row]:
    for file, row in side_rows(data, side):
        missing = [name for name in columns(kind) if name not in row]
        if missing:
            raise DataError(f"{file}: lacks the column {missing[0]}\n    run the curate stage again")
        yield row


def side_files(data: Path, side: Split) -> list[Path]:
    """The parquet files of a side in their order: SIDE.parquet, or its shards. Raises DataError for none."""
    files = split_files(data, side)
    if not files:
        raise DataError(
            f"{data / f'{side}.parquet'}: no such file, so {data} is not a dataset directory\n"
            "    give the directory of a curate stage"
        )
    return files


def _template(ref: str | None, kind: Kind) -> Callable[[Row], Row]:
    """Makes text of turns as TRL's trainers do. Tools go into the text."""
    if ref is None:
        raise UserError(
            f"--style standard makes text of {kind} rows with a chat template\n    give --tokenizer"
        )
    from jinja2 import TemplateError
    from trl.data_utils import apply_chat_template

    from data_prep.rendering import load_tokenizer

    tokenizer = load_tokenizer(ref)
    if tokenizer.chat_template is None:
        raise UserError(f"{ref}: the tokenizer has no chat template\n    name a chat model")

    def render(row: Row) -> Row:
        tools = json.loads(row["tools"]) if "tools" in row else None
        try:
            text: Row = apply_chat_template(row, tokenizer, tools=tools)
        except (TemplateError, ValueError) as error:
            raise DataError(
                f"{ref}: the chat template refuses a row ({error})\n"
                "    export with --style conversational, or choose a template that takes its roles"
            ) from error
        return text

    return render


def _write(output: Path, rows: Iterable[Row], style: str, to: str) -> int:
    """Rows written. The file appears whole or not at all."""
    handle, name = tempfile.mkstemp(dir=output.parent, prefix=f".{output.name}.")
    os.close(handle)
    temporary, count = Path(name), 0
    try:
        write = _parquet if output.suffix == ".parquet" else _jsonl
        count = write(temporary, rows, style, to)
        if count:
            temporary.chmod(0o644)
            os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def _jsonl(path: Path, rows: Iterable[Row], style: str, to: str) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def _parquet(path: Path, rows: Iterable[Row], style: str, to: str) -> int:
    """Every row has the column `tools`, null where it has none: whether one will come is not known yet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    turns = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    kind = pa.string() if style == "standard" else turns
    names = {
        "language-modeling": ["text" if style == "standard" else "messages"],
        "prompt-only": ["prompt"],
        "prompt-completion": ["prompt", "completion"],
        "preference": ["prompt", "chosen", "rejected"],
        "preference-implicit": ["chosen", "rejected"],
        "unpaired-preference": ["prompt", "completion", "label"],
    }[to]
    fields = [(name, pa.bool_() if name == "label" else kind) for name in names]
    if style == "conversational":
        fields.append(("tools", pa.string()))
    schema, count = pa.schema(fields), 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        left = iter(rows)
        while batch := list(islice(left, BATCH_ROWS)):
            writer.write_table(pa.Table.from_pylist(batch, schema=schema))
            count += len(batch)
    return count
