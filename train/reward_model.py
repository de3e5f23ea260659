"""Reward model: one score per dialogue, so that chosen answers score above rejected ones (Bradley-Terry).

    posttrain run configs/tiny/pipeline.yaml --only reward

TRL's RewardTrainer on a sequence-classification head. As in "The N+ Implementation Details of RLHF with PPO"
(2403.17031): the head starts from N(0, 1/sqrt(d+1)), the score is read at the end-of-turn token, and after
training a bias is set so that demonstrations score 0 on average; it is kept beside the model in
``reward_calibration.json`` and subtracted by ``posttrain.models.score_ids``. Departure: LoRA by default, with
the head trained and saved in full.
"""

from __future__ import annotations

import math
import random
import shutil
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import TaskType
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
)
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from trl import RewardTrainer

from data_prep.dataset import Split, read_split
from posttrain.errors import DataError, RequeueError
from posttrain.hashing import adapter_base
from posttrain.models import is_adapter, load_tokenizer
from posttrain.preemption import PreemptionFlag
from posttrain.rundir import atomic_write_json
from posttrain.stage import StageContext
from train.adapters import Start, adapt, check_start, load_base, refuse_adapter
from train.callbacks import fit
from train.checkpoints import discard_incomplete, last_complete_checkpoint
from train.config import RewardConfig
from train.encode import encode_pairs, encode_whole
from train.finish import make_ready
from train.peft_setup import check_learned, length_limit, quiet_libraries, save_model, snapshot
from train.reward_folds import cross_validate
from train.reward_scores import Pair, pair_accuracy, score_dialogues, score_pairs
from train.stopping import StopCallback, train_from
from train.trainer_args import build_args

CALIBRATION_FILE = "reward_calibration.json"
UNCALIBRATED = {"bias": 0.0}


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
        rows, pairs, counts = load_pairs(context, "train", tokenizer, max_length)
        _, eval_pairs, _ = load_pairs(context, "eval", tokenizer, max_length)

    folds: dict[str, Any] = {}
    if config.folds:
        with context.phase("cross-validate"):
            fold = partial(train_fold, config, context, tokenizer)
            folds = cross_validate(context, config.folds, config.seed, rows, pairs, fold)

    args = build_args(config, context.checkpoints, max_length=max_length)
    trainer = make_trainer(start, tokenizer, args, pairs, eval_pairs)
    before = snapshot(trainer)
    with context.phase("train"):
        metrics = fit(trainer, context, "reward")
    trained = check_learned(trainer, before)

    with context.phase("calibrate"):
        calibration = calibrate(config, context, trained, tokenizer)
    with context.phase("evaluate"):
        held_out = pair_accuracy(*score_pairs(trained, calibration, eval_pairs))
    with context.phase("save"), context.staging("model") as folder:
        save_model(trainer, tokenizer, folder, start.others)
        atomic_write_json(folder / CALIBRATION_FILE, calibration)
    exact = {f"eval_{name}": value for name, value in held_out.items()}
    return counts | folds | metrics | exact | calibration | start.facts


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
    head.weight.data.copy_(torch.normal(0.0, spread, head.weight.shape, generator=generator))
    return Start(model) if config.peft is None else adapt(model, path, config, TaskType.SEQ_CLS, checkpoints)


def load_pairs(
    context: StageContext, split: Split, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[dict], list[Pair], dict[str, int]]:
    """Rows, token ids and counts of the pairs that fit `max_length`; the others are counted, not cut.

    Raises:
        DataError: no pair fits, or see `encode_pairs`.
    """
    rows = read_split(context.path("data"), split, "preference").to_list()
    encoded = encode_pairs(tokenizer, rows)
    kept = [index for index, pair in enumerate(encoded) if max(map(len, pair)) <= max_length]
    if not kept:
        raise DataError(f"none of {len(rows)} {split} pairs fits trainer.max_length={max_length}")
    counts = {"train_pairs": len(kept), "train_pairs_dropped_too_long": len(rows) - len(kept)}
    return [rows[index] for index in kept], [encoded[index] for index in kept], counts


def make_trainer(
    start: Start,
    tokenizer: PreTrainedTokenizerBase,
    args: Any,
    pairs: Sequence[Pair],
    eval_pairs: Sequence[Pair] | None,
) -> RewardTrainer:
    """TRL's trainer on token ids; the task type is SEQ_CLS, so that the head is trained and saved."""
    chosen = _as_dataset(pairs)
    held_out = _as_dataset(eval_pairs) if eval_pairs else None
    trainer = RewardTrainer(
        model=start.model,
        args=args,
        train_dataset=chosen,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=start.lora,
    )
    make_ready(trainer, start)
    return trainer


def _as_dataset(pairs: Sequence[Pair]) -> Dataset:
    return Dataset.from_dict({"chosen_ids": [c for c, _ in pairs], "rejected_ids": [r for _, r in pairs]})


def calibrate(
    config: RewardConfig, context: StageContext, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, float]:
    """``bias``, the mean raw score over ``n`` demonstrations; 0 over none without ``calibration_data``."""
    if config.calibration_data is None:
        return {**UNCALIBRATED, "n": 0}
    rows = read_split(context.path("calibration_data"), "train", "conversation")
    count = min(config.calibration_rows, len(rows))
    rows = rows.select(sorted(random.Random(config.seed).sample(range(len(rows)), count)))
    dialogues = encode_whole(tokenizer, list(rows["messages"]), list(rows["id"]))
    scores_N = score_dialogues(model, UNCALIBRATED, dialogues)
    return {"bias": scores_N.double().mean().item(), "n": count}


def train_fold(
    config: RewardConfig,
    context: StageContext,
    tokenizer: PreTrainedTokenizerBase,
    number: int,
    flag: PreemptionFlag,
    seen: Sequence[Pair],
    held_out: Sequence[Pair],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Raw scores of both sides of `held_out`, by a model trained as the final one but on `seen` only.

    Its only checkpoint is the one that SIGTERM asks for, with which it raises RequeueError.
    """
    folder = context.checkpoints / "folds" / f"fold-{number}"
    args = build_args(config, folder)
    args.save_strategy, args.eval_strategy = SaveStrategy.NO, IntervalStrategy.NO
    args.load_best_model_at_end = False
    with tempfile.TemporaryDirectory() as initial:
        start = load_classifier(config, context, tokenizer, Path(initial))
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
    return score_pairs(check_learned(trainer, before), UNCALIBRATED, held_out)
