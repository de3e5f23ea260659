"""What is done with one chunk: a function of files and of the rows that are handed over with the task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from data_prep.ingest import Reject
from data_prep.operations.base import Dropped, MapOperation, Row, Stays, verdict_of
from data_prep.operations.engine import decided, mapped
from data_prep.operations.personal import scrubber
from data_prep.records import excerpt
from data_prep.sharded.arrow import rows_of, table_of
from data_prep.sharded.ids import Taken
from data_prep.sharded.log import StepLog, cleaned
from data_prep.sharded.parsing import parse
from data_prep.sharded.plan import READ, Part, Segment, Setup, Task, segments
from data_prep.sharded.sides import own_groups, put
from data_prep.sharded.store import (
    Store,
    read_json,
    read_table,
    replacing,
    write_bytes,
    write_json,
    write_table,
)

LINES = ("rejects", "reviews", "dropped_rows")
"""What is said of rows, a file of each kind a chunk."""
SIDES = ("train.arrow", "eval.arrow", "train.lines", "eval.lines", "train.groups", "eval.groups")


class Worker:
    """Does tasks. One is made in each process."""

    def __init__(self, setup: Setup) -> None:
        self.config = setup.config
        self.kind = setup.config.kind
        self.store = Store(setup.root)
        self.steps = setup.steps()
        self.segments = segments(self.steps)
        self.clean = scrubber([step.operation for step in self.steps])

    def run(self, task: Task) -> dict[str, Any]:
        """Do the task, and return what is said of the chunk, which is also in its .json."""
        if task.segment == READ:
            return self._read(task.chunk, task.parts)
        if task.segment > len(self.segments):
            return self._write(task)
        return self._step(self.segments[task.segment - 1], task)

    def _read(self, chunk: int, parts: Sequence[Part]) -> dict[str, Any]:
        found = parse(self.config, parts)
        log = self._log(0)
        log.tally.rows_in, log.tally.rows_out = found.read, len(found.rows)
        dropped: list[tuple[int, dict[str, Any], str | None]] = []
        for at, reject, row in found.dropped:
            said = cleaned(reject, self.clean)
            log.tally.drop(said)
            dropped.append((at, asdict(said), log.in_full(row, said, "filters") if row else None))
        write_table(self.store.file(READ, chunk, "rows.arrow"), table_of(found.rows, self.kind))
        write_table(self.store.file(READ, chunk, "keys.arrow"), found.keys())
        write_json(self.store.file(READ, chunk, "drops"), dropped)
        result = {"rows": len(found.rows), "tallies": {"0": log.tally.as_json()}}
        return self.store.finish(READ, chunk, result, ("rows.arrow", "keys.arrow", "drops"))

    def _step(self, segment: Segment, task: Task) -> dict[str, Any]:
        at, chunk = segment.number, task.chunk
        rows = rows_of(read_table(self.store.file(at - 1, chunk, "rows.arrow")), self.kind)
        verdicts = self._verdicts(at, chunk)
        logs: dict[int, StepLog] = {}
        if segment.decided == 0:
            logs[0] = self._log(0)
            rows = self._unique(chunk, rows, verdicts, logs[0])
            made: list[int] = []
        else:
            logs[segment.decided] = self._log(segment.decided)
            taken = Taken(self.store, at)
            rows = decided(rows, verdicts, taken.copy_name, logs[segment.decided])
            made = taken.made
        for number in segment.maps:
            operation = self.steps[number - 1].operation
            assert isinstance(operation, MapOperation)
            logs[number] = self._log(number)
            rows = mapped(operation, rows, logs[number])
        said: dict[str, Any] = {"rows": len(rows)}
        files = ["made"]
        write_bytes(self.store.file(at, chunk, "made"), np.array(made, dtype=np.uint64).tobytes())
        if segment.viewed is not None:
            operation = self.steps[segment.viewed - 1].operation
            assert not isinstance(operation, MapOperation)
            write_table(self.store.file(at, chunk, "view.arrow"), operation.view(rows))
            files.append("view.arrow")
        elif self.config.operates:
            rows = own_groups(self.config, rows)
        table = table_of(rows, self.kind)
        if task.writes:
            last = logs[len(self.steps) + 1] = self._log(len(self.steps) + 1)
            said |= put(self.config, self.store, at, chunk, table, last)
            files += SIDES
        else:
            write_table(self.store.file(at, chunk, "rows.arrow"), table)
            files.append("rows.arrow")
        return self._finish(at, chunk, said, files, logs)

    def _write(self, task: Task) -> dict[str, Any]:
        at, chunk = task.segment, task.chunk
        table = read_table(self.store.file(at - 1, chunk, "rows.arrow"))
        joined = self.store.file(at, chunk, "groups.arrow")
        if joined.exists():
            place = table.schema.get_field_index("group")
            table = table.set_column(place, table.schema.field("group"), read_table(joined).column("group"))
        log = self._log(len(self.steps) + 1)
        said = {"rows": table.num_rows, **put(self.config, self.store, at, chunk, table, log)}
        return self._finish(at, chunk, said, list(SIDES), {len(self.steps) + 1: log})

    def _log(self, number: int) -> StepLog:
        """Of a step, of reading (0), or of the split (the last one)."""
        examples, name = 0, "split"
        if 0 < number <= len(self.steps):
            step = self.steps[number - 1]
            examples, name = step.examples, step.name
        return StepLog(self.clean, examples, number, name, self.config.rejected_rows)

    def _finish(
        self, at: int, chunk: int, said: dict[str, Any], files: list[str], logs: dict[int, StepLog]
    ) -> dict[str, Any]:
        """Write what was said of rows, and how much of it each step said."""
        for what in LINES:
            sizes: dict[str, int] = {}
            with replacing(self.store.file(at, chunk, what)) as beside, beside.open("wb") as stream:
                for number, log in sorted(logs.items()):
                    sizes[str(number)] = stream.write("".join(vars(log)[what]).encode("utf-8"))
            said[what] = sizes
        for log in logs.values():
            assert log.tally.conserved()
        said["tallies"] = {str(number): log.tally.as_json() for number, log in logs.items()}
        return self.store.finish(at, chunk, said, [*files, *LINES])

    def _verdicts(self, segment: int, chunk: int) -> list[tuple[int, Stays | Dropped]]:
        file = self.store.file(segment, chunk, "verdicts.arrow")
        if not file.exists():
            return []
        return [(at["row"], verdict_of(at)) for at in read_table(file).to_pylist()]

    def _unique(
        self, chunk: int, rows: list[Row], verdicts: list[tuple[int, Stays | Dropped]], log: StepLog
    ) -> list[Row]:
        """The rows that repeat no other, with ids of their own; drops of reading and these in one order."""
        log.tally.rows_out = log.tally.rows_in = 0
        places = read_table(self.store.file(READ, chunk, "keys.arrow"), ["at"]).column("at").to_pylist()
        drops: list[tuple[int, Reject, str | None]] = [
            (at, Reject(**said), line) for at, said, line in read_json(self.store.file(READ, chunk, "drops"))
        ]
        again = {place: verdict for place, verdict in verdicts if isinstance(verdict, Dropped)}
        for place, verdict in again.items():
            row = rows[place]
            said = Reject(row.file, row.line, verdict.reason, verdict.detail, _beginning(row))
            reject = cleaned(said, self.clean)
            drops.append((places[place], reject, log.in_full(row, reject, "dedup")))
        for _, reject, line in sorted(drops, key=lambda drop: drop[0]):
            log.rejected(reject, line)
        names = dict(self._names(chunk))
        kept = [
            replace(row, record=replace(row.record, id=names[place])) if place in names else row
            for place, row in enumerate(rows)
            if place not in again
        ]
        log.tally.rows_out = len(kept)
        log.tally.rows_in = len(kept) + len(drops)
        return kept

    def _names(self, chunk: int) -> Iterator[tuple[int, str]]:
        file = self.store.file(1, chunk, "ids.arrow")
        if file.exists():
            table = read_table(file)
            yield from zip(table.column("row").to_pylist(), table.column("id").to_pylist(), strict=True)


def _beginning(row: Row) -> str:
    return excerpt(row.record.turns()[0][1])
