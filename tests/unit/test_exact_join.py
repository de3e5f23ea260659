"""The exact join against every pair compared by hand."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.exact_join import exact_pairs
from data_prep.shingles import jaccard, shingle

texts = st.lists(st.text("abc ", max_size=14), max_size=12)


@given(texts, st.sampled_from([0.3, 0.5, 0.7, 1.0]), st.integers(1, 3))
def test_the_pairs_are_those_of_comparing_all(batch: list[str], threshold: float, words: int) -> None:
    shingles = shingle(batch, words)
    sets = [shingles.of(index) for index in range(len(batch))]
    expected = [
        (left, right)
        for left, right in combinations(range(len(batch)), 2)
        if len(sets[left]) and len(sets[right]) and jaccard(sets[left], sets[right]) >= threshold
    ]
    assert [pair[:2] for pair in exact_pairs(batch, threshold, words).pairs] == expected


def test_an_impossible_threshold_is_refused() -> None:
    with pytest.raises(ValueError, match="threshold must be in"):
        exact_pairs(["a"], 0.0)
