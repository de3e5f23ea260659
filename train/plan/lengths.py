"""How many rows there are and how long they are, in tokens: from the data set where it is there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from data_prep.dataset import read_kind
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
    if not (directory / "train.parquet").is_file():
        return Lengths(None, limit, limit, False, f"data {data} is not made yet")
    unpaired = kind == "kto" and read_kind(directory) == UNPAIRED
    wanted: Kind = UNPAIRED if unpaired else KINDS[kind]
    samples = read_samples(directory, wanted, seed, Findings(), splits=("train",))
    if not samples:
        return Lengths(None, limit, limit, False, f"data {data} cannot be read as {wanted}")
    [sample] = samples
    tokenizer = None if model is None else _tokenizer(model)
    if tokenizer is None:
        note = "no tokenizer to count tokens with yet"
        return Lengths(sample.total, limit, limit, False, note, paired=not unpaired)
    try:
        every = count_tokens(kind, tokenizer, sample.rows)
    except (UserError, TemplateError) as error:
        return Lengths(sample.total, limit, limit, False, f"rows of {data} cannot be rendered ({error})")
    counts = [count for count in every if not drops or count <= limit]
    if not counts:
        return Lengths(sample.total, limit, limit, False, f"no row fits {limit} tokens")
    counts = [min(count, limit) for count in counts]
    mean, longest = sum(counts) / len(counts), max(counts)
    if kind != "sft":
        return Lengths(sample.total, mean, longest, True, paired=not unpaired)
    labels = count_labels(tokenizer, sample.rows) if assistant_only else counts
    return Lengths(sample.total, mean, longest, True, labels=tuple(labels))


def _tokenizer(model: Path) -> PreTrainedTokenizerBase | None:
    try:
        return load_chat_tokenizer(model)
    except UserError:
        return None


def count_tokens(kind: str, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]) -> list[int]:
    """Tokens of each sequence; of a pair those of its longer side, to which TRL pads the other."""
    if kind == "sft":
        return [
            len(row.input_ids) for row in label_conversations(tokenizer, _column(rows, "messages"), False)
        ]
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


def count_labels(tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]) -> list[int]:
    """The assistant's tokens in each row; nothing where the template does not mark them."""
    try:
        encoded = label_conversations(tokenizer, _column(rows, "messages"))
    except UserError:
        return []
    return [sum(label != IGNORED for label in row.labels) for row in encoded]


def _column(rows: list[dict[str, Any]], name: str) -> list[Any]:
    return [row[name] for row in rows]
