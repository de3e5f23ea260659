"""What `posttrain plan` says: a table for people, a dictionary for scripts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from train.plan.gpus import Gpu
from train.plan.predict import CUDA_CONTEXT, FRAGMENTATION, RESIDENT, Choice, Prediction, usable
from train.preflight.disk import gigabytes

COLUMNS = {
    "weights": ("weights", "quantised"),
    "other models": ("other_models",),
    "gradients": ("gradients",),
    "optimizer": ("optimizer", "step"),
    "activations": ("activations", "casts"),
    "logits, loss": ("logits",),
    "KV cache": ("kv_cache",),
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
        room = (
            f"of {gigabytes(gpu.memory)} it may take {gigabytes(usable(gpu))}: less {gigabytes(CUDA_CONTEXT)} "
            f"for the CUDA context, divided by {FRAGMENTATION} for fragmentation"
            if gpu.cuda
            else f"of {gigabytes(gpu.memory)} it may take 1/{RESIDENT}, since a CPU process keeps freed memory"
        )
        return [
            f"{gpu.name}: {rate} ({how}) at MFU {self.mfu:g}; {room}.",
            "Memory: bytes allocated at the worst moment of a step, the longest sequences in the batch. Hours: "
            "arithmetic (and reading weights while generating); no evaluation, loading or communication.",
        ]

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
            "cheaper_that_do_not_fit": [_choice(choice) for choice in prediction.cheaper],
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
        """The table, what does not fit, and the assumptions."""
        console.print(self._memory_table())
        console.print(self._work_table())
        for prediction in self.predictions:
            for line in explain(prediction, self.gpu):
                console.print(line, highlight=False, soft_wrap=True)
        for name, reason in self.unplanned.items():
            console.print(f"{name}: not planned: {reason}", highlight=False, soft_wrap=True)
        for line in self.assumptions():
            console.print(line, style="dim", highlight=False, soft_wrap=True)

    def _memory_table(self) -> Table:
        used = [
            column
            for column, names in COLUMNS.items()
            if any(p.choice.memory.device.get(name) for p in self.predictions for name in names)
        ]
        table = Table(title=f"Memory of each device, {self.gpu.name}", title_justify="left")
        for column in ("stage", "layout", *used, "total"):
            table.add_column(column, justify="left" if column in ("stage", "layout") else "right")
        for prediction in self.predictions:
            device = prediction.choice.memory.device
            sums = [sum(device.get(name, 0.0) for name in COLUMNS[column]) for column in used]
            total = gigabytes(prediction.choice.memory.total) + ("" if prediction.fits else " !")
            cells = [gigabytes(value) if value else "" for value in sums]
            table.add_row(prediction.described.block.name, prediction.choice.words, *cells, total)
        return table

    def _work_table(self) -> Table:
        table = Table(title="Work", title_justify="left")
        for column in (
            "stage",
            "trained",
            "longest",
            "steps",
            "tokens/step",
            "FLOPs/step",
            "hours",
            "checkpoint",
            "model",
        ):
            table.add_column(column, justify="left" if column == "stage" else "right")
        for prediction in self.predictions:
            work, lengths = prediction.work, prediction.described.lengths
            hours, sizes = self._hours(prediction), prediction.parameters.sizes
            table.add_row(
                prediction.described.block.name,
                f"{_count(sizes.trained)} of {_count(sizes.total)}",
                f"{'' if lengths.measured else 'up to '}{prediction.described.request.length}",
                "?" if work.steps is None else f"{work.steps:,}",
                f"{'' if lengths.measured else 'up to '}{work.tokens_per_step:,.0f}",
                f"{work.flops_per_step:.2g}",
                "?" if hours is None else f"{hours:.2g}" if hours < 10 else f"{hours:,.0f}",
                gigabytes(work.checkpoint),
                gigabytes(work.final),
            )
        return table


def explain(prediction: Prediction, gpu: Gpu) -> list[str]:
    """Why this layout and no cheaper one, what lies on the host, and what was assumed."""
    name, choice = prediction.described.block.name, prediction.choice
    lines = []
    if not prediction.fits:
        tried = "" if len(prediction.cheaper) == 1 else ", the least of all that were tried,"
        lines.append(
            f"{name}: does not fit {gpu.name}: {choice.words}{tried} needs {gigabytes(choice.memory.total)} of "
            f"{gigabytes(usable(gpu))}; a smaller batch or shorter sequences, LoRA (--method lora, qlora) or "
            "a larger device"
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
    lines += [f"{name}: {note}" for note in prediction.described.notes]
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


def _count(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
