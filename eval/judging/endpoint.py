"""One OpenAI-compatible chat endpoint: requests with retries that are counted and pauses that are kept.

Retried: 429 (Retry-After honoured), 408, 409 and 5xx, timeouts, broken connections, bodies that are no chat
completion.
Not retried: what a second try cannot change, such as a wrong key (the stage stops) or a request the endpoint
rejects (that request is counted as rejected). Redirects are not followed: the answers, and the key, are for
the host that the configuration names.
"""

from __future__ import annotations

import email.utils
import json
import math
import random
import threading
import time
from collections import Counter
from typing import Any

import openai

from eval.judging.replies import Reply
from eval.judging.request import (
    ChatSettings,
    RejectedError,
    StoppedError,
    UnansweredError,
    estimated_tokens,
    tokens_of,
)
from eval.judging.templates import Message
from posttrain.endpoint import open_client, redacted
from posttrain.errors import UserError
from posttrain.hashing import hash_json

_FATAL = (401, 403, 404)
_RETRIED = (408, 409, 429)
_MOST_TOKENS = 10**9
"""A count above it is no count."""


class Endpoint:
    """A client for one model, for use by several threads. retries: tries beyond the first, by cause."""

    def __init__(self, config: ChatSettings, key: str | None, stop: threading.Event) -> None:
        self.config = config
        self.retries: Counter[str] = Counter()
        self._key = key
        self._stop = stop
        self._lock = threading.Lock()
        self._not_before = 0.0
        self._random = random.Random()
        self._client = open_client(config.base_url, key, timeout=config.timeout_s, max_retries=0)

    def body(self, messages: list[Message]) -> dict[str, Any]:
        """What is sent, the key apart."""
        body: dict[str, Any] = {
            "model": self.config.model,
            "messages": messages,
            self.config.token_limit_field: self.config.max_tokens,
        }
        if self.config.temperature is not None:
            body["temperature"] = self.config.temperature
        if self.config.seed is not None:
            body["seed"] = self.config.seed
        if self.config.json_mode:
            body["response_format"] = {"type": "json_object"}
        return body

    def request_hash(self, messages: list[Message]) -> str:
        """Equal for requests that are the same in everything that decides the reply."""
        return hash_json({"base_url": self.config.base_url.rstrip("/"), "body": self.body(messages)})

    def ask(self, messages: list[Message]) -> Reply:
        """Send a request until there is a reply.

        Raises:
            UnansweredError: every try failed. RejectedError: the endpoint does not take this request.
            StoppedError: `stop` was set. UserError: the key, the model or the address is wrong.
        """
        problem = "no attempt was made"
        for attempt in range(self.config.attempts):
            self._wait_for_turn()
            try:
                return self._once(messages)
            except openai.APIStatusError as error:
                wait = self._after_status(error, attempt)
                problem = f"{error.status_code} {self._redacted(error.message)}"
                cause = str(error.status_code)
            except openai.APITimeoutError:
                wait, problem, cause = (
                    self._pause(attempt),
                    f"no reply in {self.config.timeout_s:g} s",
                    "timeout",
                )
            except openai.APIConnectionError as error:
                detail = self._redacted(str(error.__cause__ or error))
                wait, problem, cause = self._pause(attempt), f"no connection ({detail})", "connection"
            except (
                _MalformedError,
                openai.APIResponseValidationError,
                json.JSONDecodeError,
            ) as error:
                wait, problem, cause = (
                    self._pause(attempt),
                    f"malformed reply ({self._redacted(str(error))})",
                    "malformed",
                )
            if wait is None:
                break
            if attempt + 1 < self.config.attempts:
                self.retries[cause] += 1
                self._sleep(wait)
        raise UnansweredError(problem)

    def _once(self, messages: list[Message]) -> Reply:
        raw = self._client.chat.completions.with_raw_response.create(**self.body(messages))
        return self._reply(raw.text, messages)

    def _reply(self, text: str, messages: list[Message]) -> Reply:
        """The reply in a response body, which is read as it came: endpoints differ in what they leave out."""
        try:
            body = json.loads(text)
            choice = body["choices"][0]
            message = choice["message"]
            content, refusal = message.get("content"), message.get("refusal")
        except (ValueError, RecursionError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise _MalformedError(f"{type(error).__name__}: {error}") from None
        if not isinstance(content, (str, type(None))) or not isinstance(refusal, (str, type(None))):
            raise _MalformedError("the message's content is not text")
        usage = body.get("usage")
        counts = (
            [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
            if isinstance(usage, dict)
            else []
        )
        tokens = [count for count in counts if type(count) is int and 0 <= count <= _MOST_TOKENS]
        counted = len(tokens) == 2
        if not counted:
            tokens = [estimated_tokens(messages), tokens_of(content or "")]
        finish = choice.get("finish_reason")
        return Reply(
            _storable(str(body.get("model") or self.config.model)),
            _storable(content or ""),
            _storable(finish) if isinstance(finish, str) else None,
            None if refusal is None else _storable(refusal),
            tokens[0],
            tokens[1],
            not counted,
            time.time(),
        )

    def _after_status(self, error: openai.APIStatusError, attempt: int) -> float | None:
        """Seconds to wait before the next try, None to give this request up."""
        status = error.status_code
        if status in _FATAL or error.code == "insufficient_quota":
            remedy = {401: "key_env", 403: "key_env", 404: "base_url and model"}.get(status, "the account")
            raise UserError(
                f"{self.config.base_url}: {status} for model {self.config.model}: "
                f"{self._redacted(error.message)}\n"
                f"    check {remedy}; replies so far are kept"
            ) from None
        if status < 400:
            place = self._redacted(error.response.headers.get("location", "elsewhere"))
            raise UserError(
                f"{self.config.base_url}: answers {status}, a redirect to {place}, which is not followed\n"
                "    set base_url to the address that answers"
            ) from None
        if status not in _RETRIED and status < 500:
            raise RejectedError(f"{status} {self._redacted(error.message)}") from None
        asked = retry_after(error.response.headers.get("retry-after"))
        if asked is None:
            return self._pause(attempt)
        if asked > self.config.max_wait_s:
            return None
        with self._lock:
            self._not_before = max(self._not_before, time.monotonic() + asked)
        return asked

    def _pause(self, attempt: int) -> float:
        """Exponential backoff with equal jitter: between half and the whole of backoff_s * 2**attempt."""
        whole = min(self.config.backoff_s * 2**attempt, self.config.max_wait_s)
        return whole * (0.5 + 0.5 * self._random.random())

    def _wait_for_turn(self) -> None:
        """Wait until a Retry-After that any thread was given is over."""
        with self._lock:
            wait = self._not_before - time.monotonic()
        self._sleep(wait)

    def _sleep(self, seconds: float) -> None:
        if self._stop.wait(max(seconds, 0.0)):
            raise StoppedError

    def _redacted(self, text: str) -> str:
        return redacted(text, self._key)


class _MalformedError(Exception):
    """A response body that is no chat completion."""


def _storable(text: str) -> str:
    """The text without lone surrogates, which JSON can spell and neither a file nor SQLite can hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


def retry_after(value: str | None) -> float | None:
    """Seconds a Retry-After header asks for, a number or a date (RFC 9110, 10.2.3); None if unreadable."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        return _seconds_until(value)
    return None if math.isnan(seconds) else max(seconds, 0.0)


def _seconds_until(date: str) -> float | None:
    try:
        return max(email.utils.parsedate_to_datetime(date).timestamp() - time.time(), 0.0)
    except ValueError:
        return None
