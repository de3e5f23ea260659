"""Tasks whose verdict a program gives: exact match, GSM8K, IFEval."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from data_prep.answers import gsm8k_answer, gsm8k_correct
from eval.statistics import Interval
from eval.tasks.base import GenerationTask, How, Result, Scored, mean_interval
from eval.tasks.config import ExactMatchTask, Gsm8kTask, IfevalTask
from eval.tasks.ifeval import verdict
from eval.tasks.items import Item
from posttrain.errors import DataError

_PUNCTUATION = str.maketrans("", "", string.punctuation)


class ExactMatch(GenerationTask):
    """1 where the normalised answer equals a normalised reference, else 0. White space never counts."""

    def __init__(self, config: ExactMatchTask) -> None:
        super().__init__(config)
        self.config = config
        self._extract = re.compile(config.extract) if config.extract is not None else None

    def check(self, item: Item) -> None:
        item.texts(self.config.answer_column)

    def score(self, item: Item, text: str) -> Scored:
        """detail: what was taken for the answer, None where `extract` matches nothing (which is wrong)."""
        found: str | None = text
        if self._extract is not None:
            matches = list(self._extract.finditer(text))
            groups = self._extract.groups
            found = (matches[-1].group(1 if groups else 0) or "") if matches else None
        accepted = {self._normalised(one) for one in item.texts(self.config.answer_column)}
        right = found is not None and self._normalised(found) in accepted
        return Scored({"exact_match": float(right)}, {"extracted": found})

    def _normalised(self, text: str) -> str:
        if self.config.ignore_case:
            text = text.casefold()
        if self.config.ignore_punctuation:
            text = text.translate(_PUNCTUATION)
        return " ".join(text.split())


class Gsm8k(GenerationTask):
    """GSM8K's own verdict (`data_prep.answers`). answered: the share of answers that give a number."""

    def __init__(self, config: Gsm8kTask) -> None:
        super().__init__(config)
        self.config = config

    def check(self, item: Item) -> None:
        reference = item.column(self.config.answer_column)
        if not isinstance(reference, str) or gsm8k_answer(reference) is None:
            raise DataError(f"{item.where}: `{self.config.answer_column}` has no number after `####`")

    def score(self, item: Item, text: str) -> Scored:
        number = gsm8k_answer(text)
        right = gsm8k_correct(text, item.column(self.config.answer_column))
        return Scored(
            {"accuracy": float(right), "answered": float(number is not None)},
            {"extracted": None if number is None else str(number)},
        )


class Ifeval(GenerationTask):
    """The four accuracies of IFEval: by prompt and by instruction, strict and loose."""

    def __init__(self, config: IfevalTask) -> None:
        super().__init__(config)
        self.config = config

    def check(self, item: Item) -> None:
        self.score(item, "")

    def score(self, item: Item, text: str) -> Scored:
        try:
            found = verdict(
                text, item.column(self.config.instructions_column), item.column(self.config.parameters_column)
            )
        except DataError as error:
            raise DataError(f"{item.where}: {error}") from None
        return Scored(
            {
                "prompt_level_strict_acc": float(all(found.strict)),
                "prompt_level_loose_acc": float(all(found.loose)),
            },
            {
                "instructions": list(found.instructions),
                "strict": list(found.strict),
                "loose": list(found.loose),
            },
        )

    def scores(self, results: Sequence[Result], how: How) -> dict[str, Interval]:
        scores = super().scores(results, how)
        for mode in ("strict", "loose"):
            followed = [
                (float(passed), result.item.prompt)
                for result in results
                if result.scored is not None
                for passed in result.scored.detail[mode]
            ]
            values, prompts = [value for value, _ in followed], [prompt for _, prompt in followed]
            scores[f"inst_level_{mode}_acc"] = mean_interval(values, prompts, how.confidence)
        return scores
