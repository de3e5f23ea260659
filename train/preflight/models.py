"""A model without its weights: configuration, headers of its files, modules on the meta device."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import LoraConfig, TaskType, get_peft_model
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)

from posttrain.errors import UserError
from posttrain.models import adapter_base, is_adapter
from posttrain.preflight import Findings
from train.adapters import lora_config
from train.peft_config import PeftSettings
from train.peft_setup import length_limit


def read_config(path: Path, field: str, findings: Findings) -> PreTrainedConfig | None:
    """The configuration of a model, or of an adapter's base; None, with a problem, where there is none."""
    try:
        source = adapter_base(path) if is_adapter(path) else path
        config: PreTrainedConfig = AutoConfig.from_pretrained(source)
    except (OSError, ValueError, UserError) as error:
        findings.fail_with(
            field, UserError(f"{path}: its configuration cannot be read ({_first_line(error)})")
        )
        return None
    for place in dict.fromkeys((path, source)):
        check_files(place, field, findings)
    return config


def check_files(path: Path, field: str, findings: Findings) -> None:
    """Add a problem for a directory without weights, or with a safetensors file that is cut off.

    Only headers are read; they hold the size that the file must have.
    """
    remedy = "download or save the model again"
    files = [*path.glob("*.safetensors"), *path.glob("*.bin")]
    if not files:
        findings.fail(field, f"{path}: holds no weights (no *.safetensors or *.bin)", remedy)
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as weights:
                weights.keys()
        except SafetensorError as error:
            size = file.stat().st_size
            message = f"{file}: is not a complete safetensors file ({size:,} bytes; {_first_line(error)})"
            findings.fail(field, message, remedy)


def skeleton(config: PreTrainedConfig, task: TaskType, field: str, findings: Findings) -> nn.Module | None:
    """The model's modules without weights; None, with a problem, where the architecture has no such model."""
    auto: Callable[..., nn.Module] = AutoModelForCausalLM.from_config
    if task == TaskType.SEQ_CLS:
        auto = AutoModelForSequenceClassification.from_config
        config.num_labels = 1
    try:
        with torch.device("meta"):
            return auto(config)
    except ValueError as error:
        kind = (
            "reward model (sequence classification)" if task == TaskType.SEQ_CLS else "causal language model"
        )
        message = f"the architecture {config.model_type} has no {kind} in transformers ({_first_line(error)})"
        findings.fail(field, message, "start from a model of another architecture")
        return None


@dataclass(frozen=True)
class Size:
    """Parameters of a training run: those that are trained, and all. whole: the model is saved in full.

    added: those of the saved adapter that were not trained. reference: those of a frozen copy of the adapter,
    which every checkpoint holds.
    """

    trained: int
    total: int
    whole: bool
    added: int = 0
    reference: int = 0


def measure(model: nn.Module, peft: PeftSettings | LoraConfig | None, task: TaskType) -> Size:
    """What training this skeleton trains. LoRA is put into it; peft's warnings are left to the stage.

    peft: settings, or the configuration of an adapter that is trained further.

    Raises ValueError where peft refuses to.
    """
    total = sum(p.numel() for p in model.parameters())
    if peft is None:
        return Size(total, total, True)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora = peft if isinstance(peft, LoraConfig) else lora_config(peft, task)
        # Only counted: what it starts from is the stage's doing.
        counted = replace(lora, init_lora_weights=True, inference_mode=False)  # type: ignore[type-var]
        adapted = get_peft_model(model, counted)  # type: ignore[arg-type]
    return Size(sum(p.numel() for p in adapted.parameters() if p.requires_grad), total, False)


def head_alone(model: nn.Module) -> Size:
    """Of a reward model whose score head alone is trained; the model is saved in full."""
    total = sum(p.numel() for p in model.parameters())
    return Size(
        sum(p.numel() for name, p in model.named_parameters() if name.startswith("score.")), total, True
    )


def check_length(config: PreTrainedConfig, asked: int | None, findings: Findings) -> int | None:
    """The longest row in tokens; None, with a problem, where more is asked for than the model can read."""
    try:
        return length_limit(config, asked)
    except UserError as error:
        findings.fail("trainer.max_length", str(error), "lower it, or leave it out")
        return None


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
