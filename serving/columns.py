"""Compares greedy answers to the same prompts: adapter, merged and served, two at a time. Pure functions.

Tokens are compared up to the first one that differs, log-probabilities up to there. A first difference at
which the reference prefers its own token by no more than `tie` nats is a tie: rounding decides it, and the
answers after it say nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from serving.parity import LOGPROB_BOUNDS, first_difference

if TYPE_CHECKING:
    from serving.golden import Answer

SHOWN_TOKENS = 6
SHOWN_PROMPTS = 3


def tie_margin(dtype: str) -> float:
    """Margin, in nats, up to which a difference is a tie: none in float32, the bound in half precision."""
    return 0.0 if dtype == "float32" else LOGPROB_BOUNDS[dtype]


class Answered(Protocol):
    """What is compared: a golden Answer, or a server's Generation."""

    @property
    def token_ids(self) -> list[int]: ...
    @property
    def logprobs(self) -> list[float]: ...


@dataclass(frozen=True)
class Difference:
    """Where one answer leaves the reference.

    margin: by how many nats the reference prefers its own token; where its likeliest tokens do not include
    the other one, `at_least` is true and the margin is a lower bound. None at the end of one of the answers.
    """

    prompt: int
    at: int
    margin: float | None
    at_least: bool


@dataclass(frozen=True)
class Comparison:
    """One column against another. max_logprob_delta in nats, None where one is missing or not a number."""

    left: str
    right: str
    prompts: int
    identical: int
    ties: int
    max_logprob_delta: float | None
    differences: list[Difference]

    def passed(self, bound: float) -> bool:
        """Whether every answer is identical or a tie, and every log-probability within `bound`."""
        close = self.max_logprob_delta is not None and self.max_logprob_delta <= bound
        return close and self.identical + self.ties == self.prompts

    def as_json(self) -> dict[str, Any]:
        """All fields, as JSON values."""
        return asdict(self)


def compare_columns(
    left: str,
    reference: Sequence[Answer],
    right: str,
    other: Sequence[Answered],
    *,
    tie: float,
    top: Sequence[Answer] | None = None,
) -> Comparison:
    """Compare `other` with `reference`, prompt by prompt.

    Args:
        left, right: names of the two.
        tie: largest margin, in nats, of a difference that does not count.
        top: answers whose `top` gives the margins; default: the reference's own.
    """
    identical = ties = 0
    deltas: list[float] = []
    differences: list[Difference] = []
    for index, (ours, theirs) in enumerate(zip(reference, other, strict=True)):
        at = first_difference(ours.token_ids, theirs.token_ids)
        common = len(ours.token_ids) if at is None else at
        if len(theirs.logprobs) < common:
            deltas.append(math.nan)
        deltas += [abs(a - b) for a, b in zip(ours.logprobs[:common], theirs.logprobs[:common], strict=False)]
        if at is None:
            identical += 1
            continue
        difference = _difference(index, at, (top or reference)[index], ours, theirs)
        margin = difference.margin
        if margin is not None and not difference.at_least and margin <= tie:
            ties += 1
        differences.append(difference)
    finite = all(math.isfinite(delta) for delta in deltas)
    largest = max(deltas, default=0.0) if finite else None
    return Comparison(left, right, len(reference), identical, ties, largest, differences)


def _difference(index: int, at: int, top: Answer, ours: Answered, theirs: Answered) -> Difference:
    if at >= len(ours.token_ids) or at >= len(theirs.token_ids) or at >= len(top.top):
        return Difference(index, at, None, False)
    logprobs = {int(token): value for token, value in top.top[at]}
    own = logprobs.get(ours.token_ids[at], min(logprobs.values()))
    at_least = theirs.token_ids[at] not in logprobs
    margin = own - (min(logprobs.values()) if at_least else logprobs[theirs.token_ids[at]])
    return Difference(index, at, max(margin, 0.0), at_least)


def explain(
    comparison: Comparison, reference: Sequence[Answered], other: Sequence[Answered], decode: Any
) -> list[str]:
    """Readable lines about the first differences. decode: token id -> text."""
    lines = []
    for difference in comparison.differences[:SHOWN_PROMPTS]:
        at, ours = difference.at, reference[difference.prompt].token_ids
        theirs = other[difference.prompt].token_ids
        lines.append(
            f"prompt {difference.prompt}: first difference at token {at} "
            f"({comparison.left} has {len(ours)}, {comparison.right} {len(theirs)})"
        )
        width = max(len(comparison.left), len(comparison.right))
        for name, ids in ((comparison.left, ours), (comparison.right, theirs)):
            shown = ids[max(at - SHOWN_TOKENS, 0) : at + SHOWN_TOKENS]
            end = "" if len(ids) > at + SHOWN_TOKENS else " (end)"
            lines.append(f"    {name:<{width}}  {' '.join(repr(decode(token)) for token in shown)}{end}")
        if difference.margin is not None:
            least = "at least " if difference.at_least else ""
            lines.append(
                f"    {comparison.left} prefers its own token there by {least}{difference.margin:.2g} nats"
            )
    hidden = len(comparison.differences) - SHOWN_PROMPTS
    if hidden > 0:
        lines.append(f"... and {hidden} more prompts")
    return lines


def table(title: str, comparisons: Sequence[Comparison], bound: float) -> list[str]:
    """The comparisons as aligned lines, with the verdict of each."""
    width = max(len(f"{c.left} = {c.right}") for c in comparisons)
    lines = [f"{title:<{width + 4}}  tokens identical   max |delta log-probability|"]
    for c in comparisons:
        name = f"{c.left} = {c.right}"
        ties = f" (+{c.ties} ties)" if c.ties else ""
        delta = "not finite" if c.max_logprob_delta is None else f"{c.max_logprob_delta:.1e}"
        verdict = "" if c.passed(bound) else "   FAILED"
        count = f"{c.identical}/{c.prompts}{ties}"
        lines.append(f"    {name:<{width}}  {count:<16}   {delta}{verdict}")
    return lines
