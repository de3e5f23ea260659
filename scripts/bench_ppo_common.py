"""What both sides of `bench_ppo.py` share: settings, machine, peak memory, the floor of matrix products.

No torch at import: the parent process stays small and only starts others.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench_settings import SettingsFile

PACKAGES = ("torch", "transformers", "peft", "accelerate")
PAD, EOS, FIRST_TOKEN = 0, 1, 2
"""Token ids; prompts are drawn from FIRST_TOKEN on."""


@dataclass(frozen=True)
class Settings(SettingsFile):
    """One comparison. Lengths in tokens, batches in responses; updates are rollouts with their K passes.

    micro_batch_size is both sides'. On a CPU 2 is the best of both: the peer is as fast as with 8 and needs
    half the memory, and our side pads less.
    """

    layout: str = "full"
    device: str = "cpu"
    dtype: str = "float32"
    family: str = "llama"
    hidden: int = 384
    intermediate: int = 1024
    layers: int = 6
    heads: int = 6
    kv_heads: int = 6
    vocabulary: int = 32_000
    batch_size: int = 32
    micro_batch_size: int = 2
    peer_rollout_batch_size: int = 32
    prompt_min: int = 32
    prompt_max: int = 64
    response_length: int = 128
    num_ppo_epochs: int = 4
    warmup: int = 1
    updates: int = 2
    learning_rate: float = 3e-6
    kl_coef: float = 0.05
    missing_eos_penalty: float = 1.0
    lora_rank: int = 16
    threads: int = 2
    clock: str = "wall"
    seed: int = 0

    @property
    def episodes(self) -> int:
        """Responses of the whole run, warm-up included; as many prompts are made, each is used once."""
        return self.batch_size * (self.warmup + self.updates)

    @property
    def lora(self) -> dict[str, Any]:
        """Arguments of peft's LoraConfig, for every adapter of both sides."""
        return {"r": self.lora_rank, "lora_alpha": 2 * self.lora_rank, "target_modules": "all-linear"}


QUICK = replace(
    Settings(),
    hidden=64,
    intermediate=128,
    layers=2,
    heads=4,
    kv_heads=2,
    vocabulary=1000,
    batch_size=8,
    micro_batch_size=4,
    peer_rollout_batch_size=8,
    prompt_min=4,
    prompt_max=8,
    response_length=16,
    lora_rank=4,
)
PRESETS = {
    "cpu": Settings(),
    "quick": QUICK,
    # Long enough, and fast enough, to see whether both sides learn equally well: reward, not speed.
    "learn": replace(QUICK, batch_size=32, peer_rollout_batch_size=32, updates=80, learning_rate=2e-3),
    # The shapes of Qwen2-0.5B and of a 1 B Llama, weights random, output embeddings not tied to the input's.
    "qwen-0.5b": replace(
        Settings(),
        family="qwen2",
        hidden=896,
        intermediate=4864,
        layers=24,
        heads=14,
        kv_heads=2,
        vocabulary=151_936,
        batch_size=128,
        micro_batch_size=16,
        peer_rollout_batch_size=128,
        prompt_min=64,
        prompt_max=256,
        response_length=512,
        updates=3,
    ),
    "llama-1b": replace(
        Settings(),
        hidden=2048,
        intermediate=8192,
        layers=16,
        heads=32,
        kv_heads=8,
        vocabulary=128_256,
        batch_size=128,
        micro_batch_size=16,
        peer_rollout_batch_size=128,
        prompt_min=64,
        prompt_max=256,
        response_length=512,
        updates=3,
    ),
}


def machine(device: str, threads: int) -> dict[str, Any]:
    """Where and with what this was measured."""
    found = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "python": platform.python_version()}
    found |= {"system": platform.platform(), "processor": platform.machine()}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        found["processor"] = names[0].partition(":")[2].strip() if names else platform.machine()
    found |= {name: importlib.metadata.version(name) for name in PACKAGES}
    gpu = None
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        gpu = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    return found | {"cpus": os.cpu_count(), "threads": threads, "gpu": gpu}


