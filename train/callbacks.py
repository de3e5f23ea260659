"""The training loop's contact with the run directory: metrics, progress, checkpoints, resuming.

`fit` runs any transformers/TRL trainer so that a killed process, started again, ends with the same weights
and the same metrics.jsonl. Three things make that true where the trainer alone does not: a log row is forced
at every checkpoint (the running mean of the loss is not part of a checkpoint), the token count is carried
over, and the final evaluation takes place inside training, before the last checkpoint. SIGTERM ends training
with a checkpoint more (``train/stopping.py``).
"""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path
from typing import Any

from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from posttrain.errors import PosttrainError, RequeueError, UserError
from posttrain.preemption import PreemptionFlag
from posttrain.stage import StageContext
from train.checkpoints import discard_incomplete, last_complete_checkpoint, step_of
from train.stopping import StopCallback, load_means, train_from

_SKIPPED = ("epoch", "total_flos", "eval_num_tokens", "step_time")
_SPEED = ("_runtime", "_samples_per_second", "_steps_per_second")


class RunCallback(TrainerCallback):
    """Logs to metrics.jsonl and moves the progress bar; takes up the counts of the run it goes on from.

    checkpoint: that training resumes from. tokens_in_state: whether the trainer keeps its token count in the
    trainer state, which a checkpoint holds (GRPO, RLOO); the others count from 0 again after a resume, and
    what was counted before is added here.

    Raises:
        PosttrainError: the loss or the gradient norm is not finite.
    """

    def __init__(
        self,
        trainer: Trainer,
        context: StageContext,
        description: str,
        checkpoint: Path | None,
        stop: StopCallback,
        tokens_in_state: bool = False,
    ) -> None:
        self._trainer = trainer
        self._context = context
        self._description = description
        self._checkpoint = checkpoint
        self._stop = stop
        self._evaluate_at_end = trainer.eval_dataset is not None
        self._tokens_in_state = tokens_in_state
        self._exits = contextlib.ExitStack()
        self._bar: Any = None

    def __enter__(self) -> RunCallback:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._exits.close()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        counted = [row["num_tokens"] for row in state.log_history if "num_tokens" in row]
        if self._checkpoint is not None:
            counted += load_means(self._trainer, self._checkpoint)
        if counted and not self._tokens_in_state:
            self._stop.tokens_before = counted[-1]
        self._bar = self._exits.enter_context(
            self._context.progress(self._description, total=state.max_steps)
        )
        if state.global_step:
            self._bar.advance(state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._bar.advance()
        last = state.global_step >= state.max_steps
        control.should_log = control.should_log or control.should_save or last
        control.should_evaluate = control.should_evaluate or (last and self._evaluate_at_end)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        control.should_log = control.should_log or control.should_save

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        logs = dict(logs or {})
        if "train_runtime" in logs:
            return
        if "num_tokens" in logs:
            logs["num_tokens"] += self._stop.tokens_before
            state.log_history[-1]["num_tokens"] = logs["num_tokens"]
        for name in ("loss", "grad_norm", "eval_loss"):
            if name in logs and not math.isfinite(logs[name]):
                raise PosttrainError(
                    f"{self._description}: {name} is {logs[name]} at step {state.global_step}. Lower "
                    "trainer.learning_rate, set trainer.max_grad_norm, or train in bf16 or float32."
                )
        if state.is_world_process_zero:
            row = {name: value for name, value in logs.items() if _is_result(name)}
            self._context.log(state.global_step, epoch=state.epoch, **row)


def _is_result(name: str) -> bool:
    return name not in _SKIPPED and not name.endswith(_SPEED)


def check_processes(trainer: Trainer) -> None:
    """Fail when the launcher started more processes than the trainer knows of.

    Raises:
        UserError: each process would train alone on all the data, and the last one to save would win.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    known = trainer.accelerator.num_processes
    if launched != known:
        raise UserError(
            f"WORLD_SIZE is {launched} but accelerate runs {known} process(es) "
            f"({trainer.accelerator.distributed_type}): launch with torchrun, or with an accelerate "
            "configuration whose distributed_type fits the hardware."
        )


def fit(
    trainer: Trainer,
    context: StageContext,
    description: str,
    *,
    tokens_in_state: bool = False,
    stop_period: int = 1,
) -> dict[str, float]:
    """Train to the end, from the last complete checkpoint if there is one.

    tokens_in_state: see `RunCallback`. stop_period: see `StopCallback`.

    Returns:
        The last logged training values and the final evaluation, as in metrics.jsonl.

    Raises:
        RequeueError: SIGTERM came; there is a checkpoint of the step it stopped at.
    """
    check_processes(trainer)
    root = Path(str(trainer.args.output_dir))
    checkpoint = last_complete_checkpoint(root)
    discard_incomplete(root)
    context.rewind(step_of(checkpoint) if checkpoint else -1)
    trainer.remove_callback(PrinterCallback)
    with PreemptionFlag() as flag:
        stop = StopCallback(trainer, flag, stop_period)
        with RunCallback(trainer, context, description, checkpoint, stop, tokens_in_state) as callback:
            trainer.add_callback(callback)
            trainer.add_callback(stop)
            train_from(trainer, checkpoint)
    trainer.remove_callback(callback)
    trainer.remove_callback(stop)
    (root / "README.md").unlink(missing_ok=True)
    if stop.stopped:
        raise RequeueError(f"step {trainer.state.global_step} of {trainer.state.max_steps}")
    return final_metrics(trainer.state, resumed_from=step_of(checkpoint) if checkpoint else None)


def final_metrics(state: TrainerState, resumed_from: int | None) -> dict[str, float]:
    """``steps``, the last ``train_loss`` and the last evaluation of a trainer's log history."""
    metrics: dict[str, float] = {"steps": state.global_step}
    if resumed_from is not None:
        metrics["resumed_from_step"] = resumed_from
    for row in state.log_history:
        if "loss" in row:
            metrics["train_loss"] = row["loss"]
        metrics |= {k: v for k, v in row.items() if k.startswith("eval_") and _is_result(k)}
    return metrics
