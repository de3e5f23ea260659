"""Typed records: what every source is turned into, and what a dataset directory holds.

Five kinds. A conversation ends with an assistant turn, a prompt with a user (or tool) turn, a preference is a
prompt with two single assistant turns, an unpaired preference (TRL's name) a prompt with one, labelled good
or bad, a text is a plain document. Construction validates, so a record that exists is a record that can be
trained on; what cannot be is an `InvalidRecord` with a countable reason.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

Kind = Literal["text", "conversation", "preference", "unpaired_preference", "prompt"]
Side = Literal["chosen", "rejected"]
KINDS: tuple[Kind, ...] = ("text", "conversation", "preference", "unpaired_preference", "prompt")
ROLES = ("system", "user", "assistant", "tool")


class InvalidRecord(ValueError):
    """One row cannot be a record. `reason` is a short countable slug, `str()` carries the value."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason

    def __reduce__(self) -> tuple[type[InvalidRecord], tuple[str, str]]:
        return InvalidRecord, (self.reason, str(self))


def excerpt(value: Any, limit: int = 160) -> str:
    """One-line, shortened, printable form of any value, for messages and rejects.jsonl."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = printable(" ".join(text.split()))
    return text if len(text) <= limit else text[: limit - 3] + "..."


def printable(text: str) -> str:
    """The text with lone surrogates, which UTF-8 cannot hold, as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def check_text(value: Any, where: str) -> None:
    """Raises InvalidRecord unless `value` is a non-blank string that UTF-8 can hold."""
    if not isinstance(value, str):
        raise InvalidRecord(
            "wrong_type", f"{where} must be a string, got {type(value).__name__}: {excerpt(value)}"
        )
    if not value.strip():
        raise InvalidRecord("empty_content", f"{where} is empty")
    check_unicode(value, where)


def check_unicode(value: str, where: str) -> None:
    """Raises InvalidRecord unless UTF-8 can hold `value`."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRecord("invalid_unicode", f"{where} holds a lone surrogate: {excerpt(value)}") from error


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. Raises InvalidRecord: unknown_role, empty_content, wrong_type, invalid_unicode."""

    role: str
    content: str

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise InvalidRecord(
                "unknown_role", f"unknown role {excerpt(self.role, 40)!r}; known roles: {', '.join(ROLES)}"
            )
        check_text(self.content, f"the {self.role} turn")


def check_turns(turns: Sequence[Message]) -> None:
    """Raises InvalidRecord unless turns are: optional system, user, then assistant and user/tool in turn.

    Several tool results may follow each other (parallel calls). Chat templates of most model families
    refuse or garble anything else.
    """
    body = turns[1:] if turns and turns[0].role == "system" else turns
    if not body:
        raise InvalidRecord("no_turns", "there is no user turn")
    if any(turn.role == "system" for turn in body):
        raise InvalidRecord("misplaced_system", "a system turn may only be the first turn")
    if body[0].role != "user":
        raise InvalidRecord(
            "first_turn_not_user", f"the first turn after system is {body[0].role!r}, not 'user'"
        )
    for number, (before, after) in enumerate(zip(body, body[1:], strict=False), start=2):
        if (before.role == "assistant") == (after.role == "assistant") and after.role != "tool":
            raise InvalidRecord(
                "roles_not_alternating", f"turn {number} is {after.role!r} directly after {before.role!r}"
            )
        if after.role == "tool" and before.role == "user":
            raise InvalidRecord("roles_not_alternating", f"turn {number} is 'tool' directly after 'user'")


def check_prompt(prompt: Sequence[Message]) -> None:
    """Raises InvalidRecord unless `prompt` is well-formed and waits for an assistant."""
    check_turns(prompt)
    if prompt[-1].role not in ("user", "tool"):
        raise InvalidRecord("prompt_not_ending_in_user", f"the prompt ends with a {prompt[-1].role!r} turn")


@dataclass(frozen=True, kw_only=True)
class Record:
    """What every record carries. Empty id and group are filled in by curate.

    group: split key; records of one group always land on the same side. meta: a JSON object as text (tool
    definitions; generators put `facts` and gold scores here).
    """

    kind: ClassVar[Kind]
    id: str = ""
    source: str = ""
    group: str = ""
    meta: str = "{}"

    def turns(self) -> list[tuple[str, str]]:
        """The whole content as (label, text) pairs in order."""
        raise NotImplementedError

    def anchor(self) -> str:
        """The text that identifies the task: the first user turn, or the document. Default split group."""
        raise NotImplementedError

    def content_columns(self) -> dict[str, Any]:
        """The kind's own columns, as plain Python values."""
        raise NotImplementedError


