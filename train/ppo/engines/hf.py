"""Rollouts by the policy's own forward pass, with a key-value cache.

The sampler is a loop of its own: the distribution sampled from is softmax(logits / temperature) and nothing
else (a model's generation_config cannot leak in), and the weights are those of the module passed in, adapter
included. The random numbers belong to the episode, not to the batch: a response depends neither on its batch
mates, nor on the number of rows processed together, nor on the number of processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from train.ppo.engines.base import Samples

COMPACT_BELOW = 0.75
"""Finished rows leave the batch when fewer than this fraction is still being written."""

CACHE_GROWTH = 64
"""Positions by which the key-value cache grows when it is full."""

DRAW_BLOCK = 256
"""Tokens per block of the two-step search in `draw`."""


class GrowingLayer(DynamicLayer):
    """One layer's keys and values in storage that grows by CACHE_GROWTH positions at a time.

    DynamicLayer copies the whole cache for every token; this one writes the new position in place.
    """

    storage: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append [B, heads, new, head_dim] states; returns all keys and values so far, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past = self.get_seq_length()
        total = past + key_states.shape[-2]
        if self.storage is None or total > self.storage[0].shape[-2]:
            self.storage = (
                _extended(self.keys, key_states, past, total + CACHE_GROWTH),
                _extended(self.values, value_states, past, total + CACHE_GROWTH),
            )
        keys, values = self.storage
        keys[:, :, past:total] = key_states
        values[:, :, past:total] = value_states
        self.keys, self.values = keys[:, :, :total], values[:, :, :total]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows."""
        if self.storage is not None:
            total = self.get_seq_length()
            keys, values = self.storage
            self.storage = keys[indices], values[indices]
            self.keys, self.values = (part[:, :, :total] for part in self.storage)


def _extended(old: Tensor | None, new: Tensor, past: int, capacity: int) -> Tensor:
    """Storage for `capacity` positions that starts with the `past` ones of old."""
    batch, heads, _, width = new.shape
    storage = new.new_zeros(batch, heads, capacity, width)
    if old is not None and past:
        storage[:, :, :past] = old
    return storage


