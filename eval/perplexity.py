"""Held-out perplexity: how well a model predicts text it did not see.

The negative log-likelihood is summed over tokens of the whole set before dividing, so long rows weigh
more than short ones and the result does not depend on the batch. Bits per byte divides the same sum by
the UTF-8 bytes of the scored text instead, and so compares models with different tokenizers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from eval.batching import length_sorted_batches, pad_rows, token_logprobs
from posttrain.errors import DataError


@dataclass(frozen=True)
class ScoredRow:
    """Token ids, which of them are scored (as predicted tokens), and the bytes of text they stand for."""

    ids: list[int]
    scored: list[bool]
    text_bytes: int
    cut: bool


@dataclass(frozen=True)
class Perplexity:
    """Token-weighted totals of one model on one data set."""

    nll: float
    tokens: int
    text_bytes: int
    rows: int
    rows_cut: int

    def as_dict(self) -> dict[str, Any]:
        per_token = self.nll / self.tokens
        return {
            "perplexity": math.exp(per_token),
            "nll_per_token": per_token,
            "bits_per_byte": self.nll / math.log(2) / self.text_bytes if self.text_bytes else None,
            "tokens": self.tokens,
            "rows": self.rows,
            "rows_cut": self.rows_cut,
        }


def encode_text(tokenizer: Any, text: str, max_tokens: int) -> ScoredRow:
    """A plain text, every token but the first scored; no special tokens are added."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    cut = len(ids) > max_tokens
    ids, offsets = ids[:max_tokens], offsets[:max_tokens]
    text_bytes = len(text[offsets[0][1] : offsets[-1][1]].encode()) if len(ids) > 1 else 0
    return ScoredRow(ids, [False] + [True] * (len(ids) - 1) if ids else [], text_bytes, cut)


def assistant_spans(tokenizer: Any, messages: Sequence[dict[str, str]]) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation and the character spans the assistant speaks, end-of-turn mark included.

    Found by rendering the conversation up to each assistant turn, so it works for any chat template in
    which earlier text does not change as turns are added.

    Raises:
        DataError: the template rewrites earlier turns, so the spans cannot be told.
    """
    messages = list(messages)
    full = tokenizer.apply_chat_template(messages, tokenize=False)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
        after = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
        if not (after.startswith(before) and full.startswith(after)):
            raise DataError(
                f"the chat template rewrites the text before turn {i}, so assistant tokens cannot be told "
                "apart; measure perplexity on a `text` dataset instead"
            )
        spans.append((len(before), len(after)))
    return full, spans


def encode_conversation(tokenizer: Any, messages: Sequence[dict[str, str]], max_tokens: int) -> ScoredRow:
    """A conversation with only the assistant's tokens scored; a token belongs to the span it starts in."""
    full, spans = assistant_spans(tokenizer, messages)
    encoded = tokenizer(full, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"][:max_tokens], encoded["offset_mapping"][:max_tokens]
    scored = [any(low <= start < high for low, high in spans) for start, _ in offsets]
    if scored:
        scored[0] = False
    end = offsets[-1][1] if offsets else 0
    text_bytes = sum(len(full[low : min(high, end)].encode()) for low, high in spans if low < end)
    return ScoredRow(ids, scored, text_bytes, len(encoded["input_ids"]) > max_tokens)


@torch.no_grad()
def perplexity(
    model: Any,
    rows: Sequence[ScoredRow],
    *,
    pad_id: int,
    batch_size: int = 64,
    on_batch: Callable[[int], None] = lambda n: None,
) -> Perplexity:
    """Token-weighted perplexity of `rows`.

    Raises:
        DataError: no row has a token to score.
    """
    kept = [row for row in rows if any(row.scored)]
    if not kept:
        raise DataError(f"none of the {len(rows)} rows has a token to score: perplexity is undefined")
    model.eval()
    nll, tokens = 0.0, 0
    for batch in length_sorted_batches([len(row.ids) for row in kept], batch_size):
        ids_BT, mask_BT = pad_rows([kept[i].ids for i in batch], pad_id, "right", model.device)
        scored_BT, _ = pad_rows([[int(s) for s in kept[i].scored] for i in batch], 0, "right", model.device)
        logprobs_BT = token_logprobs(model, ids_BT, mask_BT)
        nll -= float((logprobs_BT * scored_BT[:, 1:]).double().sum())
        tokens += int(scored_BT[:, 1:].sum())
        on_batch(len(batch))
    text_bytes = sum(row.text_bytes for row in kept)
    return Perplexity(nll, tokens, text_bytes, len(kept), sum(row.cut for row in kept))
