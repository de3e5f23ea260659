"""Runs operations one after the other in this process, and keeps the ledger of each.

For every operation rows_in + repeated = rows_out + drops; ids stay unique.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data_prep.operations.base import (
    CorpusOperation,
    Dropped,
    Kept,
    MapOperation,
    MemoryViews,
    Operation,
    Row,
    Stays,
    tagged,
    verdict_of,
)
from data_prep.records import excerpt

BATCH_ROWS = 1000
EXAMPLE_CHARS, REVIEW_CHARS = 160, 600
Show = Callable[[str, int], str]


@dataclass(frozen=True)
class Step:
    """An operation with its name in the configuration and its settings, for the ledger."""

    name: str
    operation: Operation
    settings: dict[str, Any] = field(default_factory=dict)
    examples: int = 3


@dataclass(frozen=True)
class Drop:
    """A dropped row: by which step (1, 2, ...) and why."""

    row: Row
    step: int
    operation: str
    reason: str
    detail: str


@dataclass
class Ledger:
    """What one operation did. repeated: rows that mixing added; notes: what was changed or tagged."""

    operation: str
    settings: dict[str, Any]
    rows_in: int = 0
    rows_out: int = 0
    repeated: int = 0
    drops: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """For dataset.json; counters by name, so that equal data give equal bytes."""
        return {
            "op": self.operation,
            "settings": self.settings,
            "rows_in": self.rows_in,
            "repeated": self.repeated,
            "rows_out": self.rows_out,
            "drops": dict(sorted(self.drops.items())),
            "notes": dict(sorted(self.notes.items())),
            "facts": self.facts,
            "examples": dict(sorted(self.examples.items())),
        }


@dataclass
class Ran:
    """Rows that are left, drops in the order they fell, a ledger a step, and the review list."""

    rows: list[Row]
    drops: list[Drop] = field(default_factory=list)
    ledgers: list[Ledger] = field(default_factory=list)
    review: list[dict[str, Any]] = field(default_factory=list)


def run_operations(
    rows: Sequence[Row],
    steps: Sequence[Step],
    unique_id: Callable[[str], str],
    tick: Callable[[Step, int], None] = lambda step, rows: None,
    show: Show = excerpt,
) -> Ran:
    """Put the rows through the steps. unique_id: gives a repeated row an id that no other has.

    tick: called with the step and the number of rows it has done. show: makes of a text what examples and the
    review list may show of it, in so many characters.
    """
    ran = Ran(list(rows))
    for number, step in enumerate(steps, start=1):
        ledger = Ledger(step.name, step.settings, rows_in=len(ran.rows))
        ran.ledgers.append(ledger)
        before, ran.rows = ran.rows, []
        outcomes = (
            _mapped(step.operation, before)
            if isinstance(step.operation, MapOperation)
            else _decided(step.operation, before, ledger)
        )
        for done, (row, verdict) in enumerate(outcomes, start=1):
            if isinstance(verdict, Dropped):
                ran.drops.append(Drop(row, number, step.name, verdict.reason, verdict.detail))
                _count(ledger, row, verdict, step.examples, show)
                continue
            if isinstance(verdict, Kept) and verdict.review is not None:
                ran.review.append(_reviewed(row, verdict, show))
            ran.rows += _kept(row, verdict, ledger, unique_id)
            if done % BATCH_ROWS == 0:
                tick(step, BATCH_ROWS)
        tick(step, len(before) % BATCH_ROWS)
        ledger.rows_out = len(ran.rows)
        assert ledger.rows_in + ledger.repeated == ledger.rows_out + sum(ledger.drops.values()), step.name
    return ran


def _mapped(operation: MapOperation, rows: Sequence[Row]) -> Iterator[tuple[Row, Kept | Dropped]]:
    for begin in range(0, len(rows), BATCH_ROWS):
        batch = rows[begin : begin + BATCH_ROWS]
        yield from zip(batch, operation.apply(batch), strict=True)


def _decided(
    operation: CorpusOperation, rows: Sequence[Row], ledger: Ledger
) -> Iterator[tuple[Row, Stays | Dropped]]:
    begins = range(0, max(len(rows), 1), BATCH_ROWS)
    views = MemoryViews([operation.view(rows[begin : begin + BATCH_ROWS]) for begin in begins])
    with tempfile.TemporaryDirectory() as scratch:
        decided = operation.decide(views, Path(scratch))
        ledger.facts.update(decided.facts)
        done = 0
        for verdict in (row for table in decided.verdicts for row in table.to_pylist()):
            yield from ((row, Stays()) for row in rows[done : verdict["row"]])
            yield rows[verdict["row"]], verdict_of(verdict)
            done = verdict["row"] + 1
    yield from ((row, Stays()) for row in rows[done:])


def _count(ledger: Ledger, row: Row, dropped: Dropped, examples: int, show: Show) -> None:
    ledger.drops[dropped.reason] += 1
    shown = ledger.examples.setdefault(dropped.reason, [])
    if len(shown) < examples:
        text = show(row.record.turns()[0][1], EXAMPLE_CHARS)
        detail = show(dropped.detail, EXAMPLE_CHARS)
        shown.append({"at": f"{row.file}:{row.line}", "detail": detail, "excerpt": text})


def _reviewed(row: Row, kept: Kept, show: Show) -> dict[str, Any]:
    said = {
        key: show(value, REVIEW_CHARS) if isinstance(value, str) else value
        for key, value in (kept.review or {}).items()
    }
    return {"file": row.file, "line": row.line, "id": kept.record.id, **said}


def _kept(
    row: Row,
    verdict: Kept | Stays,
    ledger: Ledger,
    unique_id: Callable[[str], str],
) -> list[Row]:
    ledger.notes.update(verdict.notes)
    if isinstance(verdict, Kept):
        return [row if verdict.record is row.record else replace(row, record=verdict.record)]
    record = tagged(row.record, **verdict.tags)
    kept = replace(row, record=record, ties=(*row.ties, *verdict.ties))
    copies = [
        replace(kept, record=replace(record, id=unique_id(record.id)), copy=number)
        for number in range(1, verdict.copies)
    ]
    ledger.repeated += len(copies)
    return [kept, *copies]
