"""PPO: sample from the policy, score with the reward model, take clipped steps, stay near the SFT model.

    posttrain run configs/tiny/pipeline.yaml --only ppo

Follows Huang et al. 2024 (The N+ Implementation Details of RLHF with PPO, arXiv 2403.17031): separate
policy and value networks, value started from the reward model, k1 KL per token inside the reward, whitened
advantages, K = 4 passes, AdamW epsilon 1e-5, dropout off, missing end token scored -1. It departs from it
where noted:
- the score is added at the last response token, not one position later (`rewards.token_rewards`);
- KL can be held under a target by Ziegler's controller, with a margin (`kl_controller.setpoint`);
- the policy may be a LoRA adapter; the reference is then the SFT model under it, and the value network is
  still trained in full;
- gradients are clipped (`max_grad_norm`), policy and value each by itself;
- mini-batches keep their responses together over the K passes, only their order is shuffled.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import PeftModel, TaskType
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from data_prep.dataset import read_split
from posttrain.errors import PosttrainError, UserError
from posttrain.models import load_causal_lm, load_reward_model, load_tokenizer
from posttrain.rundir import atomic_write_text
from posttrain.stage import StageContext
from train.peft_setup import check_adapter, lora_config, quiet_libraries, refuse_adapter
from train.ppo.checkpoint import complete_checkpoints, load_checkpoint, save_checkpoint
from train.ppo.config import PpoStageConfig
from train.ppo.models import build_policy_and_value
from train.ppo.rewards import RewardModelScorer
from train.ppo.rollout import HfSampler, encode_prompts
from train.ppo.trainer import PpoTrainer


def run(config: PpoStageConfig, context: StageContext) -> dict[str, Any]:
    """Train and save the policy; returns the summary metrics. Resumes from the last complete checkpoint."""
    quiet_libraries()
    accelerator = build_accelerator(config.bf16)
    model_dir, reward_dir = context.path("model").resolve(), context.path("reward").resolve()
    if config.peft is not None:
        refuse_adapter(model_dir, config.model)

    with context.phase("load"):
        tokenizer = load_tokenizer(model_dir)
        rows = read_split(context.path("data"), "train", "prompt")
        prompts, dropped = encode_prompts(rows["prompt"], tokenizer, config.max_prompt_tokens)
        if dropped:
            context.console.print(
                f"ppo: dropped {dropped} of {len(rows)} prompts, longer than "
                f"max_prompt_tokens={config.max_prompt_tokens}"
            )
        sft_model = load_causal_lm(model_dir)
        reward_model, calibration = load_reward_model(reward_dir)
        for name, model in (("model", sft_model), ("reward", reward_model)):
            require_positions(name, model, config)
        lora = lora_config(config.peft, TaskType.CAUSAL_LM)
        networks, reference = build_policy_and_value(sft_model, reward_model, calibration, lora)

    trainer = PpoTrainer(
        config,
        accelerator,
        networks,
        reference,
        RewardModelScorer(reward_model.to(accelerator.device), calibration),
        HfSampler(tokenizer.eos_token_id, tokenizer.pad_token_id, config.temperature),
        prompts,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
    )
    with context.phase("train"):
        train(config, context, trainer, tokenizer)

    with context.phase("save"):
        if accelerator.is_main_process:
            save_policy(context, networks.policy, tokenizer, model_dir, sft_model.generation_config)
        accelerator.wait_for_everyone()
    return summary(config, context.metrics()) | {
        "prompts": len(prompts),
        "prompts_dropped": dropped,
        "trained_parameters": sum(p.numel() for p in networks.policy.parameters() if p.requires_grad),
    }


def train(
    config: PpoStageConfig, context: StageContext, trainer: PpoTrainer, tokenizer: PreTrainedTokenizerBase
) -> None:
    """All updates, from the last complete checkpoint on; metrics, samples and checkpoints as they come."""
    accelerator, parameters = trainer.accelerator, trainer.networks.trainable()
    checkpoints = complete_checkpoints(context.checkpoints)
    if checkpoints:
        trainer.load_state_dict(load_checkpoint(checkpoints[-1], parameters, accelerator))
        context.console.print(f"ppo: resuming after update {trainer.step} of {config.num_updates}")
    samples_file = context.run_dir / "samples.jsonl"
    if accelerator.is_main_process:
        context.rewind(trainer.step)
        rewind_samples(samples_file, trainer.step)
    with context.progress("ppo", total=config.num_updates) as bar:
        bar.advance(trainer.step)
        while trainer.step < config.num_updates:
            metrics = trainer.run_update()
            step = trainer.step
            last = step == config.num_updates
            if accelerator.is_main_process:
                context.log(step, **metrics)
                if step % config.log_samples_every == 0 or last:
                    append_samples(samples_file, trainer, tokenizer)
            if step % config.save_every == 0 and not last:
                state = trainer.state_dict()
                save_checkpoint(
                    context.checkpoints, step, parameters, state, accelerator, config.save_total_limit
                )
            bar.update(text=f"score {metrics['score']:.2f}  KL {metrics['kl']:.2f}")
            bar.advance()


def build_accelerator(bf16: bool) -> Accelerator:
    """An Accelerator for this run, whatever an earlier stage in the same process asked for.

    Raises PosttrainError when it does not see the processes that the launcher started.
    """
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision="bf16" if bf16 else "no", cpu=not torch.accelerator.is_available()
    )
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != expected:
        raise PosttrainError(
            f"the launcher started {expected} processes and accelerate sees {accelerator.num_processes}: "
            "start with torchrun, or with an accelerate config whose distributed_type matches"
        )
    return accelerator


def require_positions(name: str, model: PreTrainedModel, config: PpoStageConfig) -> None:
    """Raise UserError when prompt and response do not fit the model's context."""
    longest, limit = (
        config.max_prompt_tokens + config.max_new_tokens,
        model.config.get_text_config().max_position_embeddings,
    )
    if longest > limit:
        raise UserError(
            f"max_prompt_tokens {config.max_prompt_tokens} + max_new_tokens {config.max_new_tokens} = "
            f"{longest} tokens, but the model in `{name}` reads at most {limit}: lower one of the two"
        )


