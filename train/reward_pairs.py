"""Preference pairs as the reward stage reads them: token ids, and margins where the data give them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from data_prep.dataset import Split, read_split
from posttrain.errors import DataError
from posttrain.stage import StageContext
from train.encode import encode_pairs
from train.reward_scores import Pair


@dataclass(frozen=True)
class LabelledPairs:
    """n pairs: ``id`` and ``group`` of each, token ids of both sides, and margins or None."""

    names: list[str]
    groups: list[str]
    ids: list[Pair]
    margins: list[float] | None

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, indices: Sequence[int]) -> LabelledPairs:
        """The pairs at `indices`, in that order."""
        return LabelledPairs(
            [self.names[i] for i in indices],
            [self.groups[i] for i in indices],
            [self.ids[i] for i in indices],
            None if self.margins is None else [self.margins[i] for i in indices],
        )

    def dataset(self) -> Dataset:
        """The columns that TRL's RewardTrainer takes as they are."""
        columns: dict[str, list] = {
            "chosen_ids": [chosen for chosen, _ in self.ids],
            "rejected_ids": [rejected for _, rejected in self.ids],
        }
        return Dataset.from_dict(columns if self.margins is None else columns | {"margin": self.margins})


def load_pairs(
    context: StageContext,
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    margin: str | None,
) -> tuple[LabelledPairs, int]:
    """The pairs of a split that fit `max_length`, and how many did not; those are not cut.

    Args:
        margin: key in a record's meta under which its margin stands; None for pairs without margins.

    Raises:
        DataError: no pair fits, see `encode_pairs` and `read_margins`.
    """
    rows = read_split(context.path("data"), split, "preference").to_list()
    encoded = encode_pairs(tokenizer, rows)
    kept = [index for index, pair in enumerate(encoded) if max(map(len, pair)) <= max_length]
    if not kept:
        raise DataError(f"none of {len(rows)} {split} pairs fits trainer.max_length={max_length}")
    pairs = LabelledPairs(
        [row["id"] for row in rows],
        [row["group"] for row in rows],
        encoded,
        None if margin is None else read_margins(rows, margin),
    )
    return pairs.take(kept), len(rows) - len(kept)


def read_margins(rows: Sequence[dict], key: str) -> list[float]:
    """The number under `key` in the meta of each row.

    Raises:
        DataError: a row has none, or it is not a finite number.
    """
    found = [json.loads(row["meta"]).get(key) for row in rows]
    wrong = [
        (row["id"], value)
        for row, value in zip(rows, found, strict=True)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value)
    ]
    if wrong:
        names = ", ".join(f"{name} ({value!r})" for name, value in wrong[:5])
        raise DataError(
            f"margin: {len(wrong)} of {len(rows)} pairs have no finite number under `{key}` in their meta. "
            f"First: {names}\n    keep the column with `meta_columns: [{key}]` on the source of their curate "
            "stage, or drop `margin` from the reward stage"
        )
    return [float(value) for value in found]
