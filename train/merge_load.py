"""One adapter on its base, or several combined into one on the base they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, TaskType
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from posttrain.errors import UserError
from posttrain.hashing import adapter_base, hash_path
from posttrain.models import adapter_weight_names, is_adapter
from train.concatenate import MATRIX
from train.merge_config import MergeConfig

COMBINED = "combined"
_ALIKE = ("layers_to_transform", "layers_pattern", "exclude_modules")
_BY_MATRIX = ("linear", "ties", "dare_linear", "dare_ties")


@dataclass(frozen=True)
class Adapted:
    """The base in float32 under its adapter, in evaluation mode. name: the adapter's. loader: the class that
    loads such a model, with its options. base: where the base is, a directory or a Hub id.
    """

    model: PeftModel
    name: str
    loader: Any
    options: dict[str, Any]
    base: str


def load_adapted(paths: Sequence[Path], config: MergeConfig) -> Adapted:
    """The adapter in the only path, or the combination of several that `config` asks for.

    Raises:
        UserError: a path is not a PEFT directory, a base model does not exist, or the adapters cannot be
        combined.
    """
    bases = [base_of(path, ref) for path, ref in zip(paths, config.refs.values(), strict=True)]
    settings = [PeftConfig.from_pretrained(str(path)) for path in paths]
    if config.adapters is not None:
        check_same_base(bases, list(config.refs.values()))
        check_combinable(paths, settings, config)
    classifier = settings[0].task_type == TaskType.SEQ_CLS
    loader: Any = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    options: dict[str, Any] = {"num_labels": 1} if classifier else {}
    base = loader.from_pretrained(bases[0], dtype=torch.float32, **options)
    if config.adapters is None:
        model = PeftModel.from_pretrained(base, paths[0]).eval()
        return Adapted(model, "default", loader, options, bases[0])
    model = combine(base, paths, config)
    vars(model.peft_config[COMBINED])["base_model_name_or_path"] = bases[0]
    return Adapted(model, COMBINED, loader, options, bases[0])


def base_of(path: Path, ref: str) -> str:
    """The directory, or Hub id, of an adapter's base model.

    Raises:
        UserError: `path` is not a PEFT directory, or the base model it names does not exist.
    """
    if not is_adapter(path):
        raise UserError(
            f"model: {ref} has no adapter_config.json: it is a full model already, there is nothing to merge"
        )
    declared = PeftConfig.from_pretrained(str(path)).base_model_name_or_path or ""
    if declared and not Path(declared).is_absolute() and not Path(declared).is_dir():
        return declared
    return str(adapter_base(path))


def check_same_base(bases: Sequence[str], refs: Sequence[str]) -> None:
    """Raise UserError unless the base models are one, or have the same content."""
    first = bases[0]
    for base, ref in zip(bases[1:], refs[1:], strict=True):
        if base == first:
            continue
        both = Path(base).is_dir() and Path(first).is_dir()
        if not both or hash_path(Path(base)) != hash_path(Path(first)):
            raise UserError(
                f"adapters: {refs[0]} belongs to the base model {first}, {ref} to {base}, which is another\n"
                "    combine adapters of one base; to build one on the other, merge that first and train on "
                "the result"
            )


def check_combinable(paths: Sequence[Path], settings: Sequence[PeftConfig], config: MergeConfig) -> None:
    """Raise UserError for adapters that peft would combine into something else, or not at all."""
    refs = list(config.refs.values())
    for path, given, ref in zip(paths, settings, refs, strict=True):
        if not isinstance(given, LoraConfig):
            raise UserError(f"adapters: {ref} is a {given.peft_type} adapter; only LoRA can be combined")
        names = adapter_weight_names(path)
        more = [name for name in names if not MATRIX.search(name)]
        if more:
            raise UserError(
                f"adapters: {ref} has trained more than LoRA matrices ({more[0]}, {len(more)} tensors), "
                "which cannot be averaged\n    merge it alone (model: ...)"
            )
        if given.rank_pattern and config.method in _BY_MATRIX:
            raise UserError(
                f"adapters: {ref} has a rank_pattern, and {config.method} adds A and B of equal rank\n"
                "    use method: cat or svd"
            )
    for name in _ALIKE:
        values = [vars(given)[name] for given in settings]
        if any(value != values[0] for value in values):
            pairs = ", ".join(f"{ref} {value}" for ref, value in zip(refs, values, strict=True))
            raise UserError(
                f"adapters: they differ in {name} ({pairs}), which peft would take from the first\n"
                "    combine adapters of the same layers"
            )


def combine(base: Any, paths: Sequence[Path], config: MergeConfig) -> PeftModel:
    """`base` with the weighted combination of the adapters, which is the only one on it.

    Raises:
        UserError: peft refuses the combination.
    """
    assert config.adapters is not None
    names = [f"adapter_{index}" for index in range(len(paths))]
    model = PeftModel.from_pretrained(base, paths[0], adapter_name=names[0])
    for name, path in zip(names[1:], paths[1:], strict=True):
        model.load_adapter(path, adapter_name=name)
    # The scale of each adapter is in its layers by now. The combination has scale 1, which peft would
    # multiply by sqrt(r) if it inherited this.
    vars(model.peft_config[names[0]])["use_rslora"] = False
    torch.manual_seed(config.seed)  # dare draws what it leaves out
    try:
        tuner: Any = model.base_model
        tuner.add_weighted_adapter(
            names,
            [entry.weight for entry in config.adapters],
            COMBINED,
            combination_type=config.method or "cat",
            density=config.density,
            svd_rank=config.svd_rank,
        )
    except ValueError as error:
        raise UserError(f"adapters: peft cannot combine them by {config.method or 'cat'}: {error}") from None
    model.set_adapter(COMBINED)
    for name in names:
        model.delete_adapter(name)
    return model.eval()
