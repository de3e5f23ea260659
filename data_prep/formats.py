"""Row formats: one parser per format, from a plain dict to a typed record, and their detection.

A parser reads nothing but its row and raises `InvalidRecord` with a countable reason. How turns may be
written is in ``data_prep/turns.py``; tool definitions go to the record's meta.
"""

from __future__ import annotations

import json
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
    UnpairedPreferenceRecord,
    excerpt,
)
from data_prep.turns import Row, field, parse_transcript, parse_turns


@dataclass(frozen=True)
class Format:
    """A row format. needs: what a row must have, in words; parse: row -> record of kind `native`."""

    native: Kind
    needs: str
    parse: Callable[[Row], Record]


def _meta(row: Row) -> str:
    return (
        json.dumps({"tools": row["tools"]}, ensure_ascii=False, sort_keys=True) if row.get("tools") else "{}"
    )


def _prompt_turns(row: Row, value: Any, where: str = "prompt") -> tuple[Message, ...]:
    """A prompt as turns: a string is one user turn; a `system` field of the row goes in front."""
    turns = (Message("user", value),) if isinstance(value, str) else parse_turns(value, where)
    system = row.get("system")
    return (Message("system", system), *turns) if system and turns[0].role != "system" else turns


def _messages(row: Row) -> Record:
    return ConversationRecord(_prompt_turns(row, _list(field(row, "messages"), "messages")), meta=_meta(row))


def _sharegpt(row: Row) -> Record:
    turns = _list(field(row, "conversations", "conversation"), "conversations")
    return ConversationRecord(_prompt_turns(row, turns, "conversations"), meta=_meta(row))


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise InvalidRecord(
            "wrong_type", f"{where} must be a list of turns, got {type(value).__name__}: {excerpt(value)}"
        )
    return value


def _prompt_completion(row: Row) -> Record:
    prompt = _prompt_turns(row, field(row, "prompt"))
    value = field(row, "completion", "response")
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
    request, extra = field(row, "instruction"), row.get("input")
    if extra and isinstance(request, str) and isinstance(extra, str):
        request = f"{request}\n\n{extra}"
    turns += [Message("user", request), Message("assistant", field(row, "output"))]
    if row.get("system"):
        turns.insert(0, Message("system", row["system"]))
    return ConversationRecord(tuple(turns), meta=_meta(row))


def _self_instruct(row: Row) -> Record:
    """A seed task of Self-Instruct; of several instances the first."""
    instances = field(row, "instances")
    if not isinstance(instances, list) or not instances or not isinstance(instances[0], dict):
        raise InvalidRecord("wrong_type", f"instances must be a list of objects: {excerpt(instances)}")
    first = instances[0]
    return _alpaca({**row, "input": first.get("input"), "output": first.get("output")})


def _question_answer(row: Row) -> Record:
    return _prompt_completion({**row, "prompt": field(row, "question"), "completion": field(row, "answer")})


def _instruction(row: Row) -> Record:
    """Alpaca's instruction and input, without an answer."""
    request, extra = field(row, "instruction"), row.get("input")
    if extra and isinstance(request, str) and isinstance(extra, str):
        request = f"{request}\n\n{extra}"
    return PromptRecord(_prompt_turns(row, request, "instruction"), meta=_meta(row))


def _questions(row: Row) -> Record:
    """The first of the user's turns; those after it wait for answers that are not there, and stay in meta."""
    turns = field(row, "turns")
    if not isinstance(turns, list) or not turns:
        raise InvalidRecord("wrong_type", f"turns must be a list of the user's questions: {excerpt(turns)}")
    kept = json.dumps({**json.loads(_meta(row)), "turns": turns}, ensure_ascii=False, sort_keys=True)
    return PromptRecord(_prompt_turns(row, turns[0], "turns"), meta=kept)


def _side(value: Any, name: str) -> tuple[Message, ...]:
    if isinstance(value, str):
        return (Message("assistant", value),)
    return parse_turns([value] if isinstance(value, dict) else value, name)


def _preference(row: Row) -> Record:
    """Explicit prompt (prompt, conversations, messages), or chosen and rejected lists that begin with it."""
    sides = {name: _side(field(row, name, f"{name}_messages"), name) for name in ("chosen", "rejected")}
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


def _hh(row: Row) -> Record:
    """Two transcripts that share all but their last turn, which are the responses."""
    chosen = parse_transcript(field(row, "chosen"), "chosen")
    rejected = parse_transcript(field(row, "rejected"), "rejected")
    if chosen[:-1] != rejected[:-1]:
        raise InvalidRecord("prompt_mismatch", _mismatch(chosen[:-1], rejected[:-1], "rejected"))
    if len(chosen) < 2:
        raise InvalidRecord("no_turns", "the transcript has only one turn")
    return PreferenceRecord(chosen[:-1], chosen[-1:], rejected[-1:])


