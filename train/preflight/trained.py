"""What stages that start from a model have in common: the model's files, LoRA, the machine and the disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from peft import LoraConfig, PeftConfig, TaskType
from torch import nn

from posttrain.errors import UserError
from posttrain.preflight import Findings
from train.adapters import check_start, has_reference, refuse_adapter
from train.concatenate import saved_parameters
from train.config import RewardConfig, TrainingStageConfig
from train.online_config import OnlineConfig
from train.preflight.disk import check_disk
from train.preflight.lora import check_lora
from train.preflight.machine import check_precision, check_processes, this_device
from train.preflight.models import Size, head_alone, measure, read_config, skeleton
from train.preflight.rows import Sample
from train.quantized import require_bitsandbytes


def check_trained(
    config: TrainingStageConfig,
    task: TaskType,
    paths: Mapping[str, Path],
    samples: Sequence[Sample],
    run_dir: Path,
    findings: Findings,
    rows: int | None = None,
) -> None:
    """Add what is wrong with the model to start from, with `peft`, the machine and the disk.

    rows: that the trainer will see of the train split, where they are not its rows.
    """
    if rows is None:
        rows = next((sample.total for sample in samples if sample.split == "train"), None)
    device = this_device()
    findings.add(check_precision(config, device))
    findings.add(check_processes(config, device, rows))
    if "model" not in paths:
        return
    path = paths["model"]
    try:
        _check_start(config, task, path)
    except UserError as error:
        field, _, message = str(error).partition(": ")
        known = field in ("model", "peft.start", "quantization")
        findings.fail_with(field if known else "model", UserError(message) if known else error)
        return
    model_config = read_config(path, "model", findings)
    if model_config is None:
        return
    model = skeleton(model_config, task, "model", findings)
    if model is None:
        return
    size = _size(config, task, path, model, findings)
    if size is not None:
        findings.add(check_disk(config, size, rows, run_dir))


def _check_start(config: TrainingStageConfig, task: TaskType, path: Path) -> None:
    """Raise UserError for a model that the stage cannot start from, or cannot hold as it is asked to."""
    if config.peft is not None:
        check_start(path, config, task)
    elif task == TaskType.SEQ_CLS or isinstance(config, OnlineConfig):
        refuse_adapter(path, config.model)
    if config.quantization is not None:
        require_bitsandbytes(config.quantization)


def _size(
    config: TrainingStageConfig, task: TaskType, path: Path, model: nn.Module, findings: Findings
) -> Size | None:
    """What is trained and what is saved; None, with problems, where peft does not fit the model."""
    if isinstance(config, RewardConfig) and config.head_only:
        return head_alone(model)
    if config.peft is None:
        return measure(model, None, task)
    if config.peft.start == "continue":
        given = PeftConfig.from_pretrained(str(path))
        assert isinstance(given, LoraConfig)
        size: Size | None = measure(model, given, task)
    else:
        size = check_lora(config.peft, model, task, findings)
    if size is None:
        return None
    copied = has_reference(config) and (config.peft.start == "continue" or config.peft.changes_base)
    added = size.trained if config.peft.changes_base else 0
    if config.peft.start == "stack":
        added += saved_parameters(path)
    if config.peft.start != "new" and has_reference(config):
        findings.notes.append(f"the reference is the adapter {config.model} as it is now")
    return replace(size, added=added, reference=size.trained if copied else 0)
