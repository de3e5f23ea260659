"""Metrics to experiment trackers (`report_to`), through transformers' own integrations.

A tracker gets what metrics.jsonl gets, under the names that transformers' Trainer uses (`train/score`, ...),
and the stage's configuration. metrics.jsonl stays the record; a tracker only shows it elsewhere. Nothing is
imported while `report_to` is empty.

A resumed run goes on at its step. With tensorboard the events after the checkpoint, which are made again, are
hidden; wandb and trackio continue the same run. The others begin a new run of the same name, whose steps go
on (mlflow: set MLFLOW_RUN_ID to continue the old one).
"""

from __future__ import annotations

import difflib
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.errors import UserError
from posttrain.rundir import atomic_write_text

if TYPE_CHECKING:
    from transformers import TrainerCallback, TrainingArguments
    from transformers.trainer_callback import CallbackHandler

REPORTERS = {
    "clearml": "clearml",
    "codecarbon": "codecarbon",
    "comet_ml": "comet-ml",
    "dagshub": "dagshub mlflow",
    "dvclive": "dvclive",
    "mlflow": "mlflow",
    "neptune": "neptune",
    "swanlab": "swanlab",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
}
"""Values of `report_to` and what to install for each. (transformers' azure_ml, flyte and kubeflow only work
inside those services and are left out.)"""

NEED_MODEL = {"wandb": ("WANDB_LOG_MODEL", "WANDB_WATCH"), "dvclive": ("HF_DVCLIVE_LOG_MODEL",)}
"""Environment variables that make an integration use the model, which it is not given here: the run
directory keeps models, and the networks of a PPO run are several."""

TRACKER_ID = "tracker_id.txt"


def check_reporters(report_to: list[str]) -> None:
    """Raise UserError for a value that is unknown, not installed, or set up to take the model. Without values
    nothing is imported.
    """
    for name in report_to:
        if name not in REPORTERS:
            near = difflib.get_close_matches(name, REPORTERS, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"choose from {', '.join(REPORTERS)}"
            raise UserError(f"report_to: there is no tracker '{name}'\n    {hint}")
        for variable in NEED_MODEL.get(name, ()):
            if os.environ.get(variable, "false").lower() not in ("", "0", "false"):
                raise UserError(
                    f"report_to: {name} with {variable}={os.environ[variable]} wants the model itself, and "
                    f"only metrics are reported\n    unset {variable}; the model is in the run directory"
                )
    if not report_to:
        return
    from transformers.integrations import get_available_reporting_integrations

    available = [name for name in get_available_reporting_integrations() if name in REPORTERS]
    for name in report_to:
        if name not in available:
            raise UserError(
                f"report_to: {name} is not installed here, or not set up\n"
                f"    pip install {REPORTERS[name]}, or choose from what is available: "
                f"{', '.join(available) or 'nothing'}"
            )


class Reporter:
    """Sends metric rows to trackers: begin, log after each update, end. For the main process only.

    report_to: values of REPORTERS; none for a Reporter that does nothing. run_dir: tensorboard's events go to
    `run_dir/tensorboard`. config: the stage's settings as JSON values, shown as the run's.
    Raises UserError as `check_reporters` does.
    """

    def __init__(self, report_to: list[str], run_dir: Path, run_name: str, config: dict[str, Any]) -> None:
        check_reporters(report_to)
        self._names = list(dict.fromkeys(report_to))
        self._run_dir, self._run_name, self._config = run_dir, run_name, config
        self._handler: CallbackHandler | None = None

    def begin(self, total_steps: int, done: int = 0) -> None:
        """Open the trackers for a run of `total_steps` updates of which `done` are behind it."""
        if not self._names:
            return
        from transformers import TrainerControl, TrainerState
        from transformers.integrations import get_reporting_integration_callbacks
        from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

        callbacks: list[TrainerCallback] = [DefaultFlowCallback()]
        for name, callback in zip(self._names, get_reporting_integration_callbacks(self._names), strict=True):
            given = {"tb_writer": _tensorboard_writer(self._run_dir, done)} if name == "tensorboard" else {}
            callbacks.append(callback(**given))
        if "wandb" in self._names:
            _open_wandb(self._run_dir, self._run_name)
        self._arguments = _arguments(self._run_dir, self._run_name, self._config)
        self._state = TrainerState(max_steps=total_steps, global_step=done)
        self._control = TrainerControl()
        # No model: each integration asks whether it has a config before reading one, and those that want more
        # of it do so for the variables of NEED_MODEL only.
        self._handler = CallbackHandler(callbacks, None, None, None, None)
        self._handler.on_init_end(self._arguments, self._state, self._control)
        self._handler.on_train_begin(self._arguments, self._state, self._control)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Send the numbers in `metrics` as those of update `step`; what is not a number is left out."""
        if self._handler is not None:
            self._state.global_step = step
            numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
            self._handler.on_log(self._arguments, self._state, self._control, logs=numbers)

    def end(self) -> None:
        """Close the trackers, so that the next run in this process begins its own. May be called twice."""
        if self._handler is None:
            return
        self._handler.on_train_end(self._arguments, self._state, self._control)
        self._handler = None
        # The integrations of these two leave the run open.
        if "wandb" in self._names:
            import wandb

            wandb.finish()
        if "swanlab" in self._names:
            import swanlab

            swanlab.finish()


def _arguments(run_dir: Path, run_name: str, config: dict[str, Any]) -> TrainingArguments:
    """What integrations read of TrainingArguments: where, under which name, and the settings of this run."""
    from transformers import TrainingArguments

    class RunArguments(TrainingArguments):
        """Its own __post_init__ would reset accelerate's state under the running Accelerator and choose a
        device; its own settings (a learning rate of 5e-5) are not this run's.
        """

        def __post_init__(self) -> None:
            pass

        def to_dict(self) -> dict[str, Any]:
            return dict(config)

    return RunArguments(output_dir=str(run_dir), run_name=run_name, project="posttrain", report_to=[])


def _tensorboard_writer(run_dir: Path, done: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    place = os.environ.get("TENSORBOARD_LOGGING_DIR") or str(run_dir / "tensorboard")
    return SummaryWriter(log_dir=place, purge_step=done + 1 if done else None)


def _open_wandb(run_dir: Path, run_name: str) -> None:
    """Start the run under an id kept in checkpoints/, where a resumed run finds it and a rerun does not."""
    import wandb

    if wandb.run is not None:
        return
    file = run_dir / "checkpoints" / TRACKER_ID
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(file, f"{uuid.uuid4().hex}\n")
    wandb.init(
        project=os.environ.get("WANDB_PROJECT", "posttrain"),
        name=run_name,
        id=os.environ.get("WANDB_RUN_ID") or file.read_text(encoding="utf-8").strip(),
        resume=os.environ.get("WANDB_RESUME") or "allow",
        dir=run_dir,
    )
