"""The reference: one half of it fits what must be fitted, the other half is what traffic is compared with.

TF-IDF, SVD, centroids and the edges of histograms follow the rows they were fitted on, so those rows look
different from any new ones, of the same distribution too. They are compared with nothing: traffic meets the
held-out half, which was treated as traffic is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, vstack

from posttrain import __version__
from posttrain.errors import DataError
from posttrain.rundir import atomic_write_text
from serving.drift.embedding import BINS, Floats, LatentSemantics, decode, distance_to, encode
from serving.drift.instruments import Instruments, Settings
from serving.drift.measure import Columns, embed, measure
from serving.drift.records import Record

SCHEMA = 1
MIN_ROWS = 200
MAX_ROWS = 2000
CELLS = 10
LARGEST_GROUP = 10


@dataclass(frozen=True)
class Baseline:
    """source: {"path", "kind", "content_hash"}. rows, fitted: how many it had, and how many were fitted on.
    edges: inner edges of each number's cells, deciles of the fitted half. held_out: what to compare with."""

    source: dict[str, Any]
    rows: int
    fitted: int
    settings: Settings
    semantics: LatentSemantics | None
    centroids: dict[str, Floats]
    edges: dict[str, list[float]]
    held_out: Columns

    def complete(self, columns: Columns) -> Columns:
        """Columns with what needs the fit: vectors, and distances to the centroids."""
        if self.semantics is not None:
            embed(columns, self.semantics)
        for name, centroid in self.centroids.items():
            if name in columns.vectors:
                columns.numbers[f"{name}_distance"] = distance_to(centroid, columns.vectors[name])
        return columns


def fit(
    records: Sequence[Record],
    source: dict[str, Any],
    instruments: Instruments,
    *,
    max_rows: int = MAX_ROWS,
    seed: int = 0,
) -> Baseline:
    """The baseline of a reference. Each half has max_rows at most.

    Raises DataError when there are fewer than 200 records.
    """
    if len(records) < MIN_ROWS:
        raise DataError(
            f"{source['path']}: {len(records)} records are too few for a reference (at least {MIN_ROWS})\n"
            "    take a larger data set, or the whole one if this is a part"
        )
    rng = np.random.default_rng(seed)
    first, second = (half[:max_rows] for half in _halves(records, rng))
    fitted = measure([records[i] for i in first], instruments)
    held_out = measure([records[i] for i in second], instruments)
    semantics = None
    if instruments.encode is None:
        semantics = LatentSemantics.fit(vstack(list(fitted.tokens.values())).tocsr())
        embed(fitted, semantics)
    # As a saved baseline has them.
    centroids = {name: decode(encode(v.mean(axis=0))) for name, v in fitted.vectors.items()}
    baseline = Baseline(
        source, len(records), len(first), instruments.settings, semantics, centroids, {}, held_out
    )
    baseline.complete(fitted)
    baseline.complete(held_out)
    baseline.edges.update({name: _edges(values) for name, values in fitted.numbers.items()})
    return baseline


def _halves(
    records: Sequence[Record], rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row numbers of both halves, shuffled. Rows of one group stay together where groups are small.

    Related rows in both halves would make the held-out half look like the fitted one, more than traffic does.
    Large groups (a few customers with hundreds of rows each) are split by row: each half would have its own
    customers, and traffic has both.
    """
    groups: dict[str, list[int]] = {}
    for i, record in enumerate(records):
        groups.setdefault(f"row {i}" if record.group is None else f"group {record.group}", []).append(i)
    members = list(groups.values())
    if len(records) > LARGEST_GROUP * len(members):
        members = [[i] for i in range(len(records))]
    halves: tuple[list[int], list[int]] = ([], [])
    for i in rng.permutation(len(members)):
        halves[len(halves[0]) > len(halves[1])].extend(members[i])
    return rng.permutation(halves[0]), rng.permutation(halves[1])


def _edges(values: Floats) -> list[float]:
    known = values[~np.isnan(values)]
    inner = np.quantile(known, np.linspace(0, 1, CELLS + 1)[1:-1]) if len(known) else np.array([])
    return sorted({float(edge) for edge in inner})


def save(baseline: Baseline, path: Path) -> None:
    """Write the baseline as JSON: numbers, labels, hashed token counts and vectors; no text."""
    held = baseline.held_out
    value = {
        "schema": SCHEMA,
        "posttrain": __version__,
        "source": baseline.source,
        "rows": baseline.rows,
        "fitted": baseline.fitted,
        "held_out": held.size,
        "settings": asdict(baseline.settings),
        "edges": baseline.edges,
        "numbers": {name: [float(f"{x:.9g}") for x in values] for name, values in held.numbers.items()},
        "categories": held.categories,
        "tokens": {name: _counts_as_json(counts) for name, counts in held.tokens.items()},
        "vectors": {name: encode(vectors) for name, vectors in held.vectors.items()},
        "centroids": {name: encode(centroid) for name, centroid in baseline.centroids.items()},
        "semantics": baseline.semantics.as_json() if baseline.semantics is not None else None,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, json.dumps(value, ensure_ascii=False) + "\n")


def load(path: Path) -> Baseline:
    """The baseline in a file. Raises DataError when it is none, or one of another version."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        schema = value["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: is not a baseline ({type(error).__name__}: {error})\n"
            "    write one with `posttrain drift baseline DATASET_DIR --output baseline.json`"
        ) from error
    if schema != SCHEMA:
        raise DataError(f"{path}: schema {schema}, but this version reads {SCHEMA}\n    make it again")
    held_out = Columns(
        value["held_out"],
        {name: np.array(values, np.float32) for name, values in value["numbers"].items()},
        value["categories"],
        {name: _counts_from_json(counts) for name, counts in value["tokens"].items()},
        {name: decode(vectors) for name, vectors in value["vectors"].items()},
    )
    return Baseline(
        value["source"],
        value["rows"],
        value["fitted"],
        Settings(**value["settings"]),
        LatentSemantics.from_json(value["semantics"]) if value["semantics"] else None,
        {name: decode(centroid) for name, centroid in value["centroids"].items()},
        value["edges"],
        held_out,
    )


def _counts_as_json(counts: csr_matrix) -> dict[str, Any]:
    clipped = np.minimum(counts.data, np.iinfo(np.uint16).max).astype(np.uint16)
    return {
        "starts": encode(counts.indptr.astype(np.int32)),
        "bins": encode(counts.indices.astype(np.uint16)),
        "counts": encode(clipped),
    }


def _counts_from_json(value: dict[str, Any]) -> csr_matrix:
    starts, bins = decode(value["starts"]), decode(value["bins"]).astype(np.int32)
    data = decode(value["counts"]).astype(np.float32)
    return csr_matrix((data, bins, starts), shape=(len(starts) - 1, BINS))
