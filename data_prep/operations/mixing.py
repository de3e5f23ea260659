"""Mixing of sources: how many rows of each, by weights or temperature, within caps and quotas.

Shares are the weights, or the sizes to the power of 1 / temperature (Arivazhagan et al., Massively
multilingual neural machine translation in the wild, 2019; mT5 uses the same). Without `rows` the mix is as
large as it can be before a source would be used up. A source whose cap or quota binds gets that many rows and
the others share what is left in their proportions. Counts are whole by largest remainders, so they sum up
exactly; which rows of a source stay is decided by a hash of seed and id, so a larger target only adds rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_prep.operations.base import Decided, Dropped, Row, Stays, Views, verdict_table
from data_prep.operations.view_columns import all_words, blocks
from posttrain.errors import DataError


@dataclass(frozen=True)
class Mix:
    """A corpus operation. weights: by source, empty for temperature. max_epochs: how often a row is used at
    most.
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    temperature: float = 1.0
    max_epochs: float = 1.0
    quotas: Mapping[str, int] = field(default_factory=dict)
    rows: int | None = None
    seed: int = 0

    def view(self, batch: Sequence[Row]) -> pa.Table:
        """source; rank: the first 16 bytes of a hash of seed and id."""
        ranks = [hashlib.sha256(f"{self.seed}\0{row.record.id}".encode()).digest()[:16] for row in batch]
        sources = [row.source for row in batch]
        columns = [pa.array(sources, pa.string()), pa.array(ranks, pa.binary(16))]
        return pa.table(columns, names=["source", "rank"])

    def decide(self, views: Views, scratch: Path) -> Decided:
        """Drops over_target; a row may stay several times. Facts: rows before and after, and shares, by
        source.

        Raises DataError when a weighted source has no row left.
        """
        names, owner = _sources(views)
        ranks = all_words(views, "rank", 2)
        counts = np.bincount(owner, minlength=len(names)).tolist()
        sizes = dict(zip(names, counts, strict=True))
        targets = self.targets(sizes)
        copies = np.ones(len(owner), dtype=np.int64)
        for number, source in enumerate(names):
            rows = np.flatnonzero(owner == number)
            order = np.lexsort((ranks[1, rows], ranks[0, rows]))
            whole, extra = divmod(targets[source], len(rows))
            copies[rows] = whole
            copies[rows[order[:extra]]] += 1
        total = sum(targets.values())
        facts = {
            source: {"rows_before": sizes[source], "rows": targets[source], "share": targets[source] / total}
            for source in sorted(sizes)
        }
        said = [f"{targets[name]:,} of {sizes[name]:,} rows of {name} are used" for name in names]
        return Decided(_verdicts(copies, owner, said), {"sources": facts} if total else {})

    def targets(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Rows of every source, by the sizes of all."""
        missing = [name for name in self.weights if not sizes.get(name)]
        if missing:
            raise DataError(
                f"mix.weights: no row is left of {', '.join(missing)} (there are "
                f"{', '.join(f'{name} {count:,}' for name, count in sizes.items()) or 'no rows'})\n"
                "    correct the name, or remove what drops its rows"
            )
        if not sizes:
            return {}
        shares = self._shares(sizes)
        caps = {
            name: min(int(size * self.max_epochs), self.quotas.get(name, int(size * self.max_epochs)))
            for name, size in sizes.items()
        }
        total = self.rows
        if total is None:
            # Quotas cut a source; they do not shrink the whole mix.
            free = [name for name in sizes if shares[name] > 0]
            total = int(min(sizes[name] * self.max_epochs / shares[name] for name in free) + 1e-9)
        return whole_counts(_fill(shares, caps, total), caps)

    def _shares(self, sizes: Mapping[str, int]) -> dict[str, float]:
        raw = (
            {name: self.weights.get(name, 0.0) for name in sizes}
            if self.weights
            else {name: size ** (1 / self.temperature) for name, size in sizes.items()}
        )
        total = sum(raw.values())
        return {name: value / total for name, value in raw.items()}


def _sources(views: Views) -> tuple[list[str], NDArray[np.int32]]:
    """The names of the sources, the first seen first, and of every row the number of its source."""
    numbers: dict[str, int] = {}
    owner = np.empty(len(views), dtype=np.int32)
    done = 0
    for table in views.tables(["source"]):
        coded = table["source"].combine_chunks().dictionary_encode()
        known = [numbers.setdefault(name, len(numbers)) for name in coded.dictionary.to_pylist()]
        owner[done : done + table.num_rows] = np.array(known, dtype=np.int32)[coded.indices.to_numpy()]
        done += table.num_rows
    return list(numbers), owner


def _verdicts(copies: NDArray[np.int64], owner: NDArray[np.int32], said: Sequence[str]) -> Iterator[pa.Table]:
    for rows in blocks(np.flatnonzero(copies != 1)):
        found = zip(rows.tolist(), copies[rows].tolist(), owner[rows].tolist(), strict=True)
        yield verdict_table(
            [
                (row, Stays(copies=often) if often else Dropped("over_target", said[source]))
                for row, often, source in found
            ]
        )


def _fill(shares: Mapping[str, float], caps: Mapping[str, int], total: int) -> dict[str, float]:
    """`total` divided by `shares`; what a cap cuts off goes to the others in their proportions."""
    found = dict.fromkeys(shares, 0.0)
    open_names = {name for name, share in shares.items() if share > 0}
    left = float(total)
    while open_names and left > 1e-9:
        weight = sum(shares[name] for name in open_names)
        full = {name for name in open_names if left * shares[name] / weight >= caps[name] - 1e-9}
        if not full:
            for name in open_names:
                found[name] = left * shares[name] / weight
            break
        for name in full:
            found[name] = float(caps[name])
        left -= sum(caps[name] for name in full)
        open_names -= full
    return found


def whole_counts(wanted: Mapping[str, float], caps: Mapping[str, int]) -> dict[str, int]:
    """Whole numbers nearest to `wanted` that sum to its rounded sum, by largest remainders, none above its
    cap.
    """
    counts = {name: int(value + 1e-9) for name, value in wanted.items()}
    short = round(sum(wanted.values())) - sum(counts.values())
    by_remainder = sorted(wanted, key=lambda name: (counts[name] - wanted[name], name))
    for name in by_remainder:
        if short > 0 and counts[name] < caps[name] and wanted[name] > 0:
            counts[name] += 1
            short -= 1
    return counts
