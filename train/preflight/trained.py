"""What stages that start from a model have in common: the model's files, LoRA, the machine and the disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from peft import TaskType

from posttrain.errors import UserError
from posttrain.models import is_adapter
from posttrain.preflight import Findings
from train.config import TrainingStageConfig
from train.online_config import OnlineConfig
from train.peft_setup import refuse_adapter
from train.preflight.disk import check_disk
from train.preflight.lora import check_lora
from train.preflight.machine import check_precision, check_processes, this_device
from train.preflight.models import measure, read_config, skeleton
from train.preflight.rows import Sample


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
    merges = config.peft is None and task == TaskType.CAUSAL_LM and not isinstance(config, OnlineConfig)
    if is_adapter(path) and not merges:
        try:
            refuse_adapter(path, config.model)
        except UserError as error:
            findings.fail("model", str(error).removeprefix("model: "), "run the merge stage on it first")
        return
    model_config = read_config(path, "model", findings)
    if model_config is None:
        return
    model = skeleton(model_config, task, "model", findings)
    if model is None:
        return
    size = (
        measure(model, None, task) if config.peft is None else check_lora(config.peft, model, task, findings)
    )
    if size is not None:
        findings.add(check_disk(config, size, rows, run_dir))
