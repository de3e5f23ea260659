"""From one kind of record to another: a preference can be read as a demonstration, anything as its prompt."""

from __future__ import annotations

from typing import Any

from data_prep.records import (
    ConversationRecord,
    Kind,
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
