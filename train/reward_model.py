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
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import TaskType
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase, PrinterCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from trl import RewardTrainer

from posttrain.errors import RequeueError
from posttrain.hashing import adapter_base
from posttrain.models import is_adapter, load_tokenizer
from posttrain.preemption import PreemptionFlag
from posttrain.rundir import atomic_write_json
from posttrain.stage import StageContext
from train.adapters import Start, adapt, check_start, load_base, refuse_adapter
from train.callbacks import fit
from train.checkpoints import discard_incomplete, last_complete_checkpoint
from train.config import RewardConfig
from train.finish import make_ready
from train.frozen_trunk import FrozenTrunk, in_place_of_trunk
from train.peft_setup import check_learned, length_limit, quiet_libraries, save_model, snapshot
from train.reward_calibration import (
    CALIBRATION_FILE,
    UNCALIBRATED,
    measure_bias,
    measure_temperature,
)
from train.reward_folds import Predictions, cross_validate
from train.reward_pairs import LabelledPairs, load_pairs
from train.reward_scores import pair_accuracy, score_pairs
from train.stopping import StopCallback, train_from
from train.trainer_args import build_args


def run(config: RewardConfig, context: StageContext) -> dict[str, Any]:
    """Train and write ``model/`` with ``reward_calibration.json``; with `folds`, ``folds.jsonl`` too.

    Raises:
        UserError: data, template or model do not fit; the message says which and how to mend it.
        PosttrainError: the loss is not finite, or the head was not trained.
        RequeueError: SIGTERM came, see `fit` and `cross_validate`.
    """
    quiet_libraries()
    tokenizer = load_tokenizer(context.path("model"))
    start = load_classifier(config, context, tokenizer, context.checkpoints)
    with context.phase("tokenize"):
        max_length = length_limit(start.model.config, config.trainer.get("max_length"))
        pairs, dropped = load_pairs(context, "train", tokenizer, max_length, config.margin)
        eval_pairs, _ = load_pairs(context, "eval", tokenizer, max_length, config.margin)
    counts = {"train_pairs": len(pairs), "train_pairs_dropped_too_long": dropped}

    args = build_args(config, context.checkpoints, max_length=max_length)
    frozen = FrozenTrunk(start.model.base_model, args.bf16) if config.head_only else None
    if frozen is not None:
        dialogues = [dialogue for pair in pairs.ids + eval_pairs.ids for dialogue in pair]
        with context.phase("read"), context.progress("reading", total=len(dialogues)) as bar:
            frozen.read_ahead(dialogues, bar.advance)

    crossed: Predictions | None = None
    if config.folds:
        with context.phase("cross-validate"):
            fold = partial(train_fold, config, context, tokenizer, frozen)
            crossed = cross_validate(context, config.folds, config.seed, pairs, fold)

    with in_place_of_trunk(start.model, frozen):
        trainer = make_trainer(start, tokenizer, args, pairs, eval_pairs)
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
        save_model(trainer, tokenizer, folder, start.others)
        atomic_write_json(folder / CALIBRATION_FILE, calibration)
    folds = prefixed("cv", pair_accuracy(crossed.chosen, crossed.rejected)) if crossed else {}
    exact = prefixed("eval", pair_accuracy(*scores))
    return counts | folds | metrics | exact | calibration | start.facts


def prefixed(prefix: str, numbers: dict[str, float]) -> dict[str, float]:
    """The same numbers, each name after `prefix` and an underscore."""
    return {f"{prefix}_{name}": value for name, value in numbers.items()}


def load_classifier(
    config: RewardConfig, context: StageContext, tokenizer: PreTrainedTokenizerBase, checkpoints: Path
) -> Start:
    """The model with one output and a fresh head drawn from N(0, 1/sqrt(d+1)) with the stage's seed, or the
    reward adapter that ``peft.start: continue`` goes on with, its head included.

    Raises:
        UserError: see `check_start`; an adapter directory where every weight is trained.
    """
    path = context.path("model")
    if config.peft is None:
        refuse_adapter(path, config.model)
    else:
        check_start(path, config, TaskType.SEQ_CLS)
    source = adapter_base(path) if is_adapter(path) else path
    model = load_base(AutoModelForSequenceClassification, source, config, num_labels=1)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    generator = torch.Generator().manual_seed(config.seed)
    head: Any = model.score
    spread = 1 / math.sqrt(head.weight.shape[1] + 1)
    if config.head_only:
        head.float()  # it reads states in float32, and in 16 bits most of its updates would round to nothing
    head.weight.data.copy_(torch.normal(0.0, spread, head.weight.shape, generator=generator))
    return Start(model) if config.peft is None else adapt(model, path, config, TaskType.SEQ_CLS, checkpoints)


def make_trainer(
    start: Start,
    tokenizer: PreTrainedTokenizerBase,
    args: Any,
    pairs: LabelledPairs,
    eval_pairs: LabelledPairs | None,
) -> RewardTrainer:
    """TRL's trainer on token ids; the task type is SEQ_CLS, so that the head is trained and saved."""
    trainer = RewardTrainer(
        model=start.model,
        args=args,
        train_dataset=pairs.dataset(),
        eval_dataset=None if eval_pairs is None else eval_pairs.dataset(),
        processing_class=tokenizer,
        peft_config=start.lora,
    )
    make_ready(trainer, start)
    return trainer


def train_fold(
    config: RewardConfig,
    context: StageContext,
    tokenizer: PreTrainedTokenizerBase,
    frozen: FrozenTrunk | None,
    number: int,
    flag: PreemptionFlag,
    seen: LabelledPairs,
    held_out: LabelledPairs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Raw scores of both sides of `held_out`, by a model trained as the final one but on `seen` only.

    Its only checkpoint is the one that SIGTERM asks for, with which it raises RequeueError.
    """
    folder = context.checkpoints / "folds" / f"fold-{number}"
    args = build_args(config, folder)
    args.save_strategy, args.eval_strategy = SaveStrategy.NO, IntervalStrategy.NO
    args.load_best_model_at_end = False
    folder.mkdir(parents=True, exist_ok=True)
    start = load_classifier(config, context, tokenizer, folder)
    with in_place_of_trunk(start.model, frozen):
        trainer = make_trainer(start, tokenizer, args, seen, None)
        trainer.remove_callback(PrinterCallback)
        before = snapshot(trainer)
        discard_incomplete(folder)
        checkpoint = last_complete_checkpoint(folder)
        stop = StopCallback(trainer, flag)
        trainer.add_callback(stop)
        train_from(trainer, checkpoint)
        if stop.stopped:
            steps = f"step {trainer.state.global_step} of {trainer.state.max_steps}"
            raise RequeueError(f"{steps} of fold {number + 1} of {config.folds}")
        shutil.rmtree(folder, ignore_errors=True)
        return score_pairs(check_learned(trainer, before), UNCALIBRATED, held_out.ids)
