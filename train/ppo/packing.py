"""Sequences packed end to end in one row, each attending to itself only: no work on padding.

An attention function of our own, registered with transformers and switched on for one forward pass, runs
PyTorch's scaled-dot-product attention over one sequence after the other; everything else in the model sees
one
long row. Worth it on a CPU, where matrix products take the time; on a GPU the many small attention calls cost
more than the padding that length buckets leave.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

IMPLEMENTATION = "posttrain_packed"
_lengths: ContextVar[tuple[int, ...]] = ContextVar("lengths")


@contextmanager
def packed_attention(model: PreTrainedModel, lengths: tuple[int, ...]) -> Iterator[None]:
    """Inside, the model's forward takes one row of sequences of these lengths, without a mask."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    token = _lengths.set(lengths)
    config._attn_implementation = IMPLEMENTATION
    try:
        yield
    finally:
        config._attn_implementation = before
        _lengths.reset(token)


def packed_positions(lengths: tuple[int, ...]) -> Tensor:
    """0 .. n - 1 for every sequence, [1, N]."""
    return torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """query [1, H, N, D], key and value [1, G, N, D]; returns [1, N, H, D].

    A sliding window that cuts nothing off is ignored; one that would is refused by NotImplementedError, on
    which `Networks.choose_paths` falls back to padded rows, as it does where the result differs.
    """
    lengths = _lengths.get()
    if sliding_window is not None and max(lengths) > sliding_window:
        raise NotImplementedError("sliding-window attention over packed sequences")
    grouped = query.shape[1] != key.shape[1]
    outputs = [
        functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
        for q, k, v in zip(*(part.split(lengths, dim=2) for part in (query, key, value)), strict=True)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _no_mask(*positional: Any, **named: Any) -> None:
    return None


AttentionInterface.register(IMPLEMENTATION, _attend)
AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)
