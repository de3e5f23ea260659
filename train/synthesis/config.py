"""Configuration of the synthesize stage (torch-free)."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from posttrain.config import DatasetRef, FileRef, ForeignModelRef, ModelRef, RunRef, StageConfig, StrictModel
from posttrain.errors import Problem
from train.config import Dtype
from train.ppo.engines.config import RolloutConfig
from train.ppo.reward_config import RewardsConfig, check_functions

PLACEHOLDERS = {"score": ("prompt", "answer"), "pairwise": ("prompt", "answer_a", "answer_b")}
"""What a judge's prompt file has to hold, in braces."""


class JudgeConfig(StrictModel):
    """A language model behind an OpenAI-compatible endpoint that says how good an answer is.

    It replies with its verdict in double brackets, as the judges of MT-Bench do (Zheng et al. 2023,
    2306.05685): [[7]], or [[A]], [[B]] and [[C]] for a tie.
    """

    base_url: str = Field(
        pattern=r"^https?://[^@\s]+$",
        description="Address of the endpoint up to /v1, without a key or a password in it.",
    )
    model: str = Field(min_length=1, description="Name of the judging model at that endpoint.")
    prompt: FileRef = Field(
        description="Text file with the instructions. `{prompt}` and `{answer}` in it are replaced; for mode "
        "pairwise `{prompt}`, `{answer_a}` and `{answer_b}`."
    )
    mode: Literal["score", "pairwise"] = Field(
        "score",
        description="score: a number from 1 to 10 for each answer. pairwise: every two answers to a prompt "
        "are compared in both orders, n (n - 1) requests a prompt; the score is the share won, a tie half.",
    )
    api_key_env: str | None = Field(
        None,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="Environment variable that holds the key; null: the endpoint asks for none.",
    )
    temperature: float | None = Field(0.0, ge=0, description="Of the judge; null: the endpoint's default.")
    max_tokens: int | None = Field(
        512, ge=1, description="Longest reply of the judge; null: the endpoint's default."
    )
    timeout: float = Field(60.0, gt=0, description="Seconds to wait for a reply.")
    max_retries: int = Field(
        5,
        ge=0,
        description="Further attempts after status 408, 409, 429 or 5xx, a timeout or a lost connection, "
        "with "
        "growing pauses; and after a reply without a verdict.",
    )
    concurrency: int = Field(8, ge=1, description="Requests at the same time.")


class PreferenceSelection(StrictModel):
    """Which two answers to a prompt become a pair. The margin, chosen less rejected score, is in its meta."""

    pairs: Literal["best_worst", "best_random", "all_ranked"] = Field(
        "best_worst",
        description="best_worst: the highest score against the lowest. best_random: against one drawn from "
        "those that score less. all_ranked: every two answers whose scores differ, up to n (n - 1) / 2 "
        "pairs.",
    )
    min_margin: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="Pairs whose scores differ by less are left out."
    )


class ConversationSelection(StrictModel):
    """Which answers become demonstrations (rejection sampling)."""

    top_k: int = Field(1, ge=1, description="At most so many distinct answers to a prompt, the best.")
    min_score: float | None = Field(
        None, allow_inf_nan=False, description="Answers that score less are left out; null: none is."
    )


SAMPLING = (
    *("model", "data", "reward", "rewards", "judge", "n", "temperature", "top_p", "max_prompt_tokens"),
    *("max_new_tokens", "train_prompts", "eval_prompts", "rollout", "dtype", "batch_size"),
    "micro_batch_tokens",
)
"""The fields that mean nothing where `answers` names answers that are already there."""


