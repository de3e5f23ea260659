"""Answers of a policy to prompts: batched, left-padded, and the same on every run.

Sampling is by inverse transform: sample i at step t takes the token where the cumulative distribution
passes a uniform number that depends only on (seed, i, t). So an answer does not depend on the batch it
was generated in, and two models that answer the same prompts share their luck, which narrows the
intervals of paired comparisons (common random numbers).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from eval.batching import length_sorted_batches, pad_rows


@dataclass(frozen=True)
class Generation:
    """One answer. `ids` ends with the end-of-turn token if and only if `finished`."""

    prompt_ids: list[int]
    ids: list[int]
    text: str
    finished: bool


class InverseTransformSampler(LogitsProcessor):
    """Leaves one token per row possible: the sampled one. `uniforms` (B, steps) holds numbers in [0, 1)."""

    def __init__(self, uniforms: np.ndarray, prompt_width: int, temperature: float) -> None:
        self.uniforms = torch.from_numpy(uniforms)
        self.prompt_width = prompt_width
        self.temperature = temperature

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.prompt_width
        cdf_BV = torch.softmax(scores.double() / self.temperature, dim=-1).cumsum(dim=-1)
        u_B1 = self.uniforms[:, step : step + 1].to(cdf_BV) * cdf_BV[:, -1:]
        chosen_B1 = torch.searchsorted(cdf_BV, u_B1, right=True).clamp_(max=scores.shape[-1] - 1)
        return torch.full_like(scores, float("-inf")).scatter_(1, chosen_B1, 0.0)


def encode_prompt(tokenizer: Any, messages: Sequence[dict[str, str]]) -> list[int]:
    """Token ids of a conversation up to where the assistant is to speak, by the tokenizer's chat template."""
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def generation_config(tokenizer: Any, max_new_tokens: int) -> GenerationConfig:
    """Everything that decides the answer, written out: nothing is inherited from the model's own file."""
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        use_cache=True,
    )


def uniforms_for(seed: int, indices: Sequence[int], steps: int) -> np.ndarray:
    """Uniform numbers of shape (len(indices), steps); row i depends on (seed, indices[i]) alone."""
    return np.stack([np.random.default_rng([seed, index]).random(steps) for index in indices])


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    batch_size: int = 64,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    on_batch: Callable[[int], None] = lambda n: None,
) -> list[Generation]:
    """Answers in the order of `prompts` (token ids each); temperature 0 is greedy.

    indices: the number of each sample in the random stream; by default its place in `prompts`.

    The model is put in eval mode and its `generation_config` replaced, since transformers fills unset
    fields from it.
    """
    model.eval()
    model.generation_config = generation_config(tokenizer, max_new_tokens)
    numbers = range(len(prompts)) if indices is None else indices
    answers: dict[int, Generation] = {}
    for batch in length_sorted_batches([len(prompt) for prompt in prompts], batch_size):
        ids_BT, mask_BT = pad_rows([prompts[i] for i in batch], tokenizer.pad_token_id, "left", model.device)
        processors = LogitsProcessorList()
        if temperature > 0:
            uniforms = uniforms_for(seed, [numbers[i] for i in batch], max_new_tokens)
            processors.append(InverseTransformSampler(uniforms, ids_BT.shape[1], temperature))
        output_BT = model.generate(input_ids=ids_BT, attention_mask=mask_BT, logits_processor=processors)
        for i, row in zip(batch, output_BT[:, ids_BT.shape[1] :].tolist(), strict=True):
            answers[i] = _answer(tokenizer, prompts[i], row)
        on_batch(len(batch))
    return [answers[i] for i in range(len(prompts))]


def _answer(tokenizer: Any, prompt_ids: list[int], row: list[int]) -> Generation:
    finished = tokenizer.eos_token_id in row
    ids = row[: row.index(tokenizer.eos_token_id) + 1] if finished else row
    text = tokenizer.decode(ids, skip_special_tokens=True).strip()
    return Generation(prompt_ids, ids, text, finished)
