"""Records made into others: of another kind (a preference as a demonstration, anything as its prompt), or
shorter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from data_prep.records import (
    ConversationRecord,
    Kind,
    Message,
    PreferenceRecord,
    PromptRecord,
    Record,
    Side,
    TextRecord,
    UnpairedPreferenceRecord,
)

PROJECTIONS: dict[Kind, tuple[Kind, ...]] = {
    "text": ("text",),
    "prompt": ("prompt", "text"),
    "conversation": ("conversation", "prompt", "text"),
    "preference": ("preference", "conversation", "prompt", "text"),
    "unpaired_preference": ("unpaired_preference", "prompt"),
}
"""Which kinds a record of each native kind can feed."""


def project(record: Record, kind: Kind, use: Side = "chosen") -> Record:
    """The record as another kind (see PROJECTIONS); id, source, group and meta are kept.

    `use` picks the side of a preference that becomes the assistant turn. Text is the turns' contents
    separated by blank lines, without role names.
    """
    common: dict[str, Any] = {
        "id": record.id,
        "source": record.source,
        "group": record.group,
        "meta": record.meta,
    }
    if record.kind == kind:
        return record
    if isinstance(record, UnpairedPreferenceRecord) and kind == "prompt":
        return PromptRecord(record.prompt, **common)
    if isinstance(record, PreferenceRecord):
        if kind == "prompt":
            return PromptRecord(record.prompt, **common)
        answered = ConversationRecord(
            record.prompt + (record.chosen if use == "chosen" else record.rejected), **common
        )
        return project(answered, kind)
    if isinstance(record, ConversationRecord) and kind == "prompt":
        return PromptRecord(record.messages[:-1], **common)
    if kind == "text":
        return TextRecord("\n\n".join(text for _, text in record.turns()), **common)
    raise ValueError(f"a {record.kind} record cannot become {kind}")


def from_last_user_turns(record: Record, count: int) -> Record:
    """The record from its `count`-th last user turn on, with a leading system turn.

    A record with fewer user turns stays as it is. Raises ValueError for a record of kind text.
    """
    if isinstance(record, ConversationRecord):
        return replace(record, messages=_tail(record.messages, count))
    if isinstance(record, (PreferenceRecord, UnpairedPreferenceRecord, PromptRecord)):
        return replace(record, prompt=_tail(record.prompt, count))
    raise ValueError(f"a {record.kind} record has no turns")


def _tail(turns: Sequence[Message], count: int) -> tuple[Message, ...]:
    users = [index for index, turn in enumerate(turns) if turn.role == "user"]
    start = users[-count] if len(users) >= count else 0
    system = [turn for turn in turns[:start] if turn.role == "system"]
    return (*system, *turns[start:])
