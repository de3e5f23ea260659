"""The target that answers from a file: outputs that exist already are scored as if they were asked for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from eval.generators.base import Advance, Output, Prompt, Settings, Target, silent
from eval.generators.rows import cell, read_rows
from posttrain.errors import DataError


class GivenAnswers(Target):
    """Answers by the text of the question.

    Rows that repeat a question are taken in turn by the items, or samples, that repeat it; a single row
    serves all of them.
    """

    kind = "answers"

    def __init__(self, name: str, path: Path, question_column: str, answer_column: str) -> None:
        super().__init__(name)
        self.path = path
        self._answers: dict[str, list[str]] = defaultdict(list)
        for where, row in read_rows(path):
            question, answer = cell(row, question_column, where), cell(row, answer_column, where)
            for column, value in ((question_column, question), (answer_column, answer)):
                if not isinstance(value, str):
                    raise DataError(f"{where}: `{column}` is no text")
            self._answers[question].append(answer)

    def generate(
        self, prompts: Sequence[Prompt], settings: Settings, advance: Advance = silent
    ) -> list[Output]:
        """Raises DataError naming the first question without an answer."""
        missing = [prompt for prompt in prompts if prompt.question not in self._answers]
        if missing:
            raise DataError(
                f"{self.path}: {len(missing)} of {len(prompts)} questions have no answer here, the first is "
                f"{missing[0].question[:80]!r}\n"
                "    the question has to be the same text as in the task's data; check question_column"
            )
        taken: dict[str, int] = defaultdict(int)
        outputs = []
        for prompt in prompts:
            given = self._answers[prompt.question]
            turn = taken[prompt.question]
            if turn >= len(given) > 1:
                raise DataError(
                    f"{self.path}: holds {len(given)} answers to {prompt.question[:80]!r}, and the task "
                    "asks for more\n    give as many, or lower `samples`"
                )
            outputs.append(Output(given[turn if len(given) > 1 else 0]))
            taken[prompt.question] += 1
        self.usage.cached += len(outputs)
        advance(len(outputs))
        return outputs
