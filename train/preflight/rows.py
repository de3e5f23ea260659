"""Reading the rows that are looked at, and how counts of them are judged and written."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.dataset import SPLITS, Split, read_split
from data_prep.records import Kind
from posttrain.errors import DataError
from posttrain.preflight import Findings
from train.encode import Fault

SAMPLE = 20_000
"""Splits with more rows are looked at in a sample of so many, drawn with the stage's seed."""

MAX_LOST = 0.10
"""Largest share of rows whose answer is cut, or that are left out as too long; more of them is refused."""


@dataclass(frozen=True)
class Sample:
    """Rows of one split as plain Python, and their ids. total: of how many rows they were drawn."""

    split: Split
    path: Path
    rows: list[dict[str, Any]]
    total: int

    @property
    def ids(self) -> list[str]:
        return [row["id"] for row in self.rows]

    @property
    def where(self) -> str:
        """The split's file, for messages."""
        return str(self.path / f"{self.split}.parquet")


def read_samples(
    path: Path,
    kind: Kind,
    seed: int,
    findings: Findings,
    field: str = "data",
    splits: Sequence[Split] = SPLITS,
) -> list[Sample]:
    """The splits that can be read; what is wrong with the others, and what was sampled, is in `findings`."""
    samples = []
    for split in splits:
        try:
            rows = read_split(path, split, kind)
        except DataError as error:
            findings.fail_with(field, error)
            continue
        total = len(rows)
        if total > SAMPLE:
            rows = rows.select(sorted(random.Random(seed).sample(range(total), SAMPLE)))
            findings.notes.append(f"looked at {SAMPLE:,} of {total:,} {split} rows, drawn with seed {seed}")
        samples.append(Sample(split, path, rows.to_list(), total))
    return samples


def judge(findings: Findings, where: str, place: str, fault: Fault | None, limit: float = 0.0) -> None:
    """Add a fault: a problem when more than `limit` of the rows have it, otherwise a warning."""
    if fault is None:
        return
    add = findings.fail if fault.share > limit else findings.warn
    allowed = f"; up to {limit:.0%} is a warning" if limit and fault.share > limit else ""
    add(where, f"{place}: {fault.message}{allowed}", fault.remedy)


def all_alike(
    add: Callable[[str, str, str], None], sample: Sample, noun: str, texts: Sequence[object], remedy: str
) -> None:
    """`add` a finding when there are several rows and they are all the same."""
    if len(texts) > 1 and all(text == texts[0] for text in texts):
        add("data", f"{sample.where}: all {len(texts)} {noun} are the same ({sample.ids[0]}, ...)", remedy)
