"""One pass over a file: what it is, what its rows are, and what is wrong with them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from data_prep.columns import lookup, prepared
from data_prep.config import ReadConfig, SourceConfig, SplitConfig
from data_prep.dedup import content_key
from data_prep.doctor.columns import Column, add_row
from data_prep.doctor.licences import licence_beside
from data_prep.doctor.suggest import META, Suggestion, suggest
from data_prep.figures import measures
from data_prep.files import BadRow, FileFacts, read_rows
from data_prep.formats import FORMATS
from data_prep.records import InvalidRecord, PreferenceRecord, Record, UnpairedPreferenceRecord
from data_prep.split import default_group, side
from posttrain.errors import UserError

LOOKED_AT = 1000
LARGEST_SAMPLE = 32 << 20
REMEMBERED = 1_000_000
"""Contents and ids that are remembered to find duplicates; of a longer file, the first so many."""
SAMPLES = 10_000
TEXTS = 300
EXAMPLES = 3
FRACTIONS = (0.1, 0.2, 0.3, 0.5, 0.7, 0.9)


@dataclass
class Reservoir:
    """A uniform sample of what was added, of at most `size`, the same on every run (Vitter's algorithm R)."""

    size: int
    seen: int = 0
    kept: list[Any] = field(default_factory=list)
    random: random.Random = field(default_factory=lambda: random.Random(0))

    def add(self, value: Any) -> None:
        self.seen += 1
        if len(self.kept) < self.size:
            self.kept.append(value)
        elif (place := self.random.randrange(self.seen)) < self.size:
            self.kept[place] = value


@dataclass
class Lengths:
    """Characters of one part of the records: extremes of all, quantiles of a sample."""

    sample: Reservoir = field(default_factory=lambda: Reservoir(SAMPLES))
    least: int = 0
    most: int = 0

    def add(self, length: int) -> None:
        self.least = min(self.least, length) if self.sample.seen else length
        self.most = max(self.most, length)
        self.sample.add(length)

    def as_json(self) -> dict[str, int]:
        ordered = sorted(self.sample.kept)
        p50, p95 = (ordered[round(share * (len(ordered) - 1))] for share in (0.5, 0.95))
        return {"min": self.least, "p50": p50, "p95": p95, "max": self.most}


@dataclass
class Seen:
    """Which keys came up before, among the first REMEMBERED."""

    keys: set[Any] = field(default_factory=set)
    repeated: int = 0
    lines: list[int] = field(default_factory=list)

    def add(self, key: Any, line: int) -> None:
        if key in self.keys:
            self.repeated += 1
            if len(self.lines) < EXAMPLES:
                self.lines.append(line)
        elif len(self.keys) < REMEMBERED:
            self.keys.add(key)


@dataclass
class Sides:
    """Which sides of the split have a row, for each of FRACTIONS and the default salt."""

    by_fraction: dict[float, set[str]] = field(default_factory=lambda: {each: set() for each in FRACTIONS})

    def add(self, group: str) -> None:
        for share, sides in self.by_fraction.items():
            if len(sides) < 2:
                sides.add(side(group, SplitConfig().salt, share))

    def join(self, other: Sides) -> None:
        """Count the rows of another file too."""
        for share, sides in self.by_fraction.items():
            sides |= other.by_fraction[share]

    def usable(self) -> float | None:
        """The first fraction that leaves no side empty."""
        return next((share for share, sides in self.by_fraction.items() if len(sides) == 2), None)


@dataclass
class Examined:
    """Everything that was found out about a file. error: why it cannot be read, with nothing else then."""

    path: Path
    bytes: int = 0
    error: str | None = None
    facts: FileFacts = field(default_factory=FileFacts)
    rows: int = 0
    columns: dict[str, Column] = field(default_factory=dict)
    suggestion: Suggestion | None = None
    good: int = 0
    rejects: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    contents: Seen = field(default_factory=Seen)
    ids: Seen = field(default_factory=Seen)
    lengths: dict[str, Lengths] = field(default_factory=dict)
    roles: Counter[str] = field(default_factory=Counter)
    turns: Counter[int] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    chosen_longer: int = 0
    replaced: int = 0
    texts: Reservoir = field(default_factory=lambda: Reservoir(TEXTS))
    groups: Sides = field(default_factory=lambda: Sides())
    singles: Sides = field(default_factory=lambda: Sides())
    unread: int = 0
    licence: tuple[str, Path] | None = None

    def reject(self, line: int, reason: str, detail: str) -> None:
        """Count a row that is no record."""
        self.rejects[reason] += 1
        places = self.examples.setdefault(reason, [])
        if len(places) < EXAMPLES:
            places.append((line, detail))


def examine(path: Path, read: ReadConfig | None = None) -> Examined:
    """Read the file once, in memory that does not grow with it. What is wrong with it is not raised."""
    found = Examined(path)
    try:
        found.bytes = path.stat().st_size
        _read(found, read or ReadConfig())
    except UserError as error:
        found.error = str(error)
    except OSError as error:
        found.error = f"{path}: cannot be read ({error.strerror or error})"
    found.licence = licence_beside(path)
    return found


def _read(found: Examined, read: ReadConfig) -> None:
    pairs = read_rows(found.path, read, found.facts)
    first, good = beginning(pairs), []
    while first and not (good := [(line, row) for line, row in first if not isinstance(row, BadRow)]):
        for line, row in first:
            _add_bad(found, line, row)
        first = beginning(pairs)
    found.suggestion = suggest(good, str(found.path))
    settings = found.suggestion.settings if found.suggestion else {}
    source = SourceConfig.model_validate({"path": str(found.path), **settings})
    for line, row in chain(first, pairs):
        if isinstance(row, BadRow):
            _add_bad(found, line, row)
            continue
        found.rows += 1
        add_row(found.columns, row)
        if found.suggestion is None:
            continue
        try:
            record = FORMATS[source.format].parse(prepared(row, source))
        except InvalidRecord as error:
            found.reject(line, error.reason, str(error))
            continue
        found.good += 1
        _add(found, line, record)
        if source.id_column and lookup(row, source.id_column) is not None:
            found.ids.add(str(lookup(row, source.id_column)), line)
    if found.suggestion:
        _suggest_meta(found, found.suggestion)


def _add_bad(found: Examined, line: int, row: BadRow) -> None:
    found.rows += 1
    found.unread += 1
    found.reject(line, row.reason, row.detail)


def beginning(pairs: Iterator[tuple[int, Any]]) -> list[tuple[int, Any]]:
    """The first LOOKED_AT pairs, fewer where they are large."""
    first, size = [], 0
    for line, row in pairs:
        first.append((line, row))
        size += len(repr(row))
        if len(first) >= LOOKED_AT or size > LARGEST_SAMPLE:
            break
    return first


def _add(found: Examined, line: int, record: Record) -> None:
    key = content_key(record)
    found.contents.add(bytes.fromhex(key[:16]), line)
    found.groups.add(default_group(record))
    found.singles.add(key[:16])
    turns = record.turns()
    for name, length in measures(record.kind, record.content_columns()).items():
        found.lengths.setdefault(name, Lengths()).add(length)
    if record.kind != "text":
        found.roles.update(role for role, _ in turns)
        found.turns[len(turns)] += 1
    if isinstance(record, UnpairedPreferenceRecord):
        found.labels["true" if record.label else "false"] += 1
    if isinstance(record, PreferenceRecord):
        found.chosen_longer += len(record.chosen[0].content) > len(record.rejected[0].content)
    found.replaced += any("\ufffd" in text for _, text in turns)
    found.texts.add(turns[-1][1][:2000])


def _suggest_meta(found: Examined, suggestion: Suggestion) -> None:
    """Columns that rewards, checkers and filters read, where every row that can be used has one."""
    used = set(suggestion.settings.get("columns", {}).values()) | {suggestion.settings.get("id_column")}
    fields = {"label"} if suggestion.kind == "unpaired_preference" else set()
    fields |= {"answer"} if suggestion.settings["format"] == "question_answer" else set()
    complete = [
        name
        for name, column in found.columns.items()
        if column.filled() == column.types.total() == found.rows - found.unread
    ]
    names = [name for name in complete if name.lower() in META and name not in used | fields]
    if names:
        suggestion.settings["meta_columns"] = names


def languages(texts: list[str]) -> dict[str, float] | None:
    """Share of each language among the texts, the most frequent first; None without py3langid.

    py3langid tells 97 languages apart, 92 % of sentences right over 75 of them (docs/data.md).
    """
    try:
        import py3langid
    except ImportError:
        return None
    counts = Counter(py3langid.classify(text)[0] for text in texts if text.strip())
    return {name: round(count / counts.total(), 4) for name, count in counts.most_common(5)}
