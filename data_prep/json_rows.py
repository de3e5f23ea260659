"""Rows of JSON text: one object a line, a list of objects, or an object that holds them.

A list is read item by item: where an item is malformed, the next one begins after its brackets, so that one
bad item is one bad row.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from data_prep.records import excerpt
from data_prep.streams import BadRow, Damage, FileFacts, lines
from posttrain.errors import DataError

Row = dict[str, Any] | BadRow
LARGEST_OBJECT = 256 << 20
_SPACE = re.compile(r"[\s,]*")
_NOT_UTF8 = re.compile("[\udc80-\udcff]")
_OUTSIDE, _INSIDE = re.compile(r'["\[\]{},]'), re.compile(r'["\\]')


def jsonl_rows(chunks: Iterator[bytes], most: int, facts: FileFacts) -> Iterator[tuple[int, Row]]:
    """(line, row) pairs; a file that begins with a list is read as one, numbered by item."""
    first = next(chunks, b"")
    if re.match(rb"\s*\[\s*\{", first):
        yield from _list_items(chain((first,), chunks), most, facts)
        return
    facts.layout = "lines"
    yield from _parsed_lines(chain((first,), chunks), most)


def json_rows(path: Path, chunks: Iterator[bytes], most: int, facts: FileFacts) -> Iterator[tuple[int, Row]]:
    """(item, row) pairs of a .json file. Raises DataError when it holds neither a list nor objects."""
    first = next((chunk for chunk in chunks if chunk.strip()), b"")
    start = first.lstrip()
    rest = chain((first,), chunks)
    if start.startswith(b"["):
        yield from _list_items(rest, most, facts)
    elif start.startswith(b"{") and _is_lines(start):
        facts.layout, facts.note = "lines", "named .json, holds one object per line"
        yield from _parsed_lines(rest, most)
    elif start:
        facts.layout = "object"
        yield from enumerate(_object_rows(path, rest), start=1)


def _is_lines(start: bytes) -> bool:
    """Whether the first line is an object by itself and another follows."""
    line, _, after = start.partition(b"\n")
    return after.lstrip().startswith(b"{") and isinstance(parse_line(line), dict)


def _parsed_lines(chunks: Iterable[bytes], most: int) -> Iterator[tuple[int, Row]]:
    for number, raw in lines(chunks, most):
        if isinstance(raw, BadRow):
            yield number, raw
        elif raw.strip():
            yield number, parse_line(raw)


def parse_line(raw: bytes) -> Row:
    """One line as a row: a JSON object in UTF-8, or what is wrong with it."""
    try:
        row = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRow("invalid_utf8", f"byte {error.start} is not UTF-8", _shown(raw))
    except RecursionError:
        return BadRow("malformed_json", "nested too deeply", _shown(raw))
    except ValueError as error:
        return BadRow("malformed_json", f"{error}{_nul_note(raw)}", _shown(raw))
    return row if isinstance(row, dict) else _not_an_object(row)


def _nul_note(raw: bytes) -> str:
    return f" (byte {raw.index(0)} is NUL)" if b"\0" in raw else ""


def _shown(raw: bytes) -> str:
    return raw[:1000].decode("utf-8", "backslashreplace")


def _not_an_object(row: Any) -> BadRow:
    return BadRow("not_an_object", f"a row must be a JSON object, got {type(row).__name__}", excerpt(row))


def _object_rows(path: Path, chunks: Iterable[bytes]) -> Iterator[Row]:
    """Rows of one object: the list of objects in it, or its values where all are objects, with their keys."""
    document = _whole(path, chunks)
    lists = {key: value for key, value in document.items() if _holds_objects(value)}
    if len(lists) > 1:
        raise DataError(
            f"{path}: holds several lists of objects: {', '.join(lists)}\n"
            "    write the one that is meant into a file of its own"
        )
    if lists:
        (rows,) = lists.values()
        yield from (row if isinstance(row, dict) else _not_an_object(row) for row in rows)
    elif document and all(isinstance(value, dict) for value in document.values()):
        yield from ({"id": key, **value} for key, value in document.items())
    else:
        raise DataError(f"{path}: holds one dict, not a list\n    give a list of objects")


def _holds_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _whole(path: Path, chunks: Iterable[bytes]) -> dict[str, Any]:
    raw = bytearray()
    try:
        for chunk in chunks:
            raw += chunk
            if len(raw) > LARGEST_OBJECT:
                raise DataError(
                    f"{path}: one object of more than {LARGEST_OBJECT:,} bytes\n"
                    "    convert it to one object per line (.jsonl)"
                )
        document = json.loads(raw.decode("utf-8"))
    except Damage as damage:
        raise DataError(f"{path}: {damage}\n    fetch or compress it again") from damage
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8\n    convert the file to UTF-8") from error
    except RecursionError as error:
        raise DataError(
            f"{path}: nested too deeply to be a data set\n    give a list of flat objects"
        ) from error
    except json.JSONDecodeError as error:
        remedy = "give one list of objects; if it has one object per line, rename it to .jsonl"
        raise DataError(f"{path}:{error.lineno}: malformed JSON ({error.msg})\n    {remedy}") from error
    if not isinstance(document, dict):
        raise DataError(
            f"{path}: holds one {type(document).__name__}, not a list\n    give a list of objects"
        )
    return document


class _Window:
    """The part of the text that is being read: `text` from `at` on; `more` adds the next chunk."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.text, self.at, self.ended = "", 0, False

    def more(self) -> bool:
        """Add a chunk; False at the end of the text. Raises Damage."""
        chunk = next(self._chunks, None)
        self.ended = chunk is None
        added = self._decoder.decode(chunk or b"", final=self.ended)
        self.text, self.at = self.text[self.at :] + added, 0
        return not self.ended

    def skip(self) -> str:
        """Go past white space and commas; the character there, "" at the end of the text."""
        while True:
            found = _SPACE.match(self.text, self.at)
            assert found is not None
            self.at = found.end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""


