"""Reward functions that the tests of the ppo stage name in their configuration."""

from __future__ import annotations

from typing import Any


def short(completions: list[str], **kwargs: Any) -> list[float]:
    """Minus the number of characters, in hundreds."""
    return [-len(text) / 100 for text in completions]


def later_is_worse(completions: list[str], **kwargs: Any) -> list[float]:
    """The same for every response, and lower with every call."""
    later_is_worse.calls += 1  # type: ignore[attr-defined]
    return [-float(later_is_worse.calls)] * len(completions)  # type: ignore[attr-defined]


later_is_worse.calls = 0  # type: ignore[attr-defined]
