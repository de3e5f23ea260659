"""Supervised fine-tuning: show a base model how to answer, by LoRA on demonstrations.

    posttrain run configs/tiny/pipeline.yaml --only sft

TRL's SFTTrainer on rows tokenized here. The loss covers the assistant's tokens, its end-of-turn token
included, in every turn (``trainer.assistant_only_loss: false`` for all tokens). ``trainer.packing: true``
puts several dialogues into one row, ``trainer.padding_free: true`` those of a batch; TRL then sends position
ids that restart with each dialogue and no attention mask, from which transformers 5 builds a block-diagonal
mask (eager, sdpa, flex) or sequence offsets (flash attention): dialogues do not see each other, which is
measured before training, and the loss equals the unpacked one. What the block leaves open is chosen for
speed (``train/sft_defaults.py``).
"""

from __future__ import annotations

from typing import Any

from data_prep.dataset import Split, read_split
from posttrain.errors import DataError
from posttrain.models import load_tokenizer
from posttrain.stage import StageContext
from train.adapters import load_policy
from train.config import SftConfig
from train.encode import IGNORED, encode_conversations
from train.finish import train_and_save
from train.isolation import check_isolation
from train.length_groups import GroupedSFTTrainer
from train.peft_setup import length_limit, quiet_libraries
from train.sft_defaults import sft_defaults
from train.supervised_head import score_supervised_only
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
        train_rows, train_counts = load_rows(context, "train", tokenizer, config.trainer, max_length)
        eval_rows, _ = load_rows(context, "eval", tokenizer, config.trainer, max_length)

    args = build_args(config, context.checkpoints, **sft_defaults(config.trainer, start.model.config))
    args.max_length = max_length if args.packing else None  # the rows are cut already
    args.assistant_only_loss = False  # the labels are already in the rows
    probe = train_rows[:2]["input_ids"]
    trainer = GroupedSFTTrainer(
        model=start.model,
        args=args,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        peft_config=start.lora,
    )
    check_isolation(trainer, probe)
    if args.device.type == "cpu" and not args.torch_compile:
        score_supervised_only(trainer.model)
    return train_counts | train_and_save(trainer, start, tokenizer, context, "sft")


def load_rows(
    context: StageContext, split: Split, tokenizer: Any, trainer: dict[str, Any], max_length: int
) -> tuple[Any, dict[str, int]]:
    """A split as a dataset of ``input_ids`` and ``labels``, and what happened to its rows.

    A dialogue longer than `max_length` is cut (``packing_strategy: bfd_split`` splits it instead); one that
    loses all its supervised tokens that way, or never had any, is left out, and counted.
    """
    from datasets import Dataset

    rows = read_split(context.path("data"), split, "conversation")
    assistant_only = trainer.get("assistant_only_loss", True)
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
    cut = None if trainer.get("packing") and trainer.get("packing_strategy") == "bfd_split" else max_length
    columns = {
        "input_ids": [row.input_ids[:cut] for row in kept],
        "labels": [row.labels[:cut] for row in kept],
    }
    return Dataset.from_dict(columns), counts
