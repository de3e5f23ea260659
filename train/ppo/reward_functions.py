"""Python functions as rewards, called with keywords the way TRL calls its own.

    def polite(completions, **kwargs):
        return [1.0 if "please" in text else 0.0 for text in completions]

TRL departs in one thing: there a completion of a conversation is a list of messages, here it is the text.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from posttrain.errors import UserError
from train.ppo.reward_config import RewardFunctionConfig, load_function
from train.ppo.reward_sources import RewardBatch

GIVEN = ("prompts", "completions", "completion_ids", "finished")
"""What a function is offered beside the columns of the prompt data set and its `arguments`."""


class FunctionReward:
    """Scores responses with the function that `rewards.functions.<index>` names.

    rows: the prompts that were kept, all columns. A response for which the function returns None, it has
    no opinion on: NaN. Raises UserError when the function is not there, or wants what it cannot be given.
    """

    def __init__(
        self, config: RewardFunctionConfig, index: int, tokenizer: PreTrainedTokenizerBase, rows: Dataset
    ) -> None:
        where = f"rewards.functions.{index}"
        self.name, self.weight = config.label, config.weight
        self.target, self.arguments = config.function, config.arguments
        self.tokenizer = tokenizer
        self.function = load_function(config.function, f"{where}.function")
        offered = [*GIVEN, *(column for column in rows.column_names if column not in GIVEN)]
        self.accepted = accepted_names(self.function, offered, config, where)
        columns = {"prompt", *(name for name in self.accepted if name in rows.column_names)} - {*GIVEN}
        self.rows = rows.select_columns(sorted(columns))

    def __call__(self, batch: RewardBatch) -> Tensor:
        """Float32, [B], on the CPU. Raises UserError when what the function returns is not a score each."""
        columns = self.rows[batch.indices]
        keywords: dict[str, Any] = {
            **columns,
            "prompts": columns["prompt"],
            "completions": self.tokenizer.batch_decode(
                batch.responses, skip_special_tokens=True, clean_up_tokenization_spaces=False
            ),
            "completion_ids": [list(response) for response in batch.responses],
            "finished": list(batch.finished),
            **self.arguments,
        }
        result = self.function(**{name: keywords[name] for name in keywords if name in self.accepted})
        return self.as_scores(result, len(batch.responses))

    def as_scores(self, result: Any, count: int) -> Tensor:
        """What the function returned, checked; None becomes NaN."""
        if not isinstance(result, (list, tuple)):
            raise self.wrong(f"a {type(result).__name__} ({_short(result)})", count)
        if len(result) != count:
            raise self.wrong(f"{len(result)} scores ({_short(result)})", count)
        scores = []
        for place, value in enumerate(result):
            if value is not None and not (isinstance(value, Real) and math.isfinite(value)):
                raise self.wrong(f"{_short(value)} ({type(value).__name__}) for response {place}", count)
            scores.append(math.nan if value is None else float(value))
        return torch.tensor(scores, dtype=torch.float32)

    def wrong(self, what: str, count: int) -> UserError:
        return UserError(
            f"reward function {self.name} ({self.target}) returned {what}; it was given {count} responses\n"
            "    return a list with one finite number, or None for no opinion, per response"
        )


def accepted_names(
    function: Callable[..., Any], offered: list[str], config: RewardFunctionConfig, where: str
) -> set[str]:
    """Which of the names in `offered` and config.arguments the function takes as keywords.

    Raises UserError when it needs another one, when an argument is not among its parameters, or when an
    argument has the name of something that it is given anyway.
    """
    parameters = inspect.signature(function).parameters.values()
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    names = {parameter.name for parameter in named}
    taken = [name for name in config.arguments if name in offered]
    if taken:
        raise UserError(
            f"{where}.arguments: {', '.join(taken)} is given to every reward function\n"
            f"    choose another name; taken are {', '.join(offered)}"
        )
    unknown = [name for name in config.arguments if not takes_all and name not in names]
    if unknown:
        raise UserError(
            f"{where}.arguments: {config.function} takes no {', '.join(unknown)}\n"
            f"    its parameters are {', '.join(sorted(names))}"
        )
    known = {*offered, *config.arguments}
    missing = [p.name for p in named if p.default is p.empty and p.name not in known]
    if missing:
        raise UserError(
            f"{where}.function: {config.function} needs {', '.join(missing)}, which is not there\n"
            f"    give it in {where}.arguments, or name something of {', '.join(offered)}"
        )
    return known if takes_all else known & names


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
