"""Row formats: one parser per format, from a plain dict to a typed record, and their detection.

A parser reads nothing but its row and raises `InvalidRecord` with a countable reason. Turns may be written
{role, content} or {from, value}; roles of other conventions are mapped by `ROLE_ALIASES`. Tool calls become
assistant turns with one JSON object per call and line; tool definitions go to the record's meta.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.records import (
    ConversationRecord,
    InvalidRecord,
    Kind,
    Message,
    PreferenceRecord,
    PromptRecord,
    Record,
    TextRecord,
    excerpt,
)

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


@dataclass(frozen=True)
class Format:
    """A row format. needs: what a row must have, in words; parse: row -> record of kind `native`."""

    native: Kind
    needs: str
    parse: Callable[[Row], Record]


def _field(row: Row, *names: str) -> Any:
    """The first of the fields that the row has and that is not null. Raises InvalidRecord: missing_field."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    has = ", ".join(map(str, row)) or "no field"
    raise InvalidRecord("missing_field", f"no field {' or '.join(map(repr, names))} (the row has {has})")


def _meta(row: Row) -> str:
    return (
        json.dumps({"tools": row["tools"]}, ensure_ascii=False, sort_keys=True) if row.get("tools") else "{}"
    )


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
        return _field(part, "text", "value")
    if kind == "tool_call":
        return _call(_field(part, "value", "function"))
    raise InvalidRecord(
        "unsupported_content", f"content part of type {kind!r}; only text and tool_call are read"
    )


def parse_turn(turn: Any) -> Message:
    """One turn, {role, content} or {from, value}. Raises InvalidRecord."""
    if not isinstance(turn, dict):
        raise InvalidRecord(
            "wrong_type", f"a turn must be an object, got {type(turn).__name__}: {excerpt(turn)}"
        )
    role = _field(turn, "role", "from")
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


def _prompt_turns(row: Row, value: Any, where: str = "prompt") -> tuple[Message, ...]:
    """A prompt as turns: a string is one user turn; a `system` field of the row goes in front."""
    turns = (Message("user", value),) if isinstance(value, str) else parse_turns(value, where)
    system = row.get("system")
    return (Message("system", system), *turns) if system and turns[0].role != "system" else turns


def _messages(row: Row) -> Record:
    return ConversationRecord(_prompt_turns(row, _list(_field(row, "messages"), "messages")), meta=_meta(row))


def _sharegpt(row: Row) -> Record:
    turns = _list(_field(row, "conversations", "conversation"), "conversations")
    return ConversationRecord(_prompt_turns(row, turns, "conversations"), meta=_meta(row))


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise InvalidRecord(
            "wrong_type", f"{where} must be a list of turns, got {type(value).__name__}: {excerpt(value)}"
        )
    return value


def _prompt_completion(row: Row) -> Record:
    prompt = _prompt_turns(row, _field(row, "prompt"))
    value = _field(row, "completion", "response")
    answer = (Message("assistant", value),) if isinstance(value, str) else parse_turns(value, "completion")
    return ConversationRecord(prompt + answer, meta=_meta(row))


def _alpaca(row: Row) -> Record:
    turns: list[Message] = []
    for pair in row.get("history") or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise InvalidRecord(
                "wrong_type", f"history must hold [question, answer] pairs, got {excerpt(pair)}"
            )
        turns += [Message("user", pair[0]), Message("assistant", pair[1])]
    request, extra = _field(row, "instruction"), row.get("input")
    if extra and isinstance(request, str) and isinstance(extra, str):
        request = f"{request}\n\n{extra}"
    turns += [Message("user", request), Message("assistant", _field(row, "output"))]
    if row.get("system"):
        turns.insert(0, Message("system", row["system"]))
    return ConversationRecord(tuple(turns), meta=_meta(row))


def _side(value: Any, name: str) -> tuple[Message, ...]:
    if isinstance(value, str):
        return (Message("assistant", value),)
    return parse_turns([value] if isinstance(value, dict) else value, name)


