"""`posttrain plan`: reads a pipeline or stage file and predicts each of its training stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from posttrain.errors import ConfigError, UserError
from posttrain.pipeline import read_blocks
from posttrain.stage_file import StageBlock
from train.config import TrainingStageConfig
from train.peft_config import AdapterSettings, PeftSettings
from train.peft_setup import quiet_libraries
from train.plan.gpus import THIS, find_gpu
from train.plan.layouts import Method, find_layout
from train.plan.predict import Prediction, predict
from train.plan.report import Report
from train.plan.request import Device
from train.plan.stages import describe, is_trained
from train.ppo.config import PpoStageConfig

MFU, MEASURED_MFU = 0.35, 0.5
"""Assumed share of a data sheet's rate, and of a matrix product's measured rate."""
SHARDING = ("deepspeed", "fsdp", "fsdp_config")
"""Trainer fields that only take effect under a launcher."""


def plan(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    gpu: str = THIS,
    gpus: int | None = None,
    strategy: str | None = None,
    method: str | None = None,
    mfu: float | None = None,
) -> Report:
    """Predict the training stages of a file; nothing is loaded, written or run.

    method: full, lora or qlora instead of what each stage says. Raises ConfigError for mistakes in the file,
    UserError for a GPU, layout or method that is not known, or when no stage can be planned.
    """
    quiet_libraries()
    layout = None if strategy is None else find_layout(strategy)
    if method not in (None, "full", "lora", "qlora"):
        raise UserError(f"--method {method}: is not one of full, lora, qlora")
    blocks = read_blocks(path, overrides)
    trained = [_portable(_with_method(block, method)) for block in blocks if is_trained(block.config)]
    if not trained:
        raise UserError(f"{path}: has no training stage, so there is nothing to plan")
    problems = [problem for block in trained for problem in block.check() if not problem.here]
    if problems:
        raise ConfigError(problems)
    device = find_gpu(gpu, _arithmetic(trained))
    kind: Device = "cuda" if device.cuda else "cpu"
    stages = {block.run_dir.absolute(): block for block in blocks}
    predictions: list[Prediction] = []
    unplanned: dict[str, str] = {}
    for block in trained:
        try:
            described = describe(block, stages, kind, gpus or 1)
            predictions.append(predict(described, _method(block, method), device, layout, gpus))
        except UserError as error:
            unplanned[block.name] = str(error)
    if not predictions:
        raise UserError("\n".join(unplanned.values()))
    share = mfu or (MEASURED_MFU if device.measured else MFU)
    return Report(str(path), device, share, predictions, unplanned)


def _with_method(block: StageBlock, method: str | None) -> StageBlock:
    config = block.config
    if method is None or not isinstance(config, (TrainingStageConfig, PpoStageConfig)):
        return block
    if isinstance(config, PpoStageConfig):
        peft = None if method == "full" else config.peft or PeftSettings()
        return replace(block, config=config.model_copy(update={"peft": peft}))
    new = None if method == "full" else config.peft or AdapterSettings()
    return replace(block, config=config.model_copy(update={"peft": new, "quantization": None}))


def _portable(block: StageBlock) -> StageBlock:
    """The stage without what only the machine it is planned for can run: fp16 takes the memory of bf16, and
    --strategy says how states are sharded.
    """
    config = block.config
    if not isinstance(config, TrainingStageConfig):
        return block
    trainer = {name: value for name, value in config.trainer.items() if name not in SHARDING}
    trainer.pop("tf32", None)
    if trainer.pop("fp16", False):
        trainer["bf16"] = True
    return replace(block, config=config.model_copy(update={"trainer": trainer}))


def _method(block: StageBlock, method: str | None) -> Method:
    config = block.config
    if not isinstance(config, (TrainingStageConfig, PpoStageConfig)) or config.peft is None:
        return "full"
    if isinstance(config, PpoStageConfig):
        return "lora"
    held = config.quantization
    return "qlora" if method == "qlora" or (held is not None and held.load_in_4bit) else "lora"


def _arithmetic(blocks: Sequence[StageBlock]) -> torch.dtype:
    """bfloat16 where any stage computes in it: the type whose rate is measured."""
    for block in blocks:
        config = block.config
        if isinstance(config, TrainingStageConfig):
            if config.trainer.get("bf16") or config.dtype == "bfloat16":
                return torch.bfloat16
        elif isinstance(config, PpoStageConfig) and config.bf16:
            return torch.bfloat16
    return torch.float32
