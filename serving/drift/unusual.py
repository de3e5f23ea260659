"""The records of today that lie farthest from everything in the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from serving.drift.measure import Columns
from serving.drift.records import Record

NEIGHBOURS = 5
SHOWN = 8
_LONGEST = 2000


def farthest(reference: Columns, today: Columns, records: Sequence[Record]) -> list[dict[str, Any]]:
    """The 8 records whose prompt embedding has the largest mean distance to its 5 nearest in the reference.

    As {"distance", "messages", "answer"}, texts as they are stored (the gateway redacts before it stores),
    cut at 2,000 characters.
    """
    from sklearn.neighbors import NearestNeighbors

    index = NearestNeighbors(n_neighbors=min(NEIGHBOURS, reference.size)).fit(reference.vectors["prompt"])
    distances = index.kneighbors(today.vectors["prompt"])[0].mean(axis=1)
    shown = []
    for i in np.argsort(-distances, kind="stable")[:SHOWN]:
        record = records[i]
        messages = [turn | {"content": _cut(turn["content"])} for turn in record.messages]
        answer = None if record.answer is None else _cut(record.answer)
        shown.append({"distance": float(distances[i]), "messages": messages, "answer": answer})
    return shown


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} [{len(text) - _LONGEST} more characters]"
