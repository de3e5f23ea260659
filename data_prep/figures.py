"""Figures of a data set's rows that can be added up: what the card and the report need, without the rows.

Chunks of a data set each make their own, in any process; merged in the order of the chunks they are equal to
those of all rows at once. Their size grows with the number of different lengths, sources and languages, not
with the number of rows.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_prep.dataset import SPLITS, Split
from data_prep.records import Kind

Counts = Counter[int]


def measures(kind: Kind, row: Mapping[str, Any]) -> dict[str, int]:
    """Length in characters of the row's parts: text | prompt, answer | prompt, chosen, rejected | prompt |
    prompt, and desirable or undesirable.
    """
    if kind == "text":
        return {"text": len(row["text"])}
    if kind == "conversation":
        *before, answer = row["messages"]
        return {"prompt": _chars(before), "answer": _chars([answer])}
    if kind == "unpaired_preference":
        return {"prompt": _chars(row["prompt"]), label(row): _chars(row["completion"])}
    return {name: _chars(row[name]) for name in ("prompt", "chosen", "rejected") if name in row}


def label(row: Mapping[str, Any]) -> str:
    """What the label of an unpaired preference says."""
    return "desirable" if row["label"] else "undesirable"


def source_file(source: str) -> str:
    """What the column `source` names without the row's number: of "a.jsonl:12" the file."""
    name, _, number = source.rpartition(":")
    return name if name and number.isdecimal() else source


def _chars(turns: Sequence[Mapping[str, str]]) -> int:
    return sum(len(turn["content"]) for turn in turns)


@dataclass
class Figures:
    """Counts over rows of one kind.

    rows: by side. sources: by side, rows by `source_file`. lengths: by side and part, rows by length in
    characters. differences: pairs by length of chosen less that of rejected, in characters. turns: rows by
    number of turns of the dialogue or prompt. tokens, languages: rows by what the operations length and
    language tagged. pii_rows, pii_values: by type, rows and findings that the operation pii tagged.
    """

    kind: Kind
    rows: Counter[str] = field(default_factory=Counter)
    sources: dict[str, Counter[str]] = field(default_factory=lambda: {side: Counter() for side in SPLITS})
    lengths: dict[str, dict[str, Counts]] = field(default_factory=lambda: {side: {} for side in SPLITS})
    differences: Counts = field(default_factory=Counter)
    turns: Counts = field(default_factory=Counter)
    tokens: Counts = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    pii_rows: Counter[str] = field(default_factory=Counter)
    pii_values: Counter[str] = field(default_factory=Counter)

    def add(self, rows: Sequence[Mapping[str, Any]], side: Split) -> None:
        """Count rows of the dataset directory's columns (``data_prep.dataset.to_row``) on one side."""
        self.rows[side] += len(rows)
        for row in rows:
            self.sources[side][source_file(row["source"])] += 1
            lengths = measures(self.kind, row)
            for name, length in lengths.items():
                self.lengths[side].setdefault(name, Counter())[length] += 1
            if self.kind == "preference":
                self.differences[lengths["chosen"] - lengths["rejected"]] += 1
            if self.kind != "text":
                self.turns[len(row["messages" if self.kind == "conversation" else "prompt"])] += 1
            if '"tags"' in row["meta"]:
                self._add_tags(json.loads(row["meta"]).get("tags"))

    def _add_tags(self, tags: Any) -> None:
        """Tags of another form than the operations write are the source's own."""
        if not isinstance(tags, dict):
            return
        tokens, language, pii = (tags.get(name) for name in ("tokens", "language", "pii"))
        if isinstance(tokens, int):
            self.tokens[tokens] += 1
        if isinstance(language, str):
            self.languages[language] += 1
        for type, count in pii.items() if isinstance(pii, dict) else ():
            if isinstance(count, int):
                self.pii_rows[type] += 1
                self.pii_values[type] += count

    def merge(self, other: Figures) -> None:
        """Add those of the rows that come after. Raises ValueError where the kinds differ."""
        if other.kind != self.kind:
            raise ValueError(f"figures of {other.kind} rows cannot be added to those of {self.kind} rows")
        for name in _COUNTERS:
            vars(self)[name].update(vars(other)[name])
        for side in SPLITS:
            self.sources[side].update(other.sources[side])
            for part, counts in other.lengths[side].items():
                self.lengths[side].setdefault(part, Counter()).update(counts)

    def parts(self) -> dict[str, Counts]:
        """Lengths by part over both sides; the parts in the order in which the rows have them."""
        parts: dict[str, Counts] = {}
        for side in SPLITS:
            for part, counts in self.lengths[side].items():
                parts.setdefault(part, Counter()).update(counts)
        return parts

    def as_json(self) -> dict[str, Any]:
        """JSON values; the same rows give the same text."""
        values = {name: _written(vars(self)[name]) for name in _COUNTERS}
        sources = {side: _written(self.sources[side]) for side in SPLITS}
        lengths = {
            side: {part: _written(counts) for part, counts in self.lengths[side].items()} for side in SPLITS
        }
        return {"kind": self.kind, **values, "sources": sources, "lengths": lengths}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Figures:
        """What `as_json` gave, written and read as JSON."""
        found = cls(value["kind"])
        for name in _COUNTERS:
            vars(found)[name].update(_read(value[name], name in _BY_NUMBER))
        for side in SPLITS:
            found.sources[side].update(value["sources"][side])
            for part, counts in value["lengths"][side].items():
                found.lengths[side][part] = Counter(_read(counts, numbers=True))
        return found


_BY_NUMBER = ("differences", "turns", "tokens")
_COUNTERS = ("rows", *_BY_NUMBER, "languages", "pii_rows", "pii_values")


def _written(counts: Mapping[Any, int]) -> dict[str, int]:
    return {str(key): count for key, count in sorted(counts.items())}


def _read(counts: Mapping[str, int], numbers: bool) -> dict[Any, int]:
    return {int(key) if numbers else key: count for key, count in counts.items()}


def quantile(counts: Mapping[int, int], share: float) -> int:
    """The value at place round(share * (n - 1)), from 0, of the n values in order.

    Raises ValueError for none.
    """
    left = round(share * (sum(counts.values()) - 1))
    for value, count in sorted(counts.items()):
        if left < count:
            return value
        left -= count
    raise ValueError("no values")


def length_summary(figures: Figures) -> dict[str, Any]:
    """Quantiles in characters by part over both sides; for pairs also how often chosen is the longer one, for
    unpaired preferences the share of desirable answers.
    """
    parts = figures.parts()
    summary: dict[str, Any] = {
        name: {
            "min": min(counts),
            "p50": quantile(counts, 0.5),
            "p95": quantile(counts, 0.95),
            "max": max(counts),
        }
        for name, counts in parts.items()
    }
    if figures.kind == "preference":
        longer = sum(count for difference, count in figures.differences.items() if difference > 0)
        summary["chosen_longer"] = round(longer / figures.differences.total(), 4)
    if figures.kind == "unpaired_preference":
        good, bad = (parts.get(name, Counter()).total() for name in ("desirable", "undesirable"))
        summary["desirable_share"] = round(good / (good + bad), 4)
    return summary


def figures_of(kind: Kind, rows: Mapping[Split, Sequence[Mapping[str, Any]]]) -> Figures:
    """The figures of rows that are held in memory."""
    figures = Figures(kind)
    for side in SPLITS:
        figures.add(rows[side], side)
    return figures


def share_interval(hits: int, total: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson, Probable inference, 1927). Raises ZeroDivisionError for no trials."""
    share, z = hits / total, 1.96
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return centre - half, centre + half
