"""Preference pairs as the trainers on pairs take them (dpo, orpo, cpo), and labelled answers (kto)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.dataset import Split, read_kind, read_split
from posttrain.errors import DataError
from posttrain.stage import StageContext
from train.encode import encode_pairs, encode_whole

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


def load_answers(
    context: StageContext, split: Split, tokenizer: PreTrainedTokenizerBase, max_length: int, seed: int
) -> tuple[Dataset, dict[str, Any]]:
    """A split as a dataset of prompt, completion and label (true: desirable), in the order to be trained in.

    From a data set of kind unpaired_preference as it is labelled, from one of kind preference see `unpair`.
    Answers that do not fit `max_length` are left out and counted.

    Raises:
        DataError: none is left, or one does not end with the end-of-turn token.
    """
    if read_kind(context.path("data")) != "unpaired_preference":
        pairs, counts = load_pairs(context, split, tokenizer, max_length)
        return unpair(pairs, seed), counts
    rows = read_split(context.path("data"), split, "unpaired_preference")
    dialogues = [row["prompt"] + row["completion"] for row in rows]
    lengths = map(len, encode_whole(tokenizer, dialogues, list(rows["id"])))
    fits = [index for index, length in enumerate(lengths) if length <= max_length]
    if not fits:
        raise DataError(f"none of {len(rows)} {split} answers fits trainer.max_length={max_length}")
    kept = rows.select(fits).select_columns(["prompt", "completion", "label"])
    desirable = sum(kept["label"])
    counts = {
        "desirable": desirable,
        "undesirable": len(kept) - desirable,
        "answers_dropped_too_long": len(rows) - len(kept),
    }
    return spread(kept, seed), counts


def spread(rows: Dataset, seed: int) -> Dataset:
    """The rows shuffled with `seed`, but each label at even distances, so that every batch has its share.

    TRL reads KTO rows in the order given; see `unpair`.
    """
    labels, rng = np.array(rows["label"]), np.random.default_rng(seed)
    order = [rng.permutation(np.flatnonzero(labels == label)) for label in (True, False)]
    places = [(np.arange(len(part)) + 0.5) / len(part) for part in order if len(part)]
    ranked = np.argsort(np.concatenate(places), kind="stable")
    return rows.select(np.concatenate(order)[ranked].tolist())


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
