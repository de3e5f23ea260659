"""Direct preference optimisation (Rafailov et al. 2023, 2305.18290): chosen answers over rejected ones.

    posttrain run configs/tiny/pipeline.yaml --only dpo

TRL's DPOTrainer. Departure from its defaults: the reference is decided here. The paper's reference is the
supervised model that training starts from. With LoRA that is the base model with the adapter switched off,
which is right only if the base *is* the supervised model: an adapter directory as ``model`` is refused, merge
it first. Without LoRA a second copy of the model is loaded and frozen (or its log-probabilities are computed
once with ``trainer.precompute_ref_log_probs``).
"""

from __future__ import annotations

from typing import Any

from peft import TaskType
from trl import DPOTrainer

from data_prep.dataset import Split, read_split
from posttrain.errors import DataError
from posttrain.models import load_tokenizer
from posttrain.stage import StageContext
from train.callbacks import fit
from train.config import DpoConfig
from train.encode import encode_pairs
from train.peft_setup import (
    check_learned,
    length_limit,
    load_policy,
    lora_config,
    quiet_libraries,
    save_model,
    snapshot,
)
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
    model = load_policy(path, config)
    needs_copy = config.peft is None and not config.trainer.get("precompute_ref_log_probs", False)
    reference = load_policy(path, config) if needs_copy else None

    with context.phase("tokenize"):
        max_length = length_limit(model.config, config.trainer.get("max_length"))
        train_rows, counts = load_pairs(context, "train", tokenizer, max_length)
        eval_rows, _ = load_pairs(context, "eval", tokenizer, max_length)

    trainer = DPOTrainer(
        model=model,
        ref_model=reference,
        args=build_args(config, context.checkpoints, max_length=max_length),
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        peft_config=lora_config(config.peft, TaskType.CAUSAL_LM),
    )

    before = snapshot(trainer)
    with context.phase("train"):
        metrics = fit(trainer, context, "dpo")
    check_learned(trainer, before)
    with context.phase("save"), context.staging("model") as folder:
        save_model(trainer, tokenizer, folder)
    return counts | metrics


def load_pairs(
    context: StageContext, split: Split, tokenizer: Any, max_length: int
) -> tuple[Any, dict[str, int]]:
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
