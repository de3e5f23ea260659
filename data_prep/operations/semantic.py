"""Rows that say the same in other words; see ``data_prep/semantic.py``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_prep.operations.base import Decided, Dropped, Row, Stays, Views, verdict_table
from data_prep.operations.parts import Part, part_text
from data_prep.operations.view_columns import cluster_counts, cluster_facts, place
from data_prep.semantic import SemanticClusters, dimension, encode, find_semantic_duplicates


@dataclass(frozen=True)
class SemanticDuplicates:
    """Clusters rows whose parts have embeddings of cosine similarity `threshold` or more.

    keep: first drops all of a cluster but its first row; all keeps them and tags each with its cluster, the
    id of the first row. tie: rows of a cluster belong on one side of the split.
    """

    model: Path
    threshold: float
    part: Part
    keep: Literal["first", "all"]
    part_rows: int
    seed: int = 0
    tie: bool = False

    def view(self, batch: Sequence[Row]) -> pa.Table:
        """embedding (float16), cut: whether the model read a beginning only, id, place: file and line.

        Raises UserError when the model cannot be loaded.
        """
        found = encode(self.model, [part_text(row.record, self.part) for row in batch])
        width = dimension(self.model)
        flat = pa.array(found.embeddings.ravel(), pa.float16())
        return pa.table(
            {
                "embedding": pa.FixedSizeListArray.from_arrays(flat, width),
                "cut": pa.array(found.cut, pa.bool_()),
                "id": pa.array([row.record.id for row in batch], pa.string()),
                "place": pa.array(map(place, batch), pa.string()),
            }
        )

    def decide(self, views: Views, scratch: Path) -> Decided:
        """Facts: clusters of two rows and more, rows in them, the largest, pairs, parts that were compared
        each in itself, rows of which the model read a beginning only, rows without text.
        """
        counted = {"cut": 0, "blank": 0}
        found = find_semantic_duplicates(
            _embeddings(views, counted), len(views), self.threshold, self.part_rows, self.seed, scratch
        )
        sizes = np.bincount(found.cluster, minlength=len(views))
        facts: dict[str, Any] = {
            **cluster_counts(sizes),
            "pairs": found.pairs,
            "parts_compared": found.parts,
            "rows_longer_than_the_model_reads": counted["cut"],
            "rows_without_text": counted["blank"],
            **cluster_facts(sizes, views),
        }
        return Decided(self._verdicts(views, found, sizes), facts)

    def _verdicts(
        self, views: Views, found: SemanticClusters, sizes: NDArray[np.int64]
    ) -> Iterator[pa.Table]:
        """Names of first rows are held while rows of their clusters are to come."""
        first: dict[int, tuple[str, str]] = {}
        left = sizes.copy()
        begin = 0
        for table in views.tables(["id", "place"]):
            verdicts: list[tuple[int, Stays | Dropped]] = []
            leaders = found.cluster[begin : begin + table.num_rows]
            for offset in np.flatnonzero(sizes[leaders] > 1).tolist():
                row, leader = begin + offset, int(leaders[offset])
                if row == leader:
                    first[row] = (table["id"][offset].as_py(), table["place"][offset].as_py())
                verdicts.append((row, self._verdict(row == leader, *first[leader], found.nearest[row])))
                left[leader] -= 1
                if not left[leader]:
                    del first[leader]
            begin += table.num_rows
            yield verdict_table(verdicts)

    def _verdict(self, is_first: bool, name: str, place: str, similarity: float) -> Stays | Dropped:
        if self.keep == "first" and not is_first:
            detail = f"in one cluster with {place} (similarity {similarity:.2f} to a row of its cluster)"
            return Dropped("semantic_duplicate", detail)
        ties = (f"semantic:{name}",) if self.tie else ()
        return Stays(ties=ties, tags={"semantic_cluster": name} if self.keep == "all" else {})


def _embeddings(views: Views, counted: dict[str, int]) -> Iterator[NDArray[np.float16]]:
    """The embeddings of every table; counts rows that were cut and rows without text on the way."""
    for table in views.tables(["embedding", "cut"]):
        column = table["embedding"].combine_chunks()
        values = np.asarray(column.flatten()).reshape(table.num_rows, column.type.list_size)
        counted["cut"] += int(np.count_nonzero(np.asarray(table["cut"])))
        counted["blank"] += int(np.count_nonzero(~values.any(axis=1)))
        yield values
