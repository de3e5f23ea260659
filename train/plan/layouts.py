"""From what one device holds in plain training to what it holds under DDP, ZeRO and FSDP2.

Psi is the number of parameters, Psi_t of those that are trained, N of devices. Rajbhandari et al. 2020 (ZeRO,
arXiv 1910.02054), section 5 and figure 1: mixed precision with Adam holds 2 Psi + 2 Psi + 12 Psi bytes
(16-bit weights, 16-bit gradients, float32 copy and two moments); stage 1 divides the 12, stage 2 the
gradients too, stage 3 all of it by N. Ren et al. 2021 (ZeRO-Offload, arXiv 2101.06840): optimizer states,
and with stage 2 the gradients, live on the host. PyTorch FSDP2 keeps float32 shards of weights, gradients
and moments, 16 Psi / N, and gathers one layer at a time in the type of the arithmetic, the next one ahead of
time.

Activations come from a `Trace`, for 16-bit weights where the layout computes with those.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from posttrain.errors import UserError
from train.plan.tracker import CASTS, MODELS, OPTIMIZER, WEIGHTS, Trace

Method = Literal["full", "lora", "qlora"]
BUCKET = 500_000_000
"""Elements of DeepSpeed's reduce and all-gather buckets, its default."""
LIVE = 1_000_000_000
"""Parameters that ZeRO-3 keeps gathered at most: stage3_max_live_parameters, DeepSpeed's default."""
NF4_BYTES = 0.5 + (1 + 4 / 256) / 64
"""Bytes per weight of 4-bit NormalFloat with double quantisation: 4 bits, one 8-bit constant for 64 weights
and one float32 constant for 256 of those. Dettmers et al. 2023 (QLoRA, arXiv 2305.14314), section 3: 0.127
bits per parameter beside the 4."""
MASTER, MOMENTS = 4, 8
"""Bytes per trained parameter: float32 copy of a 16-bit weight, two float32 moments."""


@dataclass(frozen=True)
class Layout:
    """How states are spread. shards: which of weights, gradients and optimizer are divided by N. offload:
    what lies on the host. slowdown: a rough factor on the time of a step, for ordering only; ZeRO-3 and FSDP2
    communicate 1.5 times what DDP does (Rajbhandari 7.2.2), offload waits for the host's Adam and PCIe.
    """

    name: str
    words: str
    shards: frozenset[str] = frozenset()
    offload: frozenset[str] = frozenset()
    slowdown: float = 1.0


W, G, O = "weights", "gradients", "optimizer"  # noqa: E741
LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("ddp", "everything on every device (one device: plain training)"),
        Layout("zero1", "DeepSpeed ZeRO stage 1", frozenset({O}), slowdown=1.01),
        Layout("zero2", "DeepSpeed ZeRO stage 2", frozenset({G, O}), slowdown=1.02),
        Layout("fsdp2", "PyTorch FSDP2, full shard", frozenset({W, G, O}), slowdown=1.1),
        Layout("zero3", "DeepSpeed ZeRO stage 3", frozenset({W, G, O}), slowdown=1.15),
        Layout("zero2-offload", "ZeRO-2, states on the host", frozenset({G, O}), frozenset({G, O}), 1.8),
        Layout("zero3-offload", "ZeRO-3, all on the host", frozenset({W, G, O}), frozenset({W, G, O}), 2.5),
    )
}
CHECKPOINTING_SLOWDOWN = 4 / 3
"""Computing the forward pass once more (Chen et al. 2016, arXiv 1604.06174)."""


def find_layout(name: str) -> Layout:
    """The layout called `name` (`single` is `ddp`). Raises UserError naming the nearest one."""
    wanted = "ddp" if name == "single" else name
    if wanted in LAYOUTS:
        return LAYOUTS[wanted]
    near = difflib.get_close_matches(name, LAYOUTS, n=1, cutoff=0.3)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"--strategy {name}: is not a layout\n    {hint}one of single, {', '.join(LAYOUTS)}")


