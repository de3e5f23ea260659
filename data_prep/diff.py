"""What changed between two dataset directories: rows by id, drops, operations, settings, lengths.

Ids are hashes of a record's content unless its source gave it one, so a changed text is a row removed and
another added; where ids were given, a row with the same id and other content is changed. A row is moved when
it changed the side of the split: what was held out is now trained on, or the other way round. Of a row only
its id, its side and 16 bytes of a hash are held.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data_prep.dataset import SPLITS
from data_prep.export import dataset_info, side_rows
from data_prep.records import excerpt
from posttrain.errors import DataError

SHOWN = 3
_NOT_SETTINGS = frozenset(
    "rows_in rows_out rows_repeated drops lengths content_hash columns operations mixture".split()
)


@dataclass(frozen=True)
class DatasetDiff:
    """old, new: the directories. rows, drops: by name, (old, new). moved: by "train to eval" and the reverse.

    examples: beginnings of a few rows that were added, removed, changed or moved. settings: of dataset.json,
    by dotted path, (old, new), None where absent.
    """

    old: str
    new: str
    same_content: bool
    rows: dict[str, tuple[int, int]]
    added: int
    removed: int
    changed: int
    moved: dict[str, int]
    drops: dict[str, tuple[int, int]]
    settings: dict[str, tuple[Any, Any]]
    lengths: dict[str, tuple[Any, Any]]
    examples: dict[str, list[str]]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def print(self, console: Console) -> None:
        """For a terminal: counts of rows, and what else is not equal."""
        console.print(f"{self.old} -> {self.new}", markup=False, highlight=False)
        if self.same_content:
            console.print("the same rows on the same sides")
        else:
            moves = ", ".join(f"{count:,} moved from {where}" for where, count in self.moved.items())
            counts = f"{self.added:,} added, {self.removed:,} removed, {self.changed:,} changed"
            console.print(f"{counts}{', ' + moves if moves else ''}", highlight=False)
        for title, values in (
            ("rows", self.rows),
            ("drops", self.drops),
            ("lengths in characters", self.lengths),
            ("settings", self.settings),
        ):
            if values:
                console.print(_table(title, values))
        for what, shown in self.examples.items():
            for text in shown:
                console.print(f"{what}: {text}", markup=False, highlight=False)


def _table(title: str, values: Mapping[str, tuple[Any, Any]]) -> Table:
    table = Table(title, "before", "after", box=None, pad_edge=False)
    for name, (before, after) in values.items():
        table.add_row(name, *(_cell(value) for value in (before, after)))
    return table


def _cell(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "-" if value is None else excerpt(value, 60).replace("[", r"\[")


def diff(old: Path, new: Path) -> DatasetDiff:
    """Compare two dataset directories, or the run directories that hold them.

    Raises DataError: one is no dataset directory, has no dataset.json, or they hold rows of different kinds.
    """
    infos = [dataset_info(path) for path in (old, new)]
    kinds = [info["kind"] for info in infos]
    if kinds[0] != kinds[1]:
        raise DataError(
            f"{old} holds {kinds[0]} rows and {new} {kinds[1]} rows, which cannot be compared\n"
            "    give two data sets of one kind"
        )
    before, after = (_rows(path) for path in (old, new))
    common = before.keys() & after.keys()
    changed = sorted(id for id in common if before[id][1] != after[id][1])
    moved = sorted(id for id in common if before[id][0] != after[id][0])
    added, removed = sorted(after.keys() - before.keys()), sorted(before.keys() - after.keys())
    examples = {
        what: _beginnings(path, ids[:SHOWN])
        for what, path, ids in (
            ("added", new, added),
            ("removed", old, removed),
            ("changed", new, changed),
            ("moved", new, moved),
        )
    }
    first, second = infos
    rows = {"read": (first["rows_in"], second["rows_in"])}
    rows |= {side: (first["rows_out"][side], second["rows_out"][side]) for side in SPLITS}
    return DatasetDiff(
        str(old),
        str(new),
        first["content_hash"] == second["content_hash"],
        rows,
        len(added),
        len(removed),
        len(changed),
        dict(Counter(f"{before[id][0]} to {after[id][0]}" for id in moved)),
        _unlike(_counts(first), _counts(second)),
        _unlike(_settings(first), _settings(second)),
        _unlike(_flat(first["lengths"]), _flat(second["lengths"])),
        {what: shown for what, shown in examples.items() if shown},
    )


def _read(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(side, row) of every row, a batch at a time."""
    for side in SPLITS:
        for _, row in side_rows(path, side):
            yield side, row


def _content(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in ("id", "source", "group", "meta")}


def _rows(path: Path) -> dict[str, tuple[str, bytes]]:
    """(side, digest of the content) of every row, by id. source, group and meta do not count."""
    rows: dict[str, tuple[str, bytes]] = {}
    for side, row in _read(path):
        text = json.dumps(_content(row), sort_keys=True, ensure_ascii=False)
        rows[row["id"]] = (side, hashlib.sha256(text.encode()).digest()[:16])
    return rows


def _beginnings(path: Path, ids: Sequence[str]) -> list[str]:
    """The beginnings of these rows, from a second reading."""
    found: dict[str, str] = {}
    for _, row in _read(path) if ids else ():
        if row["id"] in ids:
            found[row["id"]] = _beginning(row["id"], _content(row))
            if len(found) == len(ids):
                break
    return [found[id] for id in ids]


def _beginning(id: str, content: Mapping[str, Any]) -> str:
    first = next(iter(content.values()))
    return f"{id} {excerpt(first if isinstance(first, str) else first[0]['content'], 90)}"


def _counts(info: Mapping[str, Any]) -> dict[str, Any]:
    """Drops by reason, those of operations by operation too."""
    by_operation = {
        f"{number}. {at['op']}: {reason}": count
        for number, at in enumerate(info.get("operations", ()), start=1)
        for reason, count in at["drops"].items()
    }
    return {**info["drops"], **by_operation}


def _settings(info: Mapping[str, Any]) -> dict[str, Any]:
    settings = {name: value for name, value in info.items() if name not in _NOT_SETTINGS}
    settings["sources"] = {at["name"]: at for at in info["sources"]}
    settings["split"] = {name: value for name, value in info["split"].items() if name != "groups"}
    operations = info.get("operations", ())
    for number, at in enumerate(operations, start=1):
        settings[f"operations.{number}. {at['op']}"] = at["settings"]
    return _flat(settings)


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        found: dict[str, Any] = {path: {}} if path and not value else {}
        for name, item in value.items():
            found |= _flat(item, f"{path}.{name}" if path else name)
        return found
    return {path: value}


def _unlike(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = dict.fromkeys((*first, *second))
    both = {name: (first.get(name), second.get(name)) for name in names}
    return {name: pair for name, pair in both.items() if pair[0] != pair[1]}
