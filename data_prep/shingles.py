"""Word shingles of many texts as 64-bit hashes, computed for a whole batch at once in numpy.

A text is normalised (NFKC, case, punctuation aside), cut into words, and every run of `n` words becomes one
hash; a shorter text is one shingle. Words are hashed by differences of a prefix polynomial modulo 2**64
(Karp and Rabin, 1987): with an odd base the difference can be divided by its power of the base, so that a
word's hash does not depend on its place. Two different shingles of 10 million share a hash with probability
of about 3e-6.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.dedup import normalise

Hashes = NDArray[np.uint64]
BASE = np.uint64(0x9E3779B97F4A7C15)
INVERSE = np.uint64(pow(int(BASE), -1, 2**64))
ORDER = np.uint64(0xD6E8FEB86659FD93)


class Shingles(NamedTuple):
    """hashes: of all texts, one text after the other, repeated ones included; starts: where each text begins,
    and the end of the last one.
    """

    hashes: Hashes
    starts: NDArray[np.int64]

    def of(self, index: int) -> Hashes:
        """The set of one text: its hashes, sorted, each once."""
        return np.unique(self.hashes[self.starts[index] : self.starts[index + 1]])


def shingle(texts: Sequence[str], n: int = 3) -> Shingles:
    """Hashes of every run of `n` words of every text. Texts without any word have no shingle."""
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    encoded = [normalise(text).encode("utf-8") for text in texts]
    # A text is followed by a space, so that every word has an end; offsets are those of the texts.
    data = np.frombuffer(b" ".join([*encoded, b""]), dtype=np.uint8)
    offsets = np.zeros(len(encoded) + 1, dtype=np.int64)
    np.cumsum([len(text) + 1 for text in encoded], out=offsets[1:])
    first, last = _word_bounds(data)
    words = _word_hashes(data, first, last)
    starts = np.searchsorted(first, offsets)
    return _runs(words, starts, n)


def _word_bounds(data: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First byte of each word and the one behind its last: letters, digits, and all that is not ASCII."""
    inside = _IN_WORD[data]
    change = np.flatnonzero(inside[1:] != inside[:-1]) + 1
    edges = np.concatenate(([0], change)) if len(data) and inside[0] else change
    return edges[::2], edges[1::2]


def _word_hashes(data: NDArray[np.uint8], first: NDArray[np.int64], last: NDArray[np.int64]) -> Hashes:
    powers = np.full(len(data) + 1, BASE, dtype=np.uint64)
    powers[0] = 1
    np.multiply.accumulate(powers, out=powers)
    prefix = np.zeros(len(data) + 1, dtype=np.uint64)
    np.cumsum((data.astype(np.uint64) + np.uint64(1)) * powers[:-1], out=prefix[1:])
    backwards = np.full(len(data) + 1, INVERSE, dtype=np.uint64)
    backwards[0] = 1
    np.multiply.accumulate(backwards, out=backwards)
    return mix((prefix[last] - prefix[first]) * backwards[first])


def _runs(words: Hashes, starts: NDArray[np.int64], n: int) -> Shingles:
    """Hashes of `n` words in a row, none of which crosses from one text to the next."""
    counts = np.diff(starts)
    runs = np.where(counts >= n, counts - n + 1, np.minimum(counts, 1))
    begins = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(runs, out=begins[1:])
    # Word where each run begins, and how many words it has: n, or all of a shorter text.
    at = np.arange(begins[-1]) - np.repeat(begins[:-1] - starts[:-1], runs)
    length = np.repeat(np.minimum(counts, n), runs)
    hashes = np.zeros(len(at), dtype=np.uint64)
    for step in range(n):
        here = step < length
        if here.all():
            hashes = hashes * ORDER + words[at + step]
        else:
            hashes[here] = hashes[here] * ORDER + words[at[here] + step]
    return Shingles(mix(hashes), begins)


def mix(values: Hashes) -> Hashes:
    """splitmix64's finaliser (Steele et al., 2014): every bit depends on every bit of the value."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def jaccard(left: Hashes, right: Hashes) -> float:
    """Size of the intersection of two sets from `Shingles.of` over that of their union; 1 if both empty."""
    if not len(left) and not len(right):
        return 1.0
    shared = len(np.intersect1d(left, right, assume_unique=True))
    return shared / (len(left) + len(right) - shared)


def _in_word() -> NDArray[np.bool_]:
    return np.array([byte >= 128 or chr(byte).isalnum() for byte in range(256)])


_IN_WORD = _in_word()
