"""From a stage's settings to what a prediction is asked for: batch, lengths, types, other models."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers.training_args import OptimizerNames

from posttrain.config import StageConfig, find_references
from posttrain.errors import UserError
from posttrain.stage_file import StageBlock
from train.adapters import torch_dtype
from train.base_config import BaseConfig
from train.config import (
    CpoConfig,
    DpoConfig,
    KtoConfig,
    OrpoConfig,
    PretrainConfig,
    RewardConfig,
    TrainingStageConfig,
)
from train.online_config import OnlineConfig
from train.peft_setup import length_limit
from train.plan.lengths import Lengths, read_lengths
from train.plan.lookup import FoundModel, Stages, base_config, find_model, trained_adapter
from train.plan.request import Device, Layout, Request, RewardModel, Rollout
from train.ppo.config import PpoStageConfig
from train.ppo.engines.continuous import DTYPES
from train.trainer_args import build_args

PAIRS = (RewardConfig, DpoConfig, OrpoConfig, CpoConfig)
TrainedConfig = TrainingStageConfig | PpoStageConfig | BaseConfig
TRAINED = (TrainingStageConfig, PpoStageConfig, BaseConfig)


@dataclass(frozen=True)
class Described:
    """A stage in numbers. args: TRL's arguments, None of ppo and base. notes: what was assumed."""

    block: StageBlock
    model: FoundModel
    lengths: Lengths
    request: Request
    args: Any
    notes: tuple[str, ...]


def is_trained(config: StageConfig) -> bool:
    """Whether the stage trains a model, so that there is something to plan."""
    return isinstance(config, TRAINED)


def describe(block: StageBlock, stages: Stages, device: Device, devices: int) -> Described:
    """Read what is there of a stage's model and data. Raises UserError when its model cannot be found, or its
    trainer arguments are ones that TRL refuses.
    """
    config = block.config
    if isinstance(config, BaseConfig):
        return _base(block, config, device)
    assert isinstance(config, (TrainingStageConfig, PpoStageConfig))
    model = find_model(config.model, stages)
    if isinstance(config, RewardConfig) and config.head_only:
        raise UserError(
            f"{block.name}: head_only is not planned. It holds the model once, without gradients, and a step "
            "costs next to nothing"
        )
    if isinstance(config, PpoStageConfig):
        return _ppo(block, config, model, stages, device, devices)
    try:
        args = build_args(config, Path("unused"))
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        raise UserError(f"{block.name}: TRL refuses the trainer arguments ({error})") from error
    limit = _limit(config, model, args)
    args.max_length = limit
    drops = isinstance(config, (*PAIRS, KtoConfig, OnlineConfig))
    [data] = [ref.value for ref in find_references(config) if ref.field == "data"]
    lengths = read_lengths(
        block.kind,
        data,
        model.directory,
        limit,
        config.seed,
        drops=drops,
        assistant_only=bool(config.trainer.get("assistant_only_loss", True)),
    )
    request = _trl_request(block.kind, config, model, args, lengths, device)
    rewards: tuple[RewardModel, ...] = ()
    if isinstance(config, OnlineConfig):
        rewards = _reward_models(config, stages, ())
        request = _online_request(request, config, args, lengths, rewards)
    notes = [*model.notes, *([lengths.note] if lengths.note else [])]
    if isinstance(config, RewardConfig) and config.folds:
        notes.append(f"the {config.folds} folds, each about as long as the run itself, are not counted")
    optimizer = OptimizerNames(args.optim).value
    if optimizer not in ("adamw_torch", "adamw_torch_fused"):
        notes.append(f"optim {optimizer} is counted as AdamW with two float32 moments")
    if isinstance(config, OnlineConfig) and args.use_vllm:
        notes.append("the memory that vLLM reserves is not counted")
    return Described(block, model, lengths, request, args, tuple(notes))


def _limit(config: TrainingStageConfig, model: FoundModel, args: Any) -> int:
    if isinstance(config, OnlineConfig):
        return config.max_prompt_tokens
    return length_limit(model.config, config.trainer.get("max_length"))


def _trl_request(
    kind: str, config: TrainingStageConfig, model: FoundModel, args: Any, lengths: Lengths, device: Device
) -> Request:
    rows = args.per_device_train_batch_size * (2 if isinstance(config, PAIRS) else 1)
    packed = isinstance(config, PretrainConfig) or kind == "sft"
    packed = packed and bool(args.packing)
    precomputed = config.trainer.get("precompute_ref_log_probs", False)
    reference = isinstance(config, (DpoConfig, KtoConfig)) and not precomputed
    if isinstance(config, OnlineConfig):
        reference = args.beta != 0.0
    length = args.max_length if packed else lengths.longest
    labelled = None
    if kind == "sft" and device == "cpu" and not args.torch_compile:
        labelled = lengths.labelled(rows, length)
        if packed and lengths.labels:
            share = sum(lengths.labels) / len(lengths.labels) / lengths.mean
            labelled = int(min(share, 1.0) * rows * length)
    autocast = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    return Request(
        kind=kind,
        config=model.config,
        peft=trained_adapter(config.peft, model),
        rows=rows,
        length=length,
        labelled=labelled,
        device=device,
        weights=torch_dtype(config.dtype),
        autocast=autocast,
        checkpointing=bool(args.activation_checkpointing),
        attention=config.attn_implementation,
        packed=packed,
        accumulates=args.gradient_accumulation_steps > 1,
        reference=reference,
    )


