"""Near-duplicates: MinHash signatures, LSH buckets, exact confirmation, clusters by union-find.

Every pair that shares a bucket is a candidate; a candidate counts only if the Jaccard similarity of its
shingle sets, computed exactly, reaches the threshold. So what is found is right; what can be missed is a pair
that shares no bucket, with probability (1 - J**rows)**bands at similarity J: 0.3 % at 0.7 and 0.01 % at 0.76
with the defaults. Clusters are transitive: two texts of one cluster may be less alike than the threshold.

Sources: Broder, On the resemblance and containment of documents, 1997 (MinHash); Leskovec, Rajaraman and
Ullman, Mining of Massive Datasets, section 3.4 (banding).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_prep.exact_join import exact_pairs
from data_prep.shingles import Hashes, Shingles, jaccard, mix, shingle

Signatures = NDArray[np.uint32]
BATCH_CHARACTERS = 2_000_000
CHUNK_SHINGLES = 16_384
EMPTY = np.uint32(2**32 - 1)
MAX_LEADERS = 32


@dataclass(frozen=True)
class MinHashSettings:
    """threshold: Jaccard similarity from which two texts are near-duplicates. words: of one shingle.
    bands, rows: of the LSH; bands x rows permutations are computed.
    """

    threshold: float = 0.7
    words: int = 3
    bands: int = 32
    rows: int = 5
    seed: int = 0

    @property
    def permutations(self) -> int:
        """Values of one signature."""
        return self.bands * self.rows


@dataclass(frozen=True)
class NearDuplicates:
    """cluster: for every text, the index of the first text of its cluster, its own where it is alone.

    pairs: the confirmed ones, (earlier, later, similarity), enough to connect every cluster. candidates: how
    many pairs were compared.
    """

    cluster: NDArray[np.int64]
    pairs: tuple[tuple[int, int, float], ...]
    candidates: int


def find_near_duplicates(texts: Sequence[str], settings: MinHashSettings | None = None) -> NearDuplicates:
    """Clusters of near-duplicates among `texts`. A text without any word is a duplicate of no other.

    Raises ValueError: a threshold outside (0, 1], or no band, row or word.
    """
    settings = settings or MinHashSettings()
    if not 0 < settings.threshold <= 1 or min(settings.bands, settings.rows, settings.words) < 1:
        raise ValueError(f"{settings}: threshold must be in (0, 1], bands, rows and words at least 1")
    found = list(buckets(sign(texts, settings), settings))
    sets = shingle_sets(texts, found, settings.words)
    union = UnionFind(len(texts))
    pairs: list[tuple[int, int, float]] = []
    candidates = 0
    for bucket in found:
        leaders: list[int] = []
        for index in bucket.tolist():
            for leader in leaders:
                if union.find(leader) == union.find(index):
                    break
                candidates += 1
                similarity = jaccard(sets[leader], sets[index])
                if similarity >= settings.threshold:
                    union.join(leader, index)
                    pairs.append((leader, index, similarity))
                    break
            else:
                # Compared with a bounded number of others: a bucket of a thousand unlike texts stays linear.
                if len(leaders) < MAX_LEADERS:
                    leaders.append(index)
    return NearDuplicates(union.roots(), tuple(sorted(pairs)), candidates)


def exact_near_duplicates(texts: Sequence[str], threshold: float, words: int) -> NearDuplicates:
    """As `find_near_duplicates`, but no pair is missed (data_prep/exact_join.py).

    pairs: every one. Raises ValueError: a threshold outside (0, 1], words below 1.
    """
    found = exact_pairs(texts, threshold, words)
    union = UnionFind(len(texts))
    for left, right, _ in found.pairs:
        union.join(left, right)
    return NearDuplicates(union.roots(), found.pairs, found.candidates)


def sign(texts: Sequence[str], settings: MinHashSettings) -> Signatures:
    """Signatures (texts, permutations); a row of EMPTY for a text without any word."""
    rng = np.random.default_rng(settings.seed)
    factors = rng.integers(1, 2**32, settings.permutations, dtype=np.uint64).astype(np.uint32) | np.uint32(1)
    shifts = rng.integers(0, 2**32, settings.permutations, dtype=np.uint64).astype(np.uint32)
    signatures = np.full((len(texts), settings.permutations), EMPTY, dtype=np.uint32)
    for begin, end in _batches(texts):
        _sign_batch(shingle(texts[begin:end], settings.words), factors, shifts, signatures[begin:end])
    return signatures


def _batches(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    begin = size = 0
    for index, text in enumerate(texts):
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield begin, index + 1
            begin, size = index + 1, 0
    if begin < len(texts):
        yield begin, len(texts)


def _sign_batch(shingles: Shingles, factors: Signatures, shifts: Signatures, out: Signatures) -> None:
    """Minima over each text of every permutation h -> factor * h + shift, in chunks that fit the cache."""
    counts = np.diff(shingles.starts)
    filled = np.flatnonzero(counts)
    starts = shingles.starts[:-1][filled]
    # The upper half: the finaliser has mixed all bits into it.
    hashes = (shingles.hashes >> np.uint64(32)).astype(np.uint32)
    begin = 0
    while begin < len(filled):
        # Whole texts up to CHUNK_SHINGLES, at least one.
        limit = starts[begin] + CHUNK_SHINGLES
        end = max(int(np.searchsorted(starts + counts[filled], limit, side="right")), begin + 1)
        low = starts[begin]
        high = starts[end - 1] + counts[filled[end - 1]]
        local = starts[begin:end] - low
        chunk = hashes[low:high]
        permuted = np.empty_like(chunk)
        for column, (factor, shift) in enumerate(zip(factors, shifts, strict=True)):
            np.multiply(chunk, factor, out=permuted)
            permuted += shift
            out[filled[begin:end], column] = np.minimum.reduceat(permuted, local)
        begin = end


def buckets(signatures: Signatures, settings: MinHashSettings) -> Iterator[NDArray[np.int64]]:
    """Indices of the texts, in order, that share all rows of a band; band by band."""
    filled = np.flatnonzero((signatures != EMPTY).any(axis=1))
    bits = np.uint64(len(filled).bit_length())
    places = np.arange(len(filled), dtype=np.uint64)
    for band in range(settings.bands):
        rows = signatures[filled, band * settings.rows : (band + 1) * settings.rows]
        keys = np.zeros(len(filled), dtype=np.uint64)
        for column in range(settings.rows):
            keys = mix(keys ^ rows[:, column].astype(np.uint64))
        # The lowest bits of a key make room for the index, so that one plain sort orders both.
        keys = np.sort(keys >> bits << bits | places)
        order = (keys & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)
        edges = np.flatnonzero(np.diff(keys >> bits)) + 1
        begins = np.concatenate(([0], edges))
        sizes = np.diff(np.concatenate((begins, [len(order)])))
        for begin, size in zip(begins[sizes > 1].tolist(), sizes[sizes > 1].tolist(), strict=True):
            yield filled[order[begin : begin + size]]


def shingle_sets(texts: Sequence[str], buckets: Sequence[NDArray[np.int64]], words: int) -> dict[int, Hashes]:
    """The shingle set of every text that is in a bucket."""
    members = np.unique(np.concatenate(buckets)).tolist() if buckets else []
    chosen = [texts[index] for index in members]
    sets: dict[int, Hashes] = {}
    for begin, end in _batches(chosen):
        shingles = shingle(chosen[begin:end], words)
        sets |= {members[begin + offset]: shingles.of(offset) for offset in range(end - begin)}
    return sets


class UnionFind:
    """Disjoint sets of 0 ... size - 1, whose root is their smallest member."""

    def __init__(self, size: int) -> None:
        self._parent = list(range(size))

    def find(self, item: int) -> int:
        """The root of `item`'s set."""
        parent = self._parent
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    def join(self, left: int, right: int) -> None:
        """Make one set of two."""
        left, right = sorted((self.find(left), self.find(right)))
        self._parent[right] = left

    def roots(self) -> NDArray[np.int64]:
        """The root of every item."""
        return np.array([self.find(item) for item in range(len(self._parent))], dtype=np.int64)
