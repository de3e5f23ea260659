"""What `posttrain plan` says: a table for people, a dictionary for scripts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from train.plan.gpus import Gpu
from train.plan.predict import CUDA_CONTEXT, FRAGMENTATION, RESIDENT, Choice, Prediction, usable
from train.preflight.disk import gigabytes

COLUMNS = {
    "weights": ("weights",),
    "other": ("other_models",),
    "grads": ("gradients",),
    "optim": ("optimizer", "step"),
    "activ.": ("activations", "casts"),
    "logits": ("logits",),
    "cache": ("kv_cache",),
    "buffers": ("buffers", "copies"),
}
"""Columns of the table, and the categories that each adds up."""


@dataclass(frozen=True)
class Report:
    """Predictions of a file's training stages, in order; unplanned: the others, and why."""

    source: str
    gpu: Gpu
    mfu: float
    predictions: list[Prediction]
    unplanned: dict[str, str]

    def assumptions(self) -> list[str]:
        """What the figures stand on."""
        gpu = self.gpu
        rate = f"{gpu.flops / 1e12:,.3g} TFLOP/s {gpu.format}"
        how = "measured now" if gpu.measured else "data sheet, dense"
        limits = f"of {gigabytes(gpu.memory)} it may take {gigabytes(usable(gpu))}"
        why = (
            f"less {gigabytes(CUDA_CONTEXT)} for the CUDA context, over {FRAGMENTATION} for fragmentation"
            if gpu.cuda
            else f"1/{RESIDENT}, since a process on a CPU keeps freed memory"
        )
        lines = [
            f"{gpu.name}: {rate} ({how}) at MFU {self.mfu:g}; {limits}: {why}.",
            "Memory: bytes allocated at the worst moment of a step whose sequences are the longest. Hours: "
            "arithmetic, and reading weights while generating; no evaluation, loading or communication.",
        ]
        requests = [prediction.described.request for prediction in self.predictions]
        if gpu.format == "float16" and any(
            torch.bfloat16 in (request.weights, request.autocast) for request in requests
        ):
            lines.append(f"{gpu.name} does not compute in bfloat16: float16 takes the same memory.")
        return lines

    def as_json(self) -> dict[str, Any]:
        """Sizes in bytes, lengths in tokens."""
        gpu = self.gpu
        return {
            "config": self.source,
            "gpu": {
                "name": gpu.name,
                "memory": gpu.memory,
                "usable": usable(gpu),
                "flops": gpu.flops,
                "format": gpu.format,
                "measured": gpu.measured,
            },
            "mfu": self.mfu,
            "assumptions": self.assumptions(),
            "stages": [self._row(prediction) for prediction in self.predictions],
            "unplanned": self.unplanned,
        }

    def _row(self, prediction: Prediction) -> dict[str, Any]:
        described, work = prediction.described, prediction.work
        request, lengths = described.request, described.lengths
        sizes = prediction.parameters.sizes
        return {
            "name": described.block.name,
            "stage": described.block.kind,
            "method": prediction.method,
            "parameters": {"trained": sizes.trained, "total": sizes.total},
            **_choice(prediction.choice),
            "fits": prediction.fits,
            "too_large": [_choice(choice) for choice in prediction.cheaper],
            "batch": {"rows": request.rows, "length": request.length},
            "lengths": {"mean": lengths.mean, "longest": lengths.longest, "measured": lengths.measured},
            "rows": lengths.rows,
            "steps": work.steps,
            "tokens_per_step": work.tokens_per_step,
            "most_tokens_per_step": work.most_tokens_per_step,
            "tokens": work.tokens,
            "flops_per_step": work.flops_per_step,
            "hours": self._hours(prediction),
            "checkpoint_bytes": work.checkpoint,
            "model_bytes": work.final,
            "notes": list(described.notes),
        }

    def _hours(self, prediction: Prediction) -> float | None:
        device = prediction.choice.memory.device
        held = device.get("weights", 0.0) + device.get("kv_cache", 0.0) / 2
        seconds = prediction.work.seconds(self.gpu, self.mfu, prediction.choice.devices, held)
        return None if seconds is None else seconds / 3600

    def print(self, console: Console) -> None:
        """The tables, what does not fit, and the assumptions."""
        console.print(self._memory_table())
        console.print()
        console.print(self._work_table())
        console.print()
        for prediction in self.predictions:
            for line in explain(prediction, self.gpu):
                _say(console, line)
        for note, names in self._notes().items():
            _say(console, f"{', '.join(names)}: {note}")
        for name, reason in self.unplanned.items():
            _say(console, f"{name}: not planned: {reason}")
        for line in self.assumptions():
            _say(console, line, style="dim")

    def _notes(self) -> dict[str, list[str]]:
        """Each note with the stages that it is about."""
        notes: dict[str, list[str]] = {}
        for prediction in self.predictions:
            for note in prediction.described.notes:
                notes.setdefault(note, []).append(prediction.described.block.name)
        return notes

    def _memory_table(self) -> Table:
        used = [
            column
            for column, names in COLUMNS.items()
            if any(p.choice.memory.device.get(name) for p in self.predictions for name in names)
        ]
        table = _table(f"Memory of each device, {self.gpu.name}", ("stage", "layout"), (*used, "total"))
        for prediction in self.predictions:
            device = prediction.choice.memory.device
            sums = [sum(device.get(name, 0.0) for name in COLUMNS[column]) for column in used]
            total = short(prediction.choice.memory.total) + ("" if prediction.fits else " !")
            cells = [short(value) if value else "" for value in sums]
            table.add_row(prediction.described.block.name, prediction.choice.words, *cells, total)
        return table

    def _work_table(self) -> Table:
        columns = ("longest", "tokens/step", "steps", "FLOPs/step", "hours", "checkpoint", "model")
        table = _table("Work", ("stage", "trained"), columns)
        for prediction in self.predictions:
            work, described = prediction.work, prediction.described
            hours, sizes = self._hours(prediction), prediction.parameters.sizes
            bound = "" if described.lengths.measured else "<= "
            table.add_row(
                described.block.name,
                f"{short(sizes.trained)} of {short(sizes.total)}",
                f"{bound}{described.request.length:,}",
                f"{bound}{work.tokens_per_step:,.0f}",
                "?" if work.steps is None else f"{work.steps:,}",
                f"{work.flops_per_step:.1e}",
                "?" if hours is None else f"{hours:.2g}" if hours < 10 else f"{hours:,.0f}",
                short(work.checkpoint),
                short(work.final),
            )
        return table


