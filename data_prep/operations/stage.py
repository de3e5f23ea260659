"""The operations inside the curate stage: rows that were read, through the operations, onto their sides.

A row's side is a hash of its group. Rows that an operation tied together, and all rows of their groups,
become one group: its name is the smallest of the names it is made of, whatever the order of the rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from data_prep.dataset import to_row
from data_prep.dedup import content_key
from data_prep.ingest import Reject
from data_prep.licences import roll_up
from data_prep.near_duplicates import UnionFind
from data_prep.operations.base import Row
from data_prep.operations.engine import EXAMPLE_CHARS, Drop, Ran, Show, Step, run_operations
from data_prep.operations.personal import Clean, scrubber
from data_prep.records import excerpt
from data_prep.split import side

if TYPE_CHECKING:
    from data_prep.config import CurateConfig
    from data_prep.curate import Curated

REPEATED = "repeated_in_eval"


def operate(
    config: CurateConfig,
    curated: Curated,
    steps: Sequence[Step],
    unique_id: Callable[[str], str],
    tick: Callable[[Step, int], None] = lambda step, rows: None,
) -> None:
    """Put the pending rows of `curated` through the steps and onto the sides of the split.

    A repetition that mixing made and that lands in eval is dropped: nothing is evaluated twice.
    """
    clean = scrubber([step.operation for step in steps])
    ran = run_operations(curated.pending, steps, unique_id, tick, _shower(clean))
    curated.pending = []
    sources: dict[str, list[str]] = {split: [] for split in curated.rows}
    for row, group in zip(ran.rows, groups(config, ran.rows), strict=True):
        where = side(group, config.split.salt, config.split.eval_fraction)
        if where == "eval" and row.copy:
            ran.drops.append(Drop(row, len(steps) + 1, "split", REPEATED, "a repetition, in the eval side"))
            continue
        curated.rows[where].append(to_row(replace(row.record, group=group)))
        sources[where].append(row.source)
    curated.operated = ran
    curated.operation_drops = [_reject(drop, clean) for drop in ran.drops]
    curated.mixture = {split: _shares(names) for split, names in sources.items()}


def _shower(clean: Clean | None) -> Show:
    """Shortens a text for a report; where an operation redacts, it is redacted whole before it is cut."""
    if clean is None:
        return excerpt
    return lambda text, limit: excerpt(clean(text.replace("...", "\u2026")), limit)


def _reject(drop: Drop, clean: Clean | None) -> Reject:
    show = _shower(clean)
    text = show(drop.row.record.turns()[0][1], EXAMPLE_CHARS)
    detail = clean(drop.detail) if clean else drop.detail
    return Reject(drop.row.file, drop.row.line, drop.reason, detail, text)


def clean_rejects(rejects: Sequence[Reject], steps: Sequence[Step]) -> list[Reject]:
    """Rows that could not be read, with what is shown of them redacted where an operation redacts."""
    clean = scrubber([step.operation for step in steps])
    if clean is None:
        return list(rejects)
    return [replace(at, detail=clean(at.detail), excerpt=clean(at.excerpt)) for at in rejects]


def _shares(names: Sequence[str]) -> dict[str, Any]:
    """Rows and exact share of every source."""
    counts = sorted(Counter(names).items())
    return {name: {"rows": count, "share": count / len(names)} for name, count in counts}


def groups(config: CurateConfig, rows: Sequence[Row]) -> list[str]:
    """The split group of every row."""
    by_record = config.split.by == "record"
    names = [content_key(row.record)[:16] if by_record else row.record.group for row in rows]
    if not any(row.ties for row in rows):
        return names
    numbers = {name: number for number, name in enumerate(sorted(set(names)))}
    union = UnionFind(len(numbers))
    first: dict[str, int] = {}
    for row, name in zip(rows, names, strict=True):
        for tie in row.ties:
            union.join(first.setdefault(tie, numbers[name]), numbers[name])
    ordered = list(numbers)
    return [ordered[union.find(numbers[name])] for name in names]


def conserved(rows_in: int, curated: Curated) -> bool:
    """Whether every row that was read, or repeated, is a row of the data set or a counted drop."""
    ran: Ran | None = curated.operated
    repeated = sum(ledger.repeated for ledger in ran.ledgers) if ran else 0
    out = sum(map(len, curated.rows.values()))
    return rows_in + repeated == out + len(curated.dropped) + len(curated.operation_drops)


def operations_info(config: CurateConfig, curated: Curated) -> dict[str, Any]:
    """What dataset.json says beyond its other keys; nothing without operations."""
    if curated.operated is None:
        return {}
    ledgers = curated.operated.ledgers
    rows: Counter[str] = Counter()
    for shares in curated.mixture.values():
        rows.update({name: at["rows"] for name, at in shares.items()})
    licences = [
        (source.label, "generated" if source.generator else source.licence) for source in config.sources
    ]
    return {
        "mixture": curated.mixture,
        "licences": {"marked_commercial": config.commercial, **roll_up(licences, rows)},
        "rows_repeated": sum(ledger.repeated for ledger in ledgers),
        "operations": [ledger.as_json() for ledger in ledgers],
    }
