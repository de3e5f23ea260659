"""Configuration of the `eval` stage. Imports neither torch nor transformers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat

from posttrain.config import DatasetRef, ModelRef, StageConfig
from posttrain.errors import Problem


class EvalConfig(StageConfig):
    """What is compared, on which held-out data, and which bars the result is held against."""

    models: dict[str, ModelRef] = Field(
        default_factory=dict, description="Policies to compare, by the name they carry in the report."
    )
    baseline: str | None = Field(
        None,
        description="Name in `models` that win rates and gains are measured against; default: the first.",
    )
    reference: ModelRef | None = Field(
        None, description="Model the KL divergence is measured against; default: the baseline."
    )
    reward: ModelRef | None = Field(
        None, description="Reward model: scores the samples, and is itself examined on `preferences`."
    )
    prompts: DatasetRef | None = Field(None, description="Prompt dataset whose eval split the models answer.")
    preferences: DatasetRef | None = Field(
        None, description="Preference dataset whose eval split measures the reward model."
    )
    ood_preferences: DatasetRef | None = Field(
        None,
        description="Preference dataset of another kind than the reward model was trained on; its eval split "
        "shows how far accuracy and calibration carry over.",
    )
    subset_column: str | None = Field(
        None,
        description="Key in the meta of `preferences` by which reward-model accuracy is broken down; "
        "default: the source of each pair (as always for ood_preferences).",
    )
    text: DatasetRef | None = Field(None, description="Text dataset whose eval split measures perplexity.")
    conversations: DatasetRef | None = Field(
        None, description="Conversation dataset whose eval split measures perplexity of the assistant tokens."
    )
    gold: Literal["support_desk"] | None = Field(
        None,
        description="Programmatic rubric for the answers; needs `facts` in the meta of prompts and pairs.",
    )

    num_prompts: int = Field(320, ge=2, description="Held-out prompts answered by every model.")
    max_prompt_tokens: int = Field(
        1024, ge=8, description="Prompts longer than this are skipped, and counted as skipped."
    )
    max_new_tokens: int = Field(64, ge=1, description="Most tokens a model may generate per prompt.")
    temperature: float = Field(
        1.0, ge=0.0, description="Sampling temperature; 0 is greedy. KL is taken at the same temperature."
    )
    batch_size: int = Field(64, ge=1, description="Sequences per forward pass and per generation batch.")
    max_tokens: int = Field(
        1024, ge=8, description="Perplexity and reward inputs are cut to this many tokens; cuts are counted."
    )
    num_perplexity_rows: int = Field(512, ge=1, description="Rows of each perplexity dataset that are read.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Precision the models are loaded in."
    )
    bootstrap_samples: int = Field(2000, ge=100, description="Resamples behind every bootstrap interval.")
    confidence: float = Field(0.95, gt=0.5, lt=1.0, description="Level of every interval.")
    tie_tolerance: float = Field(
        1e-9, ge=0.0, description="Two scores at most this far apart are a tie (half a win to each)."
    )
    reliability_bins: int = Field(10, ge=2, description="Bins of the reliability plot, over 0.5 to 1.")
    text_baselines: bool = Field(
        True, description="Also score `shorter wins` and a TF-IDF Bradley-Terry model on the same pairs."
    )

    kl_target: PositiveFloat | dict[str, PositiveFloat] | None = Field(
        None,
        description="Bar: mean sequence KL (nats per answer) stays under this; one number for every compared "
        "model, or a number by model name.",
    )
    min_rm_accuracy: float | None = Field(
        None, ge=0.0, le=1.0, description="Bar: reward-model accuracy (against gold where there is one)."
    )
    min_win_rate: float | None = Field(
        None, ge=0.0, le=1.0, description="Bar: win rate of every compared model against the baseline."
    )
    require_gain: bool = Field(
        False, description="Bar: score interval of every compared model lies above the baseline's."
    )

    @property
    def baseline_name(self) -> str:
        """Name of the baseline model; only meaningful when there are models."""
        return self.baseline if self.baseline is not None else next(iter(self.models))

    @property
    def challengers(self) -> list[str]:
        """The compared models other than the baseline, in the order written."""
        return [name for name in self.models if name != self.baseline_name]


def check(config: EvalConfig, where: str) -> list[Problem]:
    """Contradictions inside the block, found before any input is opened."""
    problems = []

    def problem(field: str, message: str, remedy: str) -> None:
        problems.append(Problem(f"{where}.{field}", message, remedy))

    if not config.models and config.reward is None:
        problem("models", "nothing to evaluate", "name at least one policy in `models`, or a `reward` model")
    if config.baseline is not None and config.baseline not in config.models:
        known = ", ".join(config.models) or "none"
        problem("baseline", f"'{config.baseline}' is not in models ({known})", "use one of those names")
    if config.models and not (config.prompts or config.text or config.conversations):
        problem(
            "prompts", "models are given but no data to measure them on", "set prompts, text or conversations"
        )
    if config.reward is not None and not (config.preferences or config.prompts):
        problem("reward", "a reward model is given but nothing for it to score", "set preferences or prompts")
    if config.preferences is not None and config.reward is None:
        problem("preferences", "needs a reward model to measure", "set reward, or remove preferences")
    beside = {"ood_preferences": config.ood_preferences, "subset_column": config.subset_column}
    for field, value in beside.items():
        if value is not None and config.preferences is None:
            problem(field, "needs preferences to compare with", f"set preferences, or remove {field}")
    if config.gold is not None and config.prompts is None and config.preferences is None:
        problem("gold", "a rubric is named but there are no answers to score", "set prompts or preferences")
    pairwise = len(config.models) > 1 and config.prompts is not None and bool(config.gold or config.reward)
    targets = config.kl_target if isinstance(config.kl_target, dict) else {}
    for name in targets:
        if name not in config.models:
            problem(
                f"kl_target.{name}",
                "not a name in models",
                f"use one of {', '.join(config.models) or 'none'}",
            )
    bars = (
        ("kl_target", config.kl_target is not None, bool(config.models) and config.prompts is not None),
        ("min_win_rate", config.min_win_rate is not None, pairwise),
        ("require_gain", config.require_gain, pairwise),
        ("min_rm_accuracy", config.min_rm_accuracy is not None, config.preferences is not None),
    )
    for name, wanted, measurable in bars:
        if wanted and not measurable:
            problem(
                name,
                "this bar can never be measured with the inputs given",
                f"remove {name}, or add its inputs",
            )
    return problems
