"""Direct preference optimisation (Rafailov et al. 2023, 2305.18290): chosen answers over rejected ones.

    posttrain run configs/tiny/pipeline.yaml --only dpo

TRL's DPOTrainer. Departure from its defaults: the reference is decided here. The paper's reference is the
supervised model that training starts from. With LoRA that is the base model with the adapter switched off,
which is right only if the base *is* the supervised model; where the supervised model is an adapter,
``peft.start`` says what becomes of it, and it is the reference (``train/adapters.py``). Without LoRA a second
copy of the model is loaded and frozen (or its log-probabilities are computed once with
``trainer.precompute_ref_log_probs``).
"""

from __future__ import annotations

from typing import Any

from trl import DPOTrainer

from posttrain.models import load_tokenizer
from posttrain.stage import StageContext
from train.adapters import load_policy, load_reference
from train.config import DpoConfig
from train.finish import train_and_save
from train.pairs import load_pairs
from train.peft_setup import length_limit, quiet_libraries
from train.trainer_args import build_args


def run(config: DpoConfig, context: StageContext) -> dict[str, Any]:
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
        train_rows, counts = load_pairs(context, "train", tokenizer, max_length)
        eval_rows, _ = load_pairs(context, "eval", tokenizer, max_length)

    trainer = DPOTrainer(
        model=start.model,
        ref_model=reference,
        args=build_args(config, context.checkpoints, max_length=max_length),
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        peft_config=start.lora,
    )
    return counts | train_and_save(trainer, start, tokenizer, context, "dpo")
