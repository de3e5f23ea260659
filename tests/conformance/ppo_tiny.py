"""Two-layer models with a vocabulary of 64 and a PPO trainer over them: what the conformance tests run on.

A module and not a fixture, because the processes of the two-rank test build the same things.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import TaskType
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedModel

from train.peft_setup import lora_config
from train.ppo.config import PpoStageConfig
from train.ppo.models import build_policy_and_value
from train.ppo.rewards import RewardFunction, RewardModelScorer
from train.ppo.rollout import HfSampler, Sampler
from train.ppo.trainer import PpoTrainer

PAD, EOS, VOCABULARY = 0, 1, 64
LORA = {"r": 4, "lora_alpha": 8}
CALIBRATION = {"bias": 0.3}
TIMINGS = ("seconds", "tokens_per_second")


def model_config(**overrides: Any) -> LlamaConfig:
    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "bos_token_id": None,
        "tie_word_embeddings": False,
        "initializer_range": 0.15,
        "attention_dropout": 0.1,
    }
    return LlamaConfig(**(values | overrides))


def causal_lm() -> PreTrainedModel:
    """Random weights; the end token is made likely enough that about half of the short responses have it."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(model_config())
    with torch.no_grad():
        model.lm_head.weight[EOS] *= 6
    return model


def reward_model() -> PreTrainedModel:
    torch.manual_seed(1)
    return LlamaForSequenceClassification(model_config(num_labels=1)).eval()


def prompts(count: int = 24) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(2, VOCABULARY) for _ in range(rng.randrange(3, 12))] for _ in range(count)]


def ppo_config(**overrides: Any) -> PpoStageConfig:
    values = {
        "model": "policy",
        "reward": "reward",
        "data": "prompts",
        "total_episodes": 64,
        "batch_size": 8,
        "micro_batch_size": 3,
        "max_new_tokens": 10,
        "learning_rate": 1e-3,
        "max_grad_norm": None,
    }
    return PpoStageConfig(**(values | overrides))


def ppo_trainer(
    config: PpoStageConfig,
    *,
    reward: RewardFunction | None = None,
    sampler: Sampler | None = None,
    pad_id: int = PAD,
) -> PpoTrainer:
    """A trainer over fresh copies of the same random models."""
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if config.bf16 else "no")
    scorer = reward_model()
    lora = lora_config(config.peft, TaskType.CAUSAL_LM)
    torch.manual_seed(2)
    networks, reference = build_policy_and_value(causal_lm(), scorer, CALIBRATION, lora)
    return PpoTrainer(
        config,
        accelerator,
        networks,
        reference,
        reward or RewardModelScorer(scorer, CALIBRATION),
        sampler or HfSampler(EOS, pad_id, config.temperature),
        prompts(),
        eos_id=EOS,
        pad_id=pad_id,
    )


def without_timings(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith(TIMINGS)}


def weights(trainer: PpoTrainer) -> dict[str, Tensor]:
    """Copies of the trained parameters of policy and value network."""
    return {name: p.detach().clone() for name, p in trainer.networks.trainable().items()}


def randomise_adapter(trainer: PpoTrainer, scale: float = 0.3) -> None:
    """Give a zero-initialised LoRA policy an effect."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in trainer.networks.policy.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
