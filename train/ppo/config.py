"""Configuration of the `ppo` stage (torch-free).

Where a meaning is the same as in TRL 1.12's PPOConfig, the name is the same too.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from posttrain.config import DatasetRef, ForeignModelRef, ModelRef, StageConfig, StrictModel
from posttrain.errors import Problem, UserError
from train.peft_config import PeftSettings
from train.ppo.engines.config import RolloutConfig
from train.ppo.reporting import check_reporters
from train.ppo.reward_config import RewardsConfig, check_functions


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


class HeldOut(StrictModel):
    """Evaluation on prompts of the eval split, with the same random numbers every time."""

    every: int = Field(
        5, ge=1, description="Rollouts between evaluations; the last rollout is followed by one."
    )
    num_prompts: int = Field(64, ge=1, description="Prompts, the first of the eval split.")
    max_kl: float | None = Field(
        None,
        gt=0,
        description="Highest KL to the reference, in nats per response, of a policy that `keep: best` may "
        "choose; null: kl_controller.target, and without that any.",
    )


class PpoStageConfig(StageConfig):
    """Optimise a policy against a reward model with PPO and a KL penalty to the SFT model."""

    model: ModelRef = Field(description="SFT model: the initial policy and, frozen, the reference.")
    reward: ForeignModelRef | None = Field(
        None,
        description="Reward model (SEQ_CLS); it also initialises the value network. null: only what "
        "`rewards` names, and a value head that starts at zero.",
    )
    data: DatasetRef = Field(
        description="Prompts: a dataset directory of kind prompt; its train split is used, and its eval "
        "split for `held_out`."
    )
    rewards: RewardsConfig = Field(
        RewardsConfig(), description="What is rewarded besides `reward`, and how the scores are combined."
    )
    rollout: RolloutConfig = Field(RolloutConfig(), description="The engine that generates responses.")
    layout: Literal["auto", "full", "shared"] = Field(
        "auto",
        description="`shared`: one frozen base in memory, with adapters for policy, value network and "
        "reward model (needs `peft` and a reward model that is a LoRA adapter on the same base). `full`: "
        "networks of their own. `auto`: shared where possible.",
    )
    value: Literal["model", "head"] = Field(
        "model",
        description="`model`: a value network beside the policy, started from the reward model. `head`: a "
        "value head on the policy's own hidden states: one forward and backward pass instead of two, but it "
        "starts from zero and its gradient reaches the policy.",
    )

    total_episodes: int = Field(1024, ge=1, description="Responses sampled in the whole run.")
    batch_size: int = Field(64, ge=1, description="Responses per rollout, over all processes.")
    num_ppo_epochs: int = Field(4, ge=1, description="Passes over each rollout (K).")
    num_mini_batches: int = Field(1, ge=1, description="Optimizer steps per pass; must divide batch_size.")
    micro_batch_tokens: int = Field(
        8192,
        ge=1,
        description="Tokens per forward pass on one process, padding included; responses of similar length "
        "go together. Memory only: it does not change the loss. Lower it when memory runs out.",
    )
    micro_batch_size: int | None = Field(
        None,
        ge=1,
        description="At most so many responses per forward pass; null: micro_batch_tokens decides.",
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
    dual_clip: float | None = Field(
        None,
        gt=1,
        description="Where the advantage is negative, the ratio counts as at most this (Ye et al. 2020 use "
        "3); null: unbounded.",
    )
    target_kl: float | None = Field(
        None,
        gt=0,
        description="Stop the passes over a rollout when the KL from the policy that wrote it, in nats per "
        "token, exceeds this; null: all num_ppo_epochs are taken.",
    )
    entropy_coef: float = Field(
        0.0, ge=0, description="Weight of an entropy bonus, per token, in the policy's loss."
    )
    loss_aggregation: Literal["token", "sequence"] = Field(
        "token",
        description="`token`: every response token of a mini-batch weighs the same; `sequence`: every "
        "response.",
    )
    truncated: Literal["keep", "mask_last", "mask"] = Field(
        "keep",
        description="Responses that reached max_new_tokens: `keep` trains on them, `mask_last` leaves the "
        "token they were cut at out of the losses, `mask` the whole response.",
    )
    truncated_importance_sampling: float | None = Field(
        None,
        gt=0,
        description="Weigh each token's policy loss by min(p_trainer / p_engine, this): for a rollout engine "
        "whose probabilities differ from the trainer's (`rollout_gap`). null: off.",
    )
    cliprange_value: float = Field(0.2, gt=0, description="Clipping of the value around its rollout value.")
    vf_coef: float = Field(0.1, ge=0, description="Weight of the value loss.")
    whiten_rewards: bool = Field(
        False, description="Scale per-token rewards to variance 1; their mean stays."
    )
    reward_clip: float | None = Field(
        None, gt=0, description="Clip the reward (all sources together) to [-c, c]; null: none."
    )
    missing_eos: MissingEos = Field(MissingEos(), description="Responses without an end token.")
    kl_coef: float = Field(
        0.05, ge=0, description="Weight (beta) of the per-token KL in the reward, at the start."
    )
    kl_in: Literal["reward", "loss"] = Field(
        "reward",
        description="Where the KL penalty acts: per token inside the reward (the paper), or as a term of the "
        "policy's loss.",
    )
    kl_estimator: Literal["k1", "k2", "k3"] = Field(
        "k1",
        description="Estimator of the penalty (Schulman, Approximating KL): k1 inside the reward, k2 or k3 "
        "in the loss.",
    )
    kl_controller: KlController = Field(KlController(), description="How kl_coef moves.")

    peft: PeftSettings | None = Field(
        None,
        description="LoRA for the policy, and in layout shared for the value network too; null trains all "
        "weights.",
    )
    held_out: HeldOut | None = Field(
        None, description="Scoring of the policy on prompts it is not trained on; null: none."
    )
    keep: Literal["last", "best"] = Field(
        "last",
        description="`best`: save the policy of the held-out evaluation with the highest reward among those "
        "under `held_out.max_kl`; needs `held_out`.",
    )
    report_to: list[str] = Field(
        [],
        description="Where to send metrics besides metrics.jsonl: tensorboard, wandb, mlflow, trackio, ...",
    )
    bf16: bool = Field(
        False,
        description="bfloat16 autocast. Trained weights stay float32; the matrices of frozen linear layers "
        "are held in bfloat16, which changes no result and halves their memory.",
    )
    activation_checkpointing: bool = Field(
        False,
        description="Compute each layer again in the backward pass instead of keeping its activations: less "
        "memory, about a third more arithmetic in the update, the same gradients.",
    )
    save_every: int = Field(10, ge=1, description="Rollouts between checkpoints.")
    save_total_limit: int = Field(2, ge=1, description="Checkpoints kept.")
    log_samples_every: int = Field(5, ge=1, description="Rollouts between entries of samples.jsonl.")

    @property
    def num_updates(self) -> int:
        """Rollouts in the run (the last one is full too, so total_episodes is rounded up)."""
        return -(-self.total_episodes // self.batch_size)

    @property
    def lengths(self) -> dict[str, int]:
        """The longest prompt and response in tokens, by field."""
        return {"max_prompt_tokens": self.max_prompt_tokens, "max_new_tokens": self.max_new_tokens}

    def check_processes(self, count: int) -> None:
        """Raise UserError unless a rollout can be divided among so many processes."""
        share = count * self.num_mini_batches
        if self.batch_size % share:
            raise UserError(
                f"batch_size {self.batch_size} is not divisible by {count} processes x "
                f"num_mini_batches {self.num_mini_batches}; use a multiple of {share}"
            )

    @model_validator(mode="after")
    def _mini_batches_divide_the_batch(self) -> Self:
        if self.batch_size % self.num_mini_batches:
            raise ValueError(
                f"batch_size {self.batch_size} is not divisible by num_mini_batches {self.num_mini_batches}: "
                "every optimizer step of a rollout takes equally many responses"
            )
        return self

    @model_validator(mode="after")
    def _k1_has_no_gradient(self) -> Self:
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise ValueError(
                "kl_estimator k1 in the loss pulls nowhere: the expected gradient of log p/q under p is 0. "
                "Use k2 or k3 with kl_in: loss, or kl_in: reward"
            )
        return self

    @model_validator(mode="after")
    def _best_needs_held_out(self) -> Self:
        if self.keep == "best" and self.held_out is None:
            raise ValueError("keep: best compares held-out evaluations: set held_out, for example {every: 5}")
        return self

    @model_validator(mode="after")
    def _coefficient_stays_positive(self) -> Self:
        controller = self.kl_controller
        if controller.type == "adaptive" and 5 * controller.horizon <= self.batch_size:
            raise ValueError(
                f"kl_controller.horizon {controller.horizon} is too short for batch_size "
                f"{self.batch_size}: one "
                "rollout could move the coefficient below 0, which pays for KL. Use more than a fifth of "
                "batch_size"
            )
        return self

    @model_validator(mode="after")
    def _biases_stay(self) -> Self:
        if self.peft is not None and self.peft.bias != "none":
            raise ValueError(
                f"peft.bias is {self.peft.bias}: trained biases are part of the base, which is also the "
                "reference, and it would move with the policy. Leave it none, or set peft: null"
            )
        return self

    @model_validator(mode="after")
    def _something_is_rewarded(self) -> Self:
        self.rewards.require_beside(self.reward)
        return self

    @model_validator(mode="after")
    def _dropout_is_off(self) -> Self:
        if self.peft is not None and self.peft.lora_dropout:
            raise ValueError(
                f"peft.lora_dropout is {self.peft.lora_dropout}: under PPO dropout would make the ratio "
                "of the first update differ from 1, so leave it 0"
            )
        return self


def check(config: PpoStageConfig, where: str) -> list[Problem]:
    """Mistakes that pydantic cannot see: reward functions and trackers that are not there."""
    problems = check_functions(config.rewards, f"{where}.rewards")
    try:
        check_reporters(config.report_to)
    except UserError as error:
        problems.append(Problem(f"{where}.report_to", str(error)))
    return problems
