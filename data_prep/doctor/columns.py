"""What the columns of a file hold: types, how often, how long."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from data_prep.records import excerpt

MOST_COLUMNS = 200
_TYPES = {
    str: "text",
    bool: "boolean",
    int: "integer",
    float: "number",
    list: "list",
    dict: "object",
    type(None): "null",
}


@dataclass
class Column:
    """One column. types: how many rows hold a value of each; characters: of all its texts."""

    types: Counter[str] = field(default_factory=Counter)
    characters: int = 0
    example: str = ""

    def add(self, value: Any) -> None:
        """Count one value."""
        self.types[_TYPES.get(type(value), type(value).__name__)] += 1
        if isinstance(value, str):
            self.characters += len(value)
        if not self.example and value not in (None, "", [], {}):
            self.example = excerpt(value if not isinstance(value, str) else value[:400], 60)

    def filled(self) -> int:
        """Rows that hold a value other than null."""
        return self.types.total() - self.types["null"]

    def as_json(self, rows: int) -> dict[str, Any]:
        """Shares are of the file's rows."""
        texts = self.types["text"]
        return {
            "types": {name: round(count / rows, 4) for name, count in self.types.most_common()},
            "filled": round(self.filled() / rows, 4),
            "mean_characters": round(self.characters / texts, 1) if texts else None,
            "example": self.example,
        }


def add_row(columns: dict[str, Column], row: dict[str, Any]) -> None:
    """Count a row's values. Beyond MOST_COLUMNS, new names are left out."""
    for name, value in row.items():
        if name in columns or len(columns) < MOST_COLUMNS:
            columns.setdefault(str(name), Column()).add(value)


def places(value: Any, prefix: str = "", depth: int = 4) -> Iterator[tuple[str, str]]:
    """(place, text) of every text in a row, named as in `columns` of a source; the first item of lists."""
    if isinstance(value, str):
        yield prefix, value
    elif depth and isinstance(value, dict):
        for name, inner in value.items():
            yield from places(inner, f"{prefix}.{name}" if prefix else str(name), depth - 1)
    elif depth and isinstance(value, list) and value:
        yield from places(value[0], f"{prefix}[0]", depth - 1)