@dataclass(frozen=True)
class HfSampler:
    """Batched sampling, at most max_rows prompts at a time, the longest prompts first; rows that ended leave
    the batch.
    """

    uses_uniforms: ClassVar[bool] = True

    eos_id: int
    pad_id: int
    temperature: float = 1.0
    max_rows: int = 64

    def sync(self, policy: nn.Module) -> None:
        """Nothing to do: the weights are those of the module passed to every call."""

    def close(self) -> None:
        """Nothing is held between calls."""

    @torch.no_grad()
    def __call__(self, policy: nn.Module, prompts: list[list[int]], uniforms_BN: Tensor) -> Samples:
        """See Sampler. Memory: the cache of max_rows sequences and their logits at one position."""
        order = sorted(range(len(prompts)), key=lambda row: (-len(prompts[row]), row))
        responses: list[list[int]] = [[] for _ in prompts]
        logprobs: list[list[float]] = [[] for _ in prompts]
        for first in range(0, len(order), self.max_rows):
            rows = order[first : first + self.max_rows]
            part = self._sample([prompts[row] for row in rows], uniforms_BN[rows], policy)
            for row, response, values in zip(rows, part.responses, part.logprobs, strict=True):
                responses[row], logprobs[row] = response, values
        return Samples(responses, logprobs)

    def _sample(self, prompts: list[list[int]], uniforms_BN: Tensor, policy: nn.Module) -> Samples:
        """Responses of one chunk. Prompts are padded on the left, so that all rows write the same column."""
        device = next(policy.parameters()).device
        width = max(map(len, prompts))
        padding = [width - len(prompt) for prompt in prompts]
        ids_BT = torch.tensor(
            [[self.pad_id] * n + prompt for n, prompt in zip(padding, prompts, strict=True)], device=device
        )
        padding_B1 = torch.tensor(padding, device=device).unsqueeze(1)
        columns_T = torch.arange(width + uniforms_BN.shape[1], device=device)
        padded = any(padding)
        uniforms_BN = uniforms_BN.to(device)
        cache = Cache(layer_class_to_replicate=GrowingLayer)
        rows = torch.arange(len(prompts), device=device)
        running_B = torch.ones(len(prompts), dtype=torch.bool, device=device)
        tokens_BN = torch.full(uniforms_BN.shape, self.pad_id, device=device)
        logprobs_BN = torch.zeros(uniforms_BN.shape, device=device)
        lengths_B = torch.zeros(len(prompts), dtype=torch.long, device=device)
        for step in range(uniforms_BN.shape[1]):
            seen = columns_T[: width + step]
            logits_BV = policy(
                input_ids=ids_BT,
                attention_mask=(seen >= padding_B1).long() if padded else None,
                position_ids=(seen[-ids_BT.shape[1] :] - padding_B1).clamp(min=0),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            drawn_B, logprob_B = draw(logits_BV, uniforms_BN[rows, step], self.temperature)
            live = rows[running_B]
            tokens_BN[live, step] = drawn_B[running_B]
            logprobs_BN[live, step] = logprob_B[running_B]
            lengths_B[live] += 1
            running_B = running_B & (drawn_B != self.eos_id)
            remaining = int(running_B.sum())
            if remaining == 0:
                break
            if remaining < COMPACT_BELOW * len(rows):
                keep = running_B.nonzero().squeeze(1)
                cache.batch_select_indices(keep)
                rows, drawn_B, running_B, padding_B1 = (
                    part[keep] for part in (rows, drawn_B, running_B, padding_B1)
                )
            ids_BT = drawn_B.unsqueeze(1)
        lengths = lengths_B.tolist()
        return Samples(
            [row[:n] for row, n in zip(tokens_BN.tolist(), lengths, strict=True)],
            [row[:n] for row, n in zip(logprobs_BN.tolist(), lengths, strict=True)],
        )


def draw(logits_BV: Tensor, uniforms_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Inverse-transform sampling from softmax(logits / temperature): tokens and their log-probabilities,
    [B] each.

    Token i is drawn when the uniform number falls in [F(i - 1), F(i)), so a token of probability 0 never is.
    The search goes over the sums of blocks of DRAW_BLOCK tokens first and inside one block then: cumulative
    sums in float64 over V / DRAW_BLOCK + DRAW_BLOCK numbers instead of V.
    """
    scaled_BV = logits_BV.float()
    if temperature != 1.0:
        scaled_BV = scaled_BV / temperature
    probabilities_BV = torch.softmax(scaled_BV, dim=-1)
    missing = -probabilities_BV.shape[-1] % DRAW_BLOCK
    padded_BV = functional.pad(probabilities_BV, (0, missing)) if missing else probabilities_BV
    blocks_BKW = padded_BV.unflatten(-1, (-1, DRAW_BLOCK))
    block_B1, rest_B1 = _invert(blocks_BKW.sum(-1).double(), uniforms_B.unsqueeze(1))
    inside_BW = blocks_BKW[torch.arange(len(block_B1), device=block_B1.device), block_B1.squeeze(1)]
    token_B1, _ = _invert(inside_BW.double(), rest_B1)
    tokens_B1 = (block_B1 * DRAW_BLOCK + token_B1).clamp(max=logits_BV.shape[-1] - 1)
    return tokens_B1.squeeze(1), probabilities_BV.gather(-1, tokens_B1).squeeze(1).log()


def _invert(weights_BK: Tensor, uniforms_B1: Tensor) -> tuple[Tensor, Tensor]:
    """The index that the uniform number falls in, and how far inside it lies (about [0, 1)), [B, 1] each.

    weights_BK: float64, none negative. An index of weight 0 is never returned: the threshold stays below the
    total, however it is rounded. (Weights that are not finite give the last index.)
    """
    cumulative_BK = weights_BK.cumsum(-1)
    total_B1 = cumulative_BK[:, -1:]
    below_total_B1 = torch.nextafter(total_B1, torch.zeros_like(total_B1))
    threshold_B1 = torch.minimum(uniforms_B1 * total_B1, below_total_B1)
    index_B1 = torch.searchsorted(cumulative_BK, threshold_B1, right=True).clamp(max=weights_BK.shape[-1] - 1)
    weight_B1 = weights_BK.gather(-1, index_B1)
    before_B1 = torch.where(index_B1 > 0, cumulative_BK.gather(-1, (index_B1 - 1).clamp(min=0)), 0.0)
    return index_B1, (threshold_B1 - before_B1) / weight_B1
