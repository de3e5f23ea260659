"""Rows of tables and texts: csv and tsv, plain text, parquet."""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_prep.config import ReadConfig
from data_prep.streams import BadRow, FileFacts, lines
from posttrain.errors import DataError

Row = dict[str, Any] | BadRow
DELIMITERS = (",", ";", "\t")
LONGEST_NAME = 64
_TRUTH = {"true": True, "false": False}
_LABELS = ("label", "kto_tag")
_PARQUET_BATCH = 256


def text_rows(chunks: Iterable[bytes], read: ReadConfig, facts: FileFacts) -> Iterator[tuple[int, Row]]:
    """(line, {"text": ...}) of a text file: each line, each paragraph, or the whole; blank ones left out."""
    facts.layout = "text"
    if read.text_unit == "line":
        for number, line in _text_lines(chunks, read):
            if isinstance(line, BadRow):
                yield number, line
            elif line.strip():
                yield number, {"text": line}
        return
    document = _Document(read.max_row_bytes)
    for number, line in _text_lines(chunks, read):
        if isinstance(line, BadRow):
            yield number, line
        elif line.strip() or read.text_unit == "file":
            document.add(number, line)
        elif document.size:
            yield document.start, document.take()
    if document.size:
        yield document.start, document.take()


def _text_lines(chunks: Iterable[bytes], read: ReadConfig) -> Iterator[tuple[int, str | BadRow]]:
    for number, raw in lines(chunks, read.max_row_bytes):
        yield number, raw if isinstance(raw, BadRow) else _decoded(raw.removesuffix(b"\r"))


class _Document:
    """Lines that make one document; of too many, only the first are held."""

    def __init__(self, most: int) -> None:
        self.most, self.start, self.size = most, 0, 0
        self.held: list[str] = []

    def add(self, number: int, line: str) -> None:
        if not self.size and not line.strip():
            return
        self.start = self.start if self.size else number
        self.size += len(line) + 1
        if self.size <= self.most:
            self.held.append(line)

    def take(self) -> Row:
        """The document, which is then empty again."""
        text, size = "\n".join(self.held).rstrip(), self.size
        self.held, self.size = [], 0
        if size > self.most:
            detail = f"{size:,} characters, read.max_row_bytes is {self.most:,}"
            return BadRow("oversized_row", detail, text[:200])
        return {"text": text}


def _decoded(raw: bytes) -> str | BadRow:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        shown = raw[:1000].decode("utf-8", "backslashreplace")
        return BadRow("invalid_utf8", f"byte {error.start} is not UTF-8", shown)
    if "\0" in text:
        return BadRow("nul_byte", f"character {text.index(chr(0))} is NUL", text[:1000])
    return text


class _Feed:
    """Lines for the csv reader: `taken` are those of the record being read, which `most` bytes end."""

    def __init__(self, source: Iterator[tuple[int, bytes | BadRow]], most: int) -> None:
        self.source, self.most = source, most
        self.waiting: deque[tuple[int, str | BadRow]] = deque()
        self.taken: list[tuple[int, str]] = []
        self.size = 0

    def peek(self) -> tuple[int, str | BadRow] | None:
        """The next line, left where it is; None at the end."""
        if not self.waiting:
            following = next(self.source, None)
            if following is None:
                return None
            number, raw = following
            line = raw if isinstance(raw, BadRow) else _decoded(raw)
            self.waiting.append((number, line))
        return self.waiting[0]

    def __iter__(self) -> Iterator[str]:
        """Lines of one record. A bad line, and too long a record, end it as the end of the file does."""
        self.taken, self.size = [], 0
        while self.size <= self.most and (following := self.peek()) is not None:
            number, line = following
            if isinstance(line, BadRow):
                return
            self.waiting.popleft()
            self.taken.append((number, line))
            self.size += len(line)
            yield line + "\n"

    def put_back(self) -> None:
        """Read the lines of the last record anew, all but its first."""
        self.waiting.extendleft(reversed(self.taken[1:]))


