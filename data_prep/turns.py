"""Turns as data sets write them: {role, content} or {from, value}, with tool calls, or in one transcript.

Roles of other conventions are mapped by `ROLE_ALIASES`. Tool calls become assistant turns with one JSON
object per call and line.
"""

from __future__ import annotations

import json
import re
from typing import Any

from data_prep.records import InvalidRecord, Message, excerpt

Row = dict[str, Any]

ROLE_ALIASES = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function": "tool",
    "developer": "system",
}
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


def field(row: Row, *names: str) -> Any:
    """The first of the fields that the row has and that is not null. Raises InvalidRecord: missing_field."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    has = ", ".join(map(str, row)) or "no field"
    raise InvalidRecord("missing_field", f"no field {' or '.join(map(repr, names))} (the row has {has})")


def _call(call: Any) -> str:
    """One tool call as one line of JSON with name and arguments."""
    if isinstance(call, str):
        return call
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or "name" not in function:
        raise InvalidRecord("wrong_type", f"a tool call needs a name: {excerpt(call)}")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise InvalidRecord(
                "wrong_type", f"tool call arguments are not JSON: {excerpt(arguments)}"
            ) from error
    return json.dumps({"name": function["name"], "arguments": arguments}, ensure_ascii=False)


def _part(part: Any) -> str:
    """One element of a content list. Raises InvalidRecord: unsupported_content (image, reasoning, ...)."""
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind == "text":
        return field(part, "text", "value")
    if kind == "tool_call":
        return _call(field(part, "value", "function"))
    raise InvalidRecord(
        "unsupported_content", f"content part of type {kind!r}; only text and tool_call are read"
    )


def parse_turn(turn: Any) -> Message:
    """One turn, {role, content} or {from, value}. Raises InvalidRecord."""
    if not isinstance(turn, dict):
        raise InvalidRecord(
            "wrong_type", f"a turn must be an object, got {type(turn).__name__}: {excerpt(turn)}"
        )
    role = field(turn, "role", "from")
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):
        content = "\n".join(map(str, map(_part, content)))
    calls = turn.get("tool_calls") or []
    if not isinstance(calls, list):
        raise InvalidRecord("wrong_type", f"tool_calls must be a list: {excerpt(calls)}")
    if calls:
        before = [content] if content else []
        content = "\n".join(map(str, [*before, *map(_call, calls)]))
    if content is None:
        raise InvalidRecord("empty_content", f"the {excerpt(role, 40)} turn has no content")
    return Message(ROLE_ALIASES.get(role, role) if isinstance(role, str) else role, content)


def parse_turns(value: Any, where: str) -> tuple[Message, ...]:
    """A non-empty list of turns. Raises InvalidRecord."""
    if not isinstance(value, list):
        raise InvalidRecord(
            "wrong_type", f"{where} must be a list of turns, got {type(value).__name__}: {excerpt(value)}"
        )
    if not value:
        raise InvalidRecord("no_turns", f"{where} is an empty list")
    return tuple(parse_turn(turn) for turn in value)


def parse_transcript(text: Any, where: str) -> tuple[Message, ...]:
    r"""Turns of an HH-RLHF transcript "\n\nHuman: ...\n\nAssistant: ...", contents stripped.

    Raises InvalidRecord.
    """
    if not isinstance(text, str):
        raise InvalidRecord("wrong_type", f"{where} must be a transcript string, got {type(text).__name__}")
    before, *rest = _HH_TURN.split(text if text.startswith("\n\n") else "\n\n" + text.lstrip())
    if before.strip() or not rest:
        raise InvalidRecord("not_a_transcript", f"{where} does not begin with 'Human:': {excerpt(text, 80)}")
    pairs = zip(rest[::2], rest[1::2], strict=True)
    return tuple(Message(_HH_ROLES[speaker], content.strip()) for speaker, content in pairs)
