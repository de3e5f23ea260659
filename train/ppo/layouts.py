"""Builds the networks of a PPO run from models on disk or in memory; see `networks` for the layouts."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model, set_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from posttrain.errors import UserError
from posttrain.hashing import adapter_base, fingerprint_tokenizer, hash_path
from posttrain.models import (
    adapter_weight_names,
    check_score_head,
    is_adapter,
    load_causal_lm,
    load_reward_model,
    read_calibration,
)
from train.adapters import lora_config
from train.peft_config import PeftSettings
from train.ppo.config import PpoStageConfig
from train.ppo.networks import (
    POLICY_ADAPTER,
    REFERENCE_ADAPTER,
    REWARD_ADAPTER,
    VALUE_ADAPTER,
    Networks,
    ScoreHead,
    Trunk,
)

CONTINUED = (
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
)
"""Settings of `peft` that must be those of an SFT adapter that PPO continues."""

ValueKind = Literal["model", "head"]


@dataclass(frozen=True)
class RewardAdapter:
    """A reward model kept as an adapter: its LoRA settings and weights, its score head [1, D], its bias."""

    config: LoraConfig
    weights: dict[str, Tensor]
    score: Tensor
    bias: float


def load_networks(config: PpoStageConfig, model_dir: Path, reward_dir: Path | None) -> tuple[Networks, str]:
    """The networks that `config` asks for, and in words what they share.

    Raises UserError when the layout and the models on disk do not go together; the message says what does.
    """
    layout, obstacle = choose_layout(config, model_dir, reward_dir)
    if layout == "full":
        networks = _load_full(config, model_dir, reward_dir)
        return networks, "full" + (f" ({obstacle})" if config.layout == "auto" and config.peft else "")
    return _load_shared(config, model_dir, reward_dir), "shared"


def choose_layout(
    config: PpoStageConfig, model_dir: Path, reward_dir: Path | None
) -> tuple[Literal["full", "shared"], str | None]:
    """The layout of these models, and what stands in the way of sharing; no weight is loaded.

    Raises UserError when the layout and the models on disk do not go together.
    """
    obstacle = _obstacle_to_sharing(config, model_dir, reward_dir)
    if config.layout == "shared" and obstacle:
        raise UserError(f"layout: shared is not possible: {obstacle}. Use layout: full.")
    if config.layout == "full" or obstacle:
        if is_adapter(model_dir) and config.peft is not None:
            raise UserError(
                f"model: {config.model} is a LoRA adapter, which `peft` continues in layout: shared only. "
                "Merge it first (stage: merge), or set peft: null to train all weights of the merged model."
            )
        return "full", obstacle
    if is_adapter(model_dir):
        assert config.peft is not None
        settings = PeftConfig.from_pretrained(str(model_dir))
        assert isinstance(settings, LoraConfig)
        _check_continued(config.peft, settings, config.model)
    return "shared", None


def reads_policy_tokens(model_dir: Path, reward_dir: Path) -> bool:
    """Whether the reward model has the policy's tokenizer and template; otherwise responses are rendered anew
    for it, and it is none of the networks."""
    return fingerprint_tokenizer(reward_dir) == fingerprint_tokenizer(model_dir)


def make_ready(
    networks: Networks, config: PpoStageConfig, device: torch.device, prompts: list[list[int]], pad_id: int
) -> None:
    """Move freshly loaded networks to `device`, with the fast paths and the savings that `config` allows.

    prompts: two are tried, none empty; see `Networks.choose_paths`. Raises UserError for a model that
    `activation_checkpointing` does not fit.
    """
    networks.fuse_adapters()
    # Tried in float32, and before the device holds anything.
    networks.choose_paths(
        prompts[:2],
        pad_id,
        packing=device.type == "cpu",
        longest=config.max_prompt_tokens + config.max_new_tokens,
    )
    if config.bf16:
        networks.hold_frozen_in(torch.bfloat16)
    if config.activation_checkpointing:
        networks.checkpoint_activations()
    networks.to(device)


def _obstacle_to_sharing(config: PpoStageConfig, model_dir: Path, reward_dir: Path | None) -> str | None:
    """Why policy, value network, reference and reward model cannot be adapters on one base; None if they
    can.
    """
    if config.peft is None:
        return "it needs `peft`, since all weights of the policy are trained"
    if config.peft.modules_to_save:
        return f"peft.modules_to_save {config.peft.modules_to_save} are trained in full"
    if is_adapter(model_dir):
        sft = PeftConfig.from_pretrained(str(model_dir))
        if not isinstance(sft, LoraConfig) or sft.bias != "none" or sft.modules_to_save:
            return f"the SFT adapter ({config.model}) has trained more than LoRA matrices"
    if reward_dir is None:
        return None
    if not is_adapter(reward_dir):
        return f"the reward model ({config.reward}) is a full model, not a LoRA adapter"
    settings = PeftConfig.from_pretrained(str(reward_dir))
    names = adapter_weight_names(reward_dir)
    others = [name for name in names if "lora_" not in name and not name.endswith(".score.weight")]
    if not isinstance(settings, LoraConfig) or others:
        return f"the reward model ({config.reward}) has trained more than LoRA and its score head"
    base = adapter_base(model_dir) if is_adapter(model_dir) else model_dir
    other = adapter_base(reward_dir)
    if other.resolve() != base.resolve() and hash_path(other) != hash_path(base):
        return f"the reward model's base ({other}) is not the policy's ({base})"
    return None


def _load_full(config: PpoStageConfig, model_dir: Path, reward_dir: Path | None) -> Networks:
    sft_model = load_causal_lm(model_dir)
    lora = lora_config(config.peft, TaskType.CAUSAL_LM)
    if reward_dir is None:
        return full_networks(sft_model, None, 0.0, lora, config.value)
    reward_model, calibration = load_reward_model(reward_dir)
    return full_networks(sft_model, reward_model, calibration["bias"], lora, config.value)


def _load_shared(config: PpoStageConfig, model_dir: Path, reward_dir: Path | None) -> Networks:
    assert config.peft is not None
    reward = None if reward_dir is None else read_reward_adapter(reward_dir)
    lora = lora_config(config.peft, TaskType.CAUSAL_LM)
    assert lora is not None
    if not is_adapter(model_dir):
        return shared_networks(load_causal_lm(model_dir), lora, reward, config.value)
    settings = PeftConfig.from_pretrained(str(model_dir))
    assert isinstance(settings, LoraConfig)
    weights = load_peft_weights(str(model_dir), device="cpu")
    base = load_causal_lm(adapter_base(model_dir))
    return shared_networks(base, settings, reward, config.value, sft_weights=weights)


def _check_continued(asked: PeftSettings, settings: LoraConfig, model: str) -> None:
    differing = [
        f"{name} {getattr(asked, name)} (the adapter has {getattr(settings, name)})"
        for name in CONTINUED
        if getattr(asked, name) != getattr(settings, name)
    ]
    targets = settings.target_modules or []
    if asked.target_modules != "all-linear" and set(asked.target_modules) != set(targets):
        differing.append(f"target_modules {asked.target_modules} (the adapter has {sorted(targets)})")
    if differing:
        raise UserError(
            f"model: {model} is a LoRA adapter, which PPO trains on as it is, but peft asks for "
            f"{', '.join(differing)}. Give peft the adapter's values, or merge it first (stage: merge)."
        )


def read_reward_adapter(directory: Path) -> RewardAdapter:
    """The reward model in `directory`, a SEQ_CLS LoRA adapter. Raises UserError when it has no score head."""
    check_score_head(directory)
    settings = PeftConfig.from_pretrained(str(directory))
    assert isinstance(settings, LoraConfig)
    weights = load_peft_weights(str(directory), device="cpu")
    [name] = [name for name in weights if name.endswith(".score.weight")]
    score = weights.pop(name)
    return RewardAdapter(settings, weights, score, read_calibration(directory)["bias"])


def full_networks(
    sft_model: PreTrainedModel,
    reward_model: PreTrainedModel | None,
    bias: float,
    lora: LoraConfig | None,
    value: ValueKind = "model",
) -> Networks:
    """Policy and value network of their own weights.

    The reference is the base under a LoRA policy, otherwise a copy of the SFT model. The value network is a
    copy of the reward model, or of the SFT model with a head of zeros where there is none. Zero-initialised
    LoRA leaves the policy equal to the reference to the bit.
    """
    blank = copy.deepcopy(sft_model) if reward_model is None and value == "model" else None
    if lora is None:
        reference = Trunk(copy.deepcopy(sft_model).requires_grad_(False))
        policy = Trunk(sft_model.requires_grad_(True))
    else:
        adapted = get_peft_model(sft_model, lora, adapter_name=POLICY_ADAPTER)
        policy, reference = Trunk(adapted, POLICY_ADAPTER), Trunk(adapted, None)
    if value == "head":
        critic, critic_head = policy, _zero_head(policy.plain)
    elif blank is not None:
        critic, critic_head = Trunk(blank.requires_grad_(True)), _zero_head(blank)
    else:
        assert reward_model is not None
        copied = copy.deepcopy(reward_model).requires_grad_(True)
        critic, critic_head = Trunk(copied), ScoreHead(copied.get_submodule("score"), bias)
    if reward_model is None:
        return Networks(policy, critic, critic_head, reference, None, None)
    frozen = reward_model.requires_grad_(False)
    reward_head = ScoreHead(frozen.get_submodule("score"), bias)
    return Networks(policy, critic, critic_head, reference, Trunk(frozen), reward_head)


def shared_networks(
    base: PreTrainedModel,
    lora: LoraConfig,
    reward: RewardAdapter | None,
    value: ValueKind = "model",
    sft_weights: dict[str, Tensor] | None = None,
) -> Networks:
    """One frozen base with the adapters of policy, value network and reward model.

    sft_weights: weights of an SFT adapter with the settings `lora`: the policy starts from them and a frozen
    copy is the reference; without them the reference is the base.
    """
    model = get_peft_model(base.requires_grad_(False), lora, adapter_name=POLICY_ADAPTER)
    policy, reference = Trunk(model, POLICY_ADAPTER), Trunk(model, None)
    if sft_weights is not None:
        _load_adapter(model, POLICY_ADAPTER, sft_weights)
        model.add_adapter(REFERENCE_ADAPTER, lora)
        _load_adapter(model, REFERENCE_ADAPTER, sft_weights)
        reference = Trunk(model, REFERENCE_ADAPTER)
    reward_trunk, reward_head = None, None
    if reward is not None:
        settings = replace(reward.config, task_type=TaskType.CAUSAL_LM, modules_to_save=None)
        _add_adapter(model, REWARD_ADAPTER, settings, reward.weights)
        reward_trunk = Trunk(model, REWARD_ADAPTER)
        reward_head = _head_of(reward).requires_grad_(False)
    if value == "head":
        critic, critic_head = policy, _zero_head(base)
    elif reward is not None:
        _add_adapter(model, VALUE_ADAPTER, replace(settings, inference_mode=False), reward.weights)
        critic, critic_head = Trunk(model, VALUE_ADAPTER), _head_of(reward)
    else:
        model.add_adapter(VALUE_ADAPTER, lora)
        critic, critic_head = Trunk(model, VALUE_ADAPTER), _zero_head(base)
    model.set_adapter(POLICY_ADAPTER)
    for name, parameter in model.named_parameters():
        trained = f".{POLICY_ADAPTER}." in name or f".{VALUE_ADAPTER}." in name
        parameter.requires_grad_(trained and "lora_" in name)
    return Networks(policy, critic, critic_head, reference, reward_trunk, reward_head, "shared")


def _add_adapter(model: PeftModel, name: str, settings: LoraConfig, weights: dict[str, Tensor]) -> None:
    model.add_adapter(name, settings)
    _load_adapter(model, name, weights)


def _load_adapter(model: PeftModel, name: str, weights: dict[str, Tensor]) -> None:
    result: Any = set_peft_model_state_dict(model, dict(weights), adapter_name=name)
    missing = [key for key in result.missing_keys if f".{name}." in key]
    if missing or result.unexpected_keys:
        odd = (missing + list(result.unexpected_keys))[0]
        raise UserError(
            f"the {name} adapter does not fit the base model: {odd} is in one and not in the other"
        )


def _zero_head(model: PreTrainedModel) -> ScoreHead:
    head = nn.Linear(model.config.get_text_config().hidden_size, 1, bias=False)
    torch.nn.init.zeros_(head.weight)
    return ScoreHead(head, 0.0)


def _head_of(reward: RewardAdapter) -> ScoreHead:
    head = nn.Linear(reward.score.shape[1], 1, bias=False)
    with torch.no_grad():
        head.weight.copy_(reward.score)
    return ScoreHead(head, reward.bias)
