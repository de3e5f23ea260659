"""Makes a model directory written by transformers 5 readable by the older releases inside serving containers.

transformers 4 knows neither the tokenizer class "TokenizersBackend" nor `rope_parameters` nor `dtype`, and
fails on a list under `extra_special_tokens`. What it reads instead is added, or put in its place where both
cannot stand; transformers 5 loads the result as the same model and the same tokenizer. All functions are
pure: JSON in, JSON out.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

READABLE = 0o644
SEARCHABLE = 0o755


def portable_config(config: dict[str, Any]) -> dict[str, Any]:
    """config.json with `rope_theta`, `rope_scaling` and `torch_dtype` beside their successors.

    Rotary parameters that differ by layer type have no older form and are left as they are.
    """
    result = dict(config)
    if "dtype" in config:
        result.setdefault("torch_dtype", config["dtype"])
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        result.setdefault("rope_theta", rope["rope_theta"])
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        plain = scaling.get("rope_type", "default") == "default" and len(scaling) <= 1
        result.setdefault("rope_scaling", None if plain else scaling)
    return result


def portable_tokenizer_config(settings: dict[str, Any], chat_template: str) -> dict[str, Any]:
    """tokenizer_config.json with a class, special tokens and a template that transformers 4 understands."""
    result = dict(settings)
    if result.get("tokenizer_class") == "TokenizersBackend":
        result["tokenizer_class"] = "PreTrainedTokenizerFast"
    for key in ("backend", "is_local", "local_files_only"):
        result.pop(key, None)
    extra = result.get("extra_special_tokens")
    if isinstance(extra, list):
        del result["extra_special_tokens"]
        result["additional_special_tokens"] = extra
    result["chat_template"] = chat_template
    return result


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
