"""Continued pretraining: every token of plain text, to give a model the language of a domain before SFT.

    posttrain pretrain model=my/model data=runs/my-texts --output runs/my-pretrain

TRL's SFTTrainer on rows tokenized here. Each document ends with the end-of-sequence token, and one longer
than ``trainer.max_length`` is cut into windows of that length, so that no text is lost.
``trainer.packing: true`` puts several documents into one row without letting them attend to each other.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from data_prep.dataset import Split, read_split
from posttrain.models import load_tokenizer
from posttrain.stage import StageContext
from train.adapters import load_policy
from train.config import PretrainConfig
from train.encode import encode_texts, windows_of
from train.finish import train_and_save
from train.isolation import check_isolation
from train.length_groups import GroupedSFTTrainer
from train.peft_setup import length_limit, quiet_libraries
from train.trainer_args import build_args


def run(config: PretrainConfig, context: StageContext) -> dict[str, Any]:
    """Train and write ``model/``: a PEFT directory, or a full model when ``peft`` is null.

    Raises:
        UserError: data, tokenizer or model do not fit; the message says which and how to mend it.
        PosttrainError: the loss is not finite, or nothing was learned.
    """
    quiet_libraries()
    path = context.path("model")
    tokenizer = load_tokenizer(path)
    start = load_policy(path, config, context.checkpoints)

    with context.phase("tokenize"):
        max_length = length_limit(start.model.config, config.trainer.get("max_length"))
        train_rows, counts = load_windows(context, "train", tokenizer, max_length)
        eval_rows, _ = load_windows(context, "eval", tokenizer, max_length)

    probe = train_rows[:2]["input_ids"]
    trainer = GroupedSFTTrainer(
        model=start.model,
        args=build_args(config, context.checkpoints, max_length=max_length),
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        peft_config=start.lora,
    )
    check_isolation(trainer, probe)
    return counts | train_and_save(trainer, start, tokenizer, context, "pretrain")


def load_windows(
    context: StageContext, split: Split, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[Dataset, dict[str, int]]:
    """A split as a dataset of ``input_ids`` and ``labels`` of at most `max_length`, and what was counted."""
    texts = list(read_split(context.path("data"), split, "text")["text"])
    windows = windows_of(encode_texts(tokenizer, texts), max_length)
    counts = {"documents": len(texts), "rows": len(windows), "tokens": sum(map(len, windows))}
    return Dataset.from_dict({"input_ids": windows, "labels": windows}), counts
