"""PPO: sample from the policy, score with the reward model, take clipped steps, stay near the SFT model.

    posttrain run configs/tiny/pipeline.yaml --only ppo

Follows Huang et al. 2024 (The N+ Implementation Details of RLHF with PPO, arXiv 2403.17031): separate
policy and value networks, value started from the reward model, k1 KL per token inside the reward, whitened
advantages, K = 4 passes, AdamW epsilon 1e-5, dropout off, missing end token scored -1, logits divided by the
sampling temperature, log-probabilities of the rollout recomputed by the trainer. It departs from it where
noted:
- the score is added at the last response token, not one position later (`rewards.token_rewards`);
- KL can be held under a target by Ziegler's controller, with a margin (`kl_controller.setpoint`);
- policy and value network may be LoRA adapters on one frozen base (`layout: shared`, see `networks`);
- gradients are clipped (`max_grad_norm`), policy and value each by itself;
- mini-batches keep their responses together over the K passes, only their order is shuffled.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from posttrain.errors import PosttrainError, UserError
from posttrain.hashing import adapter_base
from posttrain.models import is_adapter, load_tokenizer
from posttrain.stage import StageContext
from train.peft_setup import check_adapter, quiet_libraries
from train.ppo.advantages import summed_by
from train.ppo.config import PpoStageConfig
from train.ppo.engines.base import SamplingParams
from train.ppo.engines.build import build_engine
from train.ppo.held_out import HeldOutEvaluation
from train.ppo.layouts import load_networks, make_ready, reads_policy_tokens
from train.ppo.loop import PpoLoop
from train.ppo.networks import POLICY_ADAPTER, Networks
from train.ppo.reward_config import RewardsConfig
from train.ppo.reward_mix import Rewards, build_rewards
from train.ppo.reward_sources import NetworkReward, RewardSource, load_reward_models
from train.ppo.trainer import PpoTrainer
from train.prompts import Prompts, check_positions, end_with, read_prompts


def run(config: PpoStageConfig, context: StageContext) -> dict[str, Any]:
    """Train and save the policy; returns the summary metrics. Resumes from the last complete checkpoint.

    Raises UserError when models, prompts and settings do not go together, RequeueError after SIGTERM.
    """
    quiet_libraries()
    accelerator = build_accelerator(config.bf16)
    with context.phase("load"):
        tokenizer = load_tokenizer(context.path("model"))
        prompts = read_prompts(context, tokenizer, "train", config.max_prompt_tokens, "ppo")
        networks = build_networks(config, context, accelerator, prompts, tokenizer)
        generation_config = end_with(networks.policy_trunk.plain, tokenizer)
        engine = build_engine(
            config.rollout,
            SamplingParams(config.max_new_tokens, config.temperature),
            networks.policy_model,
            tokenizer,
            accelerator,
            max_prompt_tokens=config.max_prompt_tokens,
        )
        scorers = build_scorers(config, context, networks, tokenizer, accelerator)
        trainer = PpoTrainer(
            config,
            accelerator,
            networks,
            scorers(config.rewards, prompts.rows),
            engine,
            prompts.ids,
            eos_id=tokenizer.eos_token_id,
            pad_id=tokenizer.pad_token_id,
        )
        held_out = None
        if config.held_out is not None:
            limit = config.held_out.num_prompts
            unseen = read_prompts(context, tokenizer, "eval", config.max_prompt_tokens, "ppo", limit)
            # Not normalised: evaluations are compared with each other, and running moments move.
            plain = config.rewards.model_copy(update={"normalise": "none"})
            held_out = HeldOutEvaluation(trainer, scorers(plain, unseen.rows), unseen.ids)

    loop = PpoLoop(config, context, trainer, tokenizer, held_out)
    try:
        with context.phase("train"):
            loop.train()
    finally:
        engine.close()

    with context.phase("save"):
        if accelerator.is_main_process:
            save_policy(context, networks, tokenizer, generation_config)
        accelerator.wait_for_everyone()
    return summary(config, context.metrics()) | {
        "prompts": len(prompts.ids),
        "prompts_dropped": prompts.dropped,
        "layout": networks.layout,
        "trained_parameters": {
            part: sum(p.numel() for p in parameters.values())
            for part, parameters in trainer.updater.trained.items()
        },
        "kept_update": loop.best.step if config.keep == "best" and loop.best.score is not None else None,
    }


def build_networks(
    config: PpoStageConfig,
    context: StageContext,
    accelerator: Accelerator,
    prompts: Prompts,
    tokenizer: PreTrainedTokenizerBase,
) -> Networks:
    """Policy, value network, reference and, if it reads the policy's tokens, the reward model, on the
    device.
    """
    model_dir = context.path("model").resolve()
    reward_dir = None if config.reward is None else context.path("reward").resolve()
    if reward_dir is not None and not reads_policy_tokens(model_dir, reward_dir):
        context.console.print(
            "ppo: the reward model has a tokenizer or template of its own: responses are rendered anew for "
            "it, and the value network starts from the policy"
        )
        reward_dir = None
    networks, layout = load_networks(config, model_dir, reward_dir)
    context.console.print(f"ppo: layout {layout}")
    for name, trunk in (("model", networks.policy_trunk), ("reward", networks.reward_trunk)):
        if trunk is not None:
            require_positions(name, trunk.plain.config, config)
    assert isinstance(tokenizer.pad_token_id, int)
    make_ready(networks, config, accelerator.device, prompts.ids, tokenizer.pad_token_id)
    if not networks.fused:
        context.console.print("ppo: this model's logits are not one matrix product; all of them are computed")
    return networks


def build_scorers(
    config: PpoStageConfig,
    context: StageContext,
    networks: Networks,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
) -> Callable[[RewardsConfig, Dataset], Rewards]:
    """A function that gives the rewards of responses to the prompts of a data set."""
    own: list[RewardSource] = []
    if networks.reward_trunk is not None:
        own.append(NetworkReward(networks, config.micro_batch_tokens, tokenizer.pad_token_id))
    fields = config.rewards.fields_beside(None if own else config.reward)
    loaded = load_reward_models(fields, context.path, context.path("model"))
    for member in loaded:
        if member.tokenizer is None:
            require_positions(member.field, member.model.config, config)

    def scorers(rewards: RewardsConfig, rows: Dataset) -> Rewards:
        return build_rewards(
            rewards,
            own,
            loaded,
            tokenizer,
            rows,
            max_tokens=config.micro_batch_tokens,
            device=accelerator.device,
            reduce=summed_by(accelerator),
        )

    return scorers


def build_accelerator(bf16: bool) -> Accelerator:
    """An Accelerator for this run, whatever an earlier stage in the same process asked for.

    Raises PosttrainError when it does not see the processes that the launcher started.
    """
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision="bf16" if bf16 else "no", cpu=not torch.cuda.is_available())
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != expected:
        raise PosttrainError(
            f"the launcher started {expected} processes and accelerate sees {accelerator.num_processes}: "
            "start with torchrun, or with an accelerate config whose distributed_type matches"
        )
    if accelerator.distributed_type not in (
        DistributedType.NO,
        DistributedType.MULTI_CPU,
        DistributedType.MULTI_GPU,
    ):
        raise UserError(
            f"the launch configuration asks for {accelerator.distributed_type.value}, which PPO does not "
            "shard with: launch it as plain multi-GPU (DDP); layout: shared keeps memory down"
        )
    return accelerator


def require_positions(name: str, model: PreTrainedConfig, config: PpoStageConfig) -> None:
    """Raise UserError when prompt and response do not fit the context of a model of this configuration."""
    check_positions(name, model, config.lengths)


def save_policy(
    context: StageContext,
    networks: Networks,
    tokenizer: PreTrainedTokenizerBase,
    generation_config: GenerationConfig,
) -> None:
    """model/: full weights, or the adapter with the absolute path of the model under it; tokenizer, template.

    Raises PosttrainError when the adapter on disk is not what was trained.
    """
    policy, model_dir = networks.policy_model, context.path("model").resolve()
    with context.staging("model") as directory:
        if isinstance(policy, PeftModel):
            settings = policy.peft_config[POLICY_ADAPTER]
            base = adapter_base(model_dir) if is_adapter(model_dir) else model_dir
            settings.base_model_name_or_path = str(base)
            policy.save_pretrained(str(directory), selected_adapters=[POLICY_ADAPTER])
            check_adapter(directory, settings.to_dict()["modules_to_save"] or [])
        else:
            policy.save_pretrained(str(directory))
        generation_config.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        (directory / "README.md").unlink(missing_ok=True)


def summary(config: PpoStageConfig, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The run in a few numbers; `score`, `kl`, `eos_rate`, ... are means over the last tenth of the
    updates.
    """
    tail = rows[-max(1, len(rows) // 10) :]
    target = config.kl_controller.target
    result = {
        name: sum(row[name] for row in tail) / len(tail)
        for name in ("score", "kl", "rlhf_reward", "entropy", "eos_rate", "response_length")
    }
    return result | {
        "updates": len(rows),
        "episodes": rows[-1]["episodes"],
        "score_first": rows[0]["score"],
        "kl_max": max(row["kl"] for row in rows),
        "kl_target": target,
        "kl_under_target": None if target is None else result["kl"] < target,
        "kl_coef": rows[-1]["kl_coef"],
        "episodes_per_second": rows[-1]["episodes"] / sum(row["seconds"] for row in rows),
    }