def _plain(turns: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def _check_answer(name: str, side: Sequence[Message]) -> None:
    if len(side) != 1 or side[0].role != "assistant":
        roles = [turn.role for turn in side]
        raise InvalidRecord("side_not_one_assistant_turn", f"{name} must be one assistant turn, got {roles}")


def _first_user(turns: Sequence[Message]) -> str:
    return next(turn.content for turn in turns if turn.role == "user")


@dataclass(frozen=True)
class TextRecord(Record):
    """A plain document, e.g. for the base stage. Raises InvalidRecord when blank."""

    kind: ClassVar[Kind] = "text"
    text: str

    def __post_init__(self) -> None:
        check_text(self.text, "text")

    def turns(self) -> list[tuple[str, str]]:
        return [("text", self.text)]

    def anchor(self) -> str:
        return self.text

    def content_columns(self) -> dict[str, Any]:
        return {"text": self.text}


@dataclass(frozen=True)
class ConversationRecord(Record):
    """A demonstration whose last turn is the assistant's. Raises InvalidRecord otherwise."""

    kind: ClassVar[Kind] = "conversation"
    messages: tuple[Message, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "messages", tuple(self.messages))
        check_turns(self.messages)
        if self.messages[-1].role != "assistant":
            raise InvalidRecord(
                "last_turn_not_assistant", f"the last turn is {self.messages[-1].role!r}, not 'assistant'"
            )

    def turns(self) -> list[tuple[str, str]]:
        return [(turn.role, turn.content) for turn in self.messages]

    def anchor(self) -> str:
        return _first_user(self.messages)

    def content_columns(self) -> dict[str, Any]:
        return {"messages": _plain(self.messages)}


@dataclass(frozen=True)
class PreferenceRecord(Record):
    """A prompt and two candidate final assistant turns, the first preferred.

    Raises InvalidRecord: prompt not ending in a user/tool turn, a side that is not exactly one assistant
    turn, identical sides (up to whitespace).
    """

    kind: ClassVar[Kind] = "preference"
    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]

    def __post_init__(self) -> None:
        for name in ("prompt", "chosen", "rejected"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check_prompt(self.prompt)
        for name, side in (("chosen", self.chosen), ("rejected", self.rejected)):
            _check_answer(name, side)
        if self.chosen[0].content.split() == self.rejected[0].content.split():
            raise InvalidRecord(
                "identical_sides", f"chosen equals rejected: {excerpt(self.chosen[0].content, 80)!r}"
            )

    def turns(self) -> list[tuple[str, str]]:
        prompt = [(turn.role, turn.content) for turn in self.prompt]
        return [*prompt, ("chosen", self.chosen[0].content), ("rejected", self.rejected[0].content)]

    def anchor(self) -> str:
        return _first_user(self.prompt)

    def content_columns(self) -> dict[str, Any]:
        return {
            "prompt": _plain(self.prompt),
            "chosen": _plain(self.chosen),
            "rejected": _plain(self.rejected),
        }


@dataclass(frozen=True)
class UnpairedPreferenceRecord(Record):
    """A prompt and one final assistant turn, labelled desirable (true) or undesirable (false), for KTO.

    Raises InvalidRecord: prompt not ending in a user/tool turn, a completion that is not exactly one
    assistant turn, a label that is not a boolean.
    """

    kind: ClassVar[Kind] = "unpaired_preference"
    prompt: tuple[Message, ...]
    completion: tuple[Message, ...]
    label: bool

    def __post_init__(self) -> None:
        for name in ("prompt", "completion"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check_prompt(self.prompt)
        _check_answer("completion", self.completion)
        if not isinstance(self.label, bool):
            raise InvalidRecord(
                "label_not_boolean",
                f"the label must be true or false, got {type(self.label).__name__}: {excerpt(self.label)}",
            )

    def turns(self) -> list[tuple[str, str]]:
        prompt = [(turn.role, turn.content) for turn in self.prompt]
        return [*prompt, ("desirable" if self.label else "undesirable", self.completion[0].content)]

    def anchor(self) -> str:
        return _first_user(self.prompt)

    def content_columns(self) -> dict[str, Any]:
        return {"prompt": _plain(self.prompt), "completion": _plain(self.completion), "label": self.label}


@dataclass(frozen=True)
class PromptRecord(Record):
    """A prompt waiting for an assistant turn. Raises InvalidRecord otherwise."""

    kind: ClassVar[Kind] = "prompt"
    prompt: tuple[Message, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", tuple(self.prompt))
        check_prompt(self.prompt)

    def turns(self) -> list[tuple[str, str]]:
        return [(turn.role, turn.content) for turn in self.prompt]

    def anchor(self) -> str:
        return _first_user(self.prompt)

    def content_columns(self) -> dict[str, Any]:
        return {"prompt": _plain(self.prompt)}
