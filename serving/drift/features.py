"""What is measured on one record: pure functions of its text.

Lengths and tokens are of the whole prompt (every message) for the numbers, and of the last user message for
language, tokens and embedding: that is what the request is about.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from serving.drift.records import Record

MAX_TURNS = 8
REFUSAL_WINDOW = 200
_WORD = re.compile(r"\w+")
_REFUSALS = (
    r"\bI(?: am|'m|’m)? (?:really |very |so |truly )?sorry,? (?:but )?(?:I|we|that|this)\b",
    r"\bI (?:can(?:not|'t|’t)|could(?:n't|n’t| not)|won(?:'t|’t)|will not|must decline|have to decline)\b"
    r"(?! (?:wait|believe|tell you how|stress|imagine))",
    r"\bI(?: am|'m|’m) (?:not able|unable|not allowed|not permitted|not comfortable|not going) to\b",
    r"\bI do(?:n't|n’t| not) (?:feel comfortable|think (?:that )?I (?:can|should))\b",
    r"\bas an? (?:AI|artificial intelligence|(?:large )?language model)\b",
    r"\b(?:against|violates?) (?:my|our|the) (?:\w+ )?(?:guidelines|polic(?:y|ies)|principles)\b",
)
REFUSAL = re.compile("|".join(_REFUSALS), re.IGNORECASE)


def words(text: str) -> list[str]:
    """Lower-case runs of letters and digits."""
    return _WORD.findall(text.lower())


def last_user_message(record: Record) -> str:
    """What the request is about: the newest user message, or the newest of any role."""
    for message in reversed(record.messages):
        if message["role"] == "user":
            return message["content"]
    return record.messages[-1]["content"] if record.messages else ""


def prompt_text(record: Record) -> str:
    """Every message of the prompt, a line each."""
    return "\n".join(message["content"] for message in record.messages)


def turns(record: Record) -> str:
    """How many messages the prompt has besides a system message: "1" to "7", then "8 or more"."""
    count = sum(message["role"] != "system" for message in record.messages)
    return str(count) if count < MAX_TURNS else f"{MAX_TURNS} or more"


def is_refusal(answer: str) -> bool:
    """Whether the first 200 characters say, in English, one of the phrases of `REFUSAL`.

    A pattern list counts phrases, not refusals: it is for a rate that is compared with itself, and it misses
    other languages and polite evasions.
    """
    return REFUSAL.search(answer[:REFUSAL_WINDOW]) is not None


def repetition(text: str, n: int = 3) -> float:
    """Share of the word n-grams that occurred before in the text: 0 none, towards 1 a loop (seq-rep-n of
    Welleck et al. 2019, Neural Text Generation with Unlikelihood Training, equation 10)."""
    found = words(text)
    grams = [tuple(found[i : i + n]) for i in range(len(found) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def numbers(record: Record, count_tokens: Callable[[str], int]) -> dict[str, float]:
    """The continuous features of one record; those of the answer only where there is one."""
    prompt = prompt_text(record)
    found = {"prompt_chars": float(len(prompt)), "prompt_tokens": float(count_tokens(prompt))}
    if record.answer is not None:
        found["answer_chars"] = float(len(record.answer))
        found["answer_tokens"] = float(count_tokens(record.answer))
        found["answer_repetition"] = repetition(record.answer)
    return found


def categories(record: Record, detect: Callable[[str], str]) -> dict[str, str]:
    """The categorical features of one record. Flags are "yes" or "no"."""
    has_system = any(message["role"] == "system" for message in record.messages)
    found = {
        "turns": turns(record),
        "system_message": yes_no(has_system),
        "prompt_language": detect(last_user_message(record)),
    }
    if record.answer is not None:
        found["answer_language"] = detect(record.answer)
        found["refusal"] = yes_no(is_refusal(record.answer))
        found["empty_answer"] = yes_no(not record.answer.strip())
    return found


def yes_no(value: bool) -> str:
    return "yes" if value else "no"