def _unpaired(row: Row) -> Record:
    """A conversation in any of its formats, whose last turn is the answer, and a label."""
    known = (*_CONVERSATIONS, *((name, needed) for name, needed in _OTHERS if name in _ANSWERED))
    name = next((name for name, needed in known if needed <= _given(row)), "prompt_completion")
    talk = FORMATS[name].parse(row)
    assert isinstance(talk, ConversationRecord)
    label = field(row, *LABELS)
    return UnpairedPreferenceRecord(talk.messages[:-1], talk.messages[-1:], label, meta=talk.meta)


def _text(row: Row) -> Record:
    return TextRecord(field(row, "text"))


def _prompt(row: Row) -> Record:
    return PromptRecord(_prompt_turns(row, field(row, "prompt")), meta=_meta(row))


FORMATS: dict[str, Format] = {
    "hh": Format("preference", "chosen and rejected transcripts beginning with 'Human:'", _hh),
    "preference": Format(
        "preference", "chosen and rejected, with prompt/conversations or beginning with it", _preference
    ),
    "unpaired_preference": Format(
        "unpaired_preference",
        "label (or kto_tag) true or false, and a conversation in one of the formats of kind conversation",
        _unpaired,
    ),
    "messages": Format("conversation", "messages [{role, content}, ...]", _messages),
    "sharegpt": Format("conversation", "conversations [{from, value}, ...]", _sharegpt),
    "alpaca": Format("conversation", "instruction, output and optionally input, system, history", _alpaca),
    "prompt_completion": Format("conversation", "prompt and completion (or response)", _prompt_completion),
    "prompt": Format("prompt", "prompt, a string or turns ending with the user's", _prompt),
    "text": Format("text", "text", _text),
    "question_answer": Format("conversation", "question and answer", _question_answer),
    "self_instruct": Format("conversation", "instruction and instances [{input, output}]", _self_instruct),
    "instruction": Format("prompt", "instruction and optionally input, without output", _instruction),
    "turns": Format("prompt", "turns, a list of the user's questions", _questions),
}


LABELS = ("label", "kto_tag")
_CONVERSATIONS: tuple[tuple[str, set[str]], ...] = (
    ("messages", {"messages"}),
    ("sharegpt", {"conversations"}),
    ("alpaca", {"instruction", "output"}),
    ("prompt_completion", {"prompt", "completion"}),
    ("prompt_completion", {"prompt", "response"}),
)


def _given(row: Row) -> set[str]:
    return {name for name, value in row.items() if value is not None}


_OTHERS: tuple[tuple[str, set[str]], ...] = (
    ("prompt", {"prompt"}),
    ("text", {"text"}),
    ("question_answer", {"question", "answer"}),
    ("self_instruct", {"instruction", "instances"}),
    ("turns", {"turns"}),
    ("instruction", {"instruction"}),
)


_ANSWERED = ("question_answer", "self_instruct")
_ANSWERS = {"output", "response", "completion", "answer"}
"""Fields beside which an instruction is not taken for a prompt without an answer."""


def candidates(row: Row, kind: Kind | None = None) -> list[str]:
    """The formats that a row may be in, judged by its fields alone; the first is what is chosen.

    Several only where the row holds several conversations, as `messages` beside `conversations`. An answer
    beside a label true or false is an unpaired preference: read as a conversation, bad answers would become
    demonstrations. kind: where unpaired preferences are asked for, conversations are read as such, so that a
    label that is missing or no boolean is named.
    """
    has = _given(row)
    if {"chosen", "rejected"} <= has:
        sides = (row["chosen"], row["rejected"])
        transcripts = all(isinstance(side, str) and side.lstrip().startswith("Human:") for side in sides)
        return ["hh" if transcripts and "prompt" not in has else "preference"]
    if {"chosen_messages", "rejected_messages"} <= has:
        return ["preference"]
    labelled = any(isinstance(row.get(name), bool) for name in LABELS) or kind == "unpaired_preference"
    found = list(dict.fromkeys(name for name, needed in _CONVERSATIONS if needed <= has))
    if found:
        return ["unpaired_preference", *found[1:]] if labelled else found
    for name, needed in _OTHERS:
        if needed <= has and not (name == "instruction" and has & _ANSWERS):
            return ["unpaired_preference" if labelled and name in ("prompt", *_ANSWERED) else name]
    return []


def detect(row: Row, kind: Kind | None = None) -> str | None:
    """The first of the `candidates`; None when the row fits no format."""
    return next(iter(candidates(row, kind)), None)
