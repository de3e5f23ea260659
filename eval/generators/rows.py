"""Rows of a JSON lines or CSV file, each with the place that a message names, and their cells."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from eval.judging.rows import read_jsonl
from posttrain.errors import DataError


def read_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """("file:line", row) of every row; files that end in .csv are comma-separated with a header.

    Raises DataError for a file that cannot be read or holds no row.
    """
    if path.suffix.lower() != ".csv":
        return [(f"{path}:{line}", row) for line, row in read_jsonl(path)]
    rows = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(f"{path}:{reader.line_num}: has not as many cells as the header")
                rows.append((f"{path}:{reader.line_num}", dict(row)))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as CSV ({error})") from None
    if not rows:
        raise DataError(f"{path}: holds no row")
    return rows


def cell(row: dict[str, Any], column: str, where: str) -> Any:
    """The value of a column, or of a dotted path into nested objects ("175b.solution").

    Raises DataError naming the columns there are.
    """
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        if not isinstance(value, dict) or part not in value:
            raise DataError(f"{where}: has no `{column}`; there are {', '.join(map(str, row))}")
        value = value[part]
    return value
