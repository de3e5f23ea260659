"""Log-probabilities and entropies of tokens straight from hidden states, without the [B, T, V] logits.

The logits of `chunk` tokens exist at a time, in the forward and in the backward pass. Where the output matrix
is frozen (LoRA), the gradient towards the hidden states is taken along in the forward pass, so that no logit
is computed twice; where it is trained, the log-softmax of a single chunk is kept, that of several is computed
again in the backward pass.

    d log p(y) / dh = (W[y] - sum_v p_v W[v]) / temperature
    d H / dh = -sum_v p_v (log p_v + H) W[v] / temperature
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 64 * 2**20
"""Size of one chunk of float32 logits."""


def chunk_tokens(vocabulary: int) -> int:
    """Tokens whose logits make about CHUNK_BYTES."""
    return max(16, CHUNK_BYTES // (4 * vocabulary))


def linear_logprobs(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    temperature: float,
    *,
    with_entropy: bool = False,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """log softmax(hidden W^T / temperature)[target] and, where asked for, the entropy (else zeros), in nats.

    Returns two float32 [N]. Differentiable once, in hidden_ND and weight_VD; products are computed in the
    autocast type where autocast is on, sums over the vocabulary in float32 (float64 for float64 inputs).
    """
    device = hidden_ND.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_ND.dtype
    with torch.autocast(device, enabled=False):
        return _LinearLogprobs.apply(
            hidden_ND.to(dtype),
            weight_VD.to(dtype),
            target_N,
            temperature,
            with_entropy,
            chunk or chunk_tokens(len(weight_VD)),
        )


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type that per-token numbers are kept in: float32, and float64 for models in float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        temperature: float,
        entropy: bool,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        by_hidden, by_weight = ctx.needs_input_grad[:2]
        ahead = by_hidden and not by_weight
        logprobs, entropies = (hidden.new_zeros(len(hidden), dtype=wide(hidden.dtype)) for _ in range(2))
        slopes = torch.empty_like(hidden) if ahead else None
        entropy_slopes = torch.empty_like(hidden) if ahead and entropy else None
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logs, picked = _log_softmax(hidden[part], weight, target[part], temperature)
            logprobs[part] = picked
            if entropy or ahead:
                probabilities = logs.exp() if entropy else logs.exp_()
            if entropy:
                entropies[part] = -torch.linalg.vecdot(probabilities, logs)
            if slopes is not None:
                mean = probabilities.to(weight.dtype) @ weight
                slopes[part] = (weight[target[part]] - mean) / temperature
            if entropy_slopes is not None:
                logs.add_(entropies[part].unsqueeze(1)).mul_(probabilities)
                entropy_slopes[part] = logs.to(weight.dtype) @ weight / -temperature
        ctx.temperature, ctx.entropy, ctx.chunk = temperature, entropy, chunk
        kept = logs if by_weight and len(hidden) <= chunk else None
        saved = (slopes, entropy_slopes) if ahead else (hidden, weight, target, kept)
        ctx.save_for_backward(*saved)
        ctx.ahead = ahead
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logprobs: Tensor, d_entropies: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.ahead:
            slopes, entropy_slopes = ctx.saved_tensors
            d_hidden = slopes * d_logprobs.unsqueeze(1)
            if entropy_slopes is not None:
                d_hidden += entropy_slopes * d_entropies.unsqueeze(1)
            return d_hidden.to(slopes.dtype), None, None, None, None, None
        hidden, weight, target, kept = ctx.saved_tensors
        d_hidden, d_weight = torch.empty_like(hidden), torch.empty(0)
        for start in range(0, len(hidden), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            logs = kept
            if logs is None:
                logs, _ = _log_softmax(hidden[part], weight, target[part], ctx.temperature)
            scale = (d_logprobs[part] / ctx.temperature).unsqueeze(1)
            probabilities = logs.exp()
            if ctx.entropy:
                entropies = -torch.linalg.vecdot(probabilities, logs).unsqueeze(1)
                pull = (d_entropies[part] / ctx.temperature).unsqueeze(1)
                d_logits = -probabilities * (scale + pull * (logs + entropies))
            else:
                d_logits = probabilities.mul_(-scale)
            d_logits.scatter_add_(1, target[part].unsqueeze(1), scale)
            d_logits = d_logits.to(weight.dtype)
            d_hidden[part] = d_logits @ weight
            if start == 0:
                d_weight = (d_logits.T @ hidden[part]).to(wide(weight.dtype))
            else:
                d_weight += d_logits.T @ hidden[part]
        return d_hidden, d_weight.to(weight.dtype), None, None, None, None


def _log_softmax(hidden: Tensor, weight: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits = (hidden @ weight.T).to(wide(hidden.dtype))
    if temperature != 1.0:
        logits = logits / temperature
    logs = torch.log_softmax(logits, dim=-1)
    return logs, logs.gather(1, target.unsqueeze(1)).squeeze(1)


def plain_head(head: nn.Module | None) -> bool:
    """Whether an output layer is one matrix and nothing else, which `linear_logprobs` stands for."""
    return type(head) is nn.Linear and head.bias is None
