"""Recall by type, false hits and speed of the search for personal data: our patterns, Presidio, and both.

    python scripts/bench_pii.py ../shared/data --output docs/benchmarks/pii.json

Recall: of the spans of that type in the labelled texts of presidio_research, the share that lies whole in
one finding of the same type. Presidio runs on a blank spaCy pipeline, offline, from score 0.35
(data_prep/pii_presidio.py). False hits: findings in the questions of GSM8K's training set. URL is looked for
in the labelled texts only, as by default neither looks for it. Documents a second: of the labelled texts of
one file, on one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data_prep.pii import OPTIONAL, RULES, Finding, Search, find
from data_prep.pii_patterns import Rule
from data_prep.pii_presidio import Presidio, default_types

FILES = ("data/synth_dataset_v2.json", "tests/data/generated_large.json")
LABELS = {
    "EMAIL_ADDRESS": "EMAIL",
    "US_SSN": "SSN",
    "IP_ADDRESS": "IP",
    "DOMAIN_NAME": "URL",
    "IBAN_CODE": "IBAN",
    "CREDIT_CARD": "CREDIT_CARD",
    "PHONE_NUMBER": "PHONE",
    "PERSON": "PERSON",
    "STREET_ADDRESS": "LOCATION",
    "ADDRESS": "LOCATION",
    "GPE": "LOCATION",
    "LOCATION": "LOCATION",
    "ORGANIZATION": "ORGANIZATION",
}
"""Labels of the data and the types here; other labels have no type."""
Finder = Callable[[str], Sequence[Finding]]


def finders(url: bool) -> dict[str, Finder]:
    """The systems by name. url: whether they look for URLs too."""
    rules: tuple[Rule, ...] = (*RULES, *OPTIONAL) if url else RULES
    presidio: tuple[Search, ...] = (Presidio((*default_types(model=False), *(("URL",) if url else ()))),)
    return {
        "patterns": lambda text: find(text, rules),
        "presidio": lambda text: find(text, (), presidio),
        "both": lambda text: find(text, rules, presidio),
    }


def recall(finder: Finder, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By type: spans that are labelled, and those found whole; and findings that touch no span of their
    type.
    """
    labelled: Counter[str] = Counter()
    found: Counter[str] = Counter()
    elsewhere: Counter[str] = Counter()
    for row in rows:
        findings = finder(row["full_text"])
        spans = [
            (LABELS[at["entity_type"]], at["start_position"], at["end_position"])
            for at in row["spans"]
            if at["entity_type"] in LABELS
        ]
        for kind, start, end in spans:
            labelled[kind] += 1
            found[kind] += any(at.type == kind and at.start <= start and at.end >= end for at in findings)
        for at in findings:
            if not any(kind == at.type and start < at.end and at.start < end for kind, start, end in spans):
                elsewhere[at.type] += 1
    return {
        "recall": {kind: found[kind] / labelled[kind] for kind in sorted(labelled)},
        "labelled": dict(sorted(labelled.items())),
        "findings_without_such_a_label": dict(sorted(elsewhere.items())),
    }


def seconds(finder: Finder, texts: Sequence[str], repeats: int) -> float:
    """The fastest of some runs."""
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        for text in texts:
            finder(text)
        best = min(best, time.perf_counter() - started)
    return best


def benchmark(folder: Path, repeats: int) -> dict[str, Any]:
    """The whole report."""
    data = {
        name: json.loads((folder / "presidio_research" / name).read_text(encoding="utf-8")) for name in FILES
    }
    lines = (folder / "gsm8k/grade_school_math/data/train.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line)["question"] for line in lines]
    report: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "presidio_analyzer": version("presidio-analyzer"),
        "command": "OMP_NUM_THREADS=1 python scripts/bench_pii.py ../shared/data",
        "questions": len(questions),
        "systems": {},
    }
    for name, finder in finders(url=True).items():
        plain = finders(url=False)[name]
        hits: Counter[str] = Counter()
        with_hit = 0
        for question in questions:
            findings = plain(question)
            hits.update(at.type for at in findings)
            with_hit += bool(findings)
        texts = [row["full_text"] for row in data[FILES[0]]]
        report["systems"][name] = {
            **{file: recall(finder, rows) for file, rows in data.items()},
            "hits_in_questions": dict(sorted(hits.items())),
            "questions_with_a_hit": with_hit,
            "documents_per_second": len(texts) / seconds(plain, texts, repeats),
        }
    return report


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with presidio_research and gsm8k")
    parser.add_argument("--repeats", type=int, default=3, help="runs that are timed; the fastest counts")
    parser.add_argument("--output", type=Path, help="write the report to this JSON file")
    args = parser.parse_args()
    text = json.dumps(benchmark(args.folder, args.repeats), indent=2) + "\n"
    if args.output:
        args.output.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