def _online_request(
    request: Request, config: OnlineConfig, args: Any, lengths: Lengths, rewards: tuple[RewardModel, ...]
) -> Request:
    response = args.max_completion_length
    rows = args.per_device_train_batch_size * args.steps_per_generation
    return replace(
        request,
        length=lengths.longest + response,
        rollout=Rollout(lengths.longest, response, rows),
        rewards=rewards,
    )


def _reward_models(
    config: OnlineConfig | PpoStageConfig, stages: Stages, own: tuple[RewardModel, ...]
) -> tuple[RewardModel, ...]:
    members = [] if config.rewards.ensemble is None else list(config.rewards.ensemble.models)
    names = members if own or config.reward is None else [config.reward, *members]
    found = [find_model(name, stages) for name in names]
    return own + tuple(RewardModel(model.config, config.micro_batch_tokens) for model in found)


def _ppo(
    block: StageBlock,
    config: PpoStageConfig,
    model: FoundModel,
    stages: Stages,
    device: Device,
    devices: int,
) -> Described:
    config.check_processes(devices)
    lengths = read_lengths(
        "ppo", config.data, model.directory, config.max_prompt_tokens, config.seed, drops=True
    )
    longest = lengths.longest + config.max_new_tokens
    share = max(config.batch_size // config.num_mini_batches // devices, 1)
    rows = min(share, max(config.micro_batch_tokens // longest, 1), config.micro_batch_size or share)
    reward = None if config.reward is None else find_model(config.reward, stages)
    layout = ppo_layout(config, model, reward)
    tokens = min(config.micro_batch_tokens, longest * config.batch_size)
    own: tuple[RewardModel, ...] = ()
    if reward is not None:
        own = (RewardModel(reward.config, tokens, reward.adapter if layout == "shared" else None),)
    request = Request(
        kind="ppo",
        config=model.config,
        peft=config.peft,
        rows=rows,
        length=longest,
        device=device,
        autocast=torch.bfloat16 if config.bf16 else None,
        checkpointing=config.activation_checkpointing,
        padded=False,
        accumulates=rows < share,
        reference=True,
        rollout=_rollout(config, lengths, devices),
        rewards=_reward_models(config, stages, own),
        layout=layout,
        value=config.value,
        entropy=config.entropy_coef > 0,
    )
    notes = [*model.notes, *([lengths.note] if lengths.note else []), f"layout {layout}"]
    if config.rollout.engine == "vllm":
        notes.append("the memory that rollout.vllm reserves is not counted")
    return Described(block, model, lengths, request, None, tuple(notes))


def _rollout(config: PpoStageConfig, lengths: Lengths, devices: int) -> Rollout:
    copied = None
    if config.rollout.engine == "continuous":
        name = config.rollout.continuous.dtype
        copied = DTYPES[name] if name else torch.bfloat16 if config.bf16 else None
    rows = min(config.rollout.max_rows, max(config.batch_size // devices, 1))
    return Rollout(lengths.longest, config.max_new_tokens, rows, copied)


def ppo_layout(config: PpoStageConfig, model: FoundModel, reward: FoundModel | None) -> Layout:
    """The layout that ppo would choose (`train.ppo.layouts.choose_layout`) once its models are made."""
    if config.layout != "auto":
        return config.layout
    if config.peft is None or config.peft.modules_to_save:
        return "full"
    if reward is None:
        return "shared"
    same = reward.adapter is not None and _same(reward.base, model.base, config.model)
    return "shared" if same else "full"


def _same(reward_base: str, *bases: str) -> bool:
    return any(_place(reward_base) == _place(base) for base in bases)


def _place(ref: str) -> str:
    path = Path(ref).expanduser()
    return str((path / "model" if (path / "model").is_dir() else path).resolve()) if path.exists() else ref


def _base(block: StageBlock, config: BaseConfig, device: Device) -> Described:
    model = FoundModel(base_config(config), None)
    lengths = Lengths(
        None, config.max_length, config.max_length, False, "lengths are max_length, an upper bound"
    )
    request = Request(
        kind="base",
        config=model.config,
        peft=None,
        rows=config.batch_size,
        length=config.max_length,
        device=device,
        autocast=torch.bfloat16 if config.bf16 else None,
    )
    notes = [
        "vocabulary: vocab_size" + (", keep_whole adds to it" if config.keep_whole else ""),
        lengths.note,
    ]
    return Described(block, model, lengths, request, None, tuple(notes))
