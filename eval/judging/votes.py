"""People as a judge: votes on pairs of answers, read from a file.

A vote is a line {id or prompt or messages, model_a, model_b, choice, annotator}; choice is a, b, tie or
both_bad. `both_bad` counts as a tie, and is counted by itself too. Every vote is an observation; votes on one
prompt form one cluster.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from eval.judging.contest import Match
from eval.judging.pairwise import Judgement
from eval.judging.rows import first_of, prompt_key, prompt_of, read_jsonl
from posttrain.errors import DataError

OUTCOMES = {"a": 1.0, "b": 0.0, "tie": 0.5, "both_bad": 0.5}
_ID_KEYS = ("id", "question_id", "prompt_id")


def by_votes(path: Path, matches: Sequence[Match]) -> tuple[list[Judgement], dict[str, int]]:
    """The votes that concern the matches, and how many were read, matched and of which choice.

    A second vote of an annotator on the same comparison replaces the first. Raises DataError for a line that
    is no vote, and where no vote concerns any match.
    """
    by_id = {one.key: one for one in matches}
    by_prompt: dict[tuple[str, str, str], list[Match]] = {}
    for one in matches:
        key_of_prompt = (prompt_key(one.question.messages), one.first, one.second)
        by_prompt.setdefault(key_of_prompt, []).append(one)
    counts: Counter[str] = Counter()
    found: dict[tuple[object, ...], Judgement] = {}
    for line, row in read_jsonl(path):
        where = f"{path}:{line}"
        choice, a, b = row.get("choice"), row.get("model_a"), row.get("model_b")
        if (
            not isinstance(choice, str)
            or choice not in OUTCOMES
            or not isinstance(a, str)
            or not isinstance(b, str)
            or a == b
        ):
            raise DataError(
                f"{where}: is no vote: it needs model_a and model_b, two names, and choice, one of "
                f"{', '.join(OUTCOMES)} (got {a!r}, {b!r}, {choice!r})"
            )
        counts["read"] += 1
        found_id = first_of(row, _ID_KEYS)
        identity = None if found_id is None else str(found_id)
        messages = prompt_of(row, where)
        match: Match | None = None
        outcome = OUTCOMES[choice]
        for first, second, value in ((a, b, outcome), (b, a, 1.0 - outcome)):
            if match is None and identity is not None and (identity, first, second) in by_id:
                match, outcome = by_id[identity, first, second], value
            elif match is None and messages is not None:
                candidates = by_prompt.get((prompt_key(messages), first, second), [])
                if candidates:
                    match, outcome = candidates[0], value
        if match is None:
            counts["unmatched"] += 1
            continue
        annotator = row.get("annotator")
        name = str(annotator) if annotator is not None else None
        key = (match.key, name if name is not None else line)
        counts["replaced"] += key in found
        found[key] = Judgement(match, outcome, annotator=name, choice=choice)
    if not found:
        raise DataError(
            f"{path}: none of its {counts['read']} votes is on a prompt and two models that are judged here\n"
            "    the names of models and the prompts (or ids) must be the same as in `answers`"
        )
    counts.update(str(judgement.choice) for judgement in found.values())
    return list(found.values()), dict(counts)
