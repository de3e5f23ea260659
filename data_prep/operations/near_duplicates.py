"""Exact and near duplicates of earlier rows, by what they say; see ``data_prep/near_duplicates.py``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from data_prep.dedup import content_key
from data_prep.figures import cluster_facts
from data_prep.near_duplicates import MinHashSettings, exact_near_duplicates, find_near_duplicates
from data_prep.operations.base import Decided, Dropped, Row, Stays
from data_prep.operations.parts import Part, part_text


@dataclass(frozen=True)
class Duplicates:
    """Drops rows whose whole content (NFKC, case, white space aside) an earlier row has."""

    def view(self, row: Row) -> tuple[str, str]:
        """(content key, place)."""
        return content_key(row.record), f"{row.file}:{row.line}"

    def decide(self, views: Sequence[tuple[str, str]]) -> Decided:
        """The first row of each content stays."""
        first: dict[str, str] = {}
        verdicts: list[Stays | Dropped] = []
        for key, place in views:
            if key in first:
                verdicts.append(Dropped("duplicate", f"same content as {first[key]}"))
            else:
                first[key] = place
                verdicts.append(Stays())
        return Decided(verdicts)


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

    def view(self, row: Row) -> tuple[str, str, str]:
        """(text of the part, id, place)."""
        return part_text(row.record, self.part), row.record.id, f"{row.file}:{row.line}"

    def decide(self, views: Sequence[tuple[str, str, str]]) -> Decided:
        """Facts: clusters of two rows and more, rows in them, the largest, pairs that were compared, and
        ``cluster_facts``."""
        texts = [text for text, _, _ in views]
        found = (
            exact_near_duplicates(texts, self.settings.threshold, self.settings.words)
            if self.exact
            else find_near_duplicates(texts, self.settings)
        )
        cluster = found.cluster.tolist()
        sizes = Counter(cluster)
        likeness = {later: similarity for _, later, similarity in found.pairs}
        verdicts = [
            self._verdict(views, index, leader, sizes[leader], likeness.get(index))
            for index, leader in enumerate(cluster)
        ]
        several = [size for size in sizes.values() if size > 1]
        facts: dict[str, Any] = {
            "clusters": len(several),
            "rows_in_clusters": sum(several),
            "largest_cluster": max(several, default=0),
            "pairs_compared": found.candidates,
            **cluster_facts({views[leader][2]: size for leader, size in sizes.items()}),
        }
        return Decided(verdicts, facts)

    def _verdict(
        self,
        views: Sequence[tuple[str, str, str]],
        index: int,
        leader: int,
        size: int,
        similarity: float | None,
    ) -> Stays | Dropped:
        if size == 1:
            return Stays()
        if self.keep == "first" and index != leader:
            degree = "" if similarity is None else f" (similarity {similarity:.2f} to a row of its cluster)"
            return Dropped("near_duplicate", f"in one cluster with {views[leader][2]}{degree}")
        name = views[leader][1]
        ties = (f"near:{name}",) if self.tie else ()
        return Stays(ties=ties, tags={"cluster": name} if self.keep == "all" else {})
