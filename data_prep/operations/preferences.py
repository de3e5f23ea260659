"""Checks of preference pairs that need more than one pair, or more than the pair's own form.

That a side is empty, that both sides are the same up to white space, or that their prompts differ makes a row
unusable and is counted where it is read (``data_prep/records.py``, ``formats.py``): empty_content,
identical_sides, prompt_mismatch. Here sides that differ in case and punctuation only, sides without any word,
and pairs that contradict each other are dropped, and all pairs of one prompt are tied: they land on one side
of the split, whatever it is by. How much longer chosen answers are is stated.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from data_prep.operations.base import Decided, Dropped, Row, Stays, Views, verdict_table
from data_prep.records import PreferenceRecord
from data_prep.shingles import shingle
from data_prep.split import group_key

VIEW = pa.schema(
    [
        *((name, pa.string()) for name in ("place", "prompt", "chosen", "rejected", "wordless")),
        ("characters_chosen", pa.int64()),
        ("characters_rejected", pa.int64()),
    ]
)


class Pair(NamedTuple):
    """What is compared: keys of words whatever their case and punctuation, and lengths in characters."""

    place: str
    prompt: str
    chosen: str
    rejected: str
    wordless: str
    characters_chosen: int
    characters_rejected: int


@dataclass(frozen=True)
class PreferenceChecks:
    """A corpus operation over preferences."""

    def view(self, batch: Sequence[Row]) -> pa.Table:
        """A `Pair` a row."""
        return pa.Table.from_pylist([_pair(row)._asdict() for row in batch], schema=VIEW)

    def decide(self, views: Views, scratch: Path) -> Decided:
        """Drops side_without_words, sides_alike, contradictory_pairs; facts: length bias of the rest."""
        pairs = [Pair(**row) for table in views.tables() for row in table.to_pylist()]
        preferred: dict[tuple[str, str, str], str] = {}
        for pair in pairs:
            preferred.setdefault((pair.prompt, pair.chosen, pair.rejected), pair.place)
        verdicts = [self._verdict(pair, preferred) for pair in pairs]
        kept = [pair for pair, verdict in zip(pairs, verdicts, strict=True) if isinstance(verdict, Stays)]
        prompts: defaultdict[str, int] = defaultdict(int)
        for pair in kept:
            prompts[pair.prompt] += 1
        facts: dict[str, Any] = {
            "prompts_with_several_pairs": sum(count > 1 for count in prompts.values()),
            **length_bias([(pair.characters_chosen, pair.characters_rejected) for pair in kept]),
        }
        return Decided([verdict_table(list(enumerate(verdicts)))], facts)

    def _verdict(self, pair: Pair, preferred: dict[tuple[str, str, str], str]) -> Stays | Dropped:
        if pair.wordless:
            return Dropped("side_without_words", f"{pair.wordless}: no letter or digit")
        if pair.chosen == pair.rejected:
            return Dropped("sides_alike", "chosen and rejected differ in case and punctuation only")
        opposite = preferred.get((pair.prompt, pair.rejected, pair.chosen))
        if opposite is not None:
            return Dropped("contradictory_pairs", f"{opposite} prefers the other of the same two answers")
        return Stays(ties=(f"prompt:{pair.prompt}",))


def _pair(row: Row) -> Pair:
    record = row.record
    assert isinstance(record, PreferenceRecord)
    prompt = "\x1e".join(f"{turn.role}\x1f{turn.content}" for turn in record.prompt)
    chosen, rejected = record.chosen[0].content, record.rejected[0].content
    sides = (("chosen", chosen), ("rejected", rejected))
    bare = [name for name, text in sides if not len(shingle([text], 1).hashes)]
    return Pair(
        f"{row.file}:{row.line}",
        group_key(prompt),
        group_key(chosen),
        group_key(rejected),
        " and ".join(bare),
        len(chosen),
        len(rejected),
    )


def length_bias(lengths: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """How often and by how much chosen is the longer one, in characters; nothing without pairs.

    chosen_longer: share among pairs of unlike lengths, with its 95 % interval (Wilson, Probable inference,
    1927).
    """
    unlike = [chosen > rejected for chosen, rejected in lengths if chosen != rejected]
    if not unlike:
        return {}
    n, z = len(unlike), 1.96
    share = sum(unlike) / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return {
        "chosen_longer": round(share, 4),
        "chosen_longer_95": [round(centre - half, 4), round(centre + half, 4)],
        "mean_characters_chosen": round(sum(chosen for chosen, _ in lengths) / len(lengths), 1),
        "mean_characters_rejected": round(sum(rejected for _, rejected in lengths) / len(lengths), 1),
    }
