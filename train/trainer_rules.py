"""Combinations of trainer fields that TRL would ignore, or refuse only after loading the model.

`contradictions` is the rule book of ``train/trainer_args.py``: each rule gives the field, what is wrong with
it and the remedy. The accepted values that TRL keeps only in its code are listed here; a test compares them
with that code.
"""

from __future__ import annotations

import difflib
from typing import Any

from posttrain.errors import Problem
from train.config import (
    CpoConfig,
    DpoConfig,
    KtoConfig,
    OrpoConfig,
    PretrainConfig,
    SftConfig,
    TrainingStageConfig,
)
from train.group_rules import Rule, group_rules
from train.online_config import GrpoConfig, OnlineConfig

DPO_LOSSES = (
    "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down "
    "discopop sft sigmoid_norm"
).split()
F_DIVERGENCE_LOSSES = "sigmoid sigmoid_norm hinge ipo exo_pair robust discopop sft".split()
"""Losses of DPO that may be combined with an f-divergence other than reverse_kl."""
MASKED_BY_POSITION = "eager sdpa flex_attention".split()
"""Attention code for which transformers builds a block-diagonal mask where position ids begin anew."""
GRPO_VALUES = {
    "loss_type": "grpo dr_grpo dapo bnpo cispo sapo luspo vespo".split(),
    "importance_sampling_level": "token sequence".split(),
    "scale_rewards": "group batch none".split(),
}


OWN_GROUPS = ("galore_", "apollo_", "lomo", "adalomo")
"""Beginnings of trainer.optim that cannot be given the parameter groups of LoRA+."""


def contradictions(config: TrainingStageConfig, where: str) -> list[Problem]:
    """The problems of ``config.trainer``; where: its path, ``run.yaml: stages.sft.trainer``."""
    block, stage = config.trainer, where.removesuffix(".trainer")
    found: list[Rule] = []
    if block.get("save_total_limit") == 1:
        message = "the only complete checkpoint would be deleted before its successor is complete"
        found.append(("save_total_limit", message, "use 2 or more"))
    one_row_each = isinstance(config, (SftConfig, PretrainConfig))
    if block.get("train_sampling_strategy") == "group_by_length" and not one_row_each:
        message = "rows of this stage have no length of their own that they could be grouped by"
        found.append(("train_sampling_strategy", message, "remove it"))
    if one_row_each:
        found += _sft(block) + _rows_apart(block, config.attn_implementation)
    if isinstance(config, PretrainConfig):
        found += _pretrain(block)
    if isinstance(config, DpoConfig):
        found += _dpo(block)
    if isinstance(config, KtoConfig):
        found += _kto(block)
    if isinstance(config, (OrpoConfig, CpoConfig)) and block.get("generate_during_eval"):
        message = "it sends samples to trackers, of which a training stage has none"
        found.append(("generate_during_eval", message, "remove it; the eval stage generates"))
    if isinstance(config, OnlineConfig):
        found += _online(config)
    with_reference = isinstance(config, (DpoConfig, KtoConfig, OnlineConfig))
    if with_reference and block.get("sync_ref_model") and config.peft is not None:
        message = "with LoRA the reference is no model of its own that could follow"
        found.append(("sync_ref_model", message, "set `peft: null`"))
    return [Problem(f"{where}.{name}", message, remedy) for name, message, remedy in found] + [
        Problem(f"{stage}.peft.{name}", message, remedy) for name, message, remedy in _peft(config)
    ]


def _sft(block: dict[str, Any]) -> list[Rule]:
    found = []
    if block.get("completion_only_loss"):
        found.append(
            (
                "completion_only_loss",
                "it has no effect on conversations or plain text",
                "assistant_only_loss of the sft stage masks what the assistant did not say",
            )
        )
    if block.get("packing") and block.get("packing_strategy") == "wrapped":
        found.append(
            ("packing_strategy", "wrapped lets packed dialogues attend to each other", "use bfd or bfd_split")
        )
    if block.get("packing") and "max_length" in block and block["max_length"] is None:
        found.append(("max_length", "packing fills blocks of max_length tokens", "give a number"))
    if block.get("eval_packing") and not block.get("packing"):
        found.append(
            (
                "eval_packing",
                "without packing the packed rows would attend to each other",
                "set packing: true",
            )
        )
    if block.get("truncation_mode") == "keep_end":
        found.append(
            ("truncation_mode", "keep_end is deprecated in TRL and cuts the question", "use keep_start")
        )
    return found


def _rows_apart(block: dict[str, Any], attention: str | None) -> list[Rule]:
    """Rows in one sequence are kept apart by a mask from position ids or by sequence offsets."""
    if attention is None or attention in MASKED_BY_POSITION or "flash" in attention:
        return []
    message = f"attn_implementation {attention} does not keep the rows of a sequence apart"
    remedy = f"use one of {', '.join(MASKED_BY_POSITION)} or a flash attention, or set it to false"
    return [(name, message, remedy) for name in ("packing", "padding_free") if block.get(name)]


def _pretrain(block: dict[str, Any]) -> list[Rule]:
    found = []
    if block.get("padding_free") and not block.get("packing"):
        found.append(("padding_free", "TRL does not enforce max_length without packing", "set packing: true"))
    if block.get("assistant_only_loss"):
        found.append(
            ("assistant_only_loss", "plain text has no assistant", "remove it, or use the sft stage")
        )
    return found


