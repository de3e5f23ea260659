"""Which of the scored answers to a prompt are kept. Pure functions; every prompt that gives nothing has a
reason.

Preference pairs of best and worst: Stiennon et al. 2020 compare samples of a policy; scored by a reward model
they are what RSO (Liu et al. 2024, 2309.06657) and iterative DPO train on. Demonstrations: RAFT (Dong et al.
2023, 2304.06767) and section 3.2.2 of Llama 2 (Touvron et al. 2023, 2307.09288).
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from data_prep.dataset import Split
from train.synthesis.config import ConversationSelection, PreferenceSelection


@dataclass(frozen=True)
class Answer:
    """One sampled answer. sample: its number among those of the prompt. score: None where it has none, and
    `unscored` says why. parts: what the score was made of, and what was only watched."""

    sample: int
    text: str
    tokens: int
    finished: bool
    score: float | None = None
    unscored: str | None = None
    parts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Answered:
    """A prompt with its scored answers. row: the columns of the prompt data set."""

    split: Split
    line: int
    row: dict[str, Any]
    answers: list[Answer]

    def as_json(self) -> dict[str, Any]:
        """One line of answers.jsonl."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Answered:
        """The reverse of `as_json`."""
        answers = [Answer(**answer) for answer in data["answers"]]
        return cls(data["split"], data["line"], data["row"], answers)


@dataclass(frozen=True)
class Dropped:
    """Why a prompt gives no row. reason: a countable slug."""

    reason: str
    detail: str


@dataclass(frozen=True)
class Usable:
    """The answers that can be selected, best first, and how many could not, by reason."""

    answers: list[Answer]
    left_out: Counter[str]


def usable(answers: Sequence[Answer], *, truncated: str) -> Usable:
    """The scored, distinct answers, highest score first (of equal ones the earlier sample).

    truncated: "drop" leaves out those without an end token. Counted: truncated, blank, the reason of an
    answer without a score, duplicate (the same up to white space as an earlier one).
    """
    left_out: Counter[str] = Counter()
    kept: dict[str, Answer] = {}
    for answer in answers:
        words = " ".join(answer.text.split())
        if truncated == "drop" and not answer.finished:
            left_out["truncated"] += 1
        elif not words:
            left_out["blank"] += 1
        elif answer.score is None:
            left_out[answer.unscored or "unscored"] += 1
        elif words in kept:
            left_out["duplicate"] += 1
        else:
            kept[words] = answer
    ranked = sorted(kept.values(), key=lambda answer: (-scored(answer), answer.sample))
    return Usable(ranked, left_out)


def scored(answer: Answer) -> float:
    """The score of an answer that has one."""
    assert answer.score is not None
    return answer.score


def choose_pairs(
    found: Usable, selection: PreferenceSelection, seed: int, prompt: str
) -> list[tuple[Answer, Answer]] | Dropped:
    """(chosen, rejected) of one prompt, or why there is none.

    seed, prompt: what `best_random` draws with, so that the draw does not depend on other prompts.
    """
    ranked = found.answers
    if len(ranked) < 2:
        return _too_few(found, 2)
    best, worst = ranked[0], ranked[-1]
    if scored(best) == scored(worst):
        return Dropped("all_tied", f"all {len(ranked)} distinct answers score {scored(best):g}")
    if scored(best) - scored(worst) < selection.min_margin:
        widest = scored(best) - scored(worst)
        return Dropped(
            "below_min_margin", f"best and worst differ by {widest:g}, min_margin is {selection.min_margin:g}"
        )
    if selection.pairs == "best_worst":
        return [(best, worst)]
    if selection.pairs == "best_random":
        lower = [answer for answer in ranked if _apart(best, answer, selection.min_margin)]
        drawn = hashlib.sha256(f"pair\0{seed}\0{prompt}".encode()).hexdigest()
        return [(best, random.Random(drawn).choice(lower))]
    return [
        (higher, lower)
        for place, higher in enumerate(ranked)
        for lower in ranked[place + 1 :]
        if _apart(higher, lower, selection.min_margin)
    ]


def choose_demonstrations(found: Usable, selection: ConversationSelection) -> list[Answer] | Dropped:
    """The best answers to one prompt, or why there is none."""
    if not found.answers:
        return _too_few(found, 1)
    least = selection.min_score
    kept = [answer for answer in found.answers if least is None or scored(answer) >= least]
    if not kept:
        return Dropped(
            "below_min_score", f"the best answer scores {scored(found.answers[0]):g}, min_score is {least:g}"
        )
    return kept[: selection.top_k]


def _apart(higher: Answer, lower: Answer, min_margin: float) -> bool:
    margin = scored(higher) - scored(lower)
    return margin > 0 and margin >= min_margin


def _too_few(found: Usable, needed: int) -> Dropped:
    counts = ", ".join(f"{count} {reason}" for reason, count in sorted(found.left_out.items()))
    if found.answers and set(found.left_out) == {"duplicate"}:
        return Dropped("answers_identical", f"all answers are the same ({counts})")
    detail = f"{len(found.answers)} usable answers where {needed} are needed ({counts})"
    return Dropped("too_few_answers", detail)
