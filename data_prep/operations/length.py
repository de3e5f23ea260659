"""Lengths in tokens of the real tokenizer, over the rendered chat template; rows outside the bounds are
dropped.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from data_prep.operations.base import Dropped, Kept, Row, tagged
from data_prep.records import (
    ConversationRecord,
    Message,
    PreferenceRecord,
    PromptRecord,
    Record,
    TextRecord,
    UnpairedPreferenceRecord,
)


@dataclass(frozen=True)
class Length:
    """Row-local. A preference counts as its longer side; a prompt with what makes the assistant answer."""

    tokenizer: Path
    min_tokens: int | None = None
    max_tokens: int | None = None
    tag: bool = False

    def apply(self, batch: Sequence[Row]) -> list[Kept | Dropped]:
        """Tags `tokens` when asked to; drops too_few_tokens and too_many_tokens.

        Raises UserError when the tokenizer cannot be loaded or has no chat template.
        """
        return [self._one(row, tokens) for row, tokens in zip(batch, self.count(batch), strict=True)]

    def _one(self, row: Row, tokens: int) -> Kept | Dropped:
        if self.min_tokens is not None and tokens < self.min_tokens:
            return Dropped("too_few_tokens", f"{tokens} tokens, min_tokens is {self.min_tokens}")
        if self.max_tokens is not None and tokens > self.max_tokens:
            return Dropped("too_many_tokens", f"{tokens} tokens, max_tokens is {self.max_tokens}")
        return Kept(tagged(row.record, tokens=tokens) if self.tag else row.record)

    def count(self, batch: Sequence[Row]) -> list[int]:
        """Tokens of every row, special tokens of the template included."""
        if not batch:
            return []
        tokenizer = _tokenizer(self.tokenizer)
        rendered = [_rendered(tokenizer, row.record) for row in batch]
        flat = [text for texts in rendered for text in texts]
        special = isinstance(batch[0].record, TextRecord)
        # Not verbose: a text longer than its model reads is what is looked for, and no reason for a warning.
        encoded = tokenizer(flat, add_special_tokens=special, verbose=False)["input_ids"]
        sizes = iter(len(ids) for ids in encoded)
        return [max(next(sizes) for _ in texts) for texts in rendered]


def _rendered(tokenizer: Any, record: Record) -> list[str]:
    """The texts whose longest counts."""
    if isinstance(record, TextRecord):
        return [record.text]
    if isinstance(record, ConversationRecord):
        dialogues = [record.messages]
    elif isinstance(record, PreferenceRecord):
        dialogues = [record.prompt + record.chosen, record.prompt + record.rejected]
    elif isinstance(record, UnpairedPreferenceRecord):
        dialogues = [record.prompt + record.completion]
    else:
        assert isinstance(record, PromptRecord)
        dialogues = [record.prompt]
    tools = json.loads(record.meta).get("tools")
    return [_render(tokenizer, dialogue, tools) for dialogue in dialogues]


def _render(tokenizer: Any, dialogue: Sequence[Message], tools: Any) -> str:
    messages = [{"role": turn.role, "content": turn.content} for turn in dialogue]
    waits = dialogue[-1].role != "assistant"
    return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=waits)


@lru_cache(maxsize=2)
def _tokenizer(path: Path) -> Any:
    from posttrain.models import load_chat_tokenizer

    return load_chat_tokenizer(path)
