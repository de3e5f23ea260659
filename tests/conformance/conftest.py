"""Fixtures of the RLHF invariants. Puts this folder on the path: its tests share the module `ppo_tiny`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(params=["full", "lora", "shared", "head"])
def layout(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Settings of `ppo_config` for every layout of the networks."""
    from ppo_tiny import LAYOUTS

    return LAYOUTS[request.param]
