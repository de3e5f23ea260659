"""Values of a row by name or by place inside a column, and rows as the formats read them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from data_prep.config import SourceConfig

Row = dict[str, Any]
_STEP = re.compile(r"\.?([^.\[\]]+)|\[(\d+)\]")
_REASONING_PARTS = ("reasoning", "thinking")


def lookup(row: Mapping[str, Any], name: str) -> Any:
    """The column `name`, or what the place `a.b` or `a[0].b` leads to; None where there is nothing."""
    if name in row:
        return row[name]
    value: Any = row
    at = 0
    while at < len(name):
        step = _STEP.match(name, at)
        if step is None:
            return None
        key, index = step.groups()
        if key is not None and isinstance(value, Mapping):
            value = value.get(key)
        elif index is not None and isinstance(value, list) and int(index) < len(value):
            value = value[int(index)]
        else:
            return None
        at = step.end()
    return value


def prepared(row: Row, source: SourceConfig) -> Row:
    """The row with the source's `columns` under the names that the formats expect, and its reasoning."""
    if source.columns:
        row = {**row, **{ours: lookup(row, theirs) for ours, theirs in source.columns.items()}}
    return row if source.reasoning == "reject" else _with_reasoning(row, source.reasoning)


def _with_reasoning(row: Row, mode: str) -> Row:
    return {
        name: [_turn(turn, mode) if isinstance(turn, dict) else turn for turn in value]
        if isinstance(value, list)
        else value
        for name, value in row.items()
    }


def _turn(turn: Row, mode: str) -> Row:
    """The turn without reasoning apart from its content: before it in <think> tags, or dropped.

    As DeepSeek-R1 and Qwen3 write it: <think>, the reasoning, </think>, each on a line, a blank line.
    """
    field = next((name for name in ("content", "value") if name in turn), "content")
    content = turn.get(field)
    thoughts = [turn["reasoning_content"]] if turn.get("reasoning_content") else []
    if isinstance(content, list):
        thoughts += [_thought(part) for part in content if _is_reasoning(part)]
        content = [part for part in content if not _is_reasoning(part)]
    if not thoughts:
        return turn
    rest = {name: value for name, value in turn.items() if name not in ("reasoning_content", field)}
    if mode == "drop":
        return {**rest, field: content}
    tags = "<think>\n" + "\n".join(map(str, thoughts)).strip() + "\n</think>\n\n"
    if isinstance(content, list):
        first, *others = content or [""]
        if isinstance(first, dict) and first.get("type") == "text":
            key = "text" if first.get("text") is not None else "value"
            return {**rest, field: [{**first, key: tags + str(first.get(key) or "")}, *others]}
        return {**rest, field: [{"type": "text", "text": tags.rstrip()}, *(part for part in content if part)]}
    return {**rest, field: tags + str(content or "")}


def _is_reasoning(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in _REASONING_PARTS


def _thought(part: Row) -> Any:
    return next((part[name] for name in ("value", "text", *_REASONING_PARTS) if part.get(name)), "")
