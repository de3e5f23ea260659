"""How many rows there are and how long they are, in tokens: from the data set where it is there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from data_prep.dataset import read_kind, split_files
from data_prep.records import Kind
from posttrain.errors import UserError
from posttrain.models import load_chat_tokenizer
from posttrain.preflight import Findings
from train.encode import IGNORED, label_conversations, render_whole
from train.ppo.rollout import encode_prompts
from train.preflight.rows import read_samples


@dataclass(frozen=True)
class Lengths:
    """rows: of the train split, None while it has yet to be made. mean, longest: tokens of a sequence (of a
    pair's longer side, of a prompt), at most the stage's limit. measured: from the rows, else both are that
    limit. note: why they are not measured. labels: of each row of sft, its tokens that carry loss.
    paired: whether a row of kto is a pair, which gives two.
    """

    rows: int | None
    mean: float
    longest: int
    measured: bool
    note: str = ""
    labels: tuple[int, ...] = ()
    paired: bool = True

    def labelled(self, rows: int, limit: int) -> int | None:
        """Tokens with a label in the micro-batch of `rows` sequences that has the most; None: not measured.

        limit: of the sequences. With more rows than the data has, the rows of the data are repeated.
        """
        if not self.labels:
            return None
        times, rest = divmod(rows, len(self.labels))
        most = sorted((min(count, limit) for count in self.labels), reverse=True)
        return times * sum(most) + sum(most[:rest])


UNPAIRED: Kind = "unpaired_preference"
KINDS: dict[str, Kind] = {
    "sft": "conversation",
    "pretrain": "text",
    "reward": "preference",
    "dpo": "preference",
    "kto": "preference",
    "orpo": "preference",
    "cpo": "preference",
    "grpo": "prompt",
    "rloo": "prompt",
    "ppo": "prompt",
}
"""Kind of data set that each stage reads."""


def read_lengths(
    kind: str,
    data: str,
    model: Path | None,
    limit: int,
    seed: int,
    *,
    drops: bool,
    assistant_only: bool = False,
) -> Lengths:
    """Lengths of the rows that stage `kind` reads from `data` with the tokenizer in `model`.

    limit: longest sequence. drops: whether longer rows are left out, as pairs and prompts are, or cut.
    assistant_only: only the assistant's tokens have a label (sft).
    """
    directory = Path(data).expanduser()
    unpaired = kind == "kto" and read_kind(directory) == UNPAIRED

    def bound(rows: int | None, note: str) -> Lengths:
        return Lengths(rows, limit, limit, False, note, paired=not unpaired)

    if not split_files(directory, "train"):
        return bound(None, f"data {data} is not made yet")
    wanted: Kind = UNPAIRED if unpaired else KINDS[kind]
    samples = read_samples(directory, wanted, seed, Findings(), splits=("train",))
    if not samples:
        return bound(None, f"data {data} cannot be read as {wanted}")
    [sample] = samples
    tokenizer = None if model is None else _tokenizer(model)
    if tokenizer is None:
        return bound(sample.total, "no tokenizer to count tokens with yet")
    try:
        every, labels = count_tokens(kind, tokenizer, sample.rows, assistant_only)
    except (UserError, TemplateError) as error:
        return bound(sample.total, f"rows of {data} cannot be rendered ({error})")
    counts = [min(count, limit) for count in every if not drops or count <= limit]
    if not counts:
        return bound(sample.total, f"no row fits {limit} tokens")
    mean, longest = sum(counts) / len(counts), max(counts)
    return Lengths(sample.total, mean, longest, True, labels=tuple(labels), paired=not unpaired)


def _tokenizer(model: Path) -> PreTrainedTokenizerBase | None:
    try:
        return load_chat_tokenizer(model)
    except UserError:
        return None


def count_tokens(
    kind: str, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], assistant_only: bool = False
) -> tuple[list[int], list[int]]:
    """Tokens of each sequence, and of sft those of them that carry loss, nothing where that cannot be told.

    Of a pair the tokens of its longer side, to which TRL pads the other.
    """
    if kind != "sft":
        return _count(kind, tokenizer, rows), []
    messages = _column(rows, "messages")
    try:
        encoded = label_conversations(tokenizer, messages, assistant_only)
    except UserError:  # the template does not mark what the assistant says
        return [len(row.input_ids) for row in label_conversations(tokenizer, messages, False)], []
    labels = [sum(label != IGNORED for label in row.labels) for row in encoded]
    return [len(row.input_ids) for row in encoded], labels


def _count(kind: str, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]) -> list[int]:
    if kind == "pretrain":
        encoded: Any = tokenizer(_column(rows, "text"))["input_ids"]
        return [len(ids) + 1 for ids in encoded]
    if KINDS[kind] == "prompt":
        ids, _ = encode_prompts(_column(rows, "prompt"), tokenizer, 2**30)
        return [len(prompt) for prompt in ids]
    if "completion" in rows[0]:
        return list(map(len, render_whole(tokenizer, [row["prompt"] + row["completion"] for row in rows])))
    sides = [
        render_whole(tokenizer, [row["prompt"] + row[s] for row in rows]) for s in ("chosen", "rejected")
    ]
    return [max(map(len, pair)) for pair in zip(*sides, strict=True)]


def _column(rows: list[dict[str, Any]], name: str) -> list[Any]:
    return [row[name] for row in rows]
