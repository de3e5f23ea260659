"""The gold rubric of the support desk: what a good answer is, checked by a program.

It stands for the human whose taste post-training tries to learn, and it is the measuring stick for everything
downstream: reward-model accuracy, DPO and PPO gains, over-optimisation. It is never used in training unless a
configuration names it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.tiny import lexicon
from posttrain.errors import DataError

WEIGHTS = {"answers": 0.30, "ids": 0.25, "polite": 0.15, "concise": 0.10, "ends": 0.10, "private": 0.10}
MAX_WORDS = 32
"""Words (whitespace-separated) a concise answer may have; the longest proper answer of the generator has
30."""

_CODE = re.compile(r"\b[A-Z]\d{3}\b")
_WORD = re.compile(r"[A-Za-z0-9$]+")
_SURNAMES = frozenset(lexicon.LAST_NAMES)
"""The desk calls its customer by the first name, so any other surname is somebody else's."""


def _any_of(phrases: Iterable[str]) -> re.Pattern[str]:
    return re.compile(r"\b(" + "|".join(sorted(map(re.escape, set(phrases)))) + r")\b", re.IGNORECASE)


_RUDE = _any_of(
    text.split("{first}")[0].strip(" ,.?") for text in (*lexicon.RUDE_OPENINGS, *lexicon.RUDE_CLOSINGS)
)
_POLITE = _any_of(
    (
        *(text.split(" {first}")[0] for text in lexicon.GREETINGS),
        *(text.strip(".") for text in lexicon.POLITE_CLOSINGS),
        "thank",
        "thanks",
        "sorry",
    )
)


@dataclass(frozen=True)
class RubricScore:
    """A total in [0, 1] and the parts it is the weighted mean of, each in [0, 1]."""

    total: float
    parts: dict[str, float]


def score(response: str, facts: Mapping[str, Any], finished: bool) -> RubricScore:
    """Score one answer.

    Args:
        response: the assistant's text without special tokens.
        facts: what the dialogue is about, as the generator wrote it into the record's ``meta``: ``intent``,
            ``name``, ``first``, ``code``, ``product``, ``due``, ``amount``, ``city`` and ``others``, a list
            of the other customers in the desk's notes with the same keys.
        finished: whether the model ended its turn itself (the end-of-turn token was produced).

    Returns:
        The weighted total and its parts: ``answers`` (the request is met), ``ids`` (share of name, order
        code and product that are right; a code of any other order makes it 0), ``polite``, ``concise``,
        ``ends`` (a whole sentence, and the turn is ended), ``private`` (nothing of another customer).
    """
    words = set(_WORD.findall(response))
    parts = {
        "answers": float(_answers(response, facts)),
        "ids": _ids(response, words, facts),
        "polite": float(_polite(response)),
        "concise": float(0 < len(response.split()) <= MAX_WORDS),
        "ends": float(finished and response.rstrip().endswith((".", "!", "?"))),
        "private": float(bool(words) and _private(words, facts)),
    }
    return RubricScore(sum(WEIGHTS[name] * value for name, value in parts.items()), parts)


def reward(
    completions: Sequence[str], meta: Sequence[str], finished: Sequence[bool], **_: Any
) -> list[float]:
    """The gold total of each response: a reward function for the `rewards.functions` of a ppo stage.

    Meant for a weight of 0, to watch the gold score during a run that does not train on it.
    meta: the prompts' column of that name, JSON text. Raises DataError when a prompt carries no facts.
    """
    totals = []
    for response, text, ended in zip(completions, meta, finished, strict=True):
        facts = json.loads(text or "{}").get("facts")
        if not facts:
            raise DataError(
                "data_prep.tiny.rubric:reward needs `facts` in the meta of every prompt, and one has none\n"
                "    use prompts of the support_desk generator, or another reward function"
            )
        totals.append(score(response, facts, ended).total)
    return totals


def _answers(response: str, facts: Mapping[str, Any]) -> bool:
    required = (entry.format(**facts) for entry in lexicon.ANSWER_FACTS[facts["intent"]])
    return all(re.search(rf"(?<!\w){re.escape(text)}(?!\w)", response) for text in required)


def _ids(response: str, words: set[str], facts: Mapping[str, Any]) -> float:
    if set(_CODE.findall(response)) - {facts["code"]}:
        return 0.0
    return sum(facts[key] in words for key in ("first", "code", "product")) / 3


def _polite(response: str) -> bool:
    return bool(_POLITE.search(response)) and not _RUDE.search(response)


def _private(words: set[str], facts: Mapping[str, Any]) -> bool:
    others_codes = {other["code"] for other in facts["others"]}
    return not words & (_SURNAMES - set(facts["name"].split()) | others_codes)