class _Boundary:
    """Finds where an item of a list ends, by strings and brackets alone, also over several windows."""

    def __init__(self) -> None:
        self.depth, self.quoted, self.escaped = 0, False, False

    def find(self, text: str, start: int) -> int | None:
        """Index of the comma or bracket that ends the item; None when `text` ends before."""
        at = start
        if self.escaped:
            at, self.escaped = at + 1, False
        while found := (_INSIDE if self.quoted else _OUTSIDE).search(text, at):
            character, at = found.group(), found.end()
            if character == '"':
                self.quoted = not self.quoted
            elif character == "\\":
                self.escaped = at >= len(text)
                at += 1
            elif character in "[{":
                self.depth += 1
            elif self.depth == 0 and character in ",]":
                return found.start()
            elif character in "]}":
                self.depth = max(0, self.depth - 1)
        return None


def _list_items(chunks: Iterable[bytes], most: int, facts: FileFacts) -> Iterator[tuple[int, Row]]:
    """(item, row) pairs of a list; what breaks off or is damaged is the last row."""
    facts.layout = "list"
    window, number = _Window(chunks), 0
    try:
        window.skip()
        window.at += 1
        while (character := window.skip()) not in ("]", ""):
            row = _item(window, most)
            number += 1
            yield number, row
        if not character:
            raise Damage("truncated_file", "the list is not closed; the rows after this are missing")
        window.at += 1
        if window.skip():
            raise Damage("malformed_json", "text after the end of the list", window.text[window.at :][:200])
    except Damage as damage:
        yield number + 1, damage.row()


def _item(window: _Window, most: int) -> Row:
    try:
        row, end = json.JSONDecoder().raw_decode(window.text, window.at)
        if end < len(window.text):
            return _checked(window, row, end, most)
    except (ValueError, RecursionError):
        pass
    boundary, searched, dropped = _Boundary(), window.at, 0
    while (end_at := boundary.find(window.text, searched)) is None:
        if len(window.text) - window.at > most:
            dropped += len(window.text) - window.at
            window.at = len(window.text)
        held = len(window.text) - window.at
        if not window.more():
            return _last_item(window, dropped, most)
        searched = held
    if dropped:
        size = dropped + end_at - window.at
        window.at = end_at
        return BadRow("oversized_row", f"{size:,} characters, read.max_row_bytes is {most:,}", "")
    return _parsed_item(window, end_at, most)


def _last_item(window: _Window, dropped: int, most: int) -> Row:
    """The item that the text ends with. Raises Damage when it is cut in two."""
    text = window.text[window.at :]
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Damage("truncated_file", "the list breaks off in this row", text[:1000]) from error
    if dropped:
        raise Damage("truncated_file", "the list breaks off in this row", "")
    return _checked(window, row, len(window.text), most)


def _parsed_item(window: _Window, end: int, most: int) -> Row:
    text = window.text[window.at : end]
    try:
        row = json.loads(text)
    except RecursionError:
        window.at = end
        return BadRow("malformed_json", "nested too deeply", text[:1000])
    except ValueError as error:
        window.at = end
        return BadRow("malformed_json", f"{error}{_nul_note(text.encode('utf-8', 'replace'))}", text[:1000])
    return _checked(window, row, end, most)


def _checked(window: _Window, row: Any, end: int, most: int) -> Row:
    """The row, unless its text is too long or held bytes that are not UTF-8."""
    start, window.at = window.at, end
    if end - start > most:
        size = f"{end - start:,} characters, read.max_row_bytes is {most:,}"
        return BadRow("oversized_row", size, window.text[start : start + 200])
    bad = None if window.text.isascii() else _NOT_UTF8.search(window.text, start, end)
    if bad is not None:
        text = window.text[start:end][:1000].encode("utf-8", "surrogateescape")
        detail = f"character {bad.start() - start} of the row is not UTF-8"
        return BadRow("invalid_utf8", detail, text.decode("utf-8", "backslashreplace"))
    return row if isinstance(row, dict) else _not_an_object(row)
