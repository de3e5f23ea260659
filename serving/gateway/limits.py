"""Per-key limits: requests and tokens per minute as token buckets, and requests at a time.

A bucket holds one minute's allowance and fills evenly. A request takes its prompt and the longest answer it
asks for out of the tokens' bucket when it starts; what it did not use goes back when it ends. The state is
this process's: behind several gateways each has its own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from serving.gateway.errors import ApiError
from serving.gateway.keys import ApiKey

Clock = Callable[[], float]


class Bucket:
    """A token bucket of `per_minute`, full at first."""

    def __init__(self, per_minute: int, clock: Clock) -> None:
        self.capacity = float(per_minute)
        self.rate = per_minute / 60.0
        self.clock = clock
        self._level = self.capacity
        self._at = clock()

    @property
    def level(self) -> float:
        """What can be taken now."""
        now = self.clock()
        self._level = min(self.capacity, self._level + (now - self._at) * self.rate)
        self._at = now
        return self._level

    def wait_for(self, amount: float) -> float:
        """Seconds until `amount` can be taken; 0: now."""
        return max(amount - self.level, 0.0) / self.rate

    def take(self, amount: float) -> None:
        """Take it; a negative amount gives back."""
        self._level = min(self.capacity, self.level - amount)


@dataclass
class KeyState:
    """What one key has left."""

    requests: Bucket | None
    tokens: Bucket | None
    running: int = 0


class Limiter:
    """The limits of all keys. Not for several threads: it is used from the event loop only."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self.clock = clock
        self._states: dict[tuple[str, int | None, int | None], KeyState] = {}

    def state(self, key: ApiKey) -> KeyState:
        """The key's state; a key whose limits changed starts afresh."""
        identity = (key.name, key.requests_per_minute, key.tokens_per_minute)
        if identity not in self._states:
            requests, tokens = (Bucket(limit, self.clock) if limit else None for limit in identity[1:])
            self._states[identity] = KeyState(requests, tokens)
        return self._states[identity]

    def admit(self, key: ApiKey) -> KeyState:
        """Count one request; the caller calls `release` when it has ended.

        Raises ApiError 429 with Retry-After.
        """
        state = self.state(key)
        if key.max_concurrent is not None and state.running >= key.max_concurrent:
            raise _limited(f"at most {key.max_concurrent} requests at a time", "concurrency", 1.0)
        if state.requests is not None:
            wait = state.requests.wait_for(1)
            if wait > 0:
                raise _limited(f"{key.requests_per_minute} requests per minute", "requests", wait)
            state.requests.take(1)
        state.running += 1
        return state

    def release(self, state: KeyState) -> None:
        """The request that `admit` let in has ended."""
        state.running -= 1

    def reserve(self, key: ApiKey, state: KeyState, tokens: int) -> None:
        """Take the most tokens a request can use.

        Raises ApiError: 429 with Retry-After, or 400 when no minute's allowance is that large.
        """
        if state.tokens is None:
            return
        if tokens > state.tokens.capacity:
            raise ApiError(
                400,
                f"this request may use {tokens} tokens, and the key has {key.tokens_per_minute} per minute; "
                "lower max_tokens or shorten the prompt",
                code="request_too_large",
            )
        wait = state.tokens.wait_for(tokens)
        if wait > 0:
            raise _limited(f"{key.tokens_per_minute} tokens per minute", "tokens", wait)
        state.tokens.take(tokens)

    def settle(self, state: KeyState, reserved: int, used: int) -> None:
        """Give back what was reserved and not used."""
        if state.tokens is not None:
            state.tokens.take(used - reserved)


def headers(key: ApiKey, state: KeyState) -> dict[str, str]:
    """OpenAI's x-ratelimit headers for the limits the key has."""
    found = {}
    for name, limit, bucket in (
        ("requests", key.requests_per_minute, state.requests),
        ("tokens", key.tokens_per_minute, state.tokens),
    ):
        if bucket is not None:
            found[f"x-ratelimit-limit-{name}"] = str(limit)
            found[f"x-ratelimit-remaining-{name}"] = str(max(int(bucket.level), 0))
    return found


def _limited(what: str, kind: str, wait: float) -> ApiError:
    seconds = max(math.ceil(wait), 1)
    return ApiError(
        429,
        f"rate limit reached: {what}; try again in {seconds} s",
        kind="rate_limit_error",
        code="rate_limit_exceeded",
        headers={"Retry-After": str(seconds)},
        reason=kind,
    )
