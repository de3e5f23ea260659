"""From a judge's reply to a verdict. What cannot be read says why, and never counts as a loss.

A verdict is a JSON object with the expected key, alone, in a code fence or amid prose. Several objects that
disagree are ambiguous: a judge may quote what an answer said about itself.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from eval.judging.templates import Method

WINNERS = {"a": "A", "b": "B", "tie": "tie", "answer a": "A", "answer b": "B"}
RATING_LOW, RATING_HIGH = 1.0, 10.0
MOST_CHARACTERS = 100_000
"""A longer reply is not searched: no verdict is that long, and the search takes the square of the length."""
_KEY = {"pairwise": "winner", "rating": "rating"}
_BRACE = re.compile(r"\{")
_DECODER = json.JSONDecoder(strict=False)


@dataclass(frozen=True)
class Parsed:
    """value: "A", "B" or "tie" for a comparison, a number for a rating, None where nothing could be read.

    problem: why not; one of no_json, no_verdict, wrong_value, ambiguous, truncated, refused, empty,
    too_long.
    """

    value: str | float | None
    reason: str = ""
    problem: str | None = None


def parse(
    text: str, method: Method, *, finish_reason: str | None = "stop", refusal: str | None = None
) -> Parsed:
    """Read one reply. A refusal and a filtered reply are told apart by `problem` == "refused"."""
    if refusal or finish_reason == "content_filter":
        return Parsed(None, problem="refused")
    if not text.strip():
        return Parsed(None, problem="truncated" if finish_reason == "length" else "empty")
    if len(text) > MOST_CHARACTERS:
        return Parsed(None, problem="too_long")
    objects = list(_objects(text))
    key = _KEY[method]
    read = [_read(item, method) for item in objects if key in item]
    good = [parsed for parsed in read if parsed.value is not None]
    if len({parsed.value for parsed in good}) > 1:
        return Parsed(None, problem="ambiguous")
    if finish_reason == "length" and not good:
        return Parsed(None, problem="truncated")
    if good:
        return good[-1]
    if read:
        return read[-1]
    return Parsed(None, problem="no_verdict" if objects else "no_json")


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """Every JSON object in `text`, outermost ones only, in order."""
    at = 0
    while (found := _BRACE.search(text, at)) is not None:
        try:
            value, at = _DECODER.raw_decode(text, found.start())
        except (ValueError, RecursionError):  # ValueError: also a number of thousands of digits
            at = found.start() + 1
            continue
        if isinstance(value, dict):
            yield value


def _read(item: dict[str, Any], method: Method) -> Parsed:
    reason = item.get("reason")
    reason = reason if isinstance(reason, str) else ""
    value = item[_KEY[method]]
    if method == "pairwise":
        winner = WINNERS.get(value.strip().lower()) if isinstance(value, str) else None
        return Parsed(winner, reason, None if winner else "wrong_value")
    number = _number(value)
    if number is None or not RATING_LOW <= number <= RATING_HIGH:
        return Parsed(None, reason, "wrong_value")
    return Parsed(number, reason)


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


_SUSPICIOUS = re.compile(
    r"""["']?(winner|rating)["']?\s*:\s*["']?(A|B|tie|10)\b
    |\b(ignore|disregard|forget)\b.{0,40}\b(above|previous|prior|earlier|instructions?)\b
    |\b(answer|response|assistant)\s+(A|B)\s+(wins|is\s+(the\s+)?better)\b
    |\b(A|B)\s+wins\b""",
    re.IGNORECASE | re.VERBOSE | re.DOTALL,
)


def speaks_to_the_judge(text: str) -> bool:
    """Whether an answer holds what is meant for a judge: a verdict, or an order to ignore instructions."""
    return _SUSPICIOUS.search(text) is not None