@dataclass(frozen=True)
class Sizes:
    """Parameters of one model in numbers. linear: frozen weights of linear layers, which nf4 quantises.
    layer: of the largest decoder layer; root: outside the layers (embeddings, head, last norm). matrix: of
    the largest linear layer.
    """

    trained: int
    frozen: int
    linear: int = 0
    layer: int = 0
    root: int = 0
    matrix: int = 0

    @property
    def total(self) -> int:
        return self.trained + self.frozen


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, by what they are for, and on the host for each device."""

    device: dict[str, float]
    host: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.device.values())


BUFFERS, COPIES = "buffers", "copies"
"""Communication buffers and gathered weights; the copies that a stage compares its result with."""


def plain(trace: Trace, *, devices: int = 1, bucket_bytes: int = 0, copies: int = 0) -> Memory:
    """Single device or DDP: as traced. bucket_bytes: DDP's copy of the gradients, with several devices."""
    point = max(trace.points, key=lambda p: p.gradients + p.passing)
    held = {**trace.standing, G: point.gradients, **point.others, COPIES: copies}
    return Memory(_kept(held | {BUFFERS: bucket_bytes if devices > 1 else 0}))


def sharded(layout: Layout, trace: Trace, sizes: Sizes, devices: int, itemsize: int) -> Memory:
    """ZeRO or FSDP2 on `devices`. trace: with weights of `itemsize` bytes, the type of the arithmetic."""
    if layout.name == "fsdp2":
        return _fsdp(trace, sizes, devices, itemsize)
    part = {name: devices if name in layout.shards else 1 for name in (W, G, O)}
    weights = itemsize * sizes.total / part[W]
    gradients = itemsize * sizes.trained / part[G]
    states = (MASTER + MOMENTS) * sizes.trained / part[O]
    bucket = 2 * itemsize * min(sizes.trained, BUCKET)
    gathered = itemsize * min(sizes.total, LIVE) if W in layout.shards else 0
    others = trace.standing[MODELS] / part[W]
    host = (
        states * (O in layout.offload) + gradients * (G in layout.offload) + weights * (W in layout.offload)
    )
    held = {
        WEIGHTS: 0 if W in layout.offload else weights,
        MODELS: others,
        OPTIMIZER: 0 if O in layout.offload else states,
        BUFFERS: bucket + gathered,
    }
    scale = 0.0 if G in layout.offload else 1 / part[G]
    return Memory(_kept(held | _worst(trace, scale)), host)


def _fsdp(trace: Trace, sizes: Sizes, devices: int, itemsize: int) -> Memory:
    gathered = itemsize * (2 * sizes.layer + sizes.root)
    share = 1 if sizes.trained >= sizes.frozen else sizes.trained / sizes.total
    reduced = (itemsize + MASTER) * max(sizes.layer, sizes.root) * share
    held = {
        WEIGHTS: MASTER * sizes.total / devices,
        MODELS: trace.standing[MODELS] / devices,
        OPTIMIZER: MOMENTS * sizes.trained / devices,
        BUFFERS: gathered + reduced,
    }
    return Memory(_kept(held | _worst(trace, MASTER / itemsize / devices)))


def _worst(trace: Trace, scale: float) -> dict[str, float]:
    """The worst moment when gradients weigh `scale` times what was traced; weights need no casts then."""

    def weight(index: int) -> float:
        point = trace.points[index]
        return scale * point.gradients + point.passing - point.others.get(CASTS, 0)

    point = trace.points[max(range(len(trace.points)), key=weight)]
    passing = {name: count for name, count in point.others.items() if name != CASTS}
    return {G: scale * point.gradients, **passing}


def quantised(memory: Memory, sizes: Sizes, itemsize: int, devices: int = 1) -> Memory:
    """The same with the frozen linear weights in nf4, and one of them at a time written out in `itemsize`."""
    saved = (itemsize - NF4_BYTES) * sizes.linear / devices
    device = dict(memory.device)
    device[WEIGHTS] = device.get(WEIGHTS, 0) - saved
    device[BUFFERS] = device.get(BUFFERS, 0) + itemsize * sizes.matrix
    return replace(memory, device=_kept(device))


def _kept(held: Mapping[str, float]) -> dict[str, float]:
    return {name: float(count) for name, count in held.items() if count}
