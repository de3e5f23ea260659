"""Attention of a batch on the CPU: each request attends to its own keys, instead of to all of them masked.

The packed attention of transformers multiplies the queries of every request with the keys of all; for many
requests of one token each that is most of the attention's work, and what is not finite in one request would
reach the others.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PER_REQUEST = "sdpa_per_request"


def attend_per_request(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Any = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Same results as transformers' "sdpa", which it leaves everything to but packed batches on the CPU.

    Args:
        query: (1, heads, tokens, width), the tokens of all requests one after another; key, value likewise.
        attention_mask: (1, 1, tokens, cached and new tokens), additive.
        cache: the paged cache; keys come back from it request after request.
    """
    if cache is None or query.device.type != "cpu" or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, cache=cache, scaling=scaling, **kwargs
        )
    key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
    query_ends = kwargs["cu_seq_lens_q"].tolist()
    key_ends = kwargs["cu_seq_lens_k"].tolist()
    batch, heads, tokens, width = query.shape
    grouped = heads != key.shape[1]
    output = query.new_empty(batch, tokens, heads, value.shape[-1])
    for start, end, key_start, key_end in zip(
        query_ends, query_ends[1:], key_ends, key_ends[1:], strict=False
    ):
        own_query = query[:, :, start:end]
        mask = None
        if end - start > 1 and attention_mask is not None:
            mask = attention_mask[:, :, start:end, key_start:key_end]
        elif grouped:
            # The one query of each head sharing a key becomes a query of that key's head.
            own_query = own_query.reshape(batch, key.shape[1], -1, width)
        attended = torch.nn.functional.scaled_dot_product_attention(
            own_query,
            key[:, :, key_start:key_end],
            value[:, :, key_start:key_end],
            attn_mask=mask,
            scale=scaling,
            enable_gqa=own_query.shape[1] != key.shape[1],
        )
        output[:, start:end] = attended.reshape(batch, heads, end - start, -1).transpose(1, 2)
    return output, None


AttentionInterface.register(PER_REQUEST, attend_per_request)
AttentionMaskInterface.register(PER_REQUEST, sdpa_mask)
