"""What the sft stage takes where the ``trainer:`` block says nothing: the fastest that trains the same.

Measured by ``scripts/bench_sft.py``; docs/trainers.md has the ladder and the reasons.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.utils.generic import is_flash_attention_requested

PADDED_ALIKE = {"train_sampling_strategy": "group_by_length"}
PADDING_FREE = {"padding_free": True}


def sft_defaults(trainer: dict[str, Any], model: PreTrainedConfig) -> dict[str, Any]:
    """Defaults of the trainer block: how padding is avoided, and the number format.

    trainer: the block itself, whose settings win. model: the configuration of the loaded model, which knows
    the attention that was chosen. With a flash attention a batch is one sequence without padding, otherwise
    rows of similar length share a batch; packed rows are full as they are.
    """
    defaults: dict[str, Any] = {}
    if not (trainer.get("packing") or trainer.get("padding_free")):
        flash = is_flash_attention_requested(model) and "padding_free" not in trainer
        defaults |= PADDING_FREE if flash else PADDED_ALIKE
    if torch.cuda.is_available() and not (trainer.get("fp16") or trainer.get("use_cpu")):
        defaults["bf16"] = torch.cuda.is_bf16_supported(including_emulation=False)
    return defaults
