"""A frozen base in 4 or 8 bits (QLoRA, Dettmers et al. 2023, 2305.14314), by bitsandbytes."""

from __future__ import annotations

import importlib.metadata
import os
from typing import Any

import torch
from packaging.version import Version
from peft import prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig, PreTrainedModel

from posttrain.errors import UserError
from train.peft_config import QuantizationSettings

OLDEST = "0.45"


def require_bitsandbytes(settings: QuantizationSettings) -> None:
    """Raise UserError unless bitsandbytes is installed and has code for this machine's device."""
    asked = f"quantization: {settings.name} needs bitsandbytes {OLDEST} or newer"
    remedy = "install it (pip install 'posttrain[qlora]'), or remove quantization"
    try:
        found = importlib.metadata.version("bitsandbytes")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"{asked}, which is not installed\n    {remedy}") from None
    if Version(found) < Version(OLDEST):
        raise UserError(f"{asked}, this is {found}\n    {remedy}")
    import bitsandbytes

    device = "cuda" if torch.cuda.is_available() else "cpu"
    supported = sorted(bitsandbytes.supported_torch_devices)
    if device not in supported:
        raise UserError(
            f"{asked} with code for {device}; the bitsandbytes {found} installed here supports "
            f"{', '.join(supported)}\n    use a newer one or another machine, or remove quantization"
        )


def loading_options(settings: QuantizationSettings) -> dict[str, Any]:
    """What from_pretrained takes to load a model so: every linear layer but the output head.

    On a GPU the model goes to that of this process (LOCAL_RANK), which quantising needs.
    """
    compute = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    values = settings.model_dump()
    values["bnb_4bit_compute_dtype"] = compute[settings.bnb_4bit_compute_dtype]
    options: dict[str, Any] = {"quantization_config": BitsAndBytesConfig(**values)}
    if torch.cuda.is_available():
        options["device_map"] = {"": int(os.environ.get("LOCAL_RANK", "0"))}
    return options


def prepare(model: PreTrainedModel) -> PreTrainedModel:
    """Freeze the quantised model, with what is not quantised in float32.

    Activation checkpointing is switched on by the trainer, not here.
    """
    prepared: PreTrainedModel = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return prepared
