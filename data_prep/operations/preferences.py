"""Checks of preference pairs that need more than one pair, or more than the pair's own form.

That a side is empty, that both sides are the same up to white space, or that their prompts differ makes a row
unusable and is counted where it is read (``data_prep/records.py``, ``formats.py``): empty_content,
identical_sides, prompt_mismatch. Here sides that differ in case and punctuation only, sides without any word,
and pairs that contradict each other are dropped, and all pairs of one prompt are tied: they land on one side
of the split, whatever it is by. How much longer chosen answers are is stated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_prep.figures import share_interval
from data_prep.operations.base import Decided, Dropped, Row, Stays, Views, verdict_table
from data_prep.operations.view_columns import Cells, blocks, place, same_as_first
from data_prep.records import PreferenceRecord
from data_prep.shingles import shingle
from data_prep.split import group_key

WORDLESS = ("", "chosen", "rejected", "chosen and rejected")
"""Sides without any word, by the number that views have for them."""


@dataclass(frozen=True)
class PreferenceChecks:
    """A corpus operation over preferences."""

    def view(self, batch: Sequence[Row]) -> pa.Table:
        """prompt, chosen, rejected: keys of their words, whatever their case and punctuation; wordless: place
        in WORDLESS; characters of the sides; place.
        """
        columns: list[Sequence[Any]] = [list(column) for column in zip(*map(_pair, batch), strict=True)]
        return pa.table(columns or [[]] * len(VIEW), schema=VIEW)

    def decide(self, views: Views, scratch: Path) -> Decided:
        """Drops side_without_words, sides_alike, contradictory_pairs; facts: length bias of the rest."""
        prompt, chosen, rejected = (_column(views, name) for name in ("prompt", "chosen", "rejected"))
        alike, turned = chosen == rejected, chosen > rejected
        low = np.minimum(chosen, rejected)
        high = np.maximum(chosen, rejected, out=rejected)
        same = same_as_first([low, high, prompt])
        del low, high, chosen, rejected
        opposite = _opposites(same, turned)
        del same
        wordless = _column(views, "wordless")
        kept = ~(alike | (opposite >= 0) | (wordless > 0))
        _, counts = np.unique(prompt[kept], return_counts=True)
        characters = [_column(views, f"characters_{side}")[kept] for side in ("chosen", "rejected")]
        facts: dict[str, Any] = {
            "prompts_with_several_pairs": int((counts > 1).sum()),
            **length_bias(*characters),
        }
        return Decided(_verdicts(views, scratch, prompt, wordless, alike, opposite), facts)


def _pair(row: Row) -> tuple[Any, ...]:
    """The cells of a view, in the order of VIEW."""
    record = row.record
    assert isinstance(record, PreferenceRecord)
    prompt = "\x1e".join(f"{turn.role}\x1f{turn.content}" for turn in record.prompt)
    sides = [record.chosen[0].content, record.rejected[0].content]
    keys = [int(group_key(text), 16) for text in (prompt, *sides)]
    bare = [not len(shingle([text], 1).hashes) for text in sides]
    return (*keys, bare[0] + 2 * bare[1], *map(len, sides), place(row))


VIEW = pa.schema(
    [
        *((name, pa.uint64()) for name in ("prompt", "chosen", "rejected")),
        ("wordless", pa.uint8()),
        ("characters_chosen", pa.int32()),
        ("characters_rejected", pa.int32()),
        ("place", pa.string()),
    ]
)


def _column(views: Views, name: str) -> NDArray[Any]:
    found = np.empty(len(views), dtype=VIEW.field(name).type.to_pandas_dtype())
    done = 0
    for table in views.tables([name]):
        found[done : done + table.num_rows] = table[name].to_numpy()
        done += table.num_rows
    return found


def _opposites(same: NDArray[np.int64], turned: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Of every pair the first that prefers the other of the same two answers to the same prompt, or -1.

    same: the first pair of the same prompt and answers, whichever is preferred; turned: which is.
    """
    opposite = np.full(len(same), -1, dtype=np.int64)
    first = np.empty(len(same), dtype=np.int64)
    for side in (turned, ~turned):
        first[:] = -1
        rows = np.flatnonzero(side)[::-1]
        # The last assignment counts, which is of the first pair.
        first[same[rows]] = rows
        opposite[~side] = first[same[~side]]
    return opposite


def _verdicts(
    views: Views,
    scratch: Path,
    prompt: NDArray[np.uint64],
    wordless: NDArray[np.uint8],
    alike: NDArray[np.bool_],
    opposite: NDArray[np.int64],
) -> Iterator[pa.Table]:
    contrary = (opposite >= 0) & ~alike & (wordless == 0)
    with Cells(views, "place", np.unique(opposite[contrary]), scratch) as places:
        for rows in blocks(np.arange(len(prompt))):
            others = iter(places.at(opposite[rows][contrary[rows]]))
            columns = (column[rows].tolist() for column in (prompt, wordless, alike, contrary))
            yield verdict_table(
                [
                    (row, _verdict(key, bare, same, next(others) if contradicted else None))
                    for row, key, bare, same, contradicted in zip(rows.tolist(), *columns, strict=True)
                ]
            )


def _verdict(prompt: int, wordless: int, alike: bool, opposite: str | None) -> Stays | Dropped:
    if wordless:
        return Dropped("side_without_words", f"{WORDLESS[wordless]}: no letter or digit")
    if alike:
        return Dropped("sides_alike", "chosen and rejected differ in case and punctuation only")
    if opposite is not None:
        return Dropped("contradictory_pairs", f"{opposite} prefers the other of the same two answers")
    return Stays(ties=(f"prompt:{prompt:016x}",))


def length_bias(chosen: NDArray[np.int32], rejected: NDArray[np.int32]) -> dict[str, Any]:
    """How often and by how much chosen is the longer one, in characters; nothing without pairs.

    chosen_longer: share among pairs of unlike lengths, with its 95 % interval (`share_interval`).
    """
    unlike = int((chosen != rejected).sum())
    if not unlike:
        return {}
    longer = int((chosen > rejected).sum())
    return {
        "chosen_longer": round(longer / unlike, 4),
        "chosen_longer_95": [round(limit, 4) for limit in share_interval(longer, unlike)],
        "mean_characters_chosen": round(int(chosen.sum(dtype=np.int64)) / len(chosen), 1),
        "mean_characters_rejected": round(int(rejected.sum(dtype=np.int64)) / len(rejected), 1),
    }
