"""Loading a model to train, wrapping it in LoRA, saving it, and checking that what was saved was learned.

An adapter is only ever trained on a plain model directory: the saved adapter names that directory as its
base, so it must exist and hold exactly the weights the adapter was trained on. Training from an adapter
directory therefore needs the merge stage first (or ``peft: null``, which trains and saves all weights).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
)
from transformers.utils import logging as transformers_logging

from posttrain.errors import PosttrainError, UserError
from posttrain.models import is_adapter, load_causal_lm
from train.config import PeftSettings, TrainingStageConfig

ADAPTER_FILE = "adapter_model.safetensors"


def quiet_libraries() -> None:
    """Silence the progress bars and advice of transformers and datasets; errors still show."""
    import datasets

    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()


def lora_config(settings: PeftSettings | None, task: TaskType) -> LoraConfig | None:
    """peft's LoraConfig for a task; for SEQ_CLS the head ``score`` is always trained and saved."""
    if settings is None:
        return None
    values = settings.model_dump()
    if task == TaskType.SEQ_CLS:
        values["modules_to_save"] = sorted({*(settings.modules_to_save or []), "score"})
    return LoraConfig(task_type=task, **values)


def refuse_adapter(path: Path, ref: str) -> None:
    """Raise UserError when `path` is an adapter directory, which no adapter or head can be built on."""
    if is_adapter(path):
        raise UserError(
            f"model: {ref} is a LoRA adapter. What is trained on top of it would name a base model that "
            "exists nowhere. Merge it first (stage: merge, model: that run) and start from the merged "
            "model."
        )


def load_policy(path: Path, config: TrainingStageConfig) -> PreTrainedModel:
    """The causal language model to train, in training precision; an adapter directory is merged in memory.

    Raises:
        UserError: see `refuse_adapter`.
    """
    if config.peft is not None:
        refuse_adapter(path, config.model)
    if is_adapter(path):
        return load_causal_lm(path, dtype=config.dtype).requires_grad_(True)
    options = {"attn_implementation": config.attn_implementation} if config.attn_implementation else {}
    return AutoModelForCausalLM.from_pretrained(path.resolve(), dtype=torch_dtype(config.dtype), **options)


def load_reference(path: Path, config: TrainingStageConfig) -> PreTrainedModel | None:
    """The frozen second copy that a loss with a reference needs; None where there is one without it.

    With LoRA the reference is the model with the adapter switched off; with
    ``trainer.precompute_ref_log_probs`` its log-probabilities are computed once, before the first step.
    """
    if config.peft is not None or config.trainer.get("precompute_ref_log_probs", False):
        return None
    return load_policy(path, config)


def length_limit(config: PreTrainedConfig, asked: int | None, default: int = 1024) -> int:
    """``max_length`` of the trainer: what was asked for, else `default`, never beyond the positions that the
    model of this configuration has.

    Raises:
        UserError: more was asked for than the model has positions.
    """
    positions = config.get_text_config().max_position_embeddings
    if asked is not None and asked > positions:
        raise UserError(
            f"trainer.max_length is {asked}, the model has {positions} positions: use at most {positions}."
        )
    return asked or min(default, positions)


def snapshot(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Copies of the trainer's trainable parameters, by name."""
    assert trainer.model is not None
    named = trainer.model.named_parameters()
    return {name: p.detach().cpu().clone() for name, p in named if p.requires_grad}


def check_learned(trainer: Trainer, before: dict[str, torch.Tensor]) -> Any:
    """The trained model, if training changed what it should have.

    Raises:
        PosttrainError: nothing changed since `before`, or a module trained in full (as ``score``) did not.
    """
    model = trainer.model
    assert model is not None
    after = dict(model.named_parameters())
    same = [name for name, old in before.items() if torch.equal(old, after[name].detach().cpu())]
    if len(same) == len(before):
        raise PosttrainError(
            f"training changed none of {len(before)} trainable tensors: is trainer.learning_rate 0, or are "
            "all steps in the warm-up?"
        )
    heads = [name for name in same if "modules_to_save" in name or name.startswith("score.")]
    if heads:
        raise PosttrainError(f"training did not change {', '.join(heads)}: no gradient has reached the head")
    return model


def save_model(trainer: Trainer, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the model or adapter, the tokenizer and its chat template; check an adapter by reading it back.

    Raises:
        PosttrainError: see `check_adapter`.
    """
    trainer.save_model(str(folder))
    tokenizer.save_pretrained(folder)
    for leftover in ("training_args.bin", "README.md"):
        (folder / leftover).unlink(missing_ok=True)
    if is_adapter(folder):
        model: Any = trainer.model
        whole = model.peft_config["default"].modules_to_save or []
        names = [name for name, _ in model.named_modules()]
        check_adapter(
            folder, [module for module in whole if any(name.endswith(f".{module}") for name in names)]
        )


def check_adapter(folder: Path, whole: Sequence[str]) -> None:
    """Read the saved adapter back: no tensor empty or infinite, B not all zero, each module of `whole`.

    Raises:
        PosttrainError: what was saved is not what was trained (a known failure of ZeRO-3 and of mis-typed
        tasks).
    """
    tensors = load_file(folder / ADAPTER_FILE)
    empty = [name for name, tensor in tensors.items() if tensor.numel() == 0]
    if empty or not tensors:
        raise PosttrainError(
            f"{folder / ADAPTER_FILE}: {len(empty)} of {len(tensors)} tensors are empty: {empty[:3]}"
        )
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise PosttrainError(f"{folder / ADAPTER_FILE}: tensors that are not finite: {broken[:3]}")
    updates = [tensor for name, tensor in tensors.items() if "lora_B" in name]
    if updates and not any(bool(tensor.any()) for tensor in updates):
        raise PosttrainError(f"{folder / ADAPTER_FILE}: every B matrix is zero, the adapter does nothing")
    for module in whole:
        if not any(f".{module}." in name for name in tensors):
            raise PosttrainError(
                f"{folder / ADAPTER_FILE}: module `{module}` was trained but is not in the file"
            )


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a configuration's ``dtype``."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
