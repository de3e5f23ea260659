"""Prompts in, sampled responses out.

The sampler is a loop of its own over the policy's forward pass: the distribution sampled from is
softmax(logits / temperature) and nothing else (a model's generation_config cannot leak in), and the weights
used are those of the module passed in, adapter included. The random numbers belong to the episode, not to
the batch: a response depends neither on its batch mates nor on the number of processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerBase

from posttrain.errors import DataError
from train.ppo.models import position_ids

COMPACT_BELOW = 0.75
"""Finished rows leave the batch when fewer than this fraction is still being written."""


def encode_prompts(
    conversations: Iterable[list[dict[str, Any]]], tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int
) -> tuple[list[list[int]], int]:
    """Render with the chat template up to the assistant's turn; returns token ids and the number dropped as
    too long.

    Raises DataError when nothing is left.
    """
    kept, lengths = [], []
    for messages in conversations:
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        lengths.append(len(ids))
        if len(ids) <= max_prompt_tokens:
            kept.append(list(ids))
    if not kept:
        shortest = f", the shortest has {min(lengths)} tokens" if lengths else ""
        raise DataError(
            f"no prompt left to train on: all {len(lengths)} are longer than "
            f"max_prompt_tokens={max_prompt_tokens}{shortest}. Raise it or curate shorter prompts."
        )
    return kept, len(lengths) - len(kept)


def episode_prompts(prompt_count: int, seed: int, start: int, count: int) -> list[int]:
    """Prompt indices of episodes start .. start + count - 1: one fresh permutation per pass over the prompts.

    A function of the seed and the episode number, so that the cursor of a checkpoint is one integer.
    """
    indices: list[int] = []
    permutations: dict[int, list[int]] = {}
    for episode in range(start, start + count):
        epoch, offset = divmod(episode, prompt_count)
        if epoch not in permutations:
            generator = torch.Generator().manual_seed(_mix(seed, epoch))
            permutations[epoch] = torch.randperm(prompt_count, generator=generator).tolist()
        indices.append(permutations[epoch][offset])
    return indices


def episode_uniforms(seed: int, start: int, count: int, max_new_tokens: int) -> Tensor:
    """The random numbers that episodes start .. start + count - 1 sample with, float64 in [0, 1), [count,
    N].
    """
    generator = torch.Generator().manual_seed(_mix(seed + 1, start))
    return torch.rand(count, max_new_tokens, generator=generator, dtype=torch.float64)


def _mix(seed: int, index: int) -> int:
    return (seed * 0x9E3779B97F4A7C15 + index * 0xD1B54A32D192ED03) % 2**63


def truncate_at_eos(tokens: Sequence[int], eos_id: int) -> tuple[list[int], bool]:
    """The tokens up to and including the first end token, and whether there was one."""
    kept = list(tokens)
    if eos_id in kept:
        return kept[: kept.index(eos_id) + 1], True
    return kept, False


@dataclass(frozen=True)
class Samples:
    """Responses (end token included where written) and the log-probability each token had when it was
    drawn.
    """

    responses: list[list[int]]
    logprobs: list[list[float]]


class Sampler(Protocol):
    """A rollout engine: the policy's responses to prompts at the run's temperature."""

    def __call__(self, policy: nn.Module, prompts: list[list[int]], uniforms_BN: Tensor) -> Samples:
        """uniforms_BN: one random number per prompt and response position; N is the longest response."""
        ...


@dataclass(frozen=True)
class HfSampler:
    """Batched sampling with a key-value cache; rows that ended leave the batch."""

    eos_id: int
    pad_id: int
    temperature: float = 1.0

    @torch.no_grad()
    def __call__(self, policy: nn.Module, prompts: list[list[int]], uniforms_BN: Tensor) -> Samples:
        device = next(policy.parameters()).device
        width = max(map(len, prompts))
        ids_BT = torch.tensor([[self.pad_id] * (width - len(p)) + p for p in prompts], device=device)
        mask_BT = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        positions_BT = position_ids(mask_BT)
        uniforms_BN = uniforms_BN.to(device)
        cache = DynamicCache()
        rows = torch.arange(len(prompts), device=device)
        running_B = torch.ones(len(prompts), dtype=torch.bool, device=device)
        tokens_BN = torch.full(uniforms_BN.shape, self.pad_id, device=device)
        logprobs_BN = torch.zeros(uniforms_BN.shape, device=device)
        lengths_B = torch.zeros(len(prompts), dtype=torch.long, device=device)
        for step in range(uniforms_BN.shape[1]):
            logits_BV = policy(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                position_ids=positions_BT,
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
                rows, drawn_B, running_B = rows[keep], drawn_B[keep], running_B[keep]
                mask_BT, positions_BT = mask_BT[keep], positions_BT[keep]
            ids_BT = drawn_B.unsqueeze(1)
            mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(mask_BT), 1)], dim=1)
            positions_BT = positions_BT[:, -1:] + 1
        lengths = lengths_B.tolist()
        return Samples(
            [row[:n] for row, n in zip(tokens_BN.tolist(), lengths, strict=True)],
            [row[:n] for row, n in zip(logprobs_BN.tolist(), lengths, strict=True)],
        )


def draw(logits_BV: Tensor, uniforms_B: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Inverse-transform sampling from softmax(logits / temperature): tokens and their log-probabilities,
    [B] each.

    Token i is drawn when the uniform number falls in [F(i - 1), F(i)), so a token of probability 0 never is.
    """
    logprobs_BV = torch.log_softmax(logits_BV.float() / temperature, dim=-1)
    cumulative_BV = logprobs_BV.exp().double().cumsum(-1)
    thresholds_B1 = uniforms_B.unsqueeze(1) * cumulative_BV[:, -1:]
    tokens_B = torch.searchsorted(cumulative_BV, thresholds_B1, right=True).squeeze(1)
    tokens_B = tokens_B.clamp(max=logits_BV.shape[-1] - 1)
    return tokens_B, logprobs_BV.gather(-1, tokens_B.unsqueeze(1)).squeeze(1)
