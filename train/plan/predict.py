"""The prediction for one stage: memory under a layout, and the cheapest layout that fits a device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from posttrain.errors import UserError
from train.base_config import BaseConfig
from train.config import TrainingStageConfig
from train.plan.amounts import Parameters, Work, count, work_of
from train.plan.base_step import trace_base
from train.plan.gpus import Gpu
from train.plan.layouts import (
    CHECKPOINTING_SLOWDOWN,
    LAYOUTS,
    Layout,
    Memory,
    Method,
    plain,
    quantised,
    sharded,
)
from train.plan.ppo_step import trace_ppo
from train.plan.request import Request
from train.plan.stages import Described
from train.plan.steps import trace_step
from train.plan.tracker import Trace

CUDA_CONTEXT = 1e9
"""Bytes of a GPU that are not the allocator's: CUDA context, cuBLAS workspaces, NCCL. Assumed."""
FRAGMENTATION = 1.05
"""What the caching allocator holds over what is allocated. Assumed."""
RESIDENT = 2.3
"""Resident over allocated memory on a CPU: the largest measured at 110 M parameters (docs/plan.md)."""
COUNTS = (1, 2, 4, 8)
"""Numbers of devices that are tried."""


@dataclass(frozen=True)
class Choice:
    """One way to run a stage. memory: of each device."""

    layout: Layout
    devices: int
    checkpointing: bool
    memory: Memory

    @property
    def words(self) -> str:
        """In words: "zero2 x4, ckpt" is ZeRO-2 on four devices with activation checkpointing."""
        name = "single" if self.devices == 1 and self.layout.name == "ddp" else self.layout.name
        number = f" x{self.devices}" if self.devices > 1 else ""
        return name + number + (", ckpt" if self.checkpointing else "")


@dataclass(frozen=True)
class Prediction:
    """A stage, the way to run it that is shown, whether it fits, and the cheaper ones that do not."""

    described: Described
    parameters: Parameters
    work: Work
    method: Method
    choice: Choice
    fits: bool
    cheaper: tuple[Choice, ...]


def usable(gpu: Gpu) -> float:
    """Bytes that a prediction may take on this device."""
    return (gpu.memory - CUDA_CONTEXT) / FRAGMENTATION if gpu.cuda else gpu.memory / RESIDENT


def predict(
    described: Described, method: Method, gpu: Gpu, layout: Layout | None, devices: int | None
) -> Prediction:
    """The cheapest way to run a stage on so many of these devices, of those asked for; where none fits, the
    one that needs the least. devices: None tries up to eight.
    """
    parameters = count(described.request)
    rejected: list[Choice] = []
    chosen: Choice | None = None
    for candidate, number, checkpointing in candidates(described, layout, devices):
        memory = memory_of(described, parameters, method, candidate, number, checkpointing)
        choice = Choice(candidate, number, checkpointing, memory)
        if memory.total <= usable(gpu):
            chosen = choice
            break
        rejected.append(choice)
    fits = chosen is not None
    shown = chosen or min(rejected, key=lambda choice: choice.memory.total)
    request = replace(described.request, checkpointing=shown.checkpointing)
    work = work_of(replace(described, request=request), parameters, shown.devices)
    return Prediction(described, parameters, work, method, shown, fits, tuple(rejected))


def candidates(
    described: Described, layout: Layout | None, devices: int | None
) -> Iterator[tuple[Layout, int, bool]]:
    """Ways to run a stage, fewest devices first, then by slow-down. Its own checkpointing is never switched
    off; a layout that was asked for is taken as it is. Raises UserError for one that the stage refuses.
    """
    config, asked = described.block.config, described.request.checkpointing
    if layout is not None:
        if layout.name != "ddp" and not isinstance(config, TrainingStageConfig):
            raise UserError(
                f"{described.block.kind} runs on one device or under DDP, not under {layout.name}"
            )
        yield layout, devices or 1, asked
        return
    layouts = list(LAYOUTS.values()) if isinstance(config, TrainingStageConfig) else [LAYOUTS["ddp"]]
    counts = COUNTS if devices is None else (devices,)
    recompute = [asked] if asked or isinstance(config, BaseConfig) else [False, True]
    if isinstance(config, BaseConfig):
        counts = (1,)
    for number in counts:
        ways = [
            (way.slowdown * (CHECKPOINTING_SLOWDOWN if checkpointing else 1), way, checkpointing)
            for way in layouts
            for checkpointing in recompute
            if number > 1 or way.name == "ddp" or way.offload
        ]
        for _, way, checkpointing in sorted(ways, key=lambda item: item[0]):
            yield way, number, checkpointing


def memory_of(
    described: Described,
    parameters: Parameters,
    method: Method,
    layout: Layout,
    devices: int,
    checkpointing: bool,
) -> Memory:
    """Bytes on each device under a layout."""
    request = replace(described.request, checkpointing=checkpointing)
    sixteen = request.autocast or request.weights
    if method == "qlora":
        sixteen = sixteen if sixteen.itemsize == 2 else torch.bfloat16
        request = request.with_weights(sixteen)
    settings = described.block.config if isinstance(described.block.config, BaseConfig) else None
    sizes = parameters.sizes
    if layout.name == "ddp":
        trl = isinstance(described.block.config, TrainingStageConfig)
        gradient_bytes = sizes.trained * request.weights.itemsize
        copies = gradient_bytes if trl and request.device == "cpu" else 0
        bucket = gradient_bytes if trl else 0
        memory = plain(trace(request, settings), devices=devices, bucket_bytes=bucket, copies=copies)
        spread = 1
    else:
        request = request.with_weights(sixteen)
        memory = sharded(layout, trace(request, settings), sizes, devices, sixteen.itemsize)
        spread = devices if "weights" in layout.shards else 1
    if method != "qlora":
        return memory
    return quantised(memory, sizes, request.weights.itemsize, spread)


def trace(request: Request, settings: BaseConfig | None) -> Trace:
    """The trace of a request, computed once. settings: of the base stage, whose optimizers are its own."""
    key = repr((request, settings))
    if key not in _traces:
        if settings is not None:
            _traces[key] = trace_base(request, settings)
        else:
            _traces[key] = trace_ppo(request) if request.kind == "ppo" else trace_step(request)
    return _traces[key]


_traces: dict[str, Trace] = {}
