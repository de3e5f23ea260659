"""Fixtures of the RLHF invariants."""

from __future__ import annotations

from typing import Any

import ppo_tiny
import pytest


@pytest.fixture(params=[None, ppo_tiny.LORA], ids=["full", "lora"])
def peft(request: pytest.FixtureRequest) -> dict[str, Any] | None:
    """The policy trained in full, and as a LoRA adapter."""
    return request.param
