"""The data card (Markdown) of a dataset directory; the report is in ``data_prep/page.py``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from data_prep.dataset import SPLITS
from data_prep.operations.report import card_lines, table_cell

MEANING = {
    "text": "plain documents",
    "conversation": "demonstrations: dialogues ending with the assistant's answer",
    "preference": "a prompt with a chosen and a rejected answer",
    "unpaired_preference": "a prompt with one answer, labelled desirable or undesirable",
    "prompt": "prompts waiting for an answer",
}


def card_markdown(info: dict[str, Any]) -> str:
    """card.md: what the data set is, its sources, what was dropped, how it was split, what to mind."""
    split, rows = info["split"], info["rows_out"]
    sources = [
        f"| {table_cell(at['name'])} | {at['format']} | {at['rows']:,} | `{at['sha256'][:16]}` "
        f"| {table_cell(source_details(at))} |"
        for at in info["sources"]
    ]
    drops = [
        f"| {reason} | {count:,} | {count / info['rows_in']:.2%} |" for reason, count in info["drops"].items()
    ]
    lengths = [
        f"| {name} | {at['min']:,} | {at['p50']:,} | {at['p95']:,} | {at['max']:,} |"
        for name, at in info["lengths"].items()
        if isinstance(at, dict)
    ]
    lines = [
        f"# Data card: {info['kind']}",
        "",
        f"{rows['train'] + rows['eval']:,} rows of kind `{info['kind']}` ({MEANING[info['kind']]}), made "
        f"from {info['rows_in']:,} rows read. Content hash `{info['content_hash']}`.",
        "",
        "| side | rows | groups |",
        "|---|---:|---:|",
        *(f"| {side} | {rows[side]:,} | {split['groups'][side]:,} |" for side in SPLITS),
        "",
        "## Sources",
        "",
        "| source | format | rows read | sha256 | settings |",
        "|---|---|---:|---|---|",
        *sources,
        "",
        "## Dropped",
        "",
        *(["| reason | rows | share |", "|---|---:|---:|", *drops] if drops else ["Nothing."]),
        "",
        "Every dropped row is in `rejects.jsonl` with its file, line and reason.",
        "",
        "## Split",
        "",
        f"By {split['by']}: sha256 of the salt `{split['salt']}` and the group; the lowest "
        f"{100 * split['eval_fraction']:g} % of all values go to eval. A group is never on both sides, and "
        "lands on the same side in every data set with this salt and fraction.",
        "",
        *_shortened(info),
        *card_lines(info),
        "## Lengths in characters",
        "",
        "| part | min | median | 95 % | max |",
        "|---|---:|---:|---:|---:|",
        *lengths,
        *balance(info),
        "",
        "## What was not done",
        "",
        _not_done(info),
        "",
        "## Reading it",
        "",
        "```python",
        "from data_prep.dataset import read_split",
        "",
        f'train = read_split("this/directory", "train", "{info["kind"]}")',
        "```",
    ]
    return "\n".join(lines) + "\n"


_SEARCHES = {
    "near_duplicates": "near-duplicates",
    "pii": "personal data",
    "toxicity": "toxic text",
    "decontaminate": "overlap with evaluation sets",
}


def _not_done(info: dict[str, Any]) -> str:
    if "operations" not in info:
        off = "" if info["dedup"] else " (switched off here)"
        return (
            f"Only exact duplicates were looked for{off}. There was no search for near-duplicates, personal "
            "data, toxic text, licences or overlap with evaluation sets."
        )
    done = {operation["op"] for operation in info["operations"]}
    missing = [what for name, what in _SEARCHES.items() if name not in done]
    searched = f"There was no search for {', '.join(missing)}. " if missing else ""
    return (
        f"{searched}What the operations that ran cannot find is in docs/curation.md: paraphrases of "
        "evaluation items, names and addresses of people, near-duplicates in other words."
    )


def _shortened(info: dict[str, Any]) -> list[str]:
    if info["last_user_turns"] is None:
        return []
    return [
        "## Shortened",
        "",
        f"Dialogues begin with the last {info['last_user_turns']} turns of the user; what came before was "
        "cut, after the split group was taken from the whole dialogue.",
        "",
    ]


def balance(info: Mapping[str, Any]) -> list[str]:
    """Lines on how often chosen is longer, or how many answers are desirable."""
    lengths = info["lengths"]
    if "desirable_share" in lengths:
        return ["", f"{lengths['desirable_share']:.1%} of the answers are labelled desirable."]
    if "chosen_longer" not in lengths:
        return []
    return ["", f"The chosen answer is the longer one in {lengths['chosen_longer']:.1%} of the pairs."]


def source_details(source: Mapping[str, Any]) -> str:
    """Settings of a source as JSON text; empty without any."""
    known = ("name", "format", "rows", "sha256")
    details = {key: value for key, value in source.items() if key not in known}
    return json.dumps(details, ensure_ascii=False) if details else ""
