"""Preference optimisation without a reference: ORPO (Hong et al. 2024, 2403.07691), CPO (Xu et al. 2024,
2401.08417) and, through CPO's ``trainer.loss_type``, SimPO (Meng et al. 2024, 2405.14734).

    posttrain run configs/tiny/breadth.yaml --only orpo

The trainers of trl.experimental, which TRL may change or drop in any release. Both read pairs as dpo does.
"""

from __future__ import annotations

from typing import Any

from posttrain.models import load_tokenizer
from posttrain.stage import StageContext
from train.adapters import load_policy
from train.config import CpoConfig, OrpoConfig
from train.finish import train_and_save
from train.pairs import load_pairs
from train.peft_setup import length_limit, quiet_libraries
from train.trainer_args import build_args, experimental


def run(config: OrpoConfig | CpoConfig, context: StageContext) -> dict[str, Any]:
    """Train and write ``model/``: a PEFT directory, or a full model when ``peft`` is null.

    Raises:
        UserError: data, template or model do not fit; the message says which and how to mend it.
        PosttrainError: the loss is not finite, or nothing was learned.
    """
    quiet_libraries()
    name = "orpo" if isinstance(config, OrpoConfig) else "cpo"
    path = context.path("model")
    tokenizer = load_tokenizer(path)
    start = load_policy(path, config, context.checkpoints)

    with context.phase("tokenize"):
        max_length = length_limit(start.model.config, config.trainer.get("max_length"))
        train_rows, counts = load_pairs(context, "train", tokenizer, max_length)
        eval_rows, _ = load_pairs(context, "eval", tokenizer, max_length)

    trainer = experimental(name, f"{name.upper()}Trainer")(
        model=start.model,
        args=build_args(config, context.checkpoints, max_length=max_length, remove_unused_columns=False),
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        peft_config=start.lora,
    )
    return counts | train_and_save(trainer, start, tokenizer, context, name)
