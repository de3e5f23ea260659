"""Files on disk: finding them, naming them, and reading their rows one at a time.

What is wrong with one row is yielded as a `BadRow`; what is wrong with a whole file is a `DataError`.
"""

from __future__ import annotations

import difflib
import glob
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from data_prep.records import excerpt
from posttrain.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
_GLOB_CHARACTERS = "*?["


@dataclass(frozen=True)
class BadRow:
    """A row that is not a JSON object. raw: the text as found."""

    reason: str
    detail: str
    raw: str


def expand(pattern: str) -> list[Path]:
    """Files that a path or glob names, sorted. Raises DataError: nothing there, a folder, unknown suffix."""
    path = Path(pattern).expanduser()
    if path.is_file():
        files = [path]
    elif path.is_dir():
        raise DataError(
            f"{pattern}: is a folder\n    name its files, for example {pattern.rstrip('/')}/*.jsonl"
        )
    elif any(character in pattern for character in _GLOB_CHARACTERS):
        files = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        if not files:
            raise DataError(
                f"{pattern}: no file matches this pattern (searched from {Path.cwd()})\n    {_nearest(path)}"
            )
    else:
        raise DataError(f"{pattern}: no such file (searched from {Path.cwd()})\n    {_nearest(path)}")
    for file in files:
        if not file.name.lower().endswith(SUFFIXES):
            raise DataError(
                f"{file}: cannot read this file type\n    convert it to one of {', '.join(SUFFIXES)}"
            )
    return files


def _nearest(path: Path) -> str:
    """A remedy for a path that is not there: the nearest name in the nearest folder that exists."""
    missing = path
    while not missing.parent.is_dir() and missing.parent != missing:
        missing = missing.parent
    names = sorted(entry.name for entry in missing.parent.iterdir()) if missing.parent.is_dir() else []
    near = difflib.get_close_matches(missing.name, names, 1, cutoff=0.5)
    if near:
        return f"did you mean {missing.parent / near[0]}?"
    shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
    return f"correct the path; {missing.parent} holds: {shown or 'nothing'}"


def sha256_file(path: Path) -> str:
    """sha256 hex of the bytes of `path`."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """(line, row) pairs of one file. Raises DataError when the file as a whole cannot be read."""
    try:
        yield from _read_parquet(path) if path.name.lower().endswith(".parquet") else _read_json(path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: damaged or truncated gzip file ({error})\n    fetch or compress it again"
        ) from error
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or error})\n    check the file and its rights"
        ) from error


def _read_json(path: Path) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    name = path.name.lower()
    stream: BinaryIO
    with gzip.open(path, "rb") if name.endswith(".gz") else path.open("rb") as stream:  # type: ignore[assignment]
        if name.removesuffix(".gz").endswith(".jsonl"):
            for line, raw in enumerate(stream, start=1):
                if raw.strip():
                    yield line, _parse_line(raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw)
            return
        for item, row in enumerate(_parse_document(path, stream.read()), start=1):
            yield item, row if isinstance(row, dict) else _not_an_object(row)


def _parse_line(raw: bytes) -> dict[str, Any] | BadRow:
    try:
        row = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRow(
            "invalid_utf8", f"byte {error.start} is not UTF-8", raw.decode("utf-8", "backslashreplace")
        )
    except RecursionError:
        return BadRow("malformed_json", "nested too deeply", raw.decode("utf-8"))
    except ValueError as error:
        return BadRow("malformed_json", str(error), raw.decode("utf-8"))
    return row if isinstance(row, dict) else _not_an_object(row)


def _not_an_object(row: Any) -> BadRow:
    return BadRow("not_an_object", f"a row must be a JSON object, got {type(row).__name__}", excerpt(row))


def _parse_document(path: Path, raw: bytes) -> list[Any]:
    if not raw.strip():
        return []
    try:
        document = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8\n    convert the file to UTF-8") from error
    except RecursionError as error:
        raise DataError(
            f"{path}: nested too deeply to be a data set\n    give a list of flat objects"
        ) from error
    except json.JSONDecodeError as error:
        remedy = "give one list of objects; if it has one object per line, rename it to .jsonl"
        raise DataError(f"{path}:{error.lineno}: malformed JSON ({error.msg})\n    {remedy}") from error
    if not isinstance(document, list):
        raise DataError(
            f"{path}: holds one {type(document).__name__}, not a list\n    give a list of objects"
        )
    return document


def _read_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        line = 0
        for batch in pq.ParquetFile(path).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                line += 1
                yield line, row
    except pa.ArrowInvalid as error:
        raise DataError(
            f"{path}: not a readable parquet file ({error})\n    write or fetch it again"
        ) from error


def display_names(paths: list[Path]) -> dict[Path, str]:
    """Short names for messages and the `source` column: relative to the folder that all the files share.

    They do not depend on where the data lie, so neither do the data set's bytes.
    """
    resolved = {path: path.resolve() for path in paths}
    if not resolved:
        return {}
    root = os.path.commonpath([path.parent for path in resolved.values()])
    return {path: where.relative_to(root).as_posix() for path, where in resolved.items()}
