"""Writes the weights and the tokenizer of an export so that older containers read them as training did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from posttrain.errors import UserError
from posttrain.models import load_causal_lm, load_tokenizer
from posttrain.portable import make_portable, rewrite_json
from serving.config import ExportConfig
from serving.portable import without_added_tokens


def write_model(config: ExportConfig, source: Path, weights: Path) -> int:
    """Save the model, an adapter merged, and its tokenizer; returns the longest sequence in tokens."""
    tokenizer = load_tokenizer(source)
    model = load_causal_lm(source, dtype=config.dtype)
    weights.mkdir(parents=True)
    model.save_pretrained(weights)
    tokenizer.save_pretrained(weights)
    make_portable(weights, str(tokenizer.chat_template))
    check_prompt_tokens(weights, tokenizer)
    return int(model.config.get_text_config().max_position_embeddings)


def context_length(config: ExportConfig, allowed: int) -> int:
    """The length to serve, in tokens. Raises UserError when it is more than the model was built for."""
    wanted = config.max_model_len or allowed
    if wanted > allowed:
        raise UserError(
            f"max_model_len: {wanted} tokens, but the model's max_position_embeddings is {allowed}\n"
            f"    lower max_model_len to {allowed} or remove it"
        )
    return wanted


def check_prompt_tokens(weights: Path, tokenizer: Any) -> None:
    """Make sure that the server adds no token to a rendered prompt. Raises UserError where it would."""
    probe = tokenizer.apply_chat_template(
        [{"role": "user", "content": "?"}], tokenize=False, add_generation_prompt=True
    )
    expected = tokenizer(probe, add_special_tokens=False)["input_ids"]
    if tokenizer(probe)["input_ids"] != expected:
        rewrite_json(weights / "tokenizer.json", without_added_tokens)
    served = load_tokenizer(weights)(probe)["input_ids"]
    if served != expected:
        raise UserError(
            f"{weights}: the server would read a rendered prompt as {served[:8]}..., "
            f"training as {expected[:8]}...\n"
            "    the tokenizer adds special tokens in a way the export cannot undo; "
            "save it with add_bos_token=false"
        )


def write_json(path: Path, value: Any) -> None:
    """Indented JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