def _dpo(block: dict[str, Any]) -> list[Rule]:
    asked = block.get("loss_type", "sigmoid")
    losses = [asked] if isinstance(asked, str) else list(asked)
    found = [_not_among("loss_type", loss, DPO_LOSSES) for loss in losses if loss not in DPO_LOSSES]
    if block.get("padding_free"):
        found.append(("padding_free", "TRL ignores it in DPO", "remove it"))
    smoothing = block.get("label_smoothing", 0.0)
    if "exo_pair" in losses and smoothing == 0.0:
        found.append(
            ("label_smoothing", "exo_pair takes its logarithm, and it is 0", "set it; the paper uses 1.0e-3")
        )
    if "robust" in losses and not 0 <= smoothing < 0.5:
        found.append(("label_smoothing", f"robust divides by 1 - 2 * {smoothing}", "use less than 0.5"))
    if block.get("use_weighting") and {"aot", "aot_unpaired"} & set(losses):
        found.append(("use_weighting", "aot sorts the answers, so they have no weight each", "remove it"))
    divergence = block.get("f_divergence_type", "reverse_kl")
    others = sorted(set(losses) - set(F_DIVERGENCE_LOSSES))
    if divergence != "reverse_kl" and others:
        message = f"{divergence} is not defined for {', '.join(others)}"
        found.append(("f_divergence_type", message, f"use one of {', '.join(F_DIVERGENCE_LOSSES)}"))
    return found


def _kto(block: dict[str, Any]) -> list[Rule]:
    if block.get("loss_type", "kto") == "apo_zero_unpaired":
        return []
    found = []
    if block.get("train_sampling_strategy", "sequential") not in ("sequential", "group_by_length"):
        message = "the KL term pairs each answer with its neighbour's prompt in a fixed order"
        found.append(("train_sampling_strategy", message, "remove it; rows are shuffled with the seed"))
    if block.get("per_device_train_batch_size", 8) < 2:
        message = "the KL term needs another answer in the batch"
        found.append(("per_device_train_batch_size", message, "use 2 or more"))
    return found


def _online(config: OnlineConfig) -> list[Rule]:
    block = config.trainer
    found = []
    if block.get("max_completion_length", 512) is None:
        found.append(("max_completion_length", "answers need a limit", "give a number"))
    found += group_rules(config)
    if isinstance(config, GrpoConfig):
        found += [
            _not_among(name, block[name], values)
            for name, values in GRPO_VALUES.items()
            if name in block and block[name] not in values
        ]
    return found


def _peft(config: TrainingStageConfig) -> list[Rule]:
    if config.peft is None:
        return []
    found = []
    fused = isinstance(config, (PretrainConfig, SftConfig, DpoConfig, KtoConfig, OnlineConfig))
    if fused and "lm_head" in config.peft.target_modules:
        message = "TRL's loss reads lm_head.weight directly, an adapter on it would not be trained"
        found.append(("target_modules", message, "remove lm_head"))
    if isinstance(config, (DpoConfig, KtoConfig, OnlineConfig)) and config.peft.bias != "none":
        message = "trained biases are part of the base, which is also the reference, and it would move along"
        found.append(("bias", message, "leave it none, or set `peft: null`"))
    found += _loraplus(config)
    dropout_off = isinstance(config, (KtoConfig, OrpoConfig, CpoConfig, OnlineConfig)) and (
        config.trainer.get("disable_dropout", True)
    )
    if dropout_off and config.peft.lora_dropout:
        message = "TRL switches dropout off in this trainer, that of the adapter too"
        found.append(("lora_dropout", message, "remove it, or set trainer.disable_dropout: false"))
    return found


def _loraplus(config: TrainingStageConfig) -> list[Rule]:
    if config.peft is None or config.peft.loraplus_lr_ratio is None:
        return []
    found = []
    optimizer = str(config.trainer.get("optim", ""))
    if optimizer.startswith(OWN_GROUPS):
        message = f"trainer.optim {optimizer} makes parameter groups or updates of its own, without LoRA+'s"
        found.append(("loraplus_lr_ratio", message, "use an AdamW (adamw_torch_fused, ...), or remove it"))
    for field in ("deepspeed", "fsdp"):
        if config.trainer.get(field):
            message = f"trainer.{field} makes the optimizer itself, without LoRA+'s groups"
            found.append(("loraplus_lr_ratio", message, f"remove it or trainer.{field}"))
    return found


def generation_period(args: Any) -> int:
    """Optimizer steps from one generation to the next that starts with a step.

    args: of grpo or rloo. One generation serves steps_per_generation * num_iterations micro-steps, an
    optimizer step takes gradient_accumulation_steps of them.
    """
    served, per_step = args.steps_per_generation * args.num_iterations, args.gradient_accumulation_steps
    period = 1
    while period * per_step % served:
        period += 1
    return period


def off_boundary(args: Any, where: str) -> list[Problem]:
    """A problem where checkpoints of grpo or rloo would fall between two generations.

    TRL does not save answers that were sampled and not used up; a run resumed there would sample anew.
    """
    period = generation_period(args)
    if args.save_strategy != "steps" or (args.save_steps >= 1 and args.save_steps % period == 0):
        return []
    message = (
        f"save_steps {args.save_steps:g} is not a multiple of {period}, the optimizer steps that one "
        "generation serves: a run resumed between generations would not be the same run"
    )
    return [Problem(f"{where}.save_steps", message, f"use a multiple of {period}")]


def _not_among(name: str, value: Any, values: list[str]) -> Rule:
    near = difflib.get_close_matches(str(value), values, n=1)
    remedy = f"did you mean `{near[0]}`?" if near else f"one of {', '.join(values)}"
    return name, f"{value!r} is not a valid value", remedy
