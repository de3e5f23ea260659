"""Reward functions that the tests of grpo and rloo name in their configuration."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

CALLS: list[dict[str, Any]] = []
"""What `watch` was given, call by call."""
SCORED: list[int] = []
"""How many answers `sigterm_once` was given, call by call."""


def watch(
    prompts: list[Any],
    completions: list[str],
    completion_ids: list[list[int]],
    finished: list[bool],
    meta: list[str],
    factor: float,
) -> list[float | None]:
    """The number of words times `factor`; no opinion on a response of one token."""
    given = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
    CALLS.append({**given, "finished": finished, "meta": meta, "factor": factor})
    words = [factor * len(text.split()) for text in completions]
    return [None if len(ids) == 1 else value for ids, value in zip(completion_ids, words, strict=True)]


def constant(completions: list[str], **kwargs: Any) -> list[float]:
    """The same for every response."""
    return [1.0] * len(completions)


def sigterm_once(completions: list[str], call: int, sent: str) -> list[float]:
    """0 for every response. In its `call`-th call the process gets SIGTERM, unless the file `sent` exists."""
    SCORED.append(len(completions))
    if len(SCORED) == call and not Path(sent).exists():
        Path(sent).touch()
        os.kill(os.getpid(), signal.SIGTERM)
    return [0.0] * len(completions)
