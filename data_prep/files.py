"""Files on disk: finding them, naming them, and reading their rows one at a time.

What is wrong with one row is yielded as a `BadRow`, and so is the point where a file breaks off; what is
wrong with a whole file is a `DataError`.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.config import ReadConfig
from data_prep.dataset import SPLITS, split_files
from data_prep.json_rows import json_rows, jsonl_rows
from data_prep.records import printable
from data_prep.streams import BadRow, Damage, FileFacts, utf8_chunks
from data_prep.table_rows import csv_rows, parquet_rows, text_rows
from posttrain.errors import DataError
from posttrain.patterns import is_pattern, matching_files, walk

__all__ = [
    "SUFFIXES",
    "BadRow",
    "FileFacts",
    "display_names",
    "expand",
    "read_rows",
    "sha256_file",
    "unpacked_suffix",
]

_PLAIN = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")
SUFFIXES = (*_PLAIN, *(f"{suffix}{packed}" for packed in (".gz", ".zst") for suffix in _PLAIN), ".parquet")
_NO_DATA = ("license", "licence", "readme", "notice", "copying", "data_license", "requirements")


def expand(pattern: str) -> list[Path]:
    """Files that a path, folder or glob names, sorted.

    Of a folder, those with a known suffix that are no licence or readme; of a dataset directory, its splits.
    Raises DataError: nothing there, not a regular file, unknown suffix, a folder that cannot be listed.
    """
    path = Path(pattern).expanduser()
    try:
        if path.is_file():
            files = [path]
        elif path.is_dir():
            return _in_folder(path, pattern)
        elif is_pattern(pattern):
            files = matching_files(str(path))
            if not files:
                raise DataError(
                    f"{pattern}: no file matches this pattern (searched from {Path.cwd()})\n"
                    f"    {_nearest(path)}"
                )
        else:
            raise DataError(_absent(pattern, path))
    except OSError as error:
        raise unreadable(path, error) from error
    for file in files:
        if not file.name.lower().endswith(SUFFIXES):
            raise DataError(
                f"{file}: cannot read this file type\n    convert it to one of {', '.join(SUFFIXES)}"
            )
    return files


def _in_folder(path: Path, pattern: str) -> list[Path]:
    names = {entry.name for entry in path.iterdir()}
    if "dataset.json" in names:
        own = [split_files(path, split) for split in SPLITS]
        if all(own):
            return [file for files in own for file in files]
    files = [file for file in walk(path) if file.name.lower().endswith(SUFFIXES) and not _is_about(file)]
    if not files:
        shown = ", ".join(sorted(names)[:6]) or "nothing"
        raise DataError(
            f"{pattern}: is a folder without data files (it holds {shown})\n"
            f"    name a folder or files of {', '.join((*_PLAIN, '.parquet'))}"
        )
    return files


def _is_about(file: Path) -> bool:
    return file.name.lower().split(".")[0] in _NO_DATA


def _absent(pattern: str, path: Path) -> str:
    if path.is_symlink():
        try:
            path.stat()
        except OSError as error:
            if error.errno == errno.ELOOP:
                return f"{pattern}: is a link that leads to itself\n    name the file it was meant to lead to"
        return f"{pattern}: is a link to {os.readlink(path)}, which is not there\n    mend the link"
    if path.exists():
        return f"{pattern}: is neither a regular file nor a folder\n    write its contents to a file"
    return f"{pattern}: no such file (searched from {Path.cwd()})\n    {_nearest(path)}"


def unreadable(path: Path, error: OSError) -> DataError:
    """The error for a file or folder that the system does not give."""
    return DataError(
        f"{error.filename or path}: cannot be read ({error.strerror or error})\n"
        "    check the file and its rights"
    )


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
    """sha256 hex of the bytes of `path`. Raises DataError when it cannot be read."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise unreadable(path, error) from error


def unpacked_suffix(path: Path) -> str:
    """The suffix that says what the file holds, without .gz or .zst: ".jsonl"."""
    name = path.name.lower()
    for packed in (".gz", ".zst"):
        name = name.removesuffix(packed)
    return Path(name).suffix


def read_rows(
    path: Path, read: ReadConfig | None = None, facts: FileFacts | None = None
) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """(line, row) pairs of one file, in memory that does not grow with it; `facts` is filled in passing.

    Items of a .json list count from 1 as lines do. Raises DataError when the file as a whole cannot be read.
    """
    read, facts = read or ReadConfig(), facts or FileFacts()
    try:
        yield from _rows(path, read, facts)
    except Damage as damage:
        # Before the first byte; what comes later is a row of its reader's.
        yield 1, damage.row()
    except OSError as error:
        raise unreadable(path, error) from error


def _rows(path: Path, read: ReadConfig, facts: FileFacts) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    suffix = unpacked_suffix(path)
    if suffix == ".parquet":
        return parquet_rows(path, read, facts)
    chunks = utf8_chunks(path, read, facts)
    if suffix in (".jsonl", ".ndjson"):
        return jsonl_rows(chunks, read.max_row_bytes, facts)
    if suffix == ".json":
        return json_rows(path, chunks, read.max_row_bytes, facts)
    if suffix in (".csv", ".tsv"):
        return csv_rows(path, chunks, read, facts)
    return text_rows(chunks, read, facts)


def display_names(paths: list[Path]) -> dict[Path, str]:
    """Short names for messages and the `source` column: relative to the folder that all the files share.

    They do not depend on where the data lie, so neither do the data set's bytes. Bytes of a file name that
    are no UTF-8 become escapes.
    """
    resolved = {path: path.resolve() for path in paths}
    if not resolved:
        return {}
    root = os.path.commonpath([path.parent for path in resolved.values()])
    return {path: printable(where.relative_to(root).as_posix()) for path, where in resolved.items()}
