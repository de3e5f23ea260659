"""MinHash signatures of texts, and the numbers by which they share a bucket.

Source: Broder, On the resemblance and containment of documents, 1997; Leskovec, Rajaraman and Ullman, Mining
of Massive Datasets, section 3.4 (banding).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.shingles import Hashes, Shingles, mix, shingle

Signatures = NDArray[np.uint32]
BATCH_CHARACTERS = 2_000_000
CHUNK_SHINGLES = 16_384
EMPTY = np.uint32(2**32 - 1)


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

    def check(self) -> None:
        """Raises ValueError: a threshold outside (0, 1], or no band, row or word."""
        if not 0 < self.threshold <= 1 or min(self.bands, self.rows, self.words) < 1:
            raise ValueError(f"{self}: threshold must be in (0, 1], bands, rows and words at least 1")


class Sketches(NamedTuple):
    """Of each text what near-duplicates are found by. keys: (texts, bands); sets: its shingle set."""

    keys: Hashes
    sets: Shingles


def sketch(texts: Sequence[str], settings: MinHashSettings) -> Sketches:
    """The sketches of `texts`, the same in any batch. A text without any word has an empty set."""
    keys = np.empty((len(texts), settings.bands), dtype=np.uint64)
    parts = []
    for begin, end in batches(texts):
        parts.append(shingle(texts[begin:end], settings.words).sets())
        keys[begin:end] = band_keys(signatures_of(parts[-1], settings), settings)
    return Sketches(keys, _joined(parts))


def shingle_sets(texts: Sequence[str], words: int) -> Shingles:
    """The sets of a sketch, alone."""
    return _joined([shingle(texts[begin:end], words).sets() for begin, end in batches(texts)])


def _joined(parts: Sequence[Shingles]) -> Shingles:
    sizes = np.concatenate([np.zeros(1, dtype=np.int64), *(np.diff(part.starts) for part in parts)])
    hashes = np.concatenate([np.empty(0, dtype=np.uint64), *(part.hashes for part in parts)])
    return Shingles(hashes, np.cumsum(sizes))


def sign(texts: Sequence[str], settings: MinHashSettings) -> Signatures:
    """Signatures (texts, permutations); a row of EMPTY for a text without any word."""
    parts = [
        signatures_of(shingle(texts[begin:end], settings.words), settings) for begin, end in batches(texts)
    ]
    return np.concatenate([np.empty((0, settings.permutations), dtype=np.uint32), *parts])


def signatures_of(shingles: Shingles, settings: MinHashSettings) -> Signatures:
    """`sign` of texts by their shingles, or by the sets of these."""
    rng = np.random.default_rng(settings.seed)
    factors = rng.integers(1, 2**32, settings.permutations, dtype=np.uint64).astype(np.uint32) | np.uint32(1)
    shifts = rng.integers(0, 2**32, settings.permutations, dtype=np.uint64).astype(np.uint32)
    signatures = np.full((len(shingles.starts) - 1, settings.permutations), EMPTY, dtype=np.uint32)
    _sign_batch(shingles, factors, shifts, signatures)
    return signatures


def batches(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Where to cut `texts` into runs of about BATCH_CHARACTERS."""
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


def band_keys(signatures: Signatures, settings: MinHashSettings) -> Hashes:
    """(texts, bands): one number for the values of a band, equal where all of them are."""
    values = signatures.reshape(-1, settings.bands, settings.rows)
    keys: Hashes = np.zeros(values.shape[:2], dtype=np.uint64)
    for row in range(settings.rows):
        keys = mix(keys ^ values[:, :, row].astype(np.uint64))
    return keys
