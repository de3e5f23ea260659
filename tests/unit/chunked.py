"""Curation of records that a test holds: through the stage's own chunk files, in a temporary directory."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_prep.config import CurateConfig
from data_prep.dataset import SPLITS
from data_prep.ingest import SourceReport
from data_prep.operations.engine import Ledger, Step
from data_prep.records import Record
from data_prep.sharded.arrow import dicts_of
from data_prep.sharded.driver import Curated, Driver
from data_prep.sharded.engines import OneProcess
from data_prep.sharded.output import join_lines
from data_prep.sharded.plan import Part, Setup
from data_prep.sharded.store import Store, read_table


@dataclass(frozen=True)
class Given(Setup):
    """With steps of a test's own."""

    own: Sequence[Step] = ()

    def steps(self) -> list[Step]:
        return list(self.own)


@dataclass(frozen=True)
class Done:
    """What came of it."""

    curated: Curated
    rows: dict[str, list[dict[str, Any]]]
    rejects: list[dict[str, Any]]

    @property
    def every(self) -> list[dict[str, Any]]:
        """Rows of both sides, train first."""
        return [row for rows in self.rows.values() for row in rows]

    @property
    def ledgers(self) -> list[Ledger]:
        return self.curated.ledgers

    def lines(self) -> list[int]:
        """Where the rows that are left were read, in order."""
        return sorted(int(row["source"].rpartition(":")[2]) for row in self.every)


def curate(
    config: CurateConfig,
    records: Sequence[Record],
    steps: Sequence[Step] | None = None,
    *,
    sources: Sequence[int] = (),
    chunk: int = 4,
    file: str = "f",
) -> Done:
    """Take the records through everything but the reading of files. sources: the place of each one's source.

    Raises as the stage does; rows that all land on one side are no error here.
    """
    with tempfile.TemporaryDirectory() as name:
        setup = Setup(config, Path(name) / "work", {})
        given = setup.steps() if steps is None else list(steps)
        setup = Given(config, setup.root, {}, given)
        store = Store.opened(setup.root, "plan", resume=False)
        driver = Driver(setup, given, store, OneProcess(setup), lambda name, done, chunks, results: results)
        numbered = [
            (sources[place] if sources else 0, place + 1, replace(record, source=f"{file}:{place + 1}"))
            for place, record in enumerate(records)
        ]
        parts = (
            [Part(source, file, "", [(line, record)]) for source, line, record in numbered[at : at + chunk]]
            for at in range(0, len(numbered), chunk)
        )
        rows = driver.read(parts, [SourceReport(file, "", "", rows=len(records))])
        curated = driver.curate(rows)
        held = {
            split: [
                row
                for number in range(curated.chunks)
                for row in dicts_of(
                    read_table(store.file(curated.last, number, f"{split}.arrow")), config.kind
                )
            ]
            for split in SPLITS
        }
        join_lines(Path(name) / "rejects", store, "rejects", range(1, curated.last + 1), curated.chunks)
        text = (Path(name) / "rejects").read_text(encoding="utf-8")
        return Done(curated, held, [json.loads(line) for line in text.splitlines()])
