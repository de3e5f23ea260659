"""Makes a model directory written by transformers 5 readable by the older releases inside serving containers.

transformers 4 knows neither the tokenizer class "TokenizersBackend" nor `rope_parameters` nor `dtype`, and
fails on a list under `extra_special_tokens`. What it reads instead is added, or put in its place where both
cannot stand; transformers 5 loads the result as the same model and the same tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from posttrain.rundir import atomic_write_text


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


def make_portable(directory: Path, chat_template: str) -> None:
    """Rewrite config.json and tokenizer_config.json of a model directory so."""
    rewrite_json(directory / "config.json", portable_config)
    rewrite_json(
        directory / "tokenizer_config.json",
        lambda settings: portable_tokenizer_config(settings, chat_template),
    )


def rewrite_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Replace a JSON file by `change` of its content."""
    changed = change(json.loads(path.read_text(encoding="utf-8")))
    atomic_write_text(path, json.dumps(changed, indent=2, ensure_ascii=False) + "\n")
