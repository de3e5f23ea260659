"""Columns of features: what a set of records measures, one array per feature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from posttrain.errors import DataError
from serving.drift import features
from serving.drift.embedding import Floats, LatentSemantics, count_matrix
from serving.drift.instruments import Instruments, tag_values
from serving.drift.records import Record


@dataclass
class Columns:
    """Features of n records. numbers: name -> (n,), NaN where there is none. categories: name -> n labels.
    tokens: "prompt" and "answer" -> (n, BINS) counts. vectors: the same names -> (n, dimensions)."""

    size: int
    numbers: dict[str, Floats]
    categories: dict[str, list[str]]
    tokens: dict[str, csr_matrix]
    vectors: dict[str, Floats]

    def take(self, rows: NDArray[np.int64]) -> Columns:
        """The columns of some of the records."""
        return Columns(
            len(rows),
            {name: values[rows] for name, values in self.numbers.items()},
            {name: [labels[i] for i in rows] for name, labels in self.categories.items()},
            {name: counts[rows] for name, counts in self.tokens.items()},
            {name: vectors[rows] for name, vectors in self.vectors.items()},
        )


def measure(records: Sequence[Record], instruments: Instruments) -> Columns:
    """All features of the records but the vectors of TF-IDF and SVD, which need a fit: see `embed`.

    Raises DataError: some records have an answer and some have none.
    """
    answered = sum(record.answer is not None for record in records)
    if answered not in (0, len(records)):
        raise DataError(
            f"{len(records) - answered} of {len(records)} records have no answer, the others do\n"
            "    compare records with answers and records without them separately"
        )
    each = [features.numbers(record, instruments.count_tokens) for record in records]
    numbers = {name: np.array([row[name] for row in each], np.float32) for name in each[0]}
    labels = [features.categories(record, instruments.detect) for record in records]
    categories = {name: [row[name] for row in labels] for name in labels[0]}
    if any(record.finish_reason is not None for record in records):
        categories["finish_reason"] = [record.finish_reason or "unknown" for record in records]
    numbers |= _scores(records, instruments)
    for name, tag in instruments.tags.items():
        values = tag_values(name, tag, records)
        if isinstance(values[0], bool):
            categories[f"tag_{name}"] = [features.yes_no(value) for value in values]
        else:
            numbers[f"tag_{name}"] = np.array(values, np.float32)
    texts = {"prompt": [features.last_user_message(record) for record in records]}
    if answered:
        texts["answer"] = [record.answer or "" for record in records]
    tokens = {name: count_matrix(side, instruments.tokens) for name, side in texts.items()}
    encode = instruments.encode
    vectors = {} if encode is None else {name: encode(side) for name, side in texts.items()}
    return Columns(len(records), numbers, categories, tokens, vectors)


def _scores(records: Sequence[Record], instruments: Instruments) -> dict[str, Floats]:
    if instruments.score is not None and records[0].answer is not None:
        return {"score": instruments.score(records)}
    if any(record.score is not None for record in records):
        scores = [np.nan if record.score is None else record.score for record in records]
        return {"score": np.array(scores, np.float32)}
    return {}


def embed(columns: Columns, semantics: LatentSemantics) -> None:
    """Add the vectors of TF-IDF and SVD to `columns`."""
    columns.vectors = {name: semantics.transform(counts) for name, counts in columns.tokens.items()}
