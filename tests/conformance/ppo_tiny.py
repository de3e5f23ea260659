"""Two-layer models with a vocabulary of 64 and a PPO trainer over them: what the conformance tests run on.

A module and not a fixture, because the processes of the two-rank test build the same things.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, TaskType, get_peft_model, get_peft_model_state_dict
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedModel

from train.adapters import lora_config
from train.ppo.advantages import summed_by
from train.ppo.batches import TokenBatch
from train.ppo.config import PpoStageConfig
from train.ppo.engines.base import RolloutEngine
from train.ppo.engines.hf import HfSampler
from train.ppo.experience import Experience
from train.ppo.layouts import RewardAdapter, full_networks, shared_networks
from train.ppo.networks import Networks
from train.ppo.reward_config import RewardsConfig
from train.ppo.reward_mix import Rewards
from train.ppo.reward_sources import NetworkReward, RewardBatch, RewardSource
from train.ppo.timing import Stopwatch
from train.ppo.trainer import PpoTrainer

PAD, EOS, VOCABULARY = 0, 1, 64
LORA = {"r": 4, "lora_alpha": 8}
BIAS = 0.3
CALIBRATION = {"bias": BIAS}
TIMINGS = ("seconds", "tokens_per_second", "mfu")
Score = Callable[[Tensor, Tensor], Tensor]

LAYOUTS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"peft": LORA, "layout": "full"},
    "shared": {"peft": LORA, "layout": "shared"},
    "head": {"peft": LORA, "layout": "shared", "value": "head"},
}
"""Every way in which policy, value network, reference and reward model can live together."""


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
    """A reward model of its own weights."""
    torch.manual_seed(1)
    return LlamaForSequenceClassification(model_config(num_labels=1)).eval()


def adapted_reward_model() -> tuple[PreTrainedModel, RewardAdapter]:
    """A reward model that is LoRA on the policy's base: merged, and as the adapter that it is."""
    model = reward_model()
    model.base_model.load_state_dict(causal_lm().base_model.state_dict())
    settings = LoraConfig(
        task_type=TaskType.SEQ_CLS, target_modules="all-linear", modules_to_save=["score"], **LORA
    )
    adapted = get_peft_model(model, settings)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    weights = {name: value.clone() for name, value in get_peft_model_state_dict(adapted).items()}
    score = weights.pop(next(name for name in weights if name.endswith("score.weight")))
    settings = copy.deepcopy(adapted.peft_config["default"])
    return adapted.merge_and_unload().eval(), RewardAdapter(settings, weights, score, BIAS)


def networks(config: PpoStageConfig) -> Networks:
    """Fresh copies of the same random models in the layout of `config`."""
    lora = lora_config(config.peft, TaskType.CAUSAL_LM)
    if config.layout == "shared":
        assert lora is not None
        adapter = adapted_reward_model()[1]
        torch.manual_seed(2)
        return shared_networks(causal_lm(), lora, adapter, config.value)
    scorer = reward_model()
    torch.manual_seed(2)
    return full_networks(causal_lm(), scorer, BIAS, lora, config.value)


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


@dataclass
class TokenReward:
    """A reward source over right-padded token ids and their mask."""

    function: Score
    name: str = "model.reward"
    weight: float = 1.0

    def __call__(self, batch: RewardBatch) -> Tensor:
        tokens = TokenBatch.build(batch.prompts, batch.responses, PAD, "cpu")
        lengths = torch.tensor(tokens.lengths).unsqueeze(1)
        mask_BT = torch.arange(tokens.input_ids_BT.shape[1]) < lengths
        return self.function(tokens.input_ids_BT, mask_BT.long())


def ppo_trainer(
    config: PpoStageConfig,
    *,
    reward: Score | None = None,
    engine: RolloutEngine | None = None,
    pad_id: int = PAD,
    packed: bool = True,
) -> PpoTrainer:
    """A trainer over fresh copies of the same random models."""
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if config.bf16 else "no")
    built = networks(config)
    built.fuse_adapters()
    built.choose_paths([[5, 9, 12], [7, 30, 31, 8]], PAD, packing=packed)
    source: RewardSource = (
        TokenReward(reward) if reward else NetworkReward(built, max_tokens=256, pad_id=pad_id)
    )
    return PpoTrainer(
        config,
        accelerator,
        built,
        Rewards(RewardsConfig(), [source], [], "cpu", summed_by(accelerator)),
        engine or HfSampler(EOS, pad_id, config.temperature),
        prompts(),
        eos_id=EOS,
        pad_id=pad_id,
    )


def experience_of(trainer: PpoTrainer) -> Experience:
    """A rollout of the trainer, scored."""
    return trainer.collect(trainer.generate(), Stopwatch(torch.device("cpu")))


def without_timings(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith(TIMINGS)}


def weights(trainer: PpoTrainer) -> dict[str, Tensor]:
    """Copies of the trained parameters of policy and value network."""
    return {name: p.detach().clone() for part in trainer.updater.trained.values() for name, p in part.items()}


def frozen_weights(trainer: PpoTrainer) -> dict[str, Tensor]:
    """Copies of everything that is not trained: reference, reward model, a shared base."""
    trained = set(weights(trainer))
    return {
        name: p.detach().clone() for name, p in trainer.networks.named_parameters() if name not in trained
    }


def randomise_adapter(trainer: PpoTrainer, scale: float = 0.3) -> None:
    """Give a zero-initialised LoRA policy an effect."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in trainer.updater.trained["policy"].items():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
