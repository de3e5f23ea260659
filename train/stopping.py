"""SIGTERM in a stage whose loop is the trainer's: finish the optimizer step, write a checkpoint, stop.

`StopCallback` decides at which step, the same one in every process, and writes the checkpoint. One between
two log rows does not hold the trainer's running means, so that a run resumed from it would write another
`metrics.jsonl`: `save_means` and `load_means` put them beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from posttrain.preemption import PreemptionFlag, agree
from train.checkpoints import mark_complete

MEANS_FILE = "running_means.pt"
_SUMS = {"ORPOTrainer": "_stored_metrics", "CPOTrainer": "_stored_metrics"}
"""Where a trainer keeps what it has yet to average for a log row, if not in ``_metrics``."""


class StopCallback(TrainerCallback):
    """Marks checkpoints complete; after SIGTERM writes one more and ends training.

    To be added last, because what it decides is not for the other callbacks. Whatever is done at the end of
    an epoch (evaluation, a log row) belongs before the checkpoint of its last step, so that a run resumed
    from there has done it: that checkpoint is written when the epoch has ended.

    period: training is ended only at multiples of so many steps (`train.trainer_rules.generation_period` of
    grpo and rloo). stopped: whether it was ended, with a checkpoint.
    """

    def __init__(self, trainer: Any, flag: PreemptionFlag, period: int = 1) -> None:
        self.stopped = False
        self.tokens_before = 0.0
        self._trainer = trainer
        self._flag = flag
        self._period = period
        self._save_later = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if agree(self._flag.requested, self._largest) and self._may_stop(args, state):
            self.stopped = control.should_training_stop = True
        self._save_later = self.stopped or (control.should_save and epoch_ends(state))
        control.should_save = control.should_save and not self._save_later

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.stopped and not epoch_ends(state) and state.global_step < state.max_steps:
            control.should_log = control.should_evaluate = False
        control.should_save = control.should_save or self._save_later
        self._save_later = False

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        checkpoint = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if self.stopped:
            save_means(self._trainer, checkpoint, self.tokens_before)
        self._trainer.accelerator.wait_for_everyone()  # every process has a file of its own in it
        if state.is_world_process_zero:
            mark_complete(checkpoint)
        self._trainer.accelerator.wait_for_everyone()  # and none may exit before it is complete

    def _may_stop(self, args: TrainingArguments, state: TrainerState) -> bool:
        """Not between two generations; nor where an evaluation would decide whether to save."""
        decided = args.save_strategy == SaveStrategy.BEST and args.eval_strategy == IntervalStrategy.EPOCH
        if decided and epoch_ends(state):
            return False
        return state.global_step % self._period == 0 or state.global_step >= state.max_steps

    def _largest(self, number: int) -> int:
        if self._trainer.accelerator.num_processes == 1:
            return number
        largest = torch.tensor(number, device=self._trainer.args.device)
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        return int(largest)


def train_from(trainer: Trainer, checkpoint: Path | None) -> None:
    """`trainer.train` from a checkpoint, or from the start; the trainer's callbacks are the caller's.

    transformers trains a step too many when it resumes from the checkpoint of the last step and that step is
    not the last of its epoch. Without an epoch to train, it only loads the checkpoint (and the best one,
    where that is asked for).
    """
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if state.global_step >= state.max_steps:
            trainer.args.max_steps, trainer.args.num_train_epochs = -1, 0
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def epoch_ends(state: TrainerState) -> bool:
    """Whether the step just made was the last one of its epoch."""
    return float(state.epoch or 0).is_integer()


def save_means(trainer: Any, checkpoint: Path, tokens_before: float) -> None:
    """Write what the trainer has summed up since its last log row; of the loss the mean over processes.

    tokens_before: seen by the processes that this one goes on from.
    """
    sums = _sums(trainer)
    loss = trainer.accelerator.reduce(trainer._tr_loss, reduction="mean")
    tokens = [tokens_before + count for count in sums.get("num_tokens", [])]
    if trainer.is_world_process_zero():
        state = {"loss": loss, "last_logged": trainer._globalstep_last_logged, "tokens": tokens}
        torch.save(state | {"sums": dict(sums)}, checkpoint / MEANS_FILE)


def load_means(trainer: Any, checkpoint: Path) -> list[float]:
    """Put back what `save_means` wrote, if it did; returns the tokens seen by then, [] where not counted."""
    if not (checkpoint / MEANS_FILE).exists():
        return []
    state = torch.load(checkpoint / MEANS_FILE, map_location="cpu", weights_only=True)
    trainer._tr_loss += state["loss"].to(trainer.args.device)
    trainer._globalstep_last_logged = state["last_logged"]
    _sums(trainer).update(state["sums"])
    tokens: list[float] = state["tokens"]
    return tokens


def _sums(trainer: Any) -> dict[str, list[Any]]:
    sums: dict[str, list[Any]] = vars(trainer)[_SUMS.get(type(trainer).__name__, "_metrics")]["train"]
    return sums
