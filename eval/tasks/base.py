"""What a task is: items, a score for each answer, and scores of all of them with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.generators.base import Output, Prompt, Settings, Target
from eval.statistics import Interval, proportion_interval, t_interval
from eval.tasks.config import TextTask
from eval.tasks.items import Item, dataset_items, file_items
from posttrain.context import ProgressTracker


@dataclass(frozen=True)
class Scored:
    """Numbers of one answer by metric, and what else there is to say about it."""

    values: dict[str, float]
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """One answer to one item. scored is None where the target did not take the prompt."""

    item: Item
    sample: int
    output: Output
    scored: Scored | None


@dataclass(frozen=True)
class How:
    """How intervals are made."""

    confidence: float
    bootstrap_samples: int
    seed: int


@dataclass
class Measured:
    """A task on a target: scores with intervals, per-item results, counts that belong beside them."""

    scores: dict[str, Interval]
    results: list[Result]
    counts: dict[str, Any]


def mean_interval(values: Sequence[float], clusters: Sequence[str], confidence: float) -> Interval:
    """Of values in [0, 1] the score interval, of others Student's t, both clustered."""
    if all(0.0 <= value <= 1.0 for value in values):
        return proportion_interval(values, clusters, confidence)
    return t_interval(values, confidence, clusters)


class GenerationTask:
    """A task whose targets answer in text. Subclasses score one answer."""

    dataset_kind: str | None = None

    def __init__(self, config: TextTask) -> None:
        self.settings = config

    def items(self, path: Path, seed: int) -> list[Item]:
        """From `data`, or from a data set of `dataset_kind`. Raises DataError."""
        config = self.settings
        if config.data is not None:
            items = file_items(path, config, config.limit, seed)
        else:
            items = dataset_items(path, self.dataset_kind, config.system, config.limit, seed)
        for item in items:
            self.check(item)
        return items

    def check(self, item: Item) -> None:
        """Raise DataError for an item that could not be scored, before anything is generated."""

    def score(self, item: Item, text: str) -> Scored:
        """What one answer is worth."""
        raise NotImplementedError

    def score_all(self, items: Sequence[Item], texts: Sequence[str]) -> list[Scored]:
        """As `score`, for tasks that look at many answers at a time."""
        return [self.score(item, text) for item, text in zip(items, texts, strict=True)]

    def scores(self, results: Sequence[Result], how: How) -> dict[str, Interval]:
        """Means of the values, clustered by prompt. A metric counts the answers that have it."""
        columns: dict[str, tuple[list[float], list[str]]] = {}
        for result in results:
            for name, value in (result.scored or Scored({})).values.items():
                values, clusters = columns.setdefault(name, ([], []))
                values.append(value)
                clusters.append(result.item.prompt)
        return {name: mean_interval(*column, how.confidence) for name, column in columns.items()}

    def run(self, target: Target, path: Path, how: How, bar: ProgressTracker) -> Measured:
        """Ask the target and score what it says."""
        items = self.items(path, how.seed)
        pairs = [(item, sample) for item in items for sample in range(self.settings.samples)]
        prompts = [Prompt(item.id, item.messages, item.question, sample) for item, sample in pairs]
        asked = Settings(self.settings.max_new_tokens, self.settings.temperature, how.seed)
        outputs = target.generate(prompts, asked, bar.advance)
        answered = [i for i, output in enumerate(outputs) if output.status == "ok"]
        scored = self.score_all([pairs[i][0] for i in answered], [outputs[i].text for i in answered])
        by_place = dict(zip(answered, scored, strict=True))
        results = [
            Result(item, sample, output, by_place.get(i))
            for i, ((item, sample), output) in enumerate(zip(pairs, outputs, strict=True))
        ]
        kept = [result for result in results if result.scored is not None]
        return Measured(self.scores(kept, how) if kept else {}, results, counts_of(items, results))


def counts_of(items: Sequence[Item], results: Sequence[Result]) -> dict[str, Any]:
    """How many items and answers there are, how many were not taken, cut off, and empty; mean tokens."""
    answered = [result.output for result in results if result.scored is not None]
    tokens = [one.completion_tokens for one in answered if one.completion_tokens is not None]
    return {
        "items": len(items),
        "answers": len(answered),
        "not_answered": len(results) - len(answered),
        "unfinished": sum(one.finished is False for one in answered),
        "empty": sum(not one.text.strip() for one in answered),
        "completion_tokens_mean": sum(tokens) / len(tokens) if tokens else None,
    }