def _preference(row: Row) -> Record:
    """Explicit prompt (prompt, conversations, messages), or chosen and rejected lists that begin with it."""
    sides = {name: _side(_field(row, name), name) for name in ("chosen", "rejected")}
    given = next(
        (row[name] for name in ("prompt", "conversations", "messages") if row.get(name) is not None), None
    )
    if given is None and any(len(side) < 2 for side in sides.values()):
        raise InvalidRecord(
            "missing_field", "no prompt: give `prompt`, or chosen and rejected lists that begin with it"
        )
    prompt = sides["chosen"][:-1] if given is None else _prompt_turns(row, given)
    for name, side in sides.items():
        if len(side) > 1:
            if side[:-1] != prompt:
                raise InvalidRecord("prompt_mismatch", _mismatch(prompt, side[:-1], name))
            sides[name] = side[-1:]
    return PreferenceRecord(prompt, sides["chosen"], sides["rejected"], meta=_meta(row))


def _mismatch(prompt: Sequence[Message], other: Sequence[Message], name: str) -> str:
    """Where the turns before `name`'s answer leave the prompt."""
    turn = next(
        (i for i, (a, b) in enumerate(zip(prompt, other, strict=False)) if a != b),
        min(len(prompt), len(other)),
    )
    if turn == min(len(prompt), len(other)):
        return f"the prompt has {len(prompt)} turns, but {len(other)} come before the answer of {name}"
    return (
        f"turn {turn + 1} before the answer of {name} differs from the prompt: "
        f"{excerpt(other[turn].content, 60)!r} against {excerpt(prompt[turn].content, 60)!r}"
    )


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


def _hh(row: Row) -> Record:
    """Two transcripts that share all but their last turn, which are the responses."""
    chosen = parse_transcript(_field(row, "chosen"), "chosen")
    rejected = parse_transcript(_field(row, "rejected"), "rejected")
    if chosen[:-1] != rejected[:-1]:
        raise InvalidRecord("prompt_mismatch", _mismatch(chosen[:-1], rejected[:-1], "rejected"))
    if len(chosen) < 2:
        raise InvalidRecord("no_turns", "the transcript has only one turn")
    return PreferenceRecord(chosen[:-1], chosen[-1:], rejected[-1:])


def _text(row: Row) -> Record:
    return TextRecord(_field(row, "text"))


def _prompt(row: Row) -> Record:
    return PromptRecord(_prompt_turns(row, _field(row, "prompt")), meta=_meta(row))


FORMATS: dict[str, Format] = {
    "hh": Format("preference", "chosen and rejected transcripts beginning with 'Human:'", _hh),
    "preference": Format(
        "preference", "chosen and rejected, with prompt/conversations or beginning with it", _preference
    ),
    "messages": Format("conversation", "messages [{role, content}, ...]", _messages),
    "sharegpt": Format("conversation", "conversations [{from, value}, ...]", _sharegpt),
    "alpaca": Format("conversation", "instruction, output and optionally input, system, history", _alpaca),
    "prompt_completion": Format("conversation", "prompt and completion (or response)", _prompt_completion),
    "prompt": Format("prompt", "prompt, a string or turns ending with the user's", _prompt),
    "text": Format("text", "text", _text),
}


def detect(row: Row) -> str | None:
    """The format a row is in, judged by its fields alone; None when it fits none.

    Rows with KTO labels fit none: read as messages they would turn bad answers into demonstrations.
    """
    has = {name for name, value in row.items() if value is not None}
    if {"chosen", "rejected"} <= has:
        sides = (row["chosen"], row["rejected"])
        transcripts = all(isinstance(side, str) and side.lstrip().startswith("Human:") for side in sides)
        return "hh" if transcripts and "prompt" not in has else "preference"
    if isinstance(row.get("label"), bool):
        return None
    for name, needed in (
        ("messages", {"messages"}),
        ("sharegpt", {"conversations"}),
        ("alpaca", {"instruction", "output"}),
        ("prompt_completion", {"prompt", "completion"}),
        ("prompt_completion", {"prompt", "response"}),
        ("prompt", {"prompt"}),
        ("text", {"text"}),
    ):
        if needed <= has:
            return name
    return None
