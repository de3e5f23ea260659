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
    """The 8 records whose last message is least like its 5 nearest in the reference.

    Likeness is the dot product of the embeddings: with TF-IDF and SVD, of unit vectors after projection, so
    what the reference has no words for is like nothing. As {"distance": 1 - mean likeness, "messages",
    "answer"}, texts as they are stored (the gateway redacts before it stores), cut at 2,000 characters.
    """
    likeness = today.vectors["prompt"] @ reference.vectors["prompt"].T
    nearest = np.sort(likeness, axis=1)[:, -NEIGHBOURS:]
    distances = 1 - nearest.mean(axis=1)
    shown = []
    for i in np.argsort(-distances, kind="stable")[:SHOWN]:
        record = records[i]
        messages = [turn | {"content": _cut(turn["content"])} for turn in record.messages]
        answer = None if record.answer is None else _cut(record.answer)
        shown.append({"distance": float(distances[i]), "messages": messages, "answer": answer})
    return shown


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} [{len(text) - _LONGEST} more characters]"
