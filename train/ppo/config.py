"""Configuration of the `ppo` stage (torch-free).

Where a meaning is the same as in TRL 1.12's PPOConfig, the name is the same too.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from posttrain.config import DatasetRef, ModelRef, StageConfig, StrictModel
from train.config import PeftSettings


class KlController(StrictModel):
    """How the coefficient of the KL penalty moves during the run."""

    type: Literal["fixed", "adaptive"] = Field(
        "fixed",
        description="`fixed` keeps kl_coef; `adaptive` is the controller of Ziegler et al. 2019, 2.2.",
    )
    target: float | None = Field(
        None,
        gt=0,
        description="KL to the reference to stay under, in nats per response. Required by `adaptive`; with "
        "`fixed` it is only reported against.",
    )
    setpoint: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Fraction of the target that the adaptive controller steers to. 1 is the paper: KL "
        "settles at the target and crosses it both ways; 0.7 leaves room to stay under it.",
    )
    horizon: int = Field(
        10_000,
        ge=1,
        description="Episodes over which the coefficient moves by a factor of e^0.2 when KL is far off: an "
        "update of n episodes multiplies it by 1 + clip(KL / target - 1, -0.2, 0.2) * n / horizon.",
    )

    @model_validator(mode="after")
    def _adaptive_needs_target(self) -> Self:
        if self.type == "adaptive" and self.target is None:
            raise ValueError(
                "an adaptive KL controller needs a target: set kl_controller.target (nats per response)"
            )
        return self


class MissingEos(StrictModel):
    """What a response that reached max_new_tokens without its end token scores."""

    mode: Literal["replace", "penalty", "none"] = Field(
        "replace",
        description="`replace`: the score becomes `value` (Stiennon 2020, N+ details); `penalty`: `value` is "
        "added to the score; `none`: the score is left alone.",
    )
    value: float = Field(-1.0, description="The score, or the (negative) amount added to it.")

    @model_validator(mode="after")
    def _penalty_is_negative(self) -> Self:
        if self.mode == "penalty" and self.value > 0:
            raise ValueError(
                f"missing_eos.value {self.value} would reward responses that never end: with mode "
                f"`penalty` it is added to the score, so write it as {-self.value}"
            )
        return self


class PpoStageConfig(StageConfig):
    """Optimise a policy against a reward model with PPO and a KL penalty to the SFT model."""

    model: ModelRef = Field(description="SFT model: the initial policy and, frozen, the reference.")
    reward: ModelRef = Field(description="Reward model (SEQ_CLS); it also initialises the value network.")
    data: DatasetRef = Field(
        description="Prompts: a dataset directory of kind prompt; its train split is used."
    )

    total_episodes: int = Field(1024, ge=1, description="Responses sampled in the whole run.")
    batch_size: int = Field(64, ge=1, description="Responses per rollout, over all processes.")
    num_ppo_epochs: int = Field(4, ge=1, description="Passes over each rollout (K).")
    num_mini_batches: int = Field(1, ge=1, description="Optimizer steps per pass; must divide batch_size.")
    micro_batch_size: int = Field(
        16,
        ge=1,
        description="Responses per forward pass on one process; memory only, it does not change the loss.",
    )
    max_prompt_tokens: int = Field(512, ge=1, description="Longer prompts are dropped, and counted.")
    max_new_tokens: int = Field(64, ge=1, description="Longest response in tokens, its end token included.")
    temperature: float = Field(
        1.0, gt=0, description="Divides the logits in sampling, policy, reference and update alike."
    )

    learning_rate: float = Field(3e-6, ge=0, description="Peak learning rate of the policy.")
    value_learning_rate: float | None = Field(
        None, ge=0, description="Of the value network; null: learning_rate."
    )
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="Schedule per rollout; linear and cosine fall to 0 at the end of the run."
    )
    warmup_steps: int = Field(0, ge=0, description="Rollouts of linear warm-up at the start.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay.")
    adam_epsilon: float = Field(
        1e-5, gt=0, description="AdamW's epsilon (1e-5 in the N+ details; PyTorch's own is 1e-8)."
    )
    max_grad_norm: float | None = Field(
        1.0, gt=0, description="Gradient clipping, policy and value each by itself; null: none."
    )

    gamma: float = Field(1.0, ge=0, le=1, description="Discount per token.")
    lam: float = Field(0.95, ge=0, le=1, description="Lambda of generalised advantage estimation.")
    cliprange: float = Field(0.2, gt=0, description="Clipping of the probability ratio.")
    cliprange_value: float = Field(0.2, gt=0, description="Clipping of the value around its rollout value.")
    vf_coef: float = Field(0.1, ge=0, description="Weight of the value loss.")
    whiten_rewards: bool = Field(
        False, description="Scale per-token rewards to variance 1; their mean stays."
    )
    reward_clip: float | None = Field(
        None, gt=0, description="Clip reward-model scores to [-c, c]; null: none."
    )
    missing_eos: MissingEos = Field(MissingEos(), description="Responses without an end token.")
    kl_coef: float = Field(
        0.05, ge=0, description="Weight (beta) of the per-token KL in the reward, at the start."
    )
    kl_controller: KlController = Field(KlController(), description="How kl_coef moves.")

    peft: PeftSettings | None = Field(
        None,
        description="LoRA for the policy (the value network is trained in full); null trains all weights.",
    )
    bf16: bool = Field(False, description="bfloat16 autocast; the master weights stay float32.")
    save_every: int = Field(10, ge=1, description="Rollouts between checkpoints.")
    save_total_limit: int = Field(2, ge=1, description="Checkpoints kept.")
    log_samples_every: int = Field(5, ge=1, description="Rollouts between entries of samples.jsonl.")

    @property
    def num_updates(self) -> int:
        """Rollouts in the run (the last one is full too, so total_episodes is rounded up)."""
        return -(-self.total_episodes // self.batch_size)

    @model_validator(mode="after")
    def _mini_batches_divide_the_batch(self) -> Self:
        if self.batch_size % self.num_mini_batches:
            raise ValueError(
                f"batch_size {self.batch_size} is not divisible by num_mini_batches {self.num_mini_batches}: "
                "every optimizer step of a rollout takes equally many responses"
            )
        return self

    @model_validator(mode="after")
    def _dropout_is_off(self) -> Self:
        if self.peft is not None and self.peft.lora_dropout:
            raise ValueError(
                f"peft.lora_dropout is {self.peft.lora_dropout}: under PPO dropout would make the ratio "
                "of the first update differ from 1, so leave it 0"
            )
        return self
