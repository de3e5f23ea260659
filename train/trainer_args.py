"""The ``trainer:`` block: checked against TRL's dataclass before a weight is loaded, then turned into it.

TRL's own scripts drop a key they do not know without a word. Here an unknown key, a value of the wrong type,
a key that posttrain sets itself and a combination that TRL refuses or quietly ignores are reported together,
each with its YAML path. `check` is the hook of every stage that trains with TRL.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import importlib
import importlib.util
import types
import typing
import warnings
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from posttrain.errors import Problem
from train.config import (
    CpoConfig,
    DpoConfig,
    KtoConfig,
    OrpoConfig,
    PretrainConfig,
    RewardConfig,
    SftConfig,
    TrainingStageConfig,
)
from train.launch import launch_problems
from train.online_config import GrpoConfig, OnlineConfig, RlooConfig
from train.ppo.reward_config import check_functions
from train.trainer_rules import contradictions, off_boundary

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

OWNED_ONLINE: dict[str, str] = {
    "reward_weights": "set `weight` of rewards.functions and rewards.model_weight",
    "shuffle_dataset": "prompts are shuffled once, with the stage's seed, so that a run can be resumed",
    "remove_unused_columns": "rewards find the prompt's row by a column of their own; remove the key",
    "chat_template_kwargs": _TOKENIZER,
    "log_completions_hub_repo": _HUB,
}
"""The same, of grpo and rloo alone."""

DEFAULTS: dict[str, Any] = {
    "logging_steps": 10,
    "save_strategy": "steps",
    "save_steps": 100,
    "save_total_limit": 2,
    "activation_checkpointing": False,
    "bf16": False,
    "dataloader_num_workers": 0,
}


def arguments_class(config: TrainingStageConfig) -> type:
    """The TRL dataclass that the ``trainer:`` block of this configuration fills."""
    import trl

    if isinstance(config, OrpoConfig):
        return experimental("orpo", "ORPOConfig")
    if isinstance(config, CpoConfig):
        return experimental("cpo", "CPOConfig")
    classes = {
        PretrainConfig: trl.SFTConfig,
        SftConfig: trl.SFTConfig,
        RewardConfig: trl.RewardConfig,
        DpoConfig: trl.DPOConfig,
        KtoConfig: trl.KTOConfig,
        GrpoConfig: trl.GRPOConfig,
        RlooConfig: trl.RLOOConfig,
    }
    return classes[type(config)]


def experimental(module: str, name: str) -> Any:
    """`name` of trl.experimental.`module`, without the warning that it may change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return vars(importlib.import_module(f"trl.experimental.{module}"))[name]


def check(config: TrainingStageConfig, where: str) -> list[Problem]:
    """All problems of ``config.trainer``; `where` is the path of the stage: ``run.yaml: stages.sft``."""
    cls = arguments_class(config)
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    owned = OWNED | (OWNED_ONLINE if isinstance(config, OnlineConfig) else {})
    problems: list[Problem] = []
    sound: dict[str, Any] = {}
    for name, value in config.trainer.items():
        path = f"{where}.trainer.{name}"
        if name in owned:
            problems.append(Problem(path, "posttrain sets this field itself", owned[name]))
        elif name not in fields:
            problems.append(_unknown(path, name, cls, set(fields) - set(owned)))
        else:
            wrong = _check_value(path, value, hints[name], fields[name].metadata.get("choices"))
            problems += wrong
            if not wrong:
                sound[name] = value
    problems += contradictions(config.model_copy(update={"trainer": sound}), f"{where}.trainer")
    problems += launch_problems(where)
    if not problems:  # transformers initialises torch.distributed as it builds the arguments
        problems += _constructed(config, f"{where}.trainer")
    if isinstance(config, OnlineConfig):
        problems += check_functions(config.rewards, f"{where}.rewards")
    return problems


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
    if isinstance(config, OnlineConfig):
        defaults = {"disable_dropout": True} | defaults
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


def _constructed(config: TrainingStageConfig, where: str) -> list[Problem]:
    """Problems of TRL's dataclass with the whole block, but for the fields that only this machine lacks."""
    lacking = _lacking_here(config.trainer)
    block = {name: value for name, value in config.trainer.items() if name not in lacking}
    problems = [Problem(f"{where}.{name}", *said, here=True) for name, said in lacking.items()]
    try:
        args = build_args(config.model_copy(update={"trainer": block}), Path("unused"))
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        return [*problems, Problem(where, str(error), "")]
    return problems + (off_boundary(args, where) if isinstance(config, OnlineConfig) else [])


def _lacking_here(block: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """The fields that transformers would refuse on this machine whatever they say: message and remedy."""
    from transformers.utils import is_torch_tf32_available

    lacking = {}
    if block.get("deepspeed") and importlib.util.find_spec("deepspeed") is None:
        lacking["deepspeed"] = (
            "the package deepspeed is not installed here",
            "pip install 'posttrain[deepspeed]'",
        )
    if block.get("tf32") and not is_torch_tf32_available():
        lacking["tf32"] = ("there is no GPU here that computes in TF32", "remove it: float32 is then exact")
    return lacking
