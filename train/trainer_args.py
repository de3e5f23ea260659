"""The ``trainer:`` block: checked against TRL's dataclass before a weight is loaded, then turned into it.

TRL's own scripts drop a key they do not know without a word. Here an unknown key, a value of the wrong type,
a key that posttrain sets itself and a combination that TRL refuses or quietly ignores are reported together,
each with its YAML path. `check` is the hook of the sft, reward and dpo stages.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import types
import typing
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from posttrain.errors import Problem
from train.config import DpoConfig, RewardConfig, SftConfig, TrainingStageConfig
from train.launch import launch_problems

_RUN_DIRECTORY = "it is the run directory's; set the pipeline's output_dir and the stage's name"
_SEED = "set `seed:` of the stage"
_TRACKING = "metrics are always written to metrics.jsonl of the run directory; remove the key"
_RESUME = "an interrupted run resumes by itself from its last complete checkpoint; remove the key"
_LOADING = "set `dtype:` and `attn_implementation:` of the stage"
_TOKENIZER = "template and special tokens are those of the model's tokenizer directory; change them there"
_HUB = "nothing is uploaded by a training stage; remove the key"

OWNED: dict[str, str] = {
    "output_dir": _RUN_DIRECTORY,
    "logging_dir": _RUN_DIRECTORY,
    "overwrite_output_dir": _RUN_DIRECTORY,
    "seed": _SEED,
    "data_seed": _SEED,
    "report_to": _TRACKING,
    "run_name": _TRACKING,
    "disable_tqdm": _TRACKING,
    "resume_from_checkpoint": _RESUME,
    "ignore_data_skip": _RESUME,
    "save_only_model": _RESUME,
    "enable_jit_checkpoint": _RESUME,
    "logging_nan_inf_filter": "it would hide a loss that is not finite; remove the key",
    "do_train": "a training stage trains; remove the key",
    "do_eval": "use eval_strategy",
    "do_predict": "use the eval stage",
    "model_init_kwargs": _LOADING,
    "trust_remote_code": "models with code of their own are not loaded; remove the key",
    "chat_template_path": _TOKENIZER,
    "eos_token": _TOKENIZER,
    "pad_token": _TOKENIZER,
    "dataset_kwargs": "datasets are prepared by the curate stage; remove the key",
    "dataset_text_field": "conversations are read from the column messages; remove the key",
    "push_to_hub": _HUB,
    "hub_model_id": _HUB,
    "hub_token": _HUB,
}
"""Fields that the ``trainer:`` block may not set, and what to do instead."""

DEFAULTS: dict[str, Any] = {
    "logging_steps": 10,
    "save_strategy": "steps",
    "save_steps": 100,
    "save_total_limit": 2,
    "activation_checkpointing": False,
    "bf16": False,
    "dataset_num_proc": None,
    "dataloader_num_workers": 0,
}


def arguments_class(config: TrainingStageConfig) -> type:
    """The TRL dataclass that the ``trainer:`` block of this configuration fills."""
    import trl

    classes = {SftConfig: trl.SFTConfig, RewardConfig: trl.RewardConfig, DpoConfig: trl.DPOConfig}
    return classes[type(config)]


def check(config: TrainingStageConfig, where: str) -> list[Problem]:
    """All problems of ``config.trainer``; `where` is the path of the stage: ``run.yaml: stages.sft``."""
    cls = arguments_class(config)
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    problems = []
    for name, value in config.trainer.items():
        path = f"{where}.trainer.{name}"
        if name in OWNED:
            problems.append(Problem(path, "posttrain sets this field itself", OWNED[name]))
        elif name not in fields:
            problems.append(_unknown(path, name, cls, set(fields) - set(OWNED)))
        else:
            problems += _check_value(path, value, hints[name], fields[name].metadata.get("choices"))
    problems += _contradictions(config, f"{where}.trainer")
    problems += launch_problems(where)
    if not problems:  # transformers initialises torch.distributed as it builds the arguments
        problems += _constructed(config, f"{where}.trainer")
    return problems


check_sft = check_reward = check_dpo = check
"""The names under which the registry finds the hook."""


def build_args(config: TrainingStageConfig, output_dir: Path, **defaults: Any) -> Any:
    """The TRL arguments: our defaults, `defaults`, the ``trainer:`` block, and last what posttrain owns."""
    import torch

    cuda = torch.cuda.is_available()
    block = dict(config.trainer)
    for suffix in ("", "_kwargs"):  # the old name only warns in transformers 5
        if f"gradient_checkpointing{suffix}" in block:
            block[f"activation_checkpointing{suffix}"] = block.pop(f"gradient_checkpointing{suffix}")
    owned = {
        "output_dir": str(output_dir),
        "seed": config.seed,
        "data_seed": config.seed,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
    }
    hardware = {"use_cpu": not cuda, "dataloader_pin_memory": cuda}
    if "per_device_train_batch_size" in block:  # evaluation needs less memory per row than training
        defaults.setdefault("per_device_eval_batch_size", block["per_device_train_batch_size"])
    return arguments_class(config)(**(DEFAULTS | hardware | defaults | block | owned))


def _unknown(path: str, name: str, cls: type, valid: set[str]) -> Problem:
    near = difflib.get_close_matches(name, sorted(valid), n=1, cutoff=0.6)
    remedy = f"did you mean `{near[0]}`?" if near else "remove it"
    return Problem(path, f"{cls.__name__} of TRL has no field `{name}`", remedy)


def _check_value(path: str, value: Any, hint: Any, choices: list[str] | None) -> list[Problem]:
    members = list(typing.get_args(hint)) if _is_union(hint) else [hint]
    enums = [member for member in members if isinstance(member, type) and issubclass(member, enum.Enum)]
    allowed = [item.value for member in enums for item in member] or list(choices or [])
    if allowed and isinstance(value, str):
        if value in allowed:
            return []
        near = difflib.get_close_matches(value, map(str, allowed), n=1)
        remedy = f"did you mean `{near[0]}`?" if near else "one of " + ", ".join(map(str, allowed))
        return [Problem(path, f"{value!r} is not a valid value", remedy)]
    # TRL turns a single value into a list of one where the field is a list (loss_type of DPO).
    items = [typing.get_args(member)[0] for member in members if typing.get_origin(member) is list]
    union: Any = typing.Union[tuple(members + items)]  # noqa: UP007 - built at run time
    adapter = TypeAdapter(union, config={"arbitrary_types_allowed": True, "strict": True})
    try:
        adapter.validate_python(value)
    except ValidationError:
        return [Problem(path, f"{value!r} is a {type(value).__name__}", f"expected {_spell(hint)}")]
    return []


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _spell(hint: Any) -> str:
    if _is_union(hint):
        return " or ".join(map(_spell, typing.get_args(hint)))
    if hint is type(None):
        return "null"
    return str(hint) if typing.get_origin(hint) else hint.__name__


def _contradictions(config: TrainingStageConfig, where: str) -> list[Problem]:
    """What TRL would ignore, or raise only after loading the model."""
    block = config.trainer
    found: list[tuple[str, str, str]] = []
    if block.get("save_total_limit") == 1:
        found.append(
            (
                "save_total_limit",
                "the only complete checkpoint would be deleted before its successor is complete",
                "use 2 or more",
            )
        )
    if isinstance(config, SftConfig):
        found += _sft_contradictions(block)
    if isinstance(config, DpoConfig):
        if block.get("sync_ref_model") and config.peft is not None:
            found.append(
                ("sync_ref_model", "with LoRA the reference is the base model itself", "set `peft: null`")
            )
        if block.get("padding_free"):
            found.append(("padding_free", "TRL ignores it in DPO", "remove it"))
    problems = [Problem(f"{where}.{name}", message, remedy) for name, message, remedy in found]
    targets = config.peft.target_modules if config.peft else []
    if not isinstance(config, RewardConfig) and "lm_head" in targets:
        path = where.removesuffix(".trainer") + ".peft.target_modules"
        message = "TRL's loss reads lm_head.weight directly, an adapter on it would not be trained"
        problems.append(Problem(path, message, "remove lm_head"))
    return problems


def _sft_contradictions(block: dict[str, Any]) -> list[tuple[str, str, str]]:
    found = []
    if block.get("completion_only_loss"):
        found.append(
            (
                "completion_only_loss",
                "it has no effect on conversations",
                "assistant_only_loss (true by default) masks what the assistant did not say",
            )
        )
    if block.get("packing") and block.get("packing_strategy") == "wrapped":
        found.append(
            ("packing_strategy", "wrapped lets packed dialogues attend to each other", "use bfd or bfd_split")
        )
    if block.get("packing") and "max_length" in block and block["max_length"] is None:
        found.append(("max_length", "packing fills blocks of max_length tokens", "give a number"))
    if block.get("padding_free") and not block.get("packing"):
        found.append(("padding_free", "TRL does not enforce max_length without packing", "set packing: true"))
    if block.get("truncation_mode") == "keep_end":
        found.append(
            ("truncation_mode", "keep_end is deprecated in TRL and cuts the question", "use keep_start")
        )
    return found


def _constructed(config: TrainingStageConfig, where: str) -> list[Problem]:
    try:
        build_args(config, Path("unused"))
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        return [Problem(where, str(error), "")]
    return []