def csv_rows(
    path: Path, chunks: Iterator[bytes], read: ReadConfig, facts: FileFacts
) -> Iterator[tuple[int, Row]]:
    """(line, row) pairs of a table, cells as text, `label` columns true or false where they say so.

    A record that the rules of RFC 4180 do not allow, or with other cells than the header, is a BadRow at its
    first line. Raises DataError: two columns of one name.
    """
    facts.layout = "csv"
    csv.field_size_limit(max(csv.field_size_limit(), read.max_row_bytes))
    feed = _Feed(iter(lines(chunks, read.max_row_bytes)), read.max_row_bytes)
    facts.delimiter = read.delimiter or _delimiter(path, feed)
    names: list[str] | None = None
    for number, cells in _records(feed, facts.delimiter):
        if isinstance(cells, BadRow):
            yield number, cells
            continue
        if names is None:
            facts.header = _is_header(cells) if read.header is None else read.header
            names = _names(path, cells) if facts.header else [f"column_{i}" for i in range(1, len(cells) + 1)]
            if facts.header:
                continue
        if len(cells) != len(names):
            detail = f"{len(cells)} cells, the {'header' if facts.header else 'first row'} has {len(names)}"
            yield number, BadRow("ragged_row", detail, facts.delimiter.join(cells)[:1000])
            continue
        yield number, {name: _cell(name, cell) for name, cell in zip(names, cells, strict=True)}


def _records(feed: _Feed, delimiter: str) -> Iterator[tuple[int, list[str] | BadRow]]:
    while (following := feed.peek()) is not None:
        number, line = following
        if isinstance(line, BadRow):
            feed.waiting.popleft()
            yield number, line
            continue
        try:
            cells = next(csv.reader(feed, delimiter=delimiter, strict=True), [])
        except csv.Error as error:
            feed.put_back()
            yield number, BadRow("malformed_csv", str(error), feed.taken[0][1][:1000])
            continue
        if cells:
            yield number, cells


def _cell(name: str, cell: str) -> str | bool:
    return _TRUTH.get(cell.lower(), cell) if name in _LABELS else cell


def _delimiter(path: Path, feed: _Feed) -> str:
    following = feed.peek()
    if ".tsv" in path.suffixes:
        return "\t"
    if following is None or isinstance(following[1], BadRow):
        return ","
    outside = "".join(following[1].split('"')[::2])
    return max(DELIMITERS, key=outside.count)


def _is_header(cells: list[str]) -> bool:
    return not any(_is_number(cell) or len(cell) > LONGEST_NAME or "\n" in cell for cell in cells)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _names(path: Path, cells: list[str]) -> list[str]:
    names = [cell.strip() or f"column_{index}" for index, cell in enumerate(cells, start=1)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(
            f"{path}:1: the header names {', '.join(map(repr, twice))} more than once\n"
            "    rename a column, or set read.header: false if this is a row"
        )
    return names


def parquet_rows(path: Path, read: ReadConfig, facts: FileFacts) -> Iterator[tuple[int, Row]]:
    """(number, row) pairs of a parquet file; damage after the first rows is the last one.

    Raises DataError when nothing of it can be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    facts.layout = "parquet"
    line = 0
    try:
        with pq.ParquetFile(path) as file:
            if file.metadata.num_row_groups:
                facts.compression = file.metadata.row_group(0).column(0).compression.lower()
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH):
                for row in _batch_rows(batch, read.max_row_bytes):
                    line += 1
                    yield line, row
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        if not line:
            raise DataError(
                f"{path}: not a readable parquet file ({error})\n    write or fetch it again"
            ) from error
        yield line + 1, BadRow("damaged_file", f"the rows from here on cannot be read ({error})", "")


def _batch_rows(batch: Any, most: int) -> Iterator[Row]:
    if batch.nbytes <= most:
        try:
            rows = batch.to_pylist()
        except UnicodeDecodeError:
            rows = None
        if rows is not None:
            yield from rows
            return
    for index in range(batch.num_rows):
        one = batch.slice(index, 1)
        if one.nbytes > most:
            yield BadRow("oversized_row", f"{one.nbytes:,} bytes, read.max_row_bytes is {most:,}", "")
            continue
        try:
            row = one.to_pylist()[0]
        except UnicodeDecodeError as error:
            row = BadRow("invalid_utf8", f"a cell holds bytes that are not UTF-8 ({error.reason})", "")
        yield row
