"""Supervised fine-tuning: show a base model how to answer, by LoRA on demonstrations.

    posttrain run configs/tiny/pipeline.yaml --only sft

TRL's SFTTrainer on rows tokenized here. The loss covers the assistant's tokens, its end-of-turn token
included, in every turn (``trainer.assistant_only_loss: false`` for all tokens). ``trainer.packing: true``
puts several dialogues into one row; TRL then sends position ids that restart with each dialogue and no
attention mask, from which transformers 5 builds a block-diagonal mask (eager, sdpa, flex) or sequence offsets
(flash attention): dialogues do not see each other, and the loss equals the unpacked one.
"""

from __future__ import annotations

from typing import Any

from trl import SFTTrainer

from data_prep.dataset import Split, read_split
from posttrain.errors import DataError
from posttrain.models import load_tokenizer
from posttrain.stage import StageContext
from train.adapters import load_policy
from train.config import SftConfig
from train.encode import IGNORED, encode_conversations
from train.finish import train_and_save
from train.peft_setup import length_limit, quiet_libraries
from train.trainer_args import build_args


def run(config: SftConfig, context: StageContext) -> dict[str, Any]:
    """Train and write ``model/``: a PEFT directory, or a full model when ``peft`` is null.

    Raises:
        UserError: data, template or model do not fit; the message says which and how to mend it.
        PosttrainError: the loss is not finite, or nothing was learned.
    """
    quiet_libraries()
    path = context.path("model")
    tokenizer = load_tokenizer(path)
    start = load_policy(path, config, context.checkpoints)

    with context.phase("tokenize"):
        max_length = length_limit(start.model.config, config.trainer.get("max_length"))
        assistant_only = config.trainer.get("assistant_only_loss", True)
        train_rows, train_counts = load_rows(context, "train", tokenizer, assistant_only, max_length)
        eval_rows, _ = load_rows(context, "eval", tokenizer, assistant_only, max_length)

    args = build_args(config, context.checkpoints)
    args.max_length = max_length
    args.assistant_only_loss = False  # the labels are already in the rows
    trainer = SFTTrainer(
        model=start.model,
        args=args,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        peft_config=start.lora,
    )
    return train_counts | train_and_save(trainer, start, tokenizer, context, "sft")


def load_rows(
    context: StageContext, split: Split, tokenizer: Any, assistant_only: bool, max_length: int
) -> tuple[Any, dict[str, int]]:
    """A split as a dataset of ``input_ids`` and ``labels``, and what happened to its rows.

    A dialogue longer than `max_length` is cut by TRL; one that loses all its supervised tokens that way, or
    never had any, is left out here, and counted.
    """
    from datasets import Dataset

    rows = read_split(context.path("data"), split, "conversation")
    encoded = encode_conversations(tokenizer, list(rows["messages"]), list(rows["id"]), assistant_only)
    kept = [row for row in encoded if any(label != IGNORED for label in row.labels[:max_length])]
    silent = sum(all(label == IGNORED for label in row.labels) for row in encoded)
    counts = {
        "rows": len(kept),
        "rows_cut": sum(len(row.input_ids) > max_length for row in kept),
        "rows_dropped_unsupervised": silent,
        "rows_dropped_too_long": len(encoded) - len(kept) - silent,
        "supervised_tokens": sum(label != IGNORED for row in kept for label in row.labels[:max_length]),
    }
    if not kept:
        raise DataError(
            f"{context.path('data')}: trainer.max_length={max_length} cuts every supervised token of all "
            f"{len(encoded)} {split} dialogues; raise trainer.max_length"
        )
    columns = {"input_ids": [row.input_ids for row in kept], "labels": [row.labels for row in kept]}
    return Dataset.from_dict(columns), counts
