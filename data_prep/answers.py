"""Final answers of worked solutions, checked by a program: a reward that needs no labels.

    rewards: {functions: [{function: "data_prep.answers:gsm8k_reward"}]}

In data_prep because training rewards with it and evaluation may count with it. On the 4 x 1,319 published
model solutions of GSM8K it agrees with the official verdict on every one (``tests/unit/test_answers.py``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from decimal import Decimal

from posttrain.errors import DataError

_FINAL = re.compile(r"(?:####|^A:)\s*\$?\s*(-?(?:\d[\d,]*(?:\.\d+)?|\.\d+))", re.MULTILINE)
"""The number after ``####``, GSM8K's own mark, or after ``A:`` at the start of a line, as its published
solutions write it."""


def gsm8k_answer(text: str) -> Decimal | None:
    """The number that a solution gives as its answer; None when it gives none.

    The first marked number counts, as in GSM8K's own evaluation: a text that lists several answers has given
    the first. Thousands separators and a dollar sign in front are not part of the number.
    """
    found = _FINAL.search(text)
    return None if found is None else Decimal(found.group(1).replace(",", ""))


def gsm8k_correct(solution: str, reference: str) -> bool:
    """Whether a solution ends in the number that the reference ends in.

    Raises DataError when the reference gives no number.
    """
    right = gsm8k_answer(reference)
    if right is None:
        raise DataError(
            f"the reference answer {reference[-80:]!r} has no number after `####`\n"
            "    give GSM8K's `answer`, or a text that ends with `#### NUMBER`"
        )
    return gsm8k_answer(solution) == right


def gsm8k_reward(
    completions: Sequence[str], answer: Sequence[str] | None = None, meta: Sequence[str] | None = None
) -> list[float]:
    """1 for each completion whose final number is right, else 0; a reward function of ppo, grpo and rloo.

    answer: the reference solutions, a column of the prompt data set. Without that column they are `answer` in
    the JSON text of `meta`, where the curate stage puts it (``meta_columns: [answer]``).

    Raises DataError when a prompt has no reference.
    """
    references = answer if answer is not None else [_from_meta(text) for text in meta or ()]
    if len(references) != len(completions):
        raise DataError(
            f"{len(completions)} completions but {len(references)} reference answers\n"
            "    the prompts need a column `answer`, or `meta_columns: [answer]` in their curate stage"
        )
    return [float(gsm8k_correct(*pair)) for pair in zip(completions, references, strict=True)]


def _from_meta(text: str) -> str:
    found = json.loads(text).get("answer")
    if not isinstance(found, str):
        raise DataError(
            f"a prompt has no `answer` in its meta ({text[:80]})\n"
            "    set `meta_columns: [answer]` on the source in its curate stage"
        )
    return found
