"""A tag for the tests of drift."""

from __future__ import annotations

from typing import Any


def shouts(record: dict[str, Any]) -> bool:
    return record["answer"].isupper()
