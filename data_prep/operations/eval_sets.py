"""The items of evaluation sets, from files, folders of files or dataset directories."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_prep.dataset import SPLITS, split_files
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
            if any(map(str.isalnum, text)):
                items.append(text)
    if not items:
        what = f"no row has text in {', '.join(fields)}" if fields else "no row has text"
        raise DataError(f"{path}: {what}\n    name the fields of its questions in `fields`")
    return EvalSet(path.name, items)


def named_apart(sets: Sequence[EvalSet]) -> list[EvalSet]:
    """The sets, with numbers behind names that several have."""
    names = [each.name for each in sets]
    return [
        replace(each, name=f"{each.name} ({index + 1})") if names.count(each.name) > 1 else each
        for index, each in enumerate(sets)
    ]


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return expand(str(path))
    if all(split_files(path, split) for split in SPLITS):
        return split_files(path, "eval")
    files = sorted(file for file in path.rglob("*") if file.name.lower().endswith(SUFFIXES))
    if not files:
        raise DataError(f"{path}: holds no file to read\n    give files of {', '.join(SUFFIXES)}")
    return files


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)
