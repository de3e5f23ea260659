"""All pairs of texts whose shingle sets are alike, found exactly.

Prefix filter: order every set by how many texts have each shingle, rarest first. Two sets x and y with
Jaccard similarity of at least t share a shingle among the first |x| - ceil(t |x|) + 1 of x and the first
|y| - ceil(t |y|) + 1 of y, so only pairs that share one are compared. No pair is missed; time depends on
how common the rarest shingles of the texts are. MinHash (``near_duplicates.py``) is measured against it.

Source: Bayardo, Ma and Srikant, Scaling up all pairs similarity search, 2007; Xiao et al., Efficient
similarity joins for near-duplicate detection, 2008, lemma 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.shingles import Hashes, jaccard, shingle

Pairs = NDArray[np.int64]


class Joined(NamedTuple):
    """pairs: every (earlier, later, similarity), sorted; candidates: how many were compared."""

    pairs: tuple[tuple[int, int, float], ...]
    candidates: int


def exact_pairs(texts: Sequence[str], threshold: float = 0.7, words: int = 3) -> Joined:
    """Every pair of Jaccard similarity `threshold` or more.

    Texts without any word are in no pair. Raises ValueError: a threshold outside (0, 1].
    """
    shingles = shingle(texts, words)
    return pairs_of_sets([shingles.of(index) for index in range(len(texts))], threshold)


def pairs_of_sets(sets: Sequence[Hashes], threshold: float) -> Joined:
    """`exact_pairs` of texts by their sets of shingles (`Shingles.of`). Holds all of them in memory."""
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be in (0, 1], got {threshold}")
    sizes = np.array([len(each) for each in sets], dtype=np.int64)
    candidates = _candidates(sets, sizes, threshold)
    compared = ((left, right, jaccard(sets[left], sets[right])) for left, right in candidates.tolist())
    return Joined(tuple(pair for pair in compared if pair[2] >= threshold), len(candidates))


def _candidates(sets: Sequence[Hashes], sizes: NDArray[np.int64], threshold: float) -> Pairs:
    """Pairs that share a shingle of both prefixes and whose sizes allow the threshold."""
    if not sizes.sum():
        return np.empty((0, 2), dtype=np.int64)
    texts = np.repeat(np.arange(len(sets)), sizes)
    _, token, count = np.unique(np.concatenate(sets), return_inverse=True, return_counts=True)
    order = np.lexsort((token, count[token], texts))
    texts, token = texts[order], token[order]
    rank = np.arange(len(texts)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    # The small number guards against 0.7 * 10 being above 7 in floating point.
    prefix = sizes - np.ceil(threshold * sizes - 1e-9).astype(np.int64) + 1
    chosen = (rank < prefix[texts]) & (count[token] > 1)
    texts, token = texts[chosen], token[chosen]
    order = np.lexsort((texts, token))
    texts, token = texts[order], token[order]
    found: list[Pairs] = []
    edges = np.flatnonzero(np.diff(token)) + 1
    for group in np.split(texts, edges):
        if len(group) > 1:
            left, right = np.triu_indices(len(group), 1)
            left, right = group[left], group[right]
            small, large = np.minimum(sizes[left], sizes[right]), np.maximum(sizes[left], sizes[right])
            fits = small >= threshold * large - 1e-9
            found.append(np.stack([left[fits], right[fits]], axis=1))
    if not found:
        return np.empty((0, 2), dtype=np.int64)
    return np.unique(np.concatenate(found), axis=0)