def _table(title: str, left: tuple[str, ...], right: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in left:
        table.add_column(column, no_wrap=True)
    for column in right:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _say(console: Console, line: str, style: str | None = None) -> None:
    console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)


def explain(prediction: Prediction, gpu: Gpu) -> list[str]:
    """Why this layout and no cheaper one, and what lies on the host."""
    name, choice = prediction.described.block.name, prediction.choice
    lines = []
    if not prediction.fits:
        tried = "" if len(prediction.cheaper) == 1 else ", the least of all that were tried,"
        lines.append(
            f"{name}: does not fit {gpu.name}: {choice.words}{tried} needs "
            f"{gigabytes(choice.memory.total)} of {gigabytes(usable(gpu))}; take a smaller batch, shorter "
            "sequences, --method lora or qlora, or a larger device"
        )
    elif prediction.cheaper:
        names = "; ".join(f"{c.words} {gigabytes(c.memory.total)}" for c in prediction.cheaper[-4:])
        more = f" (and {len(prediction.cheaper) - 4} more)" if len(prediction.cheaper) > 4 else ""
        lines.append(
            f"{name}: {choice.words} is the cheapest that fits {gigabytes(usable(gpu))}. Cheaper, and too "
            f"large: {names}{more}"
        )
    if choice.memory.host:
        lines.append(f"{name}: {gigabytes(choice.memory.host)} of host memory for each device")
    return lines


def _choice(choice: Choice) -> dict[str, Any]:
    return {
        "layout": choice.layout.name,
        "gpus": choice.devices,
        "activation_checkpointing": choice.checkpointing,
        "memory": choice.memory.device,
        "total": choice.memory.total,
        "host": choice.memory.host,
    }


def short(number: float) -> str:
    """1.23G, 12.3M, 456k: bytes or parameters in at most four signs."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            value = number / size
            return f"{value:.0f}{unit}" if value >= 99.5 else f"{value:.3g}{unit}"
    return f"{number:.0f}"
