"""Around training: quiet libraries, the longest row, what was learned, and saving a model or an adapter.

The saved adapter names a model directory as its base, so it must fit exactly the weights there; see
``train/adapters.py`` for what a stage starts from.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, Trainer
from transformers.utils import logging as transformers_logging

from posttrain.errors import PosttrainError, UserError
from posttrain.models import is_adapter
from train.concatenate import ADAPTER_FILE, Part, save_concatenated

REFERENCE = "ref"
"""What TRL calls the frozen copy of an adapter that it compares with, and where it saves it."""


def quiet_libraries() -> None:
    """Silence the progress bars and advice of transformers and datasets; errors still show."""
    import datasets

    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()


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
    magnitudes = [name for name in before if "lora_magnitude_vector" in name]
    if magnitudes and set(magnitudes) <= set(same):
        raise PosttrainError(
            f"training changed none of {len(magnitudes)} magnitude vectors of DoRA: is their type too coarse "
            "for the learning rate?"
        )
    return model


def save_model(
    trainer: Trainer, tokenizer: PreTrainedTokenizerBase, folder: Path, others: Sequence[Part] = ()
) -> None:
    """Write the model or adapter, the tokenizer and its chat template; check an adapter by reading it back.

    others: adapters whose sum with the trained one is what fits the base model on disk.

    Raises:
        PosttrainError: see `check_adapter`.
    """
    trainer.save_model(str(folder))
    tokenizer.save_pretrained(folder)
    for leftover in ("training_args.bin", "README.md"):
        (folder / leftover).unlink(missing_ok=True)
    if not is_adapter(folder):
        return
    if (folder / REFERENCE).is_dir():
        shutil.rmtree(folder / REFERENCE)
    if others:
        save_concatenated(folder, others)
    model: Any = trainer.model
    whole = model.peft_config["default"].modules_to_save or []
    names = [name for name, _ in model.named_modules()]
    check_adapter(folder, [module for module in whole if any(name.endswith(f".{module}") for name in names)])


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
