"""Semantic duplicates: embeddings of a local sentence-transformers model, clusters of cosine similarity.

After SemDeDup (Abbas et al., SemDeDup: Data-efficient learning at web-scale through semantic deduplication,
2023, section 3): embeddings are divided by k-means, and pairs are compared within a part only. Up to
`part_rows` rows there is one part and no pair is missed; beyond, a pair that k-means parts is missed. Pairs
of the threshold or more are joined to clusters, which are transitive.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.near_duplicates import UnionFind
from posttrain.errors import UserError

Embeddings = NDArray[np.float16]
BLOCK = 2048
"""Rows of a block of similarities: 16 MB."""
SAMPLE = 256
"""Rows that k-means sees for each centre, as FAISS does by default."""
MARGIN = 1e-4
"""Products of matrices in float32 are trusted this far from the threshold; nearer, a pair is done anew."""


@dataclass(frozen=True)
class Encoded:
    """embeddings: (texts, dimension), of length 1, all 0 for a text of white space. cut: longer than the
    model reads.
    """

    embeddings: Embeddings
    cut: NDArray[np.bool_]


def encode(path: Path, texts: Sequence[str]) -> Encoded:
    """Embeddings of the texts, each from that text alone, to the bit.

    One text at a time on one thread: in a padded batch the last bits depend on the other texts (1e-7), and
    they may on the number of threads. Raises UserError when `path` holds no sentence-transformers model.
    """
    import torch

    model = _model(path)
    if not texts:
        return Encoded(np.zeros((0, dimension(path)), dtype=np.float16), np.zeros(0, dtype=np.bool_))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = model.encode(list(texts), batch_size=1, normalize_embeddings=True, show_progress_bar=False)
    finally:
        torch.set_num_threads(threads)
    found[[not text.strip() for text in texts]] = 0
    ids = model.tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
    lengths = np.array([len(each) for each in ids])
    return Encoded(found.astype(np.float16), lengths > (model.max_seq_length or lengths.max()))


@lru_cache(maxsize=2)
def dimension(path: Path) -> int:
    """Values of an embedding. Raises UserError as `encode`."""
    return len(_model(path).encode("", show_progress_bar=False))


def check_model(path: Path) -> None:
    """Raises UserError when the directory is no sentence-transformers model, without loading it."""
    if not (path / "modules.json").is_file():
        raise UserError(
            f"{path}: is no sentence-transformers model (it has no modules.json)\n"
            "    name the directory or Hub id of one, such as sentence-transformers/all-MiniLM-L6-v2"
        )


@lru_cache(maxsize=2)
def _model(path: Path) -> Any:
    check_model(path)
    from pickle import UnpicklingError

    from safetensors import SafetensorError
    from sentence_transformers import SentenceTransformer

    try:
        return SentenceTransformer(str(path), device="cpu", local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, UnpicklingError) as error:
        first = str(error).partition("\n")[0]
        raise UserError(
            f"{path}: cannot be loaded as a sentence-transformers model ({first})\n"
            "    copy it again, or name another"
        ) from error


@dataclass(frozen=True)
class SemanticClusters:
    """cluster: for every row the first row of its cluster. nearest: the highest similarity to a row it was
    joined with, 0 where there is none. pairs: of the threshold or more. parts: that k-means made.
    """

    cluster: NDArray[np.int64]
    nearest: NDArray[np.float32]
    pairs: int
    parts: int


def find_semantic_duplicates(
    batches: Iterable[Embeddings], rows: int, threshold: float, part_rows: int, seed: int, scratch: Path
) -> SemanticClusters:
    """Clusters of the rows whose embeddings come in `batches`, which are iterated once.

    They are kept in a file in `scratch`; memory holds a part of them and some 30 bytes a row.
    """
    stored = _store(batches, rows, scratch / "embeddings.f16")
    parts = (
        _parts(stored, part_rows, seed, scratch) if rows > part_rows else iter([(stored, np.arange(rows))])
    )
    union = UnionFind(rows)
    nearest = np.zeros(rows, dtype=np.float32)
    pairs = count = 0
    for part, places in parts:
        count += 1
        for left, right in _blocks(len(places)):
            pairs += _compare(part, places, left, right, threshold, union, nearest)
    return SemanticClusters(union.roots(), nearest, pairs, count)


def _store(batches: Iterable[Embeddings], rows: int, path: Path) -> Embeddings:
    with path.open("wb") as file:
        width = 0
        for batch in batches:
            width = batch.shape[1]
            file.write(np.ascontiguousarray(batch, dtype=np.float16).tobytes())
    if not rows:
        return np.zeros((0, max(width, 1)), dtype=np.float16)
    return np.memmap(path, dtype=np.float16, mode="r", shape=(rows, width))


def _parts(
    stored: Embeddings, part_rows: int, seed: int, scratch: Path
) -> Iterator[tuple[Embeddings, NDArray[np.int64]]]:
    """Parts of about `part_rows` rows and their places, ascending: the nearest centre of each row.

    Centres are from evenly spaced rows, on one thread, so that they depend on nothing but the rows.
    """
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    rows = len(stored)
    centres = -(-rows // part_rows)
    sample = np.linspace(0, rows - 1, min(rows, centres * SAMPLE)).astype(np.int64)
    with threadpool_limits(1):
        means = KMeans(centres, n_init=1, max_iter=20, random_state=seed)
        found = means.fit(stored[sample].astype(np.float32)).cluster_centers_
        found /= np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-9)
        nearest = np.empty(rows, dtype=np.int32)
        for begin in range(0, rows, BLOCK):
            block = stored[begin : begin + BLOCK].astype(np.float32)
            nearest[begin : begin + BLOCK] = (block @ found.T).argmax(axis=1)
    order = np.argsort(nearest, kind="stable")
    sorted_ = np.memmap(scratch / "parts.f16", dtype=np.float16, mode="w+", shape=stored.shape)
    for begin in range(0, rows, BLOCK):
        sorted_[begin : begin + BLOCK] = stored[order[begin : begin + BLOCK]]
    edges = np.cumsum(np.bincount(nearest, minlength=centres))
    for begin, end in zip([0, *edges[:-1].tolist()], edges.tolist(), strict=True):
        if end > begin:
            yield sorted_[begin:end], order[begin:end]


def _blocks(rows: int) -> Iterator[tuple[slice, slice]]:
    for left in range(0, rows, BLOCK):
        for right in range(left, rows, BLOCK):
            yield slice(left, min(left + BLOCK, rows)), slice(right, min(right + BLOCK, rows))


def _compare(
    part: Embeddings,
    places: NDArray[np.int64],
    left: slice,
    right: slice,
    threshold: float,
    union: UnionFind,
    nearest: NDArray[np.float32],
) -> int:
    """Join the rows of two blocks that are alike; how many pairs are."""
    import scipy.sparse
    from scipy.sparse.csgraph import connected_components

    first, second = _unit(part[left]), _unit(part[right])
    alike = first.astype(np.float32) @ second.astype(np.float32).T
    if left == right:
        alike = np.triu(alike, 1)
    near = np.nonzero(np.abs(alike - threshold) <= MARGIN)
    alike[near] = (first[near[0]] * second[near[1]]).sum(axis=1)
    # Equal vectors may miss 1 by a rounding of the last bit.
    alike[alike < threshold - 1e-6] = 0
    found = scipy.sparse.coo_matrix(alike)
    if not found.nnz:
        return 0
    above, below = places[left][found.row], places[right][found.col]
    np.maximum.at(nearest, above, found.data)
    np.maximum.at(nearest, below, found.data)
    both = np.concatenate((above, below))
    members, local = np.unique(both, return_inverse=True)
    graph = scipy.sparse.coo_matrix(
        (np.ones(found.nnz, dtype=bool), (local[: found.nnz], local[found.nnz :])),
        shape=(len(members), len(members)),
    )
    _, labels = connected_components(graph, directed=False)
    _, firsts = np.unique(labels, return_index=True)
    for leader, member in zip(members[firsts[labels]].tolist(), members.tolist(), strict=True):
        if leader != member:
            union.join(leader, member)
    return int(found.nnz)


def _unit(block: Embeddings) -> NDArray[np.float64]:
    """Of length 1 again after their rounding to float16; zeros stay."""
    wide = block.astype(np.float64)
    return wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-9)
