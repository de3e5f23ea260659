"""A hook for a toxicity scorer of one's own: scores are tags, never a reason to drop.

None ships. A TF-IDF and logistic regression on 24,783 labelled tweets reached a weighted F1 of .889 on its
own kind of text and .485 on functional tests of hate speech (docs/curation.md): a score to look at, no
filter.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from data_prep.operations.base import Kept, Row, tagged
from data_prep.operations.parts import Part, part_text
from posttrain.errors import UserError

Scorer = Callable[[Sequence[str]], Sequence[float]]


@dataclass(frozen=True)
class Toxicity:
    """Row-local. scorer: texts to scores, a batch at a time; above: the score from which rows count."""

    scorer: Scorer
    above: float
    part: Part = "answer"

    def apply(self, batch: Sequence[Row]) -> list[Kept]:
        """Tags `toxicity`. Raises UserError when the scorer does not give a number a text."""
        scores = [float(score) for score in self.scorer([part_text(row.record, self.part) for row in batch])]
        if len(scores) != len(batch):
            raise UserError(f"the toxicity scorer gave {len(scores)} scores for {len(batch)} texts")
        return [
            Kept(
                tagged(row.record, toxicity=round(score, 4)),
                (f"toxicity of {self.above} or more",) if score >= self.above else (),
            )
            for row, score in zip(batch, scores, strict=True)
        ]


def load_scorer(target: str) -> Scorer:
    """The function named "module:function". Raises UserError: no such module, no such callable in it."""
    module, _, name = target.partition(":")
    try:
        found = vars(importlib.import_module(module)).get(name)
    except ImportError as error:
        raise UserError(
            f"scorer {target!r}: {error}\n    name an importable module: my_scorers:toxic"
        ) from error
    if not callable(found):
        raise UserError(
            f"scorer {target!r}: {module} has no function {name!r}\n    write it as module:function"
        )
    return found
