"""The machine: number formats that the device lacks, and processes that do not fit the batch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

import torch

from posttrain.errors import UserError
from posttrain.preflight import Findings
from train.config import TrainingStageConfig
from train.launch import launch_problems, world_size
from train.ppo.config import PpoStageConfig

Config = TrainingStageConfig | PpoStageConfig


@dataclass(frozen=True)
class Device:
    """What the stage would run on. bf16: whether it computes in bfloat16 by itself. count: how many."""

    kind: Literal["cuda", "cpu"]
    name: str
    bf16: bool
    count: int


def this_device() -> Device:
    """The device of this process, as torch sees it."""
    if not torch.cuda.is_available():
        return Device("cpu", "the CPU", True, 1)
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return Device("cuda", torch.cuda.get_device_name(), bf16, torch.cuda.device_count())


def check_precision(config: Config, device: Device) -> Findings:
    """A problem for each number format asked for that the device lacks."""
    findings = Findings()
    dtype, bf16, fp16 = "float32", False, False
    bf16_field = "bf16"
    if isinstance(config, PpoStageConfig):
        bf16 = config.bf16
    else:
        dtype, bf16_field = config.dtype, "trainer.bf16"
        bf16, fp16 = bool(config.trainer.get("bf16")), bool(config.trainer.get("fp16"))
    lacking = f"{device.name} does not compute in bfloat16"
    if bf16 and not device.bf16:
        findings.fail(bf16_field, f"true, but {lacking}", _instead(config), here=True)
    if dtype == "bfloat16" and not device.bf16:
        findings.fail("dtype", f"bfloat16, but {lacking}", "use dtype: float32, or a newer GPU", here=True)
    if fp16 and device.kind == "cpu":
        remedy = "use trainer.bf16: true or leave both out; fp16 needs a GPU"
        message = "true, but there is no GPU here, and fp16 training needs one"
        findings.fail("trainer.fp16", message, remedy, here=True)
    if dtype == "float16" and device.kind == "cpu":
        findings.fail(
            "dtype",
            "float16, but there is no GPU here, and training in it on a CPU overflows or is refused by torch",
            "use dtype: float32, or bfloat16",
            here=True,
        )
    return findings


def _instead(config: Config) -> str:
    if isinstance(config, PpoStageConfig):
        return "set bf16: false"
    return "set trainer.bf16: false, or trainer.fp16: true on a GPU"


def check_processes(config: Config, device: Device, rows: int | None) -> Findings:
    """Problems of WORLD_SIZE and the batch. rows: of the train split, where it is there."""
    findings = Findings()
    findings.problems += launch_problems("")
    if findings.problems:
        return findings
    world = world_size()
    local = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if device.kind == "cuda" and local.isdigit() and int(local) > device.count:
        message = f"{local} processes on this machine share {device.count} GPU(s)"
        findings.fail("", message, f"start with torchrun --nproc-per-node {device.count}", here=True)
    if isinstance(config, PpoStageConfig):
        try:
            config.check_processes(world)
        except UserError as error:
            message, _, remedy = str(error).partition("; ")
            findings.fail("batch_size", message, remedy, here=True)
    elif rows is not None:
        _check_batches(config.trainer, world, rows, findings)
    return findings


def _check_batches(trainer: dict[str, Any], world: int, rows: int, findings: Findings) -> None:
    per_device = trainer.get("per_device_train_batch_size", 8)
    accumulation = trainer.get("gradient_accumulation_steps", 1)
    together, step = per_device * world, per_device * world * accumulation
    if trainer.get("dataloader_drop_last") and rows < together:
        findings.fail(
            "trainer.per_device_train_batch_size",
            f"{per_device} x {world} process(es) = {together} rows a batch, the train split has {rows}, and "
            "trainer.dataloader_drop_last drops the only batch there is",
            f"use at most {rows // world}, or set trainer.dataloader_drop_last: false",
        )
    elif rows < step:
        findings.warn(
            "trainer.per_device_train_batch_size",
            f"{per_device} x {world} process(es) x {accumulation} accumulation steps = {step} rows an "
            f"optimizer step, more than the {rows} of the train split: every epoch is one step",
            "lower it, or trainer.gradient_accumulation_steps",
        )
