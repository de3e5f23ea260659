"""Prompts of a rollout, its random numbers, and where its responses end; `engines` writes the responses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from posttrain.errors import DataError
from train.ppo.engines.base import Sampler, Samples
from train.ppo.engines.hf import HfSampler, draw

__all__ = [
    "HfSampler",
    "Sampler",
    "Samples",
    "draw",
    "encode_prompts",
    "episode_prompts",
    "episode_uniforms",
    "truncate_at_eos",
]


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
