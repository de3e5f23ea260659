"""Configuration of the rewards of the ppo, grpo and rloo stages (torch-free): the `rewards:` block.

Beside the reward model that the stage names in `reward`, a response may be scored by Python functions,
by further reward models, and by its form. What has a weight of 0 is logged and not trained on, which is
how a gold score is watched during a run.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from posttrain.config import ForeignModelRef, StrictModel
from posttrain.errors import ConfigError, Problem

_TARGET = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$"


class RewardFunctionConfig(StrictModel):
    """A Python function that scores responses."""

    function: str = Field(
        pattern=_TARGET,
        description="`module:function`. The module is looked for among the installed packages, on PYTHONPATH "
        "and in the working directory. It is called with keywords: prompts (messages), completions (texts "
        "without special tokens), completion_ids, finished, every column of the prompt data set, and "
        "`arguments`, of which it takes what its signature names; it returns a number or None per response.",
    )
    name: str | None = Field(
        None,
        pattern=r"^[A-Za-z_][\w-]*$",
        description="What its score is called in metrics.jsonl; null: the function's own name.",
    )
    weight: float = Field(
        1.0, allow_inf_nan=False, description="Factor of its score in the reward; 0: logged, not trained on."
    )
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="Further keyword arguments, the same in every call."
    )

    @property
    def label(self) -> str:
        """The name in metrics."""
        return self.function.partition(":")[2] if self.name is None else self.name


class LengthPenalty(StrictModel):
    """Takes something off for every token of a long response."""

    per_token: float = Field(
        gt=0, allow_inf_nan=False, description="Subtracted per response token beyond free_tokens."
    )
    free_tokens: int = Field(
        0, ge=0, description="Response tokens, the end token included, that cost nothing."
    )


class RepetitionPenalty(StrictModel):
    """Takes something off for n-grams that a response says again."""

    ngram: int = Field(3, ge=1, description="Length n of the n-grams, in tokens.")
    weight: float = Field(
        1.0,
        ge=0,
        allow_inf_nan=False,
        description="Subtracted times the share of the response's n-grams that repeat an earlier one; 0: "
        "the share is logged, not trained on.",
    )


class EnsembleConfig(StrictModel):
    """Further reward models beside `reward`, to be optimised together (Coste et al. 2023, 2310.02743)."""

    models: list[ForeignModelRef] = Field(
        min_length=1,
        description="Reward models (SEQ_CLS). One whose tokenizer or chat template is not the policy's "
        "scores the dialogue rendered with its own.",
    )
    combine: Literal["mean", "min", "mean_minus_std"] = Field(
        "mean",
        description="Over the models, `reward` included: `mean`; `min` is the most pessimistic of them; "
        "`mean_minus_std` takes off std_coef times their standard deviation. Models that score on scales "
        "of their own need `normalise`.",
    )
    std_coef: float = Field(1.0, ge=0, allow_inf_nan=False, description="The factor k of `mean_minus_std`.")


class RewardsConfig(StrictModel):
    """reward = model_weight * model + sum of weight * function - penalties."""

    model_weight: float = Field(
        1.0,
        allow_inf_nan=False,
        description="Factor of the reward model's score (the ensemble's, if there is one); 0: logged, not "
        "trained on.",
    )
    functions: list[RewardFunctionConfig] = Field(
        default_factory=list, description="Python functions that score responses."
    )
    length_penalty: LengthPenalty | None = Field(None, description="Charges for long responses.")
    repetition_penalty: RepetitionPenalty | None = Field(None, description="Charges for repeated n-grams.")
    ensemble: EnsembleConfig | None = Field(None, description="More reward models beside `reward`.")
    normalise: Literal["none", "scale", "standardise"] = Field(
        "none",
        description="Of each reward model's scores, by the moments of all its scores so far in the run: "
        "`scale` divides by their standard deviation, `standardise` subtracts their mean first.",
    )

    def require_beside(self, reward: str | None) -> None:
        """Raise ValueError when there is nothing to train on beside the stage's `reward`, and no `reward`."""
        weights = [item.weight for item in self.functions]
        weights += [] if self.repetition_penalty is None else [self.repetition_penalty.weight]
        if reward is None and not (self.ensemble or self.length_penalty or any(weights)):
            raise ValueError(
                "nothing is rewarded: give `reward`, a reward model, or a function under rewards.functions "
                "with a weight other than 0"
            )

    def fields_beside(self, reward: str | None) -> list[str]:
        """The fields of the stage that name a reward model: `reward` if it does, and the ensemble's."""
        members = [] if self.ensemble is None else self.ensemble.models
        fields = [f"rewards.ensemble.models.{index}" for index in range(len(members))]
        return fields if reward is None else ["reward", *fields]

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        names = ["model", "length_penalty", "repetition_penalty"] + [item.label for item in self.functions]
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise ValueError(
                f"two rewards are called {', '.join(map(repr, twice))}: give each of functions a `name` of "
                "its own (model, length_penalty and repetition_penalty are taken)"
            )
        return self

    @model_validator(mode="after")
    def _something_is_trained_on(self) -> Self:
        weights = [self.model_weight, *(item.weight for item in self.functions)]
        weights += [] if self.length_penalty is None else [self.length_penalty.per_token]
        weights += [] if self.repetition_penalty is None else [self.repetition_penalty.weight]
        if not any(weights):
            raise ValueError(
                "every reward has weight 0, so there is nothing to train on: set model_weight or the "
                "weight of one of functions"
            )
        return self


def load_function(target: str, where: str) -> Callable[..., Any]:
    """The function `target` ("module:function"); the working directory is searched last.

    where: the YAML field that names it. Raises ConfigError when the module cannot be imported, whatever its
    own code raises, or has no such attribute, or it cannot be called.
    """
    module_name, _, attribute = target.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise anything
        problem = f"{target!r}: the module {module_name} cannot be imported ({type(error).__name__}: {error})"
        remedy = "correct the name, start in the directory that holds it, or put that on PYTHONPATH"
        if not isinstance(error, ImportError):
            remedy = f"the error is in the code that runs on import: try `python -c 'import {module_name}'`"
        raise ConfigError([Problem(where, problem, remedy)]) from error
    members = vars(module)
    if attribute not in members:
        defined = sorted(
            name
            for name, value in members.items()
            if inspect.isfunction(value) and value.__module__ == module_name
        )
        problem = f"{target!r}: the module {module_name} defines no {attribute}"
        raise ConfigError([Problem(where, problem, f"it defines: {', '.join(defined) or 'no function'}")])
    if not callable(members[attribute]):
        problem = f"{target!r}: {attribute} is of type {type(members[attribute]).__name__}, not a function"
        raise ConfigError([Problem(where, problem, f"name a function of {module_name}")])
    return members[attribute]


def check_functions(config: RewardsConfig, where: str) -> list[Problem]:
    """For a stage's `check` hook: the functions that cannot be loaded. where: path of the `rewards` block."""
    problems: list[Problem] = []
    for index, item in enumerate(config.functions):
        try:
            load_function(item.function, f"{where}.functions.{index}.function")
        except ConfigError as error:
            problems += error.problems
    return problems
