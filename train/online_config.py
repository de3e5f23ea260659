"""Configuration of the grpo and rloo stages (torch-free): several answers per prompt, scored.

The rewards are those of the ppo stage (``train/ppo/reward_config.py``).
"""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator

from posttrain.config import DatasetRef, ForeignModelRef
from train.config import TrainingStageConfig
from train.ppo.config import MissingEos
from train.ppo.reward_config import RewardsConfig


class OnlineConfig(TrainingStageConfig):
    """What grpo and rloo have in common. The reference is the model given: with LoRA the adapter switched
    off (of an adapter given, see peft.start), without LoRA a second, frozen copy; there is none where
    ``trainer.beta`` is 0."""

    data: DatasetRef = Field(
        description="Prompts: a dataset directory of kind prompt; its train split is used, and its eval "
        "split where trainer.eval_strategy asks for evaluations."
    )
    reward: ForeignModelRef | None = Field(
        None,
        description="Reward model (SEQ_CLS). It reads the very token ids that were sampled, end token "
        "included; one with a tokenizer or template of its own reads the dialogue rendered with that. null: "
        "only what `rewards` names.",
    )
    rewards: RewardsConfig = Field(
        RewardsConfig(),
        description="What is rewarded besides `reward`, and how the scores are added up, as in the ppo "
        "stage; `normalise` is not offered.",
    )
    missing_eos: MissingEos = Field(
        MissingEos(mode="none"),
        description="Responses that reached trainer.max_completion_length: scored as they are, without an "
        "end token, unless this says otherwise.",
    )
    max_prompt_tokens: int = Field(512, ge=1, description="Longer prompts are dropped, and counted.")
    micro_batch_tokens: int = Field(
        8192, ge=1, description="Tokens per forward pass of a reward model, padding included. Memory only."
    )

    @model_validator(mode="after")
    def _something_is_rewarded(self) -> Self:
        self.rewards.require_beside(self.reward)
        return self

    @model_validator(mode="after")
    def _no_running_moments(self) -> Self:
        if self.rewards.normalise != "none":
            raise ValueError(
                f"rewards.normalise is {self.rewards.normalise}: its running moments are not part of TRL's "
                "checkpoints, and advantages are relative to the group anyway. Remove it; "
                "trainer.scale_rewards (grpo) and trainer.normalize_advantages (rloo) set the scale"
            )
        return self


class GrpoConfig(OnlineConfig):
    """Group-relative policy optimisation: each answer against the mean of its prompt's answers."""

    trainer: dict[str, Any] = Field(
        {},
        description="Fields of trl.GRPOConfig. Defaults that differ from TRL's: disable_dropout true, "
        "activation_checkpointing false, bf16 false, save_steps 100, save_total_limit 2.",
    )


class RlooConfig(OnlineConfig):
    """REINFORCE leave-one-out: each answer against the mean of the prompt's other answers, KL in the
    reward."""

    trainer: dict[str, Any] = Field(
        {},
        description="Fields of trl.RLOOConfig. Defaults that differ from TRL's: disable_dropout true, "
        "activation_checkpointing false, bf16 false, save_steps 100, save_total_limit 2.",
    )
