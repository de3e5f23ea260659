"""Configuration of the merge stage (torch-free)."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from posttrain.config import DatasetRef, ModelRef, StageConfig, StrictModel
from train.config import Dtype

Method = Literal["linear", "cat", "ties", "dare_linear", "dare_ties", "svd"]
SPARSE = ("ties", "dare_linear", "dare_ties")
"""Methods that keep only a part of each adapter, `density` of it."""


class WeightedAdapter(StrictModel):
    """One adapter of several, and how much of it."""

    model: ModelRef = Field(description="The run directory of a training stage, or a PEFT directory.")
    weight: float = Field(1.0, description="Factor of its update.")


class MergeConfig(StageConfig):
    """Fold a LoRA adapter, or several, into the base model and prove that the result computes the same."""

    model: ModelRef | None = Field(
        None, description="The adapter: the run directory of a training stage, or a PEFT directory."
    )
    adapters: list[WeightedAdapter] | None = Field(
        None, min_length=2, description="Several adapters of one base model, instead of `model`."
    )
    method: Method | None = Field(
        None,
        description="How `adapters` are combined, under the names of peft's add_weighted_adapter. cat: the "
        "weighted sum of the updates, exactly (rank: the sum of ranks). svd: the best approximation of that "
        "sum of rank svd_rank. linear: A and B added each by itself, which is not the sum of the updates. "
        "ties (2306.01708), dare_linear, dare_ties (2311.03099): as linear, after leaving out all but "
        "`density` of the values. null: cat.",
    )
    density: float | None = Field(
        None, gt=0, le=1, description="Share of values kept by ties, dare_linear and dare_ties."
    )
    svd_rank: int | None = Field(None, ge=1, description="Rank that svd gives; null: the largest one.")
    output: Literal["model", "adapter"] = Field(
        "model",
        description="model: full weights. adapter: the combination of `adapters`, in float32, as one adapter "
        "of their base.",
    )
    data: DatasetRef | None = Field(
        None,
        description="Dialogues to compare on (any kind; the first rows of its eval split). null: token ids "
        "that span the vocabulary.",
    )
    dtype: Dtype = Field(
        "float32", description="Type the merged weights are saved in; the merge itself is float32."
    )
    tolerance: float = Field(
        1e-4, gt=0, description="Largest allowed |logit(adapter) - logit(merged)|, both in float32."
    )
    greedy_tokens: int = Field(
        32,
        ge=0,
        description="Tokens that adapter and merged model each write after 8 prompts, which must be the same "
        "ones; 0: none.",
    )

    @property
    def refs(self) -> dict[str, str]:
        """Field of each adapter -> what it names."""
        if self.adapters is None:
            return {"model": self.model or ""}
        return {f"adapters.{index}.model": entry.model for index, entry in enumerate(self.adapters)}

    @model_validator(mode="after")
    def _one_or_several(self) -> Self:
        if (self.model is None) == (self.adapters is None):
            raise ValueError("set `model` (one adapter) or `adapters` (several of one base), and not both")
        several: dict[str, object] = {
            "method": self.method,
            "density": self.density,
            "svd_rank": self.svd_rank,
        }
        several["output"] = None if self.output == "model" else self.output
        asked = [name for name, value in several.items() if value is not None]
        if self.model is not None and asked:
            raise ValueError(f"{', '.join(asked)} is about several adapters; set `adapters`, or remove it")
        if self.output == "adapter" and self.dtype != "float32":
            raise ValueError(f"dtype is {self.dtype}, and output: adapter is saved in float32; remove dtype")
        return self

    @model_validator(mode="after")
    def _what_a_method_takes(self) -> Self:
        method = self.method or "cat"
        if (self.density is None) == (method in SPARSE):
            what = "needs density, the share of values to keep (0.5, say)"
            raise ValueError(f"method {method} {what if method in SPARSE else 'takes no density; remove it'}")
        if self.svd_rank is not None and method != "svd":
            raise ValueError(f"method {method} takes no svd_rank; remove it, or use method: svd")
        return self
