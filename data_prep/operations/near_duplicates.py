"""Exact and near duplicates of earlier rows, by what they say; see ``data_prep/near_duplicates.py``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from data_prep.dedup import content_key
from data_prep.minhash import MinHashSettings, shingle_sets, sketch
from data_prep.near_duplicates import NearDuplicates as Found
from data_prep.near_duplicates import connect, exact_near_duplicates
from data_prep.operations.base import Decided, Dropped, Row, Stays, Views, verdict_table
from data_prep.operations.parts import Part, part_text
from data_prep.operations.view_columns import (
    Cells,
    all_words,
    blocks,
    cluster_counts,
    cluster_facts,
    fixed,
    place,
    same_as_first,
    words_of,
)
from data_prep.shingles import Shingles
from data_prep.sketch_files import SketchFiles


@dataclass(frozen=True)
class Duplicates:
    """Drops rows whose whole content (NFKC, case, white space aside) an earlier row has."""

    def view(self, batch: Sequence[Row]) -> pa.Table:
        """key: the first 16 bytes of the content key; place: file and line."""
        keys = [bytes.fromhex(content_key(row.record))[:16] for row in batch]
        columns = [pa.array(keys, pa.binary(16)), pa.array(map(place, batch), pa.string())]
        return pa.table(columns, names=["key", "place"])

    def decide(self, views: Views, scratch: Path) -> Decided:
        """The first row of each content stays."""
        first = same_as_first(list(all_words(views, "key", 2)))
        again = np.flatnonzero(first != np.arange(len(first)))
        return Decided(self._verdicts(views, again, first, scratch))

    def _verdicts(
        self, views: Views, again: NDArray[np.int64], first: NDArray[np.int64], scratch: Path
    ) -> Iterator[pa.Table]:
        with Cells(views, "place", np.unique(first[again]), scratch) as places:
            for rows in blocks(again):
                found = zip(rows.tolist(), places.at(first[rows]), strict=True)
                yield verdict_table(
                    [(row, Dropped("duplicate", f"same content as {at}")) for row, at in found]
                )


@dataclass(frozen=True)
class NearDuplicates:
    """Clusters rows whose parts share most of their word shingles.

    keep: first drops all of a cluster but its first row; all keeps them and tags each with its cluster, the
    id of the first row. tie: rows of a cluster belong on one side of the split. exact: search without missing
    a pair, with the shingles of all rows in memory.
    """

    settings: MinHashSettings
    part: Part
    keep: Literal["first", "all"]
    tie: bool = False
    exact: bool = False

    def view(self, batch: Sequence[Row]) -> pa.Table:
        """keys: of the bands (not with `exact`); shingles: the set of them, 8 bytes each; id; place."""
        texts = [part_text(row.record, self.part) for row in batch]
        columns = {}
        if self.exact:
            found = shingle_sets(texts, self.settings.words)
        else:
            keys, found = sketch(texts, self.settings)
            columns["keys"] = fixed(keys)
        bounds = pa.array(found.starts * 8, pa.int64())
        columns |= {
            "shingles": pa.LargeBinaryArray.from_buffers(
                pa.large_binary(), len(batch), [None, bounds.buffers()[1], pa.py_buffer(found.hashes)]
            ),
            "id": pa.array([row.record.id for row in batch], pa.string()),
            "place": pa.array(map(place, batch), pa.string()),
        }
        return pa.table(columns)

    def decide(self, views: Views, scratch: Path) -> Decided:
        """Facts: clusters of two rows and more, rows in them, the largest, pairs that were compared, and
        ``cluster_facts``.
        """
        found = self._exact(views) if self.exact else self._by_bands(views, scratch)
        sizes = np.bincount(found.cluster, minlength=len(found.cluster))
        facts: dict[str, Any] = {
            **cluster_counts(sizes),
            "pairs_compared": found.candidates,
            **cluster_facts(sizes, views),
        }
        return Decided(self._verdicts(views, found, sizes, scratch), facts)

    def _exact(self, views: Views) -> Found:
        tables = [_sets(table) for table in views.tables(["shingles"])]
        sets = [each for table in tables for each in np.split(table.hashes, table.starts[1:-1])]
        return exact_near_duplicates(sets, self.settings.threshold)

    def _by_bands(self, views: Views, scratch: Path) -> Found:
        with SketchFiles(scratch, len(views), self.settings.bands) as files:
            for table in views.tables(["keys", "shingles"]):
                files.add_keys(words_of(table["keys"]), np.diff(_sets(table).starts) > 0)
            wanted, done = files.wanted(), 0
            for table in views.tables(["shingles"]):
                sets, chosen = _sets(table), wanted[done : done + table.num_rows]
                sizes = np.diff(sets.starts)
                files.add_sets(sets.hashes[np.repeat(chosen, sizes)], np.where(chosen, sizes, 0))
                done += table.num_rows
            return connect(len(views), files.buckets(), files.read, self.settings.threshold)

    def _verdicts(
        self, views: Views, found: Found, sizes: NDArray[np.int64], scratch: Path
    ) -> Iterator[pa.Table]:
        clustered = sizes[found.cluster] > 1
        leads = found.cluster == np.arange(len(sizes))
        leaders = np.flatnonzero(clustered & leads)
        dropped = clustered & ~leads if self.keep == "first" else np.zeros_like(leads)
        likeness = _likeness(found) if self.keep == "first" else np.empty(0)
        # A row that stays has a verdict only where that says anything.
        spoken = np.flatnonzero(clustered if self.keep == "all" or self.tie else dropped)
        with Cells(views, "id", leaders, scratch) as ids, Cells(views, "place", leaders, scratch) as places:
            for rows in blocks(spoken):
                gone = dropped[rows]
                stay, go = rows[~gone], rows[gone]
                near = zip(go.tolist(), places.at(found.cluster[go]), likeness[go].tolist(), strict=True)
                names = zip(stay.tolist(), ids.at(found.cluster[stay]), strict=True)
                verdicts: list[tuple[int, Stays | Dropped]] = [
                    *((row, _near_duplicate(at, similarity)) for row, at, similarity in near),
                    *((row, self._stays(name)) for row, name in names),
                ]
                yield verdict_table(sorted(verdicts, key=lambda verdict: verdict[0]))

    def _stays(self, name: str) -> Stays:
        ties = (f"near:{name}",) if self.tie else ()
        return Stays(ties=ties, tags={"cluster": name} if self.keep == "all" else {})


def _near_duplicate(at: str, similarity: float) -> Dropped:
    degree = "" if np.isnan(similarity) else f" (similarity {similarity:.2f} to a row of its cluster)"
    return Dropped("near_duplicate", f"in one cluster with {at}{degree}")


def _likeness(found: Found) -> NDArray[np.float64]:
    """Of every row the similarity to the last row before it that it was found near to, if any."""
    likeness = np.full(len(found.cluster), np.nan)
    order = np.argsort(found.earlier, kind="stable")
    likeness[found.later[order]] = found.similarity[order]
    return likeness


def _sets(table: pa.Table) -> Shingles:
    column = table["shingles"].combine_chunks()
    if not pc.sum(pc.binary_length(column)).as_py():
        # Of arrays without content a file need not hold any buffer.
        return Shingles(np.empty(0, dtype=np.uint64), np.zeros(len(column) + 1, dtype=np.int64))
    bounds = np.frombuffer(column.buffers()[1], dtype=np.int64)[column.offset :][: len(column) + 1]
    hashes = np.frombuffer(column.buffers()[2], dtype=np.uint64)
    return Shingles(hashes[bounds[0] // 8 : bounds[-1] // 8], (bounds - bounds[0]) // 8)
