"""Fixtures of the RLHF invariants. Puts this folder on the path: its tests share the module `ppo_tiny`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(params=[None, {"r": 4, "lora_alpha": 8}], ids=["full", "lora"])
def peft(request: pytest.FixtureRequest) -> dict[str, Any] | None:
    """The policy trained in full, and as a LoRA adapter."""
    return request.param
