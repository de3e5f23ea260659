"""What can be said of a request without sending it: its size. And the ways in which it can fail."""

from __future__ import annotations

from typing import Protocol

from eval.judging.templates import Message

BYTES_PER_TOKEN = 4.0
"""Of UTF-8. Used where the endpoint counts no tokens, and in estimates; English under common tokenizers. By
bytes, not characters, since a character of other scripts is often a token or two by itself."""


class ChatSettings(Protocol):
    """What the client of an endpoint reads of a configuration (`eval.judging.config.EndpointJudge`)."""

    @property
    def base_url(self) -> str: ...

    @property
    def model(self) -> str: ...

    @property
    def max_tokens(self) -> int: ...

    @property
    def token_limit_field(self) -> str: ...

    @property
    def temperature(self) -> float | None: ...

    @property
    def seed(self) -> int | None: ...

    @property
    def json_mode(self) -> bool: ...

    @property
    def timeout_s(self) -> float: ...

    @property
    def attempts(self) -> int: ...

    @property
    def backoff_s(self) -> float: ...

    @property
    def max_wait_s(self) -> float: ...


class UnansweredError(Exception):
    """A request without a reply after all its tries. Asked again when the stage runs again."""


class RejectedError(Exception):
    """A request the endpoint does not take (400, 413, 422): too long, most often."""


class StoppedError(Exception):
    """The stage was asked to stop while a request waited for its next try."""


def tokens_of(text: str) -> int:
    """Tokens in a text, estimated from its bytes in UTF-8."""
    return round(len(text.encode("utf-8", "replace")) / BYTES_PER_TOKEN)


def estimated_tokens(messages: list[Message]) -> int:
    """Tokens of a request, estimated, with four for the frame of each message."""
    return sum(tokens_of(message["content"]) + 4 for message in messages)
