"""Decontamination: rows that hold text of an evaluation set are dropped, rows that are near it are listed.

Two rules drop. contaminated_ngram: the row shares a run of 13 words with an evaluation item (Brown et al.,
Language models are few-shot learners, 2020, appendix C). contaminated_coverage: runs of 8 words that it
shares with the set cover at least half of the row's words (runs of 8 as in Chowdhery et al., PaLM, 2022,
section 8, which asks for 70 % of an item's). Runs that are in more than a few items are the set's own
boilerplate and do not count. Neither finds a paraphrase: rows whose TF-IDF cosine to an item is high go to
a review list, for a reader to judge.

Measured on GSM8K (tests/integration/test_decontaminate.py): 13-grams find every verbatim copy of a test
question and none of 1,319 rephrased ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.operations.base import Dropped, Kept, Row
from data_prep.operations.parts import Part, part_text
from data_prep.shingles import Hashes, Shingles, shingle

COSINES = 4_000_000
"""How many are held at a time."""


@dataclass(frozen=True)
class EvalSet:
    """The items of one evaluation set, by the name that drops and the review list give it."""

    name: str
    items: Sequence[str]


@dataclass(frozen=True)
class GramIndex:
    """Runs of n words of all items: hashes sorted, and of each the number of the first item that has it."""

    n: int
    hashes: Hashes
    item: NDArray[np.int64]

    @classmethod
    def of(cls, items: Sequence[str], n: int, common: int) -> GramIndex:
        """Runs that are in more than `common` items are left out."""
        shingles = shingle(items, n)
        owner = np.repeat(np.arange(len(items)), np.diff(shingles.starts))
        both = np.unique(np.stack([shingles.hashes, owner.astype(np.uint64)]), axis=1)
        hashes, first, count = np.unique(both[0], return_index=True, return_counts=True)
        rare = count <= common
        return cls(n, hashes[rare], both[1][first[rare]].astype(np.int64))

    def places(self, hashes: Hashes) -> NDArray[np.int64]:
        """For each hash the number of the first item that has it, -1 where none has."""
        if not len(self.hashes):
            return np.full(len(hashes), -1)
        at = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        return np.where(self.hashes[at] == hashes, self.item[at], -1)


def covered(shingles: Shingles, found: NDArray[np.bool_], words: NDArray[np.int64], n: int) -> NDArray[Any]:
    """Share of the words of each text that are in a found run of n words. words: how many each text has."""
    runs = np.diff(shingles.starts)
    begins = np.concatenate(([0], np.cumsum(words)))
    at = np.flatnonzero(found)
    text = np.repeat(np.arange(len(runs)), runs)[at]
    start = begins[text] + at - shingles.starts[text]
    edge = np.zeros(begins[-1] + 1, dtype=np.int64)
    np.add.at(edge, start, 1)
    np.add.at(edge, start + np.minimum(n, words[text]), -1)
    inside = np.concatenate(([0], np.cumsum(np.cumsum(edge)[:-1] > 0)))
    return (inside[begins[1:]] - inside[begins[:-1]]) / np.maximum(words, 1)


@dataclass
class Decontaminate:
    """Row-local, against given sets. ngram, coverage_ngram: 0 switches a rule off; review_above None: no
    list.
    """

    sets: Sequence[EvalSet]
    part: Part = "whole"
    ngram: int = 13
    coverage_ngram: int = 8
    coverage: float = 0.5
    common: int = 10
    review_above: float | None = 0.6
    _indexes: dict[tuple[str, int], GramIndex] = field(default_factory=dict, init=False, repr=False)
    _tfidf: dict[str, tuple[Any, Any]] = field(default_factory=dict, init=False, repr=False)

    def apply(self, batch: Sequence[Row]) -> list[Kept | Dropped]:
        """Drops `contaminated_ngram` and `contaminated_coverage`; of the rest, those near an item get a
        review.
        """
        texts = [part_text(row.record, self.part) for row in batch]
        verdicts: list[Kept | Dropped] = [Kept(row.record) for row in batch]
        for evaluation in self.sets:
            self._by_ngram(evaluation, texts, verdicts)
            self._by_coverage(evaluation, texts, verdicts)
        if self.review_above is not None:
            self._review(texts, verdicts, self.review_above)
        return verdicts

    def _index(self, evaluation: EvalSet, n: int) -> GramIndex:
        key = (evaluation.name, n)
        if key not in self._indexes:
            self._indexes[key] = GramIndex.of(evaluation.items, n, self.common)
        return self._indexes[key]

    def _by_ngram(self, evaluation: EvalSet, texts: Sequence[str], verdicts: list[Kept | Dropped]) -> None:
        if not self.ngram:
            return
        shingles = shingle(texts, self.ngram)
        places = self._index(evaluation, self.ngram).places(shingles.hashes)
        owner = np.repeat(np.arange(len(texts)), np.diff(shingles.starts))
        hits, first = np.unique(owner[places >= 0], return_index=True)
        for text, item in zip(hits.tolist(), places[places >= 0][first].tolist(), strict=True):
            what = f"shares {self.ngram} words in a row with item {item + 1} of {evaluation.name}"
            _drop(verdicts, text, "contaminated_ngram", what)

    def _by_coverage(self, evaluation: EvalSet, texts: Sequence[str], verdicts: list[Kept | Dropped]) -> None:
        if not self.coverage_ngram:
            return
        shingles = shingle(texts, self.coverage_ngram)
        found = self._index(evaluation, self.coverage_ngram).places(shingles.hashes) >= 0
        if not found.any():
            return
        words = np.diff(shingle(texts, 1).starts)
        shares = covered(shingles, found, words, self.coverage_ngram)
        for text in np.flatnonzero(shares >= self.coverage).tolist():
            what = (
                f"{shares[text]:.0%} of its words are in runs of {self.coverage_ngram} of {evaluation.name}"
            )
            _drop(verdicts, text, "contaminated_coverage", what)

    def _review(self, texts: Sequence[str], verdicts: list[Kept | Dropped], above: float) -> None:
        left = [index for index, verdict in enumerate(verdicts) if isinstance(verdict, Kept)]
        best: dict[int, Mapping[str, Any]] = {}
        for evaluation in self.sets:
            for index, item, cosine in self.nearest(evaluation, [texts[index] for index in left]):
                at = left[index]
                if cosine >= above and cosine > best.get(at, {"cosine": 0})["cosine"]:
                    best[at] = {
                        "operation": "decontaminate",
                        "cosine": round(cosine, 4),
                        "set": evaluation.name,
                        "item": item + 1,
                        "item_text": evaluation.items[item],
                        "row_text": texts[at],
                    }
        for at, review in best.items():
            kept = verdicts[at]
            assert isinstance(kept, Kept)
            verdicts[at] = Kept(kept.record, (f"near an item of {review['set']}, in review.jsonl",), review)

    def nearest(self, evaluation: EvalSet, texts: Sequence[str]) -> list[tuple[int, int, float]]:
        """(text, item, cosine) of every text's nearest item by TF-IDF, with the document frequencies of the
        set.

        A text without a word of the set has cosine 0.
        """
        if evaluation.name not in self._tfidf:
            from sklearn.feature_extraction.text import TfidfVectorizer

            vectoriser = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
            items = vectoriser.fit_transform(evaluation.items)
            self._tfidf[evaluation.name] = vectoriser, items.T.tocsc()
        vectoriser, items = self._tfidf[evaluation.name]
        found: list[tuple[int, int, float]] = []
        step = max(1, COSINES // len(evaluation.items))
        for begin in range(0, len(texts), step):
            cosines = (vectoriser.transform(texts[begin : begin + step]) @ items).toarray()
            nearest = cosines.argmax(axis=1).tolist()
            found += [(begin + row, item, float(cosines[row, item])) for row, item in enumerate(nearest)]
        return found


def _drop(verdicts: list[Kept | Dropped], index: int, reason: str, detail: str) -> None:
    """The first rule that drops a row is the one that is counted."""
    if isinstance(verdicts[index], Kept):
        verdicts[index] = Dropped(reason, detail)
