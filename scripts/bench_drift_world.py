"""Real conversations for `bench_drift.py`: a stream of requests to learn from, and ways in which it shifts.

The stream is GSM8K (train and test), HH-RLHF harmless-base (chosen side) and Alpaca, shuffled: 12,000 rows.
A row is used once: for the reference, or in one day. Folder: POSTTRAIN_SHARED_DATA, or ../shared/data.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from data_prep.records import InvalidRecord
from data_prep.turns import parse_transcript
from serving.drift.records import Record

ROOT = Path(os.environ.get("POSTTRAIN_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
Shift = Callable[[list[Record], np.random.Generator], list[Record]]


def lines(path: str) -> list[dict]:
    file = ROOT / path
    data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    return [json.loads(line) for line in data.decode("utf-8").split("\n") if line]


def ask(prompt: str, answer: str) -> Record:
    return Record([{"role": "user", "content": prompt}], answer)


def maths() -> list[Record]:
    rows = [row for part in ("train", "test") for row in lines(f"gsm8k/grade_school_math/data/{part}.jsonl")]
    return [ask(row["question"], row["answer"]) for row in rows]


def chat() -> list[Record]:
    """HH-RLHF: whole dialogues, as a chat service sees them."""
    found = []
    for row in lines("hh_rlhf/harmless-base/test.jsonl.gz"):
        try:
            *prompt, answer = parse_transcript(row["chosen"], "chosen")
        except InvalidRecord:  # 13 of 2,312 have an empty turn
            continue
        if prompt and answer.role == "assistant":
            turns = [{"role": turn.role, "content": turn.content} for turn in prompt]
            found.append(Record(turns, answer.content))
    return found


def instructions(language: str = "en") -> list[Record]:
    """Alpaca."""
    file = ROOT / f"llamafactory_demo/data/alpaca_{language}_demo.json"
    rows = json.loads(file.read_text(encoding="utf-8"))
    return [ask(f"{row['instruction']}\n{row['input']}".strip(), row["output"]) for row in rows]


def formats() -> list[Record]:
    """IFEval: requests full of demands on the format, with GPT-4's answers."""
    rows = lines("ifeval/data/input_response_data_gpt4_20231107_145030.jsonl")
    return [ask(row["prompt"], row["response"]) for row in rows]


def sentences(language: str) -> list[str]:
    file = ROOT / f"lingua_langid/language-testdata/sentences/{language}.txt"
    return file.read_text(encoding="utf-8").splitlines()


def replaced(share: float, others: Sequence[Record]) -> Shift:
    """A share of the day is other records."""

    def shift(day: list[Record], rng: np.random.Generator) -> list[Record]:
        count = round(share * len(day))
        chosen = rng.choice(len(others), count, replace=False)
        return [*(others[i] for i in chosen), *day[count:]]

    return shift


def translated(share: float, texts: Sequence[str]) -> Shift:
    """A share of the last messages becomes sentences of another language, about as long; answers stay."""

    def other(record: Record, rng: np.random.Generator) -> Record:
        length, text = len(record.messages[-1]["content"]), ""
        while len(text) < length:
            text = f"{text} {texts[rng.integers(len(texts))]}".strip()
        turn = {"role": "user", "content": text[: max(length, 20)]}
        return replace(record, messages=[*record.messages[:-1], turn])

    def shift(day: list[Record], rng: np.random.Generator) -> list[Record]:
        count = round(share * len(day))
        return [*(other(record, rng) for record in day[:count]), *day[count:]]

    return shift


def doubled(part: str) -> Shift:
    """Every prompt (last message) or answer is joined by that of another: twice as long, same words."""

    def shift(day: list[Record], rng: np.random.Generator) -> list[Record]:
        order = rng.permutation(len(day))
        if part == "answer":
            return [
                replace(a, answer=f"{a.answer}\n{day[i].answer}") for a, i in zip(day, order, strict=True)
            ]
        longer = []
        for record, i in zip(day, order, strict=True):
            last = record.messages[-1]
            text = f"{last['content']}\n{day[i].messages[-1]['content']}"
            longer.append(replace(record, messages=[*record.messages[:-1], {**last, "content": text}]))
        return longer

    return shift


def refusing(share: float) -> Shift:
    """A share of the answers becomes a refusal."""

    def shift(day: list[Record], rng: np.random.Generator) -> list[Record]:
        count = round(share * len(day))
        said = "I'm sorry, but I can't help with that."
        return [*(replace(record, answer=said) for record in day[:count]), *day[count:]]

    return shift
