"""Exact deduplication on normalised content. Near-duplicates are not looked for here."""

from __future__ import annotations

import hashlib
import json
import unicodedata

from data_prep.records import Record


def normalise(text: str) -> str:
    """NFKC, casefold, runs of whitespace to one space, ends stripped."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def content_key(record: Record) -> str:
    """sha256 hex of the whole normalised content: tool definitions and every turn with its role.

    id, source, group and the rest of meta do not count.
    """
    digest = hashlib.sha256(record.kind.encode())
    tools = json.loads(record.meta).get("tools")
    if tools:
        digest.update(f"\x1etools\x1f{json.dumps(tools, sort_keys=True)}".encode())
    for label, text in record.turns():
        digest.update(f"\x1e{label}\x1f{normalise(text)}".encode())
    return digest.hexdigest()
