"""The items of evaluation sets, from files, folders of files or dataset directories."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_prep.dataset import SPLITS
from data_prep.files import SUFFIXES, BadRow, expand, read_rows
from data_prep.operations.decontaminate import EvalSet
from posttrain.errors import DataError


def read_eval_set(path: Path, fields: Sequence[str]) -> EvalSet:
    """One text an item: its `fields`, or without any every text in it. A dataset directory: its eval side.

    Raises DataError: no readable file, a row that is no object, no item with text, a field that no row has.
    """
    items = []
    for file in _files(path):
        for line, row in read_rows(file):
            if isinstance(row, BadRow):
                raise DataError(
                    f"{file}:{line}: {row.detail}\n    an evaluation set is read whole; correct it"
                )
            given = [row[name] for name in fields if name in row] if fields else [row]
            text = "\n".join(text for value in given for text in _texts(value) if text.strip())
            if text:
                items.append(text)
    if not items:
        what = f"no row has text in {', '.join(fields)}" if fields else "no row has text"
        raise DataError(f"{path}: {what}\n    name the fields of its questions in `fields`")
    return EvalSet(_name(path), items)


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return expand(str(path))
    if all((path / f"{split}.parquet").is_file() for split in SPLITS):
        return [path / "eval.parquet"]
    files = sorted(file for file in path.rglob("*") if file.name.lower().endswith(SUFFIXES))
    if not files:
        raise DataError(f"{path}: holds no file to read\n    give files of {', '.join(SUFFIXES)}")
    return files


def _name(path: Path) -> str:
    """Two parts at most: enough to tell sets apart, and the same wherever the data lie."""
    return "/".join(path.parts[-2:]) if path.is_dir() else path.name


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)
