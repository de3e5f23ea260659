"""Kahneman-Tversky optimisation (Ethayarajh et al. 2024, 2402.01306): good answers up, bad ones down.

    posttrain run configs/tiny/breadth.yaml --only kto

TRL's KTOTrainer. Answers are labelled each by itself (kind unpaired_preference), or each preference pair
gives a desirable and an undesirable one; `train.pairs.load_answers` also orders them for the KL term.
Departure from TRL's defaults: the reference is decided here, as in ``train/preference.py``; with LoRA it is
the model given, or the adapter given (``train/adapters.py``).
"""

from __future__ import annotations

from typing import Any

from trl import KTOTrainer

from posttrain.models import load_tokenizer
from posttrain.stage import StageContext
from train.adapters import load_policy, load_reference
from train.config import KtoConfig
from train.finish import train_and_save
from train.pairs import load_answers
from train.peft_setup import length_limit, quiet_libraries
from train.trainer_args import build_args


def run(config: KtoConfig, context: StageContext) -> dict[str, Any]:
    """Train and write ``model/``: a PEFT directory, or a full model when ``peft`` is null.

    Raises:
        UserError: data, template or model do not fit; the message says which and how to mend it.
        PosttrainError: the loss is not finite, or nothing was learned.
    """
    quiet_libraries()
    path = context.path("model")
    tokenizer = load_tokenizer(path)
    start = load_policy(path, config, context.checkpoints)
    reference = load_reference(path, config)

    with context.phase("tokenize"):
        max_length = length_limit(start.model.config, config.trainer.get("max_length"))
        train_rows, counts = load_answers(context, "train", tokenizer, max_length, config.seed)
        eval_rows, _ = load_answers(context, "eval", tokenizer, max_length, config.seed)

    trainer = KTOTrainer(
        model=start.model,
        ref_model=reference,
        args=build_args(config, context.checkpoints, max_length=max_length),
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        peft_config=start.lora,
    )
    return counts | train_and_save(trainer, start, tokenizer, context, "kto")
