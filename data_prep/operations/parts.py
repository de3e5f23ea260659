"""The parts of a record that an operation looks at, and records with other texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

from data_prep.records import (
    ConversationRecord,
    Message,
    PreferenceRecord,
    PromptRecord,
    Record,
    TextRecord,
    UnpairedPreferenceRecord,
)

Part = Literal["whole", "prompt", "answer"]


def part_texts(record: Record, part: Part) -> list[str]:
    """The texts of a part, in order. answer: the last assistant turn, or both sides of a preference.

    A plain text is both its prompt and its answer. A prompt has no answer.
    """
    if part == "whole" or isinstance(record, TextRecord):
        return [text for _, text in record.turns()]
    if isinstance(record, ConversationRecord):
        turns = record.messages[:-1] if part == "prompt" else record.messages[-1:]
    elif isinstance(record, PreferenceRecord):
        turns = record.prompt if part == "prompt" else record.chosen + record.rejected
    elif isinstance(record, UnpairedPreferenceRecord):
        turns = record.prompt if part == "prompt" else record.completion
    elif isinstance(record, PromptRecord):
        turns = record.prompt if part == "prompt" else ()
    else:
        raise TypeError(f"no parts known of a {type(record).__name__}")
    return [turn.content for turn in turns]


def part_text(record: Record, part: Part) -> str:
    """The texts of a part as one, a line break between them."""
    return "\n".join(part_texts(record, part))


def with_texts(record: Record, change: Callable[[str], str]) -> Record:
    """The record with every text changed. Raises InvalidRecord when one then cannot be trained on."""
    if isinstance(record, TextRecord):
        text = change(record.text)
        return record if text == record.text else replace(record, text=text)
    changed: dict[str, Any] = {}
    for name in ("messages", "prompt", "chosen", "rejected", "completion"):
        if name in type(record).__dataclass_fields__:
            before: Sequence[Message] = vars(record)[name]
            after = tuple(Message(turn.role, change(turn.content)) for turn in before)
            if after != before:
                changed[name] = after
    return replace(record, **changed) if changed else record
