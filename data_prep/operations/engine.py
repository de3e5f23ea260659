"""One step over some rows: verdicts become rows that stay, drops that are counted, and lines for a reader.

For every step rows_in + repeated = rows_out + drops, over any rows; what is counted of parts of the rows, in
their order, adds up to what is counted of all (`Tally.add`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from data_prep.ingest import Reject
from data_prep.operations.base import Dropped, Kept, MapOperation, Operation, Row, Stays, tagged

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


@dataclass
class Tally:
    """What a step did with some rows. repeated: rows that mixing added; notes: what was changed or tagged.

    drops, first: how many rows of each reason, and the first of them, reasons in the order they came up.
    """

    rows_in: int = 0
    rows_out: int = 0
    repeated: int = 0
    drops: Counter[str] = field(default_factory=Counter)
    first: dict[str, Reject] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[dict[str, str]]] = field(default_factory=dict)

    def add(self, later: Tally, examples: int) -> None:
        """Count what was done with the rows that come after these. examples: how many a reason."""
        self.rows_in += later.rows_in
        self.rows_out += later.rows_out
        self.repeated += later.repeated
        self.drops.update(later.drops)
        self.notes.update(later.notes)
        for reason, at in later.first.items():
            self.first.setdefault(reason, at)
        for reason, shown in later.examples.items():
            held = self.examples.setdefault(reason, [])
            held += shown[: examples - len(held)]

    def drop(self, at: Reject) -> None:
        """Count a row that goes."""
        self.drops[at.reason] += 1
        self.first.setdefault(at.reason, at)

    def conserved(self) -> bool:
        """Whether every row went somewhere."""
        return self.rows_in + self.repeated == self.rows_out + self.drops.total()

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        first = {reason: asdict(at) for reason, at in self.first.items()}
        return {**vars(self), "first": first}

    @classmethod
    def of_json(cls, value: dict[str, Any]) -> Tally:
        """The tally that `as_json` wrote down."""
        first = {reason: Reject(**at) for reason, at in value["first"].items()}
        counters = {name: Counter(value[name]) for name in ("drops", "notes")}
        return cls(**{**value, **counters, "first": first})


@dataclass
class Ledger:
    """What one operation did with all rows, and its own facts."""

    step: Step
    tally: Tally = field(default_factory=Tally)
    facts: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """For dataset.json; counters by name, so that equal data give equal bytes."""
        return {
            "op": self.step.name,
            "settings": self.step.settings,
            "rows_in": self.tally.rows_in,
            "repeated": self.tally.repeated,
            "rows_out": self.tally.rows_out,
            "drops": dict(sorted(self.tally.drops.items())),
            "notes": dict(sorted(self.tally.notes.items())),
            "facts": self.facts,
            "examples": dict(sorted(self.tally.examples.items())),
        }


class Log(Protocol):
    """Takes what one step says of one row."""

    tally: Tally

    def dropped(self, row: Row, verdict: Dropped) -> None:
        """The row goes."""
        ...

    def reviewed(self, row: Row, verdict: Kept) -> None:
        """The row is for the review list."""
        ...


def mapped(operation: MapOperation, rows: Sequence[Row], log: Log) -> list[Row]:
    """The rows that a map operation keeps, as it leaves them."""
    kept: list[Row] = []
    log.tally.rows_in += len(rows)
    for begin in range(0, len(rows), BATCH_ROWS):
        batch = rows[begin : begin + BATCH_ROWS]
        for row, verdict in zip(batch, operation.apply(batch), strict=True):
            if isinstance(verdict, Dropped):
                log.dropped(row, verdict)
                continue
            if verdict.review is not None:
                log.reviewed(row, verdict)
            log.tally.notes.update(verdict.notes)
            kept.append(row if verdict.record is row.record else replace(row, record=verdict.record))
    log.tally.rows_out += len(kept)
    return kept


def decided(
    rows: Sequence[Row],
    verdicts: Iterable[tuple[int, Stays | Dropped]],
    copy_name: Callable[[str], str],
    log: Log,
) -> list[Row]:
    """The rows that a corpus operation keeps, repeated ones after each other.

    verdicts: with the places of their rows, ascending. copy_name: an id that no other row has, from that of
    the row that is repeated.
    """
    kept: list[Row] = []
    log.tally.rows_in += len(rows)
    done = 0
    for place, verdict in verdicts:
        kept += rows[done:place]
        done = place + 1
        if isinstance(verdict, Dropped):
            log.dropped(rows[place], verdict)
        else:
            kept += _repeated(rows[place], verdict, copy_name, log)
    kept += rows[done:]
    log.tally.rows_out += len(kept)
    return kept


def _repeated(row: Row, verdict: Stays, copy_name: Callable[[str], str], log: Log) -> Iterator[Row]:
    log.tally.notes.update(verdict.notes)
    record = tagged(row.record, **verdict.tags)
    row = replace(row, record=record, ties=(*row.ties, *verdict.ties))
    yield row
    for number in range(1, verdict.copies):
        log.tally.repeated += 1
        yield replace(row, record=replace(record, id=copy_name(record.id)), copy=number)
