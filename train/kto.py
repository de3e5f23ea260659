"""Kahneman-Tversky optimisation (Ethayarajh et al. 2024, 2402.01306): good answers up, bad ones down.

    posttrain run configs/tiny/breadth.yaml --only kto

TRL's KTOTrainer. Each preference pair gives a desirable and an undesirable row (`train.pairs.unpair`, which
also orders them for the KL term). Departure from TRL's defaults: the reference is decided here, as in
``train/preference.py``; with LoRA it is the model given, or the adapter given (``train/adapters.py``).
"""

from __future__ import annotations

from typing import Any

from trl import KTOTrainer

from posttrain.models import load_tokenizer
from posttrain.stage import StageContext
from train.adapters import load_policy, load_reference
from train.config import KtoConfig
from train.finish import train_and_save
from train.pairs import load_pairs, unpair
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
        train_pairs, counts = load_pairs(context, "train", tokenizer, max_length)
        eval_pairs, _ = load_pairs(context, "eval", tokenizer, max_length)

    trainer = KTOTrainer(
        model=start.model,
        ref_model=reference,
        args=build_args(config, context.checkpoints, max_length=max_length),
        train_dataset=unpair(train_pairs, config.seed),
        eval_dataset=unpair(eval_pairs, config.seed),
        processing_class=tokenizer,
        peft_config=start.lora,
    )
    return counts | train_and_save(trainer, start, tokenizer, context, "kto")
