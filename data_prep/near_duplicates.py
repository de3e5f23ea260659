"""Near-duplicates: MinHash signatures, LSH buckets, exact confirmation, clusters by union-find.

Every pair that shares a bucket is a candidate; a candidate counts only if the Jaccard similarity of its
shingle sets, computed exactly, reaches the threshold. So what is found is right; what can be missed is a pair
that shares no bucket, with probability (1 - J**rows)**bands at similarity J: 0.3 % at 0.7 and 0.01 % at 0.76
with the defaults. Clusters are transitive: two texts of one cluster may be less alike than the threshold.

Sources: Broder, On the resemblance and containment of documents, 1997 (MinHash); Leskovec, Rajaraman and
Ullman, Mining of Massive Datasets, section 3.4 (banding).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.exact_join import pairs_of_sets
from data_prep.minhash import MinHashSettings, band_keys, batches, signatures_of
from data_prep.shingles import Hashes, jaccard, shingle

MAX_LEADERS = 32
LIST_BUCKETS = 8192


@dataclass(frozen=True)
class NearDuplicates:
    """cluster: for every text, the index of the first text of its cluster, its own where it is alone.

    earlier, later, similarity: the confirmed pairs, enough to connect every cluster, in no order. candidates:
    how many pairs were compared.
    """

    cluster: NDArray[np.int64]
    earlier: NDArray[np.int64]
    later: NDArray[np.int64]
    similarity: NDArray[np.float64]
    candidates: int

    @property
    def pairs(self) -> list[tuple[int, int, float]]:
        """The confirmed pairs, sorted."""
        columns = (self.earlier.tolist(), self.later.tolist(), self.similarity.tolist())
        return sorted(zip(*columns, strict=True))


class Buckets(NamedTuple):
    """The buckets of one band that hold two texts and more. members: texts of the first bucket in order, then
    those of the second ...; starts: where in `members` each bucket begins.
    """

    members: NDArray[np.int64]
    starts: NDArray[np.int64]


def find_near_duplicates(texts: Sequence[str], settings: MinHashSettings | None = None) -> NearDuplicates:
    """Clusters of near-duplicates among `texts`. A text without any word is a duplicate of no other.

    Holds the shingles of all texts that are in a bucket; `data_prep/sketch_files.py` has them on disk.
    Raises ValueError as `MinHashSettings.check`.
    """
    settings = settings or MinHashSettings()
    settings.check()
    keys = np.empty((settings.bands, len(texts)), dtype=np.uint64)
    filled = np.zeros(len(texts), dtype=np.bool_)
    for begin, end in batches(texts):
        shingles = shingle(texts[begin:end], settings.words)
        filled[begin:end] = np.diff(shingles.starts) > 0
        keys[:, begin:end] = band_keys(signatures_of(shingles, settings), settings).T
    numbers = np.flatnonzero(filled)
    found = [buckets(of_band[numbers], numbers) for of_band in keys]
    sets = _shingle_sets(texts, found, settings.words)
    return connect(len(texts), found, sets.__getitem__, settings.threshold)


def connect(
    count: int, bands: Iterable[Buckets], read: Callable[[int], Hashes], threshold: float
) -> NearDuplicates:
    """Clusters of `count` texts from the buckets of every band. read: the shingle set of a text.

    Within a bucket every text is compared with those before it that lead a cluster of their own, until one is
    near enough.
    """
    union = UnionFind(count)
    pairs = (array("q"), array("q"), array("d"))
    candidates = 0
    for band in bands:
        for bucket in _unsettled(band, union):
            candidates += _confirm(bucket, union, read, threshold, pairs)
        del band
    earlier, later, similarity = (np.array(column) for column in pairs)
    return NearDuplicates(union.roots(), earlier, later, similarity, candidates)


def _unsettled(band: Buckets, union: UnionFind) -> Iterator[list[int]]:
    """The buckets whose texts are not all of one cluster already: in the others nothing is compared."""
    if not len(band.starts):
        return
    roots = union.roots()[band.members]
    low, high = np.minimum.reduceat(roots, band.starts), np.maximum.reduceat(roots, band.starts)
    del roots
    chosen = np.flatnonzero(low != high)
    ends = np.append(band.starts[1:], len(band.members))
    for few in np.split(chosen, range(LIST_BUCKETS, len(chosen), LIST_BUCKETS)):
        for begin, end in zip(band.starts[few].tolist(), ends[few].tolist(), strict=True):
            yield band.members[begin:end].tolist()


def _confirm(
    bucket: Sequence[int],
    union: UnionFind,
    read: Callable[[int], Hashes],
    threshold: float,
    pairs: tuple[array[int], array[int], array[float]],
) -> int:
    """Join and note what is near enough of a bucket; returns how many pairs were compared."""
    leaders: list[tuple[int, Hashes]] = []
    compared = 0
    for index in bucket:
        own: Hashes | None = None
        for leader, theirs in leaders:
            if union.find(leader) == union.find(index):
                break
            compared += 1
            own = read(index) if own is None else own
            similarity = jaccard(theirs, own)
            if similarity >= threshold:
                union.join(leader, index)
                pairs[0].append(leader)
                pairs[1].append(index)
                pairs[2].append(similarity)
                break
        else:
            # Compared with a bounded number of others: a bucket of a thousand unlike texts stays linear.
            if len(leaders) < MAX_LEADERS:
                leaders.append((index, read(index) if own is None else own))
    return compared


def exact_near_duplicates(sets: Sequence[Hashes], threshold: float) -> NearDuplicates:
    """Clusters of texts by their shingle sets, without missing a pair (data_prep/exact_join.py).

    The pairs are all there are. Raises ValueError: a threshold outside (0, 1].
    """
    found = pairs_of_sets(sets, threshold)
    union = UnionFind(len(sets))
    for left, right, _ in found.pairs:
        union.join(left, right)
    columns = [np.array(column) for column in zip(*found.pairs, strict=True)] or [np.empty(0, np.int64)] * 3
    return NearDuplicates(union.roots(), columns[0], columns[1], columns[2], found.candidates)


def buckets(keys: Hashes, numbers: NDArray[np.int64]) -> Buckets:
    """The buckets of a band. keys: of the texts that have words, used up; numbers: which, ascending."""
    bits = np.uint64(len(keys).bit_length())
    # The lowest bits of a key make room for the index, so that one plain sort orders both.
    keys >>= bits
    keys <<= bits
    keys |= np.arange(len(keys), dtype=np.uint64)
    keys.sort()
    order = (keys & ((np.uint64(1) << bits) - np.uint64(1))).view(np.int64)
    keys >>= bits
    same = keys[1:] == keys[:-1]
    del keys
    shared = np.zeros(len(order), dtype=np.bool_)
    shared[1:] = same
    shared[:-1] |= same
    first = np.ones(len(order), dtype=np.bool_)
    first[1:] = ~same
    return Buckets(numbers[order[shared]], np.flatnonzero(first[shared]))


def _shingle_sets(texts: Sequence[str], bands: Sequence[Buckets], words: int) -> dict[int, Hashes]:
    """The shingle set of every text that is in a bucket."""
    members = np.unique(np.concatenate([band.members for band in bands])).tolist()
    chosen = [texts[index] for index in members]
    sets: dict[int, Hashes] = {}
    for begin, end in batches(chosen):
        shingles = shingle(chosen[begin:end], words)
        sets |= {members[begin + offset]: shingles.of(offset) for offset in range(end - begin)}
    return sets


class UnionFind:
    """Disjoint sets of 0 ... size - 1, whose root is their smallest member. Holds 8 bytes an item."""

    def __init__(self, size: int) -> None:
        self._parent = array("q", range(size))

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
        roots = np.array(self._parent, dtype=np.int64)
        # A parent is smaller than its child, so halving all ways ends at the roots.
        while not np.array_equal(nearer := roots[roots], roots):
            roots = nearer
        return roots
