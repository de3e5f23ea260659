"""Sampling parameters of vLLM: what the stand-in accepts and what it refuses.

Defaults and meanings are vLLM's (docs.vllm.ai, SamplingParams): temperature 1.0, max_tokens 16, temperature 0
is greedy, top_k 0 or -1 is off, `logprobs: n` returns the drawn token and the n likeliest. A parameter that
the stand-in does not implement is refused unless it has its neutral value: an answer is never silently
different.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_ANSWERS = 16
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1, None),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "skip_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
}


class RequestError(ValueError):
    """A request that cannot be served. `unavailable`: the server's fault, worth another try."""

    def __init__(self, message: str, unavailable: bool = False) -> None:
        super().__init__(message)
        self.unavailable = unavailable


@dataclass(frozen=True)
class SamplingParams:
    """One request's parameters, validated."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    max_tokens: int = 16
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    lora_name: str | None = None
    n: int = 1

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0.0


def parse(text: str, max_output_tokens: int) -> SamplingParams:
    """Sampling parameters from a request's JSON string.

    Raises:
        RequestError: not a JSON object, unknown or unsupported parameter, or a value out of range.
    """
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"sampling_parameters is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise RequestError(f"sampling_parameters must be a JSON object, not {type(raw).__name__}")
    for key in sorted(NEUTRAL.keys() & raw.keys()):
        if raw.pop(key) not in NEUTRAL[key]:
            raise RequestError(f"sampling parameter '{key}' is not supported by the embedded server")
    unknown = sorted(raw.keys() - SamplingParams.__dataclass_fields__.keys())
    if unknown:
        raise RequestError(f"unknown sampling parameters: {', '.join(unknown)[:200]}")
    return SamplingParams(
        temperature=_number(raw, "temperature", 1.0, 0.0, 100.0),
        top_p=_number(raw, "top_p", 1.0, 1e-6, 1.0),
        top_k=max(_integer(raw, "top_k", 0, -1, 1_000_000), 0),
        seed=None if raw.get("seed") is None else _integer(raw, "seed", 0, -(2**63), 2**63 - 1),
        max_tokens=_integer(raw, "max_tokens", min(16, max_output_tokens), 1, max_output_tokens),
        stop=_stop_strings(raw.get("stop")),
        stop_token_ids=_token_ids(raw.get("stop_token_ids")),
        ignore_eos=_boolean(raw, "ignore_eos", False),
        logprobs=None if raw.get("logprobs") is None else _integer(raw, "logprobs", 0, 0, MAX_LOGPROBS),
        lora_name=_name(raw.get("lora_name")),
        n=_integer(raw, "n", 1, 1, MAX_ANSWERS),
    )


def _number(raw: dict[str, Any], key: str, default: float, low: float, high: float) -> float:
    value = raw.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise RequestError(f"{key} must be a number from {low:g} to {high:g}, got {_shown(value)}")
    return float(value)


def _integer(raw: dict[str, Any], key: str, default: int, low: int, high: int) -> int:
    value = raw.get(key, default)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"{key} must be an integer from {low} to {high}, got {_shown(value)}")
    return value


def _boolean(raw: dict[str, Any], key: str, default: bool) -> bool:
    value = raw.get(key, default)
    if not isinstance(value, bool):
        raise RequestError(f"{key} must be true or false, got {_shown(value)}")
    return value


def _name(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise RequestError(f"lora_name must be a string, got {_shown(value)}")
    return value


def _stop_strings(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    strings = [value] if isinstance(value, str) else value
    valid = isinstance(strings, list) and all(isinstance(s, str) and 0 < len(s) <= 256 for s in strings)
    if not valid or len(strings) > MAX_STOP_STRINGS:
        raise RequestError(f"stop must be at most {MAX_STOP_STRINGS} non-empty strings, got {_shown(value)}")
    return tuple(strings)


def _token_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) > 256 or not all(type(item) is int for item in value):
        raise RequestError(f"stop_token_ids must be a list of at most 256 integers, got {_shown(value)}")
    return tuple(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
