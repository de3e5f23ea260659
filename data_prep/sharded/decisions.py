"""Decisions over all rows, and their verdicts cut to the chunks that they are about."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from data_prep.operations.base import CorpusOperation
from data_prep.operations.near_duplicates import Duplicates
from data_prep.sharded.ids import give_ids, write_taken
from data_prep.sharded.memory import release_memory
from data_prep.sharded.plan import READ
from data_prep.sharded.store import FileViews, Store, read_json, write_json, write_table


@dataclass(frozen=True)
class Decision:
    """facts: the operation's own; ties: whether verdicts tie rows; dropped: rows that go."""

    facts: dict[str, Any]
    ties: bool
    dropped: int


def decide_duplicates(store: Store, rows: Sequence[int], dedup: bool) -> Decision:
    """Which rows repeat the content of an earlier one, and the ids of the others. rows: of each chunk."""

    def decide() -> Decision:
        files = [store.file(READ, chunk, "keys.arrow") for chunk in range(len(rows))]
        found = Decision({}, False, 0)
        if dedup:
            with store.scratch() as scratch:
                views = FileViews(files, sum(rows), ("key", "place"))
                decision = Duplicates().decide(views, scratch)
                found, _ = _cut(store, 1, rows, decision.verdicts, {})
        give_ids(store, len(rows))
        return found

    return _once(store, 1, decide)


def decide(store: Store, segment: int, operation: CorpusOperation, rows: Sequence[int]) -> Decision:
    """The decision of a corpus operation that `segment` begins with; rows: of each chunk before it."""

    def decide() -> Decision:
        files = [store.file(segment - 1, chunk, "view.arrow") for chunk in range(len(rows))]
        with store.scratch() as scratch:
            decision = operation.decide(FileViews(files, sum(rows)), scratch)
            found, copies = _cut(store, segment, rows, decision.verdicts, dict(decision.facts))
        if copies:
            write_taken(store, segment, len(rows))
        return found

    return _once(store, segment, decide)


def _once(store: Store, segment: int, decide: Any) -> Decision:
    """The decision of an earlier attempt, or made now."""
    file = store.segment(segment) / "decided.json"
    if read_json(file) is None:
        release_memory()
        write_json(file, vars(decide()))
        release_memory()
    return Decision(**read_json(file))


def _cut(
    store: Store, segment: int, rows: Sequence[int], verdicts: Iterable[pa.Table], facts: dict[str, Any]
) -> tuple[Decision, bool]:
    """Write the verdicts on each chunk with places in it; the decision, and whether rows are repeated."""
    dropped, ties, copies = 0, False, False
    for chunk, table in _by_chunk(rows, verdicts):
        write_table(store.file(segment, chunk, "verdicts.arrow"), table)
        dropped += table.num_rows - table.column("reason").null_count
        ties = ties or bool(pc.any(pc.greater(pc.list_value_length(table.column("ties")), 0)).as_py())
        copies = copies or pc.max(table.column("copies")).as_py() > 1
    return Decision(facts, ties, dropped), copies


def _by_chunk(rows: Sequence[int], verdicts: Iterable[pa.Table]) -> Iterator[tuple[int, pa.Table]]:
    """(chunk, verdicts on its rows), chunks without any left out."""
    ends = list(accumulate(rows))
    chunk = 0
    held: list[pa.Table] = []
    for table in verdicts:
        places = table.column("row").to_numpy()
        begin = 0
        while begin < table.num_rows:
            if places[begin] >= ends[chunk]:
                if held:
                    yield chunk, pa.concat_tables(held)
                    held = []
                chunk += 1
                continue
            end = int(places.searchsorted(ends[chunk]))
            part = table.slice(begin, end - begin)
            local = pc.subtract(part.column("row"), ends[chunk] - rows[chunk])
            held.append(part.set_column(0, table.schema.field(0), local))
            begin = end
    if held:
        yield chunk, pa.concat_tables(held)
