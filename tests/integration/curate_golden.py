"""A data set with every quirk that curation handles, and a configuration with all kinds of operations.

Pinned in test_curate_sharded.py is what the stage made of it when it still held all rows in memory.
"""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WORDS = (
    "order kettle refund where is my the a ships monday blue red green return warehouse carrier please "
    "thanks café straße 漢字 ann@shop.example {code} ... http"
).split()
EXAM = ["order kettle refund where is my the a ships monday blue", "return warehouse carrier please thanks"]
OPERATIONS: list[dict[str, Any]] = [
    {"op": "unicode", "mojibake": False},
    {"op": "mix", "weights": {"a.jsonl": 1, "b.jsonl": 1}, "max_epochs": 2.5},
    {"op": "near_duplicates", "keep": "all", "part": "prompt"},
    {"op": "pii", "action": "redact", "examples": 1},
    {"op": "quality", "action": "tag"},
    {"op": "toxicity", "scorer": "tests.integration.curate_golden:scores"},
    {"op": "preference_checks"},
    {"op": "duplicates"},
    {"op": "decontaminate", "against": ["exam.jsonl"], "ngram": 5, "review_above": 0.3},
    {"op": "mix", "temperature": 3.0, "max_epochs": 2.0, "rows": 240},
    {"op": "near_duplicates", "threshold": 0.9, "search": "exact"},
]


def write(folder: Path, count: int = 150) -> None:
    """a.jsonl, b.jsonl with half as many rows, and exam.jsonl."""
    rng = random.Random(7)
    for name, rows in (("a", count), ("b", count // 2)):
        lines: list[str] = []
        held: list[dict[str, Any]] = []
        for number in range(rows):
            row = _row(rng, held, rows)
            held.append(row)
            lines.append(json.dumps(row))
            if number % 97 == 5:
                lines.append("{bad ann@shop.example")
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    exam = "".join(json.dumps({"q": text}) + "\n" for text in EXAM)
    (folder / "exam.jsonl").write_text(exam, encoding="utf-8")


def _row(rng: random.Random, held: Sequence[dict[str, Any]], rows: int) -> dict[str, Any]:
    def said(most: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(2, most)))

    keys = ["a", "b", "a-2", "a-3", "a-2-2", f"k{rng.randint(0, rows)}", f"k{rng.randint(0, rows)}-2"]
    row = {
        "prompt": said(25),
        "chosen": said(30),
        "rejected": said(30),
        "who": f"u{rng.randint(0, rows // 2)}" if rng.random() < 0.9 else "bob@x.example",
        "key": rng.choice(keys),
    }
    if held and rng.random() < 0.25:
        row = {**rng.choice(held)}
        row["prompt"] += rng.choice(["", " again", "!"])
    if held and rng.random() < 0.05:
        other = rng.choice(held)
        row = {**other, "chosen": other["rejected"], "rejected": other["chosen"]}
    if rng.random() < 0.02:
        row["rejected"] = row["chosen"]
    if rng.random() < 0.02:
        row["chosen"] = ""
    return row


def block(folder: Path, **rest: Any) -> dict[str, Any]:
    """The configuration of the data in `folder`."""
    first = {"path": str(folder / "a.jsonl"), "id_column": "key", "group_column": "who", "name": "a.jsonl"}
    operations = [dict(operation) for operation in OPERATIONS]
    for operation in operations:
        if "against" in operation:
            operation["against"] = [str(folder / "exam.jsonl")]
    return {
        "kind": "preference",
        "sources": [first, {"path": str(folder / "b.jsonl"), "meta_columns": ["who"]}],
        "operations": operations,
        "split": {"by": "cluster"},
        "max_reject_fraction": 1.0,
        **rest,
    }


def scores(texts: Sequence[str]) -> list[float]:
    """A scorer that notes how often it was called, and stops its process where a test asks for that.

    POSTTRAIN_TEST_CALLS: a file; a line is added a call. POSTTRAIN_TEST_SIGNAL: "9 3" sends signal 9 at the
    third call, once.
    """
    calls = os.environ.get("POSTTRAIN_TEST_CALLS")
    if calls:
        with open(calls, "a", encoding="utf-8") as stream:
            stream.write(f"{len(texts)}\n")
        number, _, at = os.environ.get("POSTTRAIN_TEST_SIGNAL", "0 0").partition(" ")
        if len(Path(calls).read_text(encoding="utf-8").splitlines()) == int(at):
            os.kill(os.getpid(), signal.Signals(int(number)))
    return [len(text) / 100 for text in texts]
