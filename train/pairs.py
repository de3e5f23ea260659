"""Preference pairs as the trainers on pairs (dpo, orpo, cpo) and on single answers (kto) take them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.dataset import Split, read_split
from posttrain.errors import DataError
from posttrain.stage import StageContext
from train.encode import encode_pairs

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def load_pairs(
    context: StageContext, split: Split, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[Dataset, dict[str, Any]]:
    """A split as a dataset of prompt, chosen and rejected, without the pairs that do not fit `max_length`.

    TRL would cut such a pair, and with it the end-of-turn token; here it is left out and counted.

    Raises:
        DataError: no pair is left, or one does not end with the end-of-turn token.
    """
    rows = read_split(context.path("data"), split, "preference")
    encoded = encode_pairs(tokenizer, rows.to_list())
    fits = [index for index, pair in enumerate(encoded) if max(map(len, pair)) <= max_length]
    if not fits:
        raise DataError(f"none of {len(encoded)} {split} pairs fits trainer.max_length={max_length}")
    counts = {"pairs": len(fits), "pairs_dropped_too_long": len(encoded) - len(fits)}
    return rows.select(fits).select_columns(["prompt", "chosen", "rejected"]), counts


def unpair(pairs: Dataset, seed: int) -> Dataset:
    """Each pair as two rows of prompt, completion and label: chosen is desirable (true), rejected is not.

    TRL reads KTO rows in the order given and estimates the KL term by giving each prompt its neighbour's
    answer. So the pairs are shuffled with `seed`, the labels alternate, which balances every batch of even
    size, and the two answers to one prompt stand half the data apart.
    """
    from datasets import Dataset

    order = np.random.default_rng(seed).permutation(len(pairs)).tolist()
    rows = []
    for place, index in enumerate(order):
        other = order[(place + len(order) // 2) % len(order)]
        for label, pair, side in ((True, pairs[index], "chosen"), (False, pairs[other], "rejected")):
            rows.append({"prompt": pair["prompt"], "completion": pair[side], "label": label})
    return Dataset.from_list(rows)
