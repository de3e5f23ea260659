"""Exact and near duplicates of earlier rows, by what they say; see ``data_prep/near_duplicates.py``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from data_prep.dedup import content_key
from data_prep.near_duplicates import MinHashSettings, exact_near_duplicates, find_near_duplicates
from data_prep.operations.base import Decided, Dropped, Row, Stays, Views, verdict_table
from data_prep.operations.parts import Part, part_text

KEYS = pa.schema([("key", pa.binary(16)), ("place", pa.string())])
TEXTS = pa.schema([("text", pa.large_string()), ("id", pa.string()), ("place", pa.string())])


@dataclass(frozen=True)
class Duplicates:
    """Drops rows whose whole content (NFKC, case, white space aside) an earlier row has."""

    def view(self, batch: Sequence[Row]) -> pa.Table:
        """key: the first 16 bytes of the content key; place: file and line."""
        keys = [bytes.fromhex(content_key(row.record))[:16] for row in batch]
        return pa.table({"key": keys, "place": _places(batch)}, schema=KEYS)

    def decide(self, views: Views, scratch: Path) -> Decided:
        """The first row of each content stays."""
        first: dict[bytes, str] = {}
        verdicts: list[tuple[int, Stays | Dropped]] = []
        for index, row in enumerate(row for table in views.tables() for row in table.to_pylist()):
            if row["key"] in first:
                verdicts.append((index, Dropped("duplicate", f"same content as {first[row['key']]}")))
            first.setdefault(row["key"], row["place"])
        return Decided([verdict_table(verdicts)])


@dataclass(frozen=True)
class NearDuplicates:
    """Clusters rows whose parts share most of their word shingles.

    keep: first drops all of a cluster but its first row; all keeps them and tags each with its cluster, the
    id of the first row. tie: rows of a cluster belong on one side of the split.
    """

    settings: MinHashSettings
    part: Part
    keep: Literal["first", "all"]
    tie: bool = False
    exact: bool = False

    def view(self, batch: Sequence[Row]) -> pa.Table:
        """text of the part, id, and place: file and line."""
        texts = [part_text(row.record, self.part) for row in batch]
        ids = [row.record.id for row in batch]
        return pa.table({"text": texts, "id": ids, "place": _places(batch)}, schema=TEXTS)

    def decide(self, views: Views, scratch: Path) -> Decided:
        """Facts: clusters of two rows and more, rows in them, the largest, and pairs that were compared."""
        rows = [row for table in views.tables() for row in table.to_pylist()]
        texts = [row["text"] for row in rows]
        found = (
            exact_near_duplicates(texts, self.settings.threshold, self.settings.words)
            if self.exact
            else find_near_duplicates(texts, self.settings)
        )
        cluster = found.cluster.tolist()
        sizes = Counter(cluster)
        likeness = {later: similarity for _, later, similarity in found.pairs}
        verdicts = [
            (index, self._verdict(rows, index, leader, likeness.get(index)))
            for index, leader in enumerate(cluster)
            if sizes[leader] > 1
        ]
        several = [size for size in sizes.values() if size > 1]
        facts: dict[str, Any] = {
            "clusters": len(several),
            "rows_in_clusters": sum(several),
            "largest_cluster": max(several, default=0),
            "pairs_compared": found.candidates,
        }
        return Decided([verdict_table(verdicts)], facts)

    def _verdict(
        self, rows: Sequence[dict[str, Any]], index: int, leader: int, similarity: float | None
    ) -> Stays | Dropped:
        if self.keep == "first" and index != leader:
            degree = "" if similarity is None else f" (similarity {similarity:.2f} to a row of its cluster)"
            return Dropped("near_duplicate", f"in one cluster with {rows[leader]['place']}{degree}")
        name = rows[leader]["id"]
        ties = (f"near:{name}",) if self.tie else ()
        return Stays(ties=ties, tags={"cluster": name} if self.keep == "all" else {})


def _places(batch: Sequence[Row]) -> list[str]:
    return [f"{row.file}:{row.line}" for row in batch]
