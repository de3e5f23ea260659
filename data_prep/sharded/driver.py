"""Leads the chunks of one run through the segments, and adds up what is said of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from data_prep.curate_checks import check_left, check_read
from data_prep.dataset import SPLITS, Split
from data_prep.figures import Figures
from data_prep.ingest import SourceReport
from data_prep.operations.base import MapOperation
from data_prep.operations.engine import Ledger, Step, Tally
from data_prep.sharded.decisions import Decision, decide, decide_duplicates
from data_prep.sharded.engines import Engine
from data_prep.sharded.groups import join_groups
from data_prep.sharded.plan import READ, Part, Segment, Setup, Task, segments
from data_prep.sharded.reading import in_order
from data_prep.sharded.sides import distinct
from data_prep.sharded.store import Store, read_json, write_json

Watch = Callable[[str, int, int | None, Iterator[Any]], Iterator[Any]]
"""Sees the results of a segment as they pass. It is told the segment's name, how many chunks an earlier
attempt has done, and how many there are, where that is known.
"""


@dataclass
class Curated:
    """What is known of all rows.

    tallies: by step, 0 for reading with filters and exact dedup, the last one for the split. chunks,
    last: how many there are, and the segment whose files hold the sides; sides: rows of each chunk.
    mixture: rows by side and source.
    """

    figures: Figures
    sources: list[SourceReport] = field(default_factory=list)
    chunks: int = 0
    last: int = 0
    tallies: dict[int, Tally] = field(default_factory=dict)
    ledgers: list[Ledger] = field(default_factory=list)
    sides: dict[Split, list[int]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    groups: dict[Split, int] = field(default_factory=dict)
    mixture: dict[Split, Counter[str]] = field(default_factory=lambda: {split: Counter() for split in SPLITS})

    @property
    def rows_in(self) -> int:
        """Rows read."""
        return sum(source.rows for source in self.sources)

    @property
    def rows(self) -> dict[Split, int]:
        """Rows of each side."""
        return {split: sum(counts) for split, counts in self.sides.items()}

    def dropped(self) -> Tally:
        """Drops of all steps, reasons in the order in which they first came up."""
        every = Tally()
        for _, tally in sorted(self.tallies.items()):
            every.add(replace(tally, examples={}), 0)
        return every

    def conserved(self) -> bool:
        """Whether every row that was read, or repeated, is a row of the data set or a counted drop."""
        repeated = sum(ledger.tally.repeated for ledger in self.ledgers)
        return self.rows_in + repeated == sum(self.rows.values()) + self.dropped().drops.total()


class Driver:
    """Runs a curation in a work directory."""

    def __init__(
        self, setup: Setup, steps: Sequence[Step], store: Store, engine: Engine, watch: Watch
    ) -> None:
        self.config = setup.config
        self.steps, self.store, self.engine, self.watch = steps, store, engine, watch
        self.segments = segments(steps)
        self.found = Curated(Figures(setup.config.kind))
        self.tallies = self.found.tallies
        self.facts: dict[int, dict[str, Any]] = {}

    def read(self, chunks: Iterator[Sequence[Part]], reports: list[SourceReport]) -> list[int]:
        """Read what was not read yet. Returns the rows of each chunk that are left.

        reports: filled while `chunks` are taken.
        """
        file = self.store.segment(READ) / "read.json"
        found = read_json(file)
        if found is not None:
            results = iter([self._done(READ, chunk) for chunk in range(found["chunks"])])
            reports[:] = [SourceReport(**at) for at in found["reports"]]
        else:
            tasks = (Task(READ, number, tuple(parts)) for number, parts in enumerate(chunks))
            results = self.watch("read", self.store.done(READ), None, self._run(READ, tasks))
        rows = [said["rows"] for said in self._counted(results)]
        write_json(file, {"chunks": len(rows), "reports": [vars(report) for report in reports]})
        self.found.sources = reports
        return rows

    def curate(self, rows: list[int]) -> Curated:
        """Take the chunks that were read through the steps and onto the sides.

        Raises DataError: too many unusable rows, or none left; and as the operations do.
        """
        reports = self.found.sources
        check_read(self.config, reports, self.tallies.get(0, Tally()))
        ties = False
        for segment in self.segments:
            decision = self._decided(segment, rows)
            if segment.decided == 0:
                drops = self.tallies.pop(0).drops + Counter(duplicate=decision.dropped)
                check_left(self.config, reports, sum(rows) - decision.dropped, drops)
            ties = ties or decision.ties
            last = segment.number == len(self.segments)
            rows = self._pass(segment.number, len(rows), self._name(segment), writes=last and not ties)
            self.store.drop(segment.number - 1, "rows.arrow", "keys.arrow", "drops", "view.arrow")
        number = len(self.segments)
        if ties:
            files = [self.store.file(number, chunk, "rows.arrow") for chunk in range(len(rows))]
            marker = self.store.segment(number + 1) / "decided.json"
            if not marker.exists():
                join_groups(
                    files, [self.store.file(number + 1, chunk, "groups.arrow") for chunk in range(len(rows))]
                )
                write_json(marker, {})
            self._pass(number + 1, len(rows), "sides", writes=True)
            self.store.drop(number, "rows.arrow")
            number += 1
        return self._joined(number, len(rows))

    def _decided(self, segment: Segment, rows: list[int]) -> Decision:
        if segment.decided == 0:
            return decide_duplicates(self.store, rows, self.config.dedup)
        operation = self.steps[segment.decided - 1].operation
        assert not isinstance(operation, MapOperation)
        decision = decide(self.store, segment.number, operation, rows)
        self.facts[segment.decided] = decision.facts
        return decision

    def _name(self, segment: Segment) -> str:
        """What a segment does, in words."""
        numbers = [number for number in (segment.decided, *segment.maps) if number]
        return ", ".join(self.steps[number - 1].name for number in numbers) or "rows"

    def _pass(self, number: int, chunks: int, name: str, *, writes: bool) -> list[int]:
        """Take all chunks through a segment; the rows of each that are left."""
        tasks = (Task(number, chunk, (), writes) for chunk in range(chunks))
        results = self.watch(name, self.store.done(number), chunks, self._run(number, tasks))
        return [said["rows"] for said in self._counted(results)]

    def _run(self, segment: int, tasks: Iterator[Task]) -> Iterator[dict[str, Any]]:
        """What is said of each chunk, in order; those that are done are not done again."""
        self.store.segment(segment)
        done: list[tuple[int, dict[str, Any]]] = []

        def missing() -> Iterator[Task]:
            for task in tasks:
                said = self.store.result(segment, task.chunk)
                if said is None:
                    yield task
                else:
                    done.append((task.chunk, said))

        def every() -> Iterator[tuple[int, dict[str, Any]]]:
            for result in self.engine.run(missing()):
                while done:
                    yield done.pop(0)
                yield result
            yield from done

        return in_order(every())

    def _done(self, segment: int, chunk: int) -> dict[str, Any]:
        said = self.store.result(segment, chunk)
        assert said is not None, f"chunk {chunk} of segment {segment} is gone"
        return said

    def _counted(self, results: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The results, once what adds up was added up."""
        for said in results:
            for name, value in said.pop("tallies").items():
                number = int(name)
                examples = self.steps[number - 1].examples if 0 < number <= len(self.steps) else 0
                self.tallies.setdefault(number, Tally()).add(Tally.of_json(value), examples)
            if "figures" in said:
                self.found.figures.merge(Figures.from_json(said.pop("figures")))
                for split in SPLITS:
                    self.found.sides[split].append(said["sides"][split])
                    self.found.mixture[split].update(said["mixture"][split])
            yield said

    def _joined(self, last: int, chunks: int) -> Curated:
        found = self.found
        found.last, found.chunks = last, chunks
        for number, step in enumerate(self.steps, start=1):
            found.ledgers.append(Ledger(step, self.tallies[number], self.facts.get(number, {})))
        for split in SPLITS:
            files = [self.store.file(last, chunk, f"{split}.groups") for chunk in range(chunks)]
            found.groups[split] = distinct(files)
        assert found.conserved()
        return found