class PeakMemory:
    """Bytes above what the process held when this was made, and in all: resident, or allocated on a GPU."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        if self.cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            self.before = _resident("VmRSS")

    def read(self) -> dict[str, float]:
        """{"peak": above the start, "absolute"}, in GiB."""
        if self.cuda:
            import torch

            peak = torch.cuda.max_memory_allocated()
        else:
            peak = _resident("VmHWM")
        return {"peak": (peak - self.before) / 2**30, "absolute": peak / 2**30}


def _resident(field: str) -> int:
    """Bytes: a field of Linux's /proc/self/status; elsewhere ru_maxrss, the largest so far, for any field."""
    status = Path("/proc/self/status")
    if status.is_file():
        return int(status.read_text(encoding="ascii").partition(f"{field}:")[2].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def now(device: str) -> float:
    """Seconds of the clock, once the device has done what it was given."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


def prepare_process(settings: Settings) -> None:
    """Threads, float32 products (TF32 on a GPU) and the clock alike for both sides; called before any work.

    The clock `cpu` counts the processor time of the process wherever `time.perf_counter` is read, the
    trainer's own phases included: on a machine shared with others, with one thread, it is what the wall clock
    would show alone.
    """
    import torch

    if settings.clock == "cpu":
        time.perf_counter = time.process_time
    torch.set_num_threads(settings.threads)
    torch.set_float32_matmul_precision("high")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


@dataclass(frozen=True)
class Product:
    """`count` linear layers [outputs, inputs] over the same tokens; frozen ones have no weight gradient."""

    inputs: int
    outputs: int
    count: int
    frozen: bool = False


def trained_products(settings: Settings, lora: bool) -> tuple[list[Product], list[Product]]:
    """Linear layers of one backbone, and of the language-model head, as one training pass goes through them.

    With `lora` the weights are frozen and each backbone layer has its two low-rank factors beside it.
    """
    kv_width = settings.hidden // settings.heads * settings.kv_heads
    shapes = [
        (settings.hidden, settings.hidden, 2),
        (settings.hidden, kv_width, 2),
        (settings.hidden, settings.intermediate, 2),
        (settings.intermediate, settings.hidden, 1),
    ]
    backbone = []
    for inputs, outputs, count in shapes:
        count *= settings.layers
        backbone.append(Product(inputs, outputs, count, frozen=lora))
        if lora:
            backbone.append(Product(inputs, settings.lora_rank, count))
            backbone.append(Product(settings.lora_rank, outputs, count))
    return backbone, [Product(settings.hidden, settings.vocabulary, 1, frozen=lora)]


def flops(products: list[Product], tokens: float) -> float:
    """Of forward and backward: two per weight, token and product; frozen weights have one product less."""
    return sum(2 * p.inputs * p.outputs * p.count * (2 if p.frozen else 3) for p in products) * tokens


def products_seconds(products: list[Product], tokens: float, settings: Settings) -> float:
    """Measured time of nothing but these products, forward and backward, for `tokens` tokens.

    Each shape is timed by itself on a chunk of tokens, best of three, and scaled up.
    """
    import torch

    dtype = torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
    total = 0.0
    for product in products:
        chunk = int(min(tokens, 1024 if settings.device == "cpu" else 8192))
        options: dict[str, Any] = {"device": settings.device, "dtype": dtype}
        x_TI = torch.randn(chunk, product.inputs, **options)
        weight_OI = torch.randn(product.outputs, product.inputs, **options)
        y_TO, gradient_OI = x_TI @ weight_OI.T, torch.empty_like(weight_OI)

        def work(x=x_TI, w=weight_OI, y=y_TO, g=gradient_OI, frozen: bool = product.frozen) -> None:
            torch.mm(x, w.T, out=y)
            torch.mm(y, w, out=x)
            if not frozen:
                torch.mm(y.T, x, out=g)

        repeats = max(1, int(2e9 / flops([product], chunk) * product.count))
        total += best_seconds(work, settings.device, repeats) * product.count * tokens / chunk
    return total


def best_seconds(work: Callable[[], None], device: str, repeats: int = 1, rounds: int = 3) -> float:
    """Seconds of one call: the best of `rounds` timings of `repeats` calls, after one call unmeasured."""
    work()
    timings = []
    for _ in range(rounds):
        start = now(device)
        for _ in range(repeats):
            work()
        timings.append((now(device) - start) / repeats)
    return min(timings)
