"""Room on the disk for the checkpoints that are asked for and the final model."""

from __future__ import annotations

from pathlib import Path

from posttrain.errors import free_bytes
from posttrain.preflight import Findings
from train.config import TrainingStageConfig
from train.ppo.config import PpoStageConfig
from train.preflight.models import Size
from train.trainer_args import DEFAULTS

WEIGHT, ADAM = 4, 8
"""Bytes per trained parameter: a float32 weight, and the two float32 moments of Adam."""

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def check_disk(
    config: TrainingStageConfig | PpoStageConfig, size: Size, rows: int | None, run_dir: Path
) -> Findings:
    """A problem when checkpoints and model do not fit, the checkpoint that is being written included."""
    findings = Findings()
    (needed, what), free = disk_room(config, size, rows), free_bytes(run_dir)
    if needed > free:
        limit = "" if isinstance(config, PpoStageConfig) else "trainer."
        findings.fail(
            f"{limit}save_total_limit",
            f"{what} need {gigabytes(needed)}, {run_dir} has {gigabytes(free)} free",
            "lower it, save less often, train with LoRA, or choose another disk: output_dir=/path "
            "(pipeline), --output /path (stage)",
            here=True,
        )
    return findings


def disk_room(config: TrainingStageConfig | PpoStageConfig, size: Size, rows: int | None) -> tuple[int, str]:
    """Bytes that checkpoints and model take at most, and in words what takes them."""
    dtype = "float32" if isinstance(config, PpoStageConfig) else config.dtype
    count = checkpoints(config, rows)
    one = size.trained * (WEIGHT + ADAM) + size.reference * WEIGHT
    model = size.total * _BYTES[dtype] if size.whole else (size.trained + size.added) * WEIGHT
    what = (
        f"{count} checkpoints of {gigabytes(one)} ({size.trained:,} trained parameters x {WEIGHT + ADAM} "
        f"bytes) and the model of {gigabytes(model)}"
    )
    return count * one + model, what


def checkpoints(config: TrainingStageConfig | PpoStageConfig, rows: int | None) -> int:
    """The most checkpoints that are on the disk at once: those kept and the one being written."""
    if isinstance(config, PpoStageConfig):
        return config.save_total_limit + 1
    trainer = DEFAULTS | config.trainer
    if trainer["save_strategy"] == "no":
        return 0
    if trainer["save_total_limit"] is not None:
        return int(trainer["save_total_limit"]) + 1
    if trainer["save_strategy"] == "epoch":
        return int(trainer.get("num_train_epochs", 3)) + 1
    return int(planned_steps(trainer, rows) // max(float(trainer["save_steps"]), 1)) + 1


def planned_steps(trainer: dict[str, object], rows: int | None) -> int:
    """Optimizer steps on one process; 0 when that depends on rows that are not there yet."""
    steps = int(str(trainer.get("max_steps", -1)))
    if steps > 0 or rows is None:
        return max(steps, 0)
    batch = int(str(trainer.get("per_device_train_batch_size", 8)))
    batch *= int(str(trainer.get("gradient_accumulation_steps", 1)))
    return int(float(str(trainer.get("num_train_epochs", 3))) * -(-rows // batch))


def gigabytes(count: float) -> str:
    """12.3 GB, or in MB or kB what is less than one of them."""
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 1000:,.1f} kB"
