"""Days of a support desk for the tests of drift: like the reference, or shifted in a known way."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

from data_prep.tiny.world import generate
from serving.drift.records import Record

GERMAN = (
    "Guten Tag, meine Bestellung {code} ist noch nicht angekommen, wann kommt das Paket?",
    "Hallo, ich möchte den Artikel aus der Bestellung {code} zurückgeben, wie geht das?",
    "Können Sie mir bitte sagen, wo sich die Lieferung {code} gerade befindet?",
)
MATHS = (
    "A train travels {a} miles in {b} hours; how many miles does it travel each hour?",
    "There are {a} apples and {b} children. How many apples does each child get?",
    "What is the sum of {a} and {b}, multiplied by the number of days in a week?",
)
Shift = Callable[[list[Record], random.Random], list[Record]]


def desk(rows: int, seed: int) -> list[Record]:
    """Requests to the support desk with mixed answers, by the tiny world's generator."""
    found = []
    for record in generate("conversation", rows, seed):
        turns = [{"role": turn.role, "content": turn.content} for turn in record.messages]
        found.append(Record(turns[:-1], turns[-1]["content"]))
    return found


def _asked(record: Record, text: str) -> Record:
    return replace(record, messages=[*record.messages[:-1], {"role": "user", "content": text}])


def german(share: float) -> Shift:
    def shift(day: list[Record], rng: random.Random) -> list[Record]:
        count = round(share * len(day))
        texts = [rng.choice(GERMAN).format(code=f"K{rng.randrange(100, 999)}") for _ in range(count)]
        return [*map(_asked, day[:count], texts), *day[count:]]

    return shift


def maths(share: float) -> Shift:
    def shift(day: list[Record], rng: random.Random) -> list[Record]:
        count = round(share * len(day))
        texts = [
            rng.choice(MATHS).format(a=rng.randrange(10, 99), b=rng.randrange(2, 9)) for _ in range(count)
        ]
        return [*map(_asked, day[:count], texts), *day[count:]]

    return shift


def long_prompts(day: list[Record], rng: random.Random) -> list[Record]:
    others = rng.sample(day, len(day))
    return [
        _asked(a, f"{a.messages[-1]['content']} {b.messages[-1]['content']}")
        for a, b in zip(day, others, strict=True)
    ]


def long_answers(day: list[Record], rng: random.Random) -> list[Record]:
    others = rng.sample(day, len(day))
    return [replace(a, answer=f"{a.answer} {b.answer}") for a, b in zip(day, others, strict=True)]


def refusals(share: float) -> Shift:
    def shift(day: list[Record], rng: random.Random) -> list[Record]:
        count = round(share * len(day))
        return [*(replace(r, answer="I'm sorry, but I can't help.") for r in day[:count]), *day[count:]]

    return shift


SHIFTS: dict[str, tuple[Shift, str]] = {
    "topic": (maths(0.2), "prompt_embedding"),
    "language": (german(0.2), "prompt_language"),
    "another language": (german(1.0), "prompt_language"),
    "prompts twice as long": (long_prompts, "prompt_tokens"),
    "answers twice as long": (long_answers, "answer_tokens"),
    "refusals": (refusals(0.1), "refusal"),
}
