"""What an exported directory needs besides configs that older releases read (`posttrain.portable`)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

READABLE = 0o644
SEARCHABLE = 0o755


def without_added_tokens(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """tokenizer.json whose post-processor adds no tokens (BOS, EOS) around a text.

    A served prompt is a rendered conversation, whose template writes every special token itself; Triton's
    vLLM backend would tokenise it as plain text and add a second BOS.
    """
    result = copy.deepcopy(tokenizer)
    processor = result.get("post_processor")
    if processor is None:
        return result
    steps = processor["processors"] if processor["type"] == "Sequence" else [processor]
    kept = [step for step in steps if step["type"] not in ("TemplateProcessing", "BertProcessing")]
    result["post_processor"] = {"type": "Sequence", "processors": kept} if kept else None
    return result


def make_readable(directory: Path) -> None:
    """Files get mode 0644, folders 0755: safetensors writes 0600, and a container is another user."""
    for path in (directory, *directory.rglob("*")):
        path.chmod(SEARCHABLE if path.is_dir() else READABLE)
