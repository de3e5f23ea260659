"""What the parts of `bench_sft.py` share: the settings and the rungs of the ladder. No torch at import."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from bench_settings import SettingsFile

TRL_DEFAULTS = {"activation_checkpointing": True, "bf16": True, "train_sampling_strategy": "random"}
"""Where TRL 1.16's SFTConfig differs from what our stage takes by itself."""


@dataclass(frozen=True)
class Settings(SettingsFile):
    """One ladder. Sizes of the Llama-architecture model; batch_size in dialogues, as TRL counts it; warmup:
    steps at the start of a run that are not timed."""

    device: str = "cpu"
    data: str = ""
    hidden: int = 320
    intermediate: int = 864
    layers: int = 6
    heads: int = 5
    vocabulary: int = 8000
    positions: int = 1024
    batch_size: int = 8
    steps: int = 100
    warmup: int = 3
    learning_rate: float = 1e-3
    lora_learning_rate: float = 1e-3
    lora_rank: int = 16
    held_out: int = 256
    eval_fraction: float = 0.04
    threads: int = 2
    seed: int = 0


SMOKE = Settings(
    hidden=32,
    intermediate=64,
    layers=2,
    heads=2,
    vocabulary=400,
    positions=512,
    steps=6,
    warmup=2,
    held_out=16,
    eval_fraction=0.1,
)
PRESETS = {
    "cpu": Settings(),
    "smoke": replace(SMOKE, threads=1),
    # The shape of a 1 B Llama, weights random.
    "llama-1b": Settings(
        device="cuda",
        hidden=2048,
        intermediate=8192,
        layers=16,
        heads=32,
        vocabulary=32_000,
        learning_rate=2e-4,
        held_out=512,
    ),
}


@dataclass(frozen=True)
class Rung:
    """One way to train.

    trainer: our trainer block on top of steps, batch and learning rate, or TRL's flags; attention: our
    attn_implementation; whole_head: the head at every position, as TRL's trainer has it on a CPU; devices:
    where it is in the ladder.
    """

    title: str
    side: Literal["trl", "ours"]
    trainer: dict[str, Any] = field(default_factory=dict)
    lora: bool = False
    attention: str | None = None
    whole_head: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")


RUNGS: dict[str, Rung] = {
    "trl": Rung("`trl sft`, its own defaults", "trl"),
    "trl-float32": Rung("`trl sft --bf16 False`", "trl", {"bf16": False}, devices=("cpu",)),
    "same": Rung("posttrain with TRL's settings", "ours", TRL_DEFAULTS, whole_head=True),
    "no-checkpointing": Rung(
        "and no activation checkpointing",
        "ours",
        TRL_DEFAULTS | {"activation_checkpointing": False},
        whole_head=True,
    ),
    "grouped": Rung(
        "and rows of similar length in a batch",
        "ours",
        {"activation_checkpointing": False, "bf16": True},
        whole_head=True,
        devices=("cpu",),
    ),
    "bf16": Rung("defaults, with bfloat16", "ours", {"bf16": True}, devices=("cpu",)),
    "defaults": Rung("**posttrain, its own defaults**", "ours"),
    "packing": Rung("defaults, with packing (bfd)", "ours", {"packing": True}),
    "padding-free": Rung(
        "defaults, with padding_free", "ours", {"padding_free": True, "train_sampling_strategy": "random"}
    ),
    "checkpointing": Rung(
        "defaults, with activation checkpointing", "ours", {"activation_checkpointing": True}
    ),
    "flash": Rung("defaults on flash attention 2", "ours", attention="flash_attention_2", devices=("cuda",)),
    "trl-lora": Rung("`trl sft --use_peft`, its own defaults", "trl", lora=True),
    "lora": Rung("**posttrain with LoRA, its own defaults**", "ours", lora=True),
    "compile": Rung("defaults, with torch.compile", "ours", {"torch_compile": True}),
}