def rewind_samples(path: Path, step: int) -> None:
    """Drop the samples of updates after `step`, which will be made again."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        # A line cut short by a kill belongs to an update after the checkpoint.
        kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= step]
        atomic_write_text(path, "".join(kept))


def append_samples(path: Path, trainer: PpoTrainer, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the last rollout's first few responses, special tokens kept."""
    with open(path, "a", encoding="utf-8") as file:
        for sample in trainer.samples:
            row = {
                "step": trainer.step,
                "prompt": tokenizer.decode(sample.prompt, skip_special_tokens=False),
                "response": tokenizer.decode(sample.response, skip_special_tokens=False),
                "score": sample.score,
                "kl": sample.kl,
                "finished": sample.finished,
                "tokens": len(sample.response),
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def save_policy(
    context: StageContext,
    policy: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    model_dir: Path,
    generation_config: GenerationConfig,
) -> None:
    """model/: full weights, or the adapter with the absolute path of the model under it; tokenizer, template.

    Raises PosttrainError when the adapter on disk is not what was trained.
    """
    generation_config.eos_token_id = tokenizer.eos_token_id
    generation_config.pad_token_id = tokenizer.pad_token_id
    with context.staging("model") as directory:
        if isinstance(policy, PeftModel):
            policy.peft_config["default"].base_model_name_or_path = str(model_dir)
        policy.save_pretrained(str(directory))
        generation_config.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        (directory / "README.md").unlink(missing_ok=True)
        if isinstance(policy, PeftModel):
            whole = policy.peft_config["default"].to_dict()["modules_to_save"]
            check_adapter(directory, whole or [])


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
        "kl_under_target": None if target is None else result["kl"] <= target,
        "kl_coef": rows[-1]["kl_coef"],
        "episodes_per_second": rows[-1]["episodes"] / sum(row["seconds"] for row in rows),
    }
