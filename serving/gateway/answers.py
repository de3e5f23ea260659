"""Triton's pieces as OpenAI's answers: whole, or chunk by chunk."""

from __future__ import annotations

import json
import math
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from serving.gateway.upstream import Candidate, Piece

LOWEST_LOGPROB = -9999.0
"""What stands for minus infinity, which JSON has no word for."""
DONE = "data: [DONE]\n\n"
_ENCODE = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
"""Kept, because json.dumps makes an encoder for each call with arguments like these."""


@dataclass
class Tally:
    """What has come of one request so far. unfinished: answers that are still being written.

    The prompt counts once, however many answers it gets. finish_reason: of the last answer to end, when all
    have ended.
    """

    prompt_tokens: int
    completion_tokens: int = 0
    finish_reason: str | None = None
    unfinished: int = 1

    def count(self, piece: Piece) -> None:
        """Add one piece. The prompt's length is the server's count once there is one."""
        self.prompt_tokens = piece.input_tokens
        self.completion_tokens += piece.output_tokens
        if piece.finish_reason is not None:
            self.unfinished -= 1
            self.finish_reason = None if self.unfinished > 0 else piece.finish_reason

    def usage(self) -> dict[str, int]:
        """OpenAI's usage object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


@dataclass
class Writer:
    """Shapes one response. chat: of a chat or of a text completion; top: candidates asked for; n: answers."""

    chat: bool
    model: str
    version: str
    top: int | None
    tally: Tally
    include_usage: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = ""
    """The request's id; in answers it has OpenAI's prefix. Default: a new one."""
    n: int = 1
    offsets: Counter[int] = field(default_factory=Counter)
    """Characters of each answer that went by, where log-probabilities were asked for."""

    def __post_init__(self) -> None:
        self.id = ("chatcmpl-" if self.chat else "cmpl-") + (self.id or uuid.uuid4().hex)

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """All answers in one object."""
        choices = [
            self._choice(index, [piece for piece in pieces if piece.index == index])
            for index in range(self.n)
        ]
        kind = "chat.completion" if self.chat else "text_completion"
        return self._envelope(kind, choices) | {"usage": self.tally.usage()}

    def _choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        positions = [position for piece in pieces for position in piece.positions]
        choice: dict[str, Any] = {"index": index, "finish_reason": pieces[-1].finish_reason}
        if self.chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        choice["logprobs"] = self._logprobs(index, positions)
        return choice

    def opening(self) -> str | None:
        """The first chunks of a chat stream, which name the role of each answer."""
        if not self.chat:
            return None
        delta = {"role": "assistant", "content": ""}
        return "".join(self._chunk(index, delta, "", None, None) for index in range(self.n))

    def piece(self, piece: Piece) -> str | None:
        """One piece as an event; None where it says nothing, such as half a character held back."""
        if not (piece.text or piece.finish_reason or (self.top is not None and piece.positions)):
            return None
        delta = {"content": piece.text} if piece.text else {}
        logprobs = self._logprobs(piece.index, piece.positions)
        return self._chunk(piece.index, delta, piece.text, logprobs, piece.finish_reason)

    def closing(self) -> str:
        """What follows the last piece: usage if asked for, and the end mark."""
        if not self.include_usage:
            return DONE
        return event(self._envelope(self._chunk_kind, []) | {"usage": self.tally.usage()}) + DONE

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _chunk(
        self, index: int, delta: dict[str, Any], text: str, logprobs: Any, finish_reason: str | None
    ) -> str:
        choice: dict[str, Any] = {"index": index, "logprobs": logprobs, "finish_reason": finish_reason}
        choice |= {"delta": delta} if self.chat else {"text": text}
        usage = {"usage": None} if self.include_usage else {}
        return event(self._envelope(self._chunk_kind, [choice]) | usage)

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.version,
            "choices": choices,
        }

    def _logprobs(self, index: int, positions: Sequence[Sequence[Candidate]]) -> dict[str, Any] | None:
        if self.top is None:
            return None
        return (
            self._chat_logprobs(positions, self.top)
            if self.chat
            else self._text_logprobs(index, positions, self.top)
        )

    def _chat_logprobs(self, positions: Sequence[Sequence[Candidate]], top: int) -> dict[str, Any]:
        content = [
            entry(position[0])
            | {"top_logprobs": [entry(candidate) for candidate in likeliest(position, top)]}
            for position in positions
        ]
        return {"content": content, "refusal": None}

    def _text_logprobs(
        self, index: int, positions: Sequence[Sequence[Candidate]], top: int
    ) -> dict[str, Any]:
        tokens = [position[0].text for position in positions]
        offsets = []
        for token in tokens:
            offsets.append(self.offsets[index])
            self.offsets[index] += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [finite(position[0].logprob) for position in positions],
            "top_logprobs": [
                {candidate.text: finite(candidate.logprob) for candidate in likeliest(position, top)}
                for position in positions
            ]
            if top
            else None,
            "text_offset": offsets,
        }


def likeliest(position: Sequence[Candidate], top: int) -> list[Candidate]:
    """The `top` candidates with the highest log-probability."""
    return sorted(position, key=lambda candidate: candidate.logprob, reverse=True)[:top]


def entry(candidate: Candidate) -> dict[str, Any]:
    """One token of a chat's log-probabilities. bytes: null where the token is a part of a character."""
    whole = "\ufffd" not in candidate.text
    return {
        "token": candidate.text,
        "logprob": finite(candidate.logprob),
        "bytes": list(candidate.text.encode("utf-8")) if whole else None,
    }


def finite(logprob: float) -> float:
    """A number that JSON can hold."""
    return logprob if math.isfinite(logprob) else LOWEST_LOGPROB


def event(value: Any) -> str:
    """One server-sent event."""
    return f"data: {_ENCODE(value)}\n\n"
