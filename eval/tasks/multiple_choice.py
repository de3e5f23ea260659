"""Multiple choice by log-likelihood: the choice the model finds likeliest as the assistant's answer.

acc takes the highest sum of log-probabilities; acc_norm the highest per character of the choice, without
which short choices win. TruthfulQA (Lin et al. 2022, arXiv:2109.07958): mc1 is whether the best answer is
likelier than every false one, mc2 the share of probability on the true answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import softmax

from eval.generators.base import Continuation, Likelihood, Output, Target
from eval.tasks.base import How, Measured, Result, Scored, mean_interval
from eval.tasks.config import MultipleChoiceTask
from eval.tasks.items import Item, dataset_items, file_items
from posttrain.context import ProgressTracker
from posttrain.errors import DataError


@dataclass(frozen=True)
class Choices:
    """The choices of an item. right: their places, the best one first; false: the places of the others."""

    texts: list[str]
    right: list[int]
    false: list[int]


def split_answers(cell: str) -> list[str]:
    """The answers in a cell of TruthfulQA.csv, each ended with a full stop as its evaluation does."""
    parts = [part.strip() for part in cell.split(";")]
    return [part if part.endswith(".") else f"{part}." for part in parts if part]


class MultipleChoice:
    """acc and acc_norm, or mc1 and mc2 for TruthfulQA."""

    def __init__(self, config: MultipleChoiceTask) -> None:
        truthfulqa = config.layout == "truthfulqa"
        changed = (
            {"question_column": "Question"} if truthfulqa and config.question_column == "question" else {}
        )
        self.config = config.model_copy(update=changed)

    def run(self, target: Target, path: Path, how: How, bar: ProgressTracker) -> Measured:
        """Ask the target for likelihoods. Raises DataError for items without a right and a false choice."""
        config = self.config
        if config.data is not None:
            items = file_items(path, config, config.limit, how.seed)
        else:
            items = dataset_items(path, "preference", config.system, config.limit, how.seed)
        choices = [self.choices(item) for item in items]
        asked = [
            Continuation(item.messages, text)
            for item, one in zip(items, choices, strict=True)
            for text in one.texts
        ]
        bar_per_choice = iter(np.diff(np.linspace(0, len(items), len(asked) + 1).astype(int)).tolist())

        def advance(count: int) -> None:
            bar.advance(sum(next(bar_per_choice, 0) for _ in range(count)))

        found = iter(target.loglikelihood(asked, advance))
        results = []
        for item, one in zip(items, choices, strict=True):
            likelihoods = [next(found) for _ in one.texts]
            scored = self.score(one, likelihoods)
            results.append(Result(item, 0, Output(one.texts[scored.detail["chosen"]]), scored))
        columns: dict[str, list[float]] = {}
        for result in results:
            for name, value in (result.scored or Scored({})).values.items():
                columns.setdefault(name, []).append(value)
        clusters = [item.prompt for item in items]
        scores = {name: mean_interval(column, clusters, how.confidence) for name, column in columns.items()}
        return Measured(scores, results, {"items": len(items), "choices": len(asked)})

    def choices(self, item: Item) -> Choices:
        """The choices of an item, by the layout. Raises DataError."""
        if self.config.layout == "truthfulqa":
            return _truthfulqa(item)
        given = self.config.data is not None
        texts = item.column(self.config.choices_column if given else "choices")
        if not isinstance(texts, list) or not all(isinstance(one, str) and one for one in texts):
            raise DataError(f"{item.where}: `{self.config.choices_column}` is no list of texts")
        answer: Any = item.column(self.config.answer_column if given else "answer")
        if type(answer) is not int or not 0 <= answer < len(texts) or len(texts) < 2:
            raise DataError(
                f"{item.where}: `{self.config.answer_column}` is {answer!r} with {len(texts)} choices; "
                "it is the place of the right one, from 0"
            )
        return Choices(texts, [answer], [i for i in range(len(texts)) if i != answer])

    def score(self, choices: Choices, likelihoods: Sequence[Likelihood]) -> Scored:
        """A right choice has to be strictly likelier than every false one."""
        totals = np.array([one.logprob for one in likelihoods])
        best, right, false = choices.right[0], choices.right, choices.false
        detail = {"choices": choices.texts, "logprobs": totals.tolist(), "chosen": int(totals.argmax())}
        first = float(totals[best] > totals[false].max())
        if self.config.layout == "truthfulqa":
            mass = softmax(totals)
            return Scored({"mc1": first, "mc2": float(min(mass[right].sum(), 1.0))}, detail)
        each = totals / np.array([len(text) for text in choices.texts])
        return Scored({"acc": first, "acc_norm": float(each[best] > each[false].max())}, detail)


def _truthfulqa(item: Item) -> Choices:
    best = split_answers(str(item.column("Best Answer")))
    true, false = (split_answers(str(item.column(f"{side} Answers"))) for side in ("Correct", "Incorrect"))
    if not best or not false:
        raise DataError(f"{item.where}: has no best answer, or no incorrect one")
    first = "; ".join(part.removesuffix(".") for part in best) + "."
    true = [one for one in dict.fromkeys(true) if one not in best and one != first]
    texts = [first, *true, *dict.fromkeys(false)]
    right = list(range(1 + len(true)))
    return Choices(texts, right, list(range(len(right), len(texts))))
