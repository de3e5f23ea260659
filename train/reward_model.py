"""Reward model: one score per dialogue, so that chosen answers score above rejected ones (Bradley-Terry).

    posttrain run configs/tiny/pipeline.yaml --only reward

TRL's RewardTrainer on a sequence-classification head. As in "The N+ Implementation Details of RLHF with PPO"
(2403.17031): the head starts from N(0, 1/sqrt(d+1)), the score is read at the end-of-turn token, and after
training a bias is set so that demonstrations score 0 on average; it is kept beside the model in
``reward_calibration.json`` and subtracted by ``posttrain.models.score_ids``. The same file holds the
temperature at which a difference of two scores is a probability (``train/reward_calibration.py``). Departure:
LoRA by default, with the head trained and saved in full; ``head_only`` trains nothing but the head.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from peft import TaskType
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
)
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from trl import RewardTrainer

from posttrain.models import load_tokenizer
from posttrain.rundir import atomic_write_json
from posttrain.stage import StageContext
from train.callbacks import fit
from train.config import RewardConfig
from train.frozen_trunk import FrozenTrunk, in_place_of_trunk
from train.peft_setup import (
    check_learned,
    length_limit,
    lora_config,
    quiet_libraries,
    refuse_adapter,
    save_model,
    snapshot,
    torch_dtype,
)
from train.reward_calibration import (
    CALIBRATION_FILE,
    UNCALIBRATED,
    measure_bias,
    measure_temperature,
)
from train.reward_folds import Predictions, cross_validate
from train.reward_pairs import LabelledPairs, load_pairs
from train.reward_scores import pair_accuracy, score_pairs
from train.trainer_args import build_args


def run(config: RewardConfig, context: StageContext) -> dict[str, Any]:
    """Train and write ``model/`` with ``reward_calibration.json``; with `folds`, ``folds.jsonl`` too.

    Raises:
        UserError: data, template or model do not fit; the message says which and how to mend it.
        PosttrainError: the loss is not finite, or the head was not trained.
    """
    quiet_libraries()
    tokenizer = load_tokenizer(context.path("model"))
    model = load_classifier(config, context, tokenizer)
    with context.phase("tokenize"):
        max_length = length_limit(model.config, config.trainer.get("max_length"))
        pairs, dropped = load_pairs(context, "train", tokenizer, max_length, config.margin)
        eval_pairs, _ = load_pairs(context, "eval", tokenizer, max_length, config.margin)
    counts = {"train_pairs": len(pairs), "train_pairs_dropped_too_long": dropped}

    args = build_args(config, context.checkpoints, max_length=max_length)
    frozen = FrozenTrunk(model.base_model, args.bf16) if config.head_only else None
    if frozen is not None:
        dialogues = [dialogue for pair in pairs.ids + eval_pairs.ids for dialogue in pair]
        with context.phase("read"), context.progress("reading", total=len(dialogues)) as bar:
            frozen.read_ahead(dialogues, bar.advance)

    crossed: Predictions | None = None
    if config.folds:
        with context.phase("cross-validate"):
            fold = partial(train_fold, config, context, tokenizer, frozen)
            crossed = cross_validate(context, config.folds, config.seed, pairs, fold)

    with in_place_of_trunk(model, frozen):
        trainer = make_trainer(config, model, tokenizer, args, pairs, eval_pairs)
        before = snapshot(trainer)
        with context.phase("train"):
            metrics = fit(trainer, context, "reward")
        trained = check_learned(trainer, before)
        with context.phase("calibrate"):
            bias = measure_bias(config, context, trained, tokenizer)
        with context.phase("evaluate"):
            scores = score_pairs(trained, bias, eval_pairs.ids)
    held_out = crossed or Predictions(eval_pairs.groups, None, *scores)
    calibration = bias | measure_temperature(held_out.margins, held_out.groups, held_out.fold, config.seed)
    with context.phase("save"), context.staging("model") as folder:
        save_model(trainer, tokenizer, folder)
        atomic_write_json(folder / CALIBRATION_FILE, calibration)
    folds = prefixed("cv", pair_accuracy(crossed.chosen, crossed.rejected)) if crossed else {}
    exact = prefixed("eval", pair_accuracy(*scores))
    return counts | folds | metrics | exact | calibration


def prefixed(prefix: str, numbers: dict[str, float]) -> dict[str, float]:
    """The same numbers, each name after `prefix` and an underscore."""
    return {f"{prefix}_{name}": value for name, value in numbers.items()}


def load_classifier(
    config: RewardConfig, context: StageContext, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """The model with one output and a fresh head drawn from N(0, 1/sqrt(d+1)) with the stage's seed.

    Raises:
        UserError: the model is an adapter directory.
    """
    path = context.path("model").resolve()
    refuse_adapter(path, config.model)
    options = {"attn_implementation": config.attn_implementation} if config.attn_implementation else {}
    model = AutoModelForSequenceClassification.from_pretrained(
        path, num_labels=1, dtype=torch_dtype(config.dtype), **options
    )
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    generator = torch.Generator().manual_seed(config.seed)
    head = model.score.weight.data
    spread = 1 / math.sqrt(head.shape[1] + 1)
    head.copy_(torch.normal(0.0, spread, head.shape, generator=generator))
    return model


def make_trainer(
    config: RewardConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: Any,
    pairs: LabelledPairs,
    eval_pairs: LabelledPairs | None,
) -> RewardTrainer:
    """TRL's trainer on token ids; the task type is SEQ_CLS, so that the head is trained and saved."""
    return RewardTrainer(
        model=model,
        args=args,
        train_dataset=pairs.dataset(),
        eval_dataset=None if eval_pairs is None else eval_pairs.dataset(),
        processing_class=tokenizer,
        peft_config=lora_config(config.peft, TaskType.SEQ_CLS),
    )


def train_fold(
    config: RewardConfig,
    context: StageContext,
    tokenizer: PreTrainedTokenizerBase,
    frozen: FrozenTrunk | None,
    seen: LabelledPairs,
    held_out: LabelledPairs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Raw scores of both sides of `held_out`, by a model trained as the final one but on `seen` only."""
    args = build_args(config, context.checkpoints / "folds")
    args.save_strategy, args.eval_strategy = SaveStrategy.NO, IntervalStrategy.NO
    args.load_best_model_at_end = False
    model = load_classifier(config, context, tokenizer)
    with in_place_of_trunk(model, frozen):
        trainer = make_trainer(config, model, tokenizer, args, seen, None)
        trainer.remove_callback(PrinterCallback)
        before = snapshot(trainer)
        trainer.train()
        return score_pairs(check_learned(trainer, before), UNCALIBRATED, held_out.ids)
