"""Runs a corpus operation alone, without the engine."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.operations.base import (
    VERDICT_SCHEMA,
    CorpusOperation,
    Dropped,
    MemoryViews,
    Row,
    Stays,
    Views,
    verdict_of,
)


def views_of(operation: CorpusOperation, rows: Sequence[Row], batch: int = 1000) -> MemoryViews:
    """The views of `rows`, in tables of `batch` rows."""
    begins = range(0, max(len(rows), 1), batch)
    return MemoryViews([operation.view(rows[begin : begin + batch]) for begin in begins])


def verdicts_on(operation: CorpusOperation, views: Views) -> tuple[list[Stays | Dropped], dict[str, Any]]:
    """A verdict a row, `Stays()` where none is given, and the facts; the form of the stream is checked."""
    with tempfile.TemporaryDirectory() as scratch:
        decided = operation.decide(views, Path(scratch))
        facts = dict(decided.facts)
        tables = list(decided.verdicts)
    assert all(table.schema == VERDICT_SCHEMA for table in tables)
    given = [row for table in tables for row in table.to_pylist()]
    places = [row["row"] for row in given]
    assert places == sorted(set(places))
    verdicts: list[Stays | Dropped] = [Stays()] * len(views)
    for row in given:
        verdicts[row["row"]] = verdict_of(row)
    return verdicts, facts


def decided_on(
    operation: CorpusOperation, rows: Sequence[Row], batch: int = 1000
) -> tuple[list[Stays | Dropped], dict[str, Any]]:
    """`verdicts_on` the views of `rows`."""
    return verdicts_on(operation, views_of(operation, rows, batch))