class SynthesizeConfig(StageConfig):
    """Sample n answers to every prompt, score them, and keep the best: pairs or demonstrations."""

    kind: Literal["preference", "conversation"] = Field(
        description="preference: pairs of a better and a worse answer, for dpo, reward and the like. "
        "conversation: the best answers as demonstrations, for sft (rejection sampling)."
    )
    model: ModelRef | None = Field(None, description="The policy that answers.")
    data: DatasetRef | None = Field(
        None,
        description="Prompts: a dataset directory of kind prompt. What is made of a prompt stays on its "
        "side of "
        "the split.",
    )
    answers: RunRef | None = Field(
        None,
        description="A finished synthesize run whose scored answers are selected from, instead of sampling "
        "anew; in place of `model`, `data` and a scorer.",
    )
    reward: ForeignModelRef | None = Field(
        None,
        description="Reward model (SEQ_CLS) that scores the very token ids that were sampled; one with a "
        "tokenizer or template of its own reads the dialogue rendered with that.",
    )
    rewards: RewardsConfig = Field(
        RewardsConfig(),
        description="Functions, further reward models and penalties in the score, as in the ppo stage; "
        "`normalise` is not offered. What has weight 0 is recorded and does not select.",
    )
    judge: JudgeConfig | None = Field(None, description="A judge in place of `reward` and `rewards`.")
    n: int = Field(8, ge=1, description="Answers sampled for each prompt.")
    temperature: float = Field(1.0, gt=0, description="Divides the logits.")
    top_p: float = Field(
        1.0, gt=0, le=1, description="Nucleus sampling; below 1 only with rollout.engine hf."
    )
    max_prompt_tokens: int = Field(512, ge=1, description="Longer prompts are dropped, and counted.")
    max_new_tokens: int = Field(256, ge=1, description="Longest answer in tokens, its end token included.")
    train_prompts: int | None = Field(
        None, ge=1, description="At most so many prompts of the train split, the first; null: all."
    )
    eval_prompts: int | None = Field(None, ge=1, description="At most so many of the eval split; null: all.")
    truncated: Literal["drop", "mark"] = Field(
        "drop",
        description="Answers that reached max_new_tokens without their end token: drop leaves them out, and "
        "counts them. mark selects from them too, with `truncated: true` in the meta; training would teach "
        "that the answer ends where it was cut.",
    )
    preference: PreferenceSelection = Field(PreferenceSelection(), description="Of kind preference.")
    conversation: ConversationSelection = Field(ConversationSelection(), description="Of kind conversation.")
    rollout: RolloutConfig = Field(RolloutConfig(), description="The engine that writes the answers.")
    dtype: Dtype = Field("float32", description="Type of the policy's weights.")
    batch_size: int = Field(
        64, ge=1, description="Prompts that are answered, scored and saved together; what a kill can cost."
    )
    micro_batch_tokens: int = Field(
        8192, ge=1, description="Tokens per forward pass of a reward model, padding included. Memory only."
    )

    @property
    def lengths(self) -> dict[str, int]:
        """The longest prompt and answer in tokens, by field."""
        return {"max_prompt_tokens": self.max_prompt_tokens, "max_new_tokens": self.max_new_tokens}

    @model_validator(mode="after")
    def _answers_come_from_one_place(self) -> Self:
        if self.answers is not None:
            given = [name for name in SAMPLING if name in self.model_fields_set]
            if given:
                raise ValueError(
                    f"`answers` names answers that are sampled and scored already, so {', '.join(given)} "
                    f"would "
                    "change nothing: remove one or the other"
                )
            return self
        missing = [name for name in ("model", "data") if name not in self.model_fields_set]
        if missing:
            raise ValueError(
                f"{' and '.join(missing)} missing: give the policy and the prompts, or `answers` of an "
                f"earlier "
                "synthesize run"
            )
        if self.judge is None:
            self.rewards.require_beside(self.reward)
        elif self.reward is not None or "rewards" in self.model_fields_set:
            raise ValueError("a `judge` scores in place of `reward` and `rewards`: remove one or the other")
        return self

    @model_validator(mode="after")
    def _scores_do_not_move(self) -> Self:
        if self.rewards.normalise != "none":
            raise ValueError(
                f"rewards.normalise is {self.rewards.normalise}: a running scale would make the score of an "
                "answer depend on those before it. Remove it"
            )
        return self

    @model_validator(mode="after")
    def _selection_of_the_kind(self) -> Self:
        other = "conversation" if self.kind == "preference" else "preference"
        if other in self.model_fields_set:
            raise ValueError(
                f"the block `{other}` belongs to kind {other}, and kind is {self.kind}: remove it"
            )
        if self.answers is None and self.kind == "preference" and self.n < 2:
            raise ValueError("n is 1: a pair needs two answers, so use at least 2")
        return self

    @model_validator(mode="after")
    def _nucleus_engine(self) -> Self:
        if self.top_p < 1 and self.rollout.engine != "hf":
            raise ValueError(
                f"top_p is {self.top_p} and rollout.engine is {self.rollout.engine}, which samples from "
                f"the whole "
                "distribution: use engine hf, or leave top_p out"
            )
        return self


def check(config: SynthesizeConfig, where: str) -> list[Problem]:
    """Mistakes that pydantic cannot see: reward functions, and what a judge needs."""
    problems = check_functions(config.rewards, f"{where}.rewards")
    if config.judge is not None:
        problems += _check_judge(config.judge, f"{where}.judge")
    return problems


def _check_judge(judge: JudgeConfig, where: str) -> list[Problem]:
    problems = []
    file = Path(judge.prompt).expanduser()
    if file.is_file():
        message = prompt_problem(file, judge.mode)
        if message:
            problems.append(Problem(f"{where}.prompt", message, "add it to the file"))
    name = judge.api_key_env
    if name is not None and not os.environ.get(name):
        remedy = f"export {name} before the start, or leave api_key_env out for an endpoint without keys"
        message = f"the environment variable {name} is not set"
        problems.append(Problem(f"{where}.api_key_env", message, remedy, here=True))
    if importlib.util.find_spec("openai") is None:
        message, remedy = "a judge needs the package openai", "pip install 'posttrain[judge]'"
        problems.append(Problem(where, message, remedy, here=True))
    return problems


def prompt_problem(file: Path, mode: Literal["score", "pairwise"]) -> str | None:
    """What a judge's prompt file lacks, in words; None where it has every placeholder."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return f"{file}: cannot be read as UTF-8 text ({error})"
    missing = [f"{{{name}}}" for name in PLACEHOLDERS[mode] if f"{{{name}}}" not in text]
    return f"{file}: holds no {' and no '.join(missing)}, which mode {mode} fills in" if missing else None
