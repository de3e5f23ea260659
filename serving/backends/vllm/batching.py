"""Continuous batching: one forward pass over the next tokens of all requests, with a paged cache.

Scheduler, cache and inputs are those of transformers (transformers.generation.continuous_batching, pinned
exactly); the forward pass is called here, because every request draws its own tokens and may name an adapter.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.utils import find_head_dim, find_num_key_value_heads

from serving.backends.vllm.attention import PER_REQUEST

PAGE_TOKENS = 32
MAX_BATCH_TOKENS = 256
CACHE_BYTES = 1 << 30


class AdaptersLike(Protocol):
    """Adapters of the served model: those of serving.backends.vllm.adapters, where there are any."""

    names: tuple[str, ...]

    def use(self, spans: Sequence[tuple[str | None, int]], head_rows: Sequence[int] | None = None) -> None:
        """Say whose tokens the next forward pass computes."""


class PagedBatch:
    """Requests that are computed together.

    Memory is bounded: a request is let in when its longest answer fits.
    """

    def __init__(
        self, model: Any, adapters: AdaptersLike | None, max_model_len: int, max_active: int
    ) -> None:
        """Allocate the cache: room for max_active requests of max_model_len tokens, or for about CACHE_BYTES,
        but always for one such request.

        Raises:
            Whatever transformers raises for a model that it cannot compute this way.
        """
        self.model = model
        self.adapters = adapters
        longest = _pages(max_model_len)
        self._free_pages = max(longest, min(longest * max_active, CACHE_BYTES // _page_bytes(model)))
        self._pages: dict[str, int] = {}
        self._adapter_of: dict[str, str | None] = {}
        self._keeps_logits = takes_logits_to_keep(model)
        config = ContinuousBatchingConfig(
            page_size=PAGE_TOKENS,
            # Pages come in larger units where layers differ: each request may leave two of them open.
            num_blocks=self._free_pages + 2 * max_active,
            max_batch_tokens=max(MAX_BATCH_TOKENS, max_active),
            max_requests_per_batch=max_active,
            max_blocks_per_request=0,
            allow_block_sharing=False,
            safety_margin=0.0,
            auto_switch_to_flash=False,
            use_cuda_graph=False,
            use_async_batching=False,
        )
        if model.config._attn_implementation == PER_REQUEST:
            model.set_attn_implementation("sdpa")
        settings = GenerationConfig(do_sample=False, eos_token_id=-1)
        self._manager = model.init_continuous_batching(settings, config)
        self._manager.warmup()
        self._processor = self._manager.batch_processor
        if model.config._attn_implementation == "sdpa":
            # Inputs and masks are now made as for "sdpa", which this one takes the place of.
            model.set_attn_implementation(PER_REQUEST)

    def add(self, key: str, prompt_ids: list[int], max_tokens: int, adapter: str | None) -> bool:
        """Take a request in, or return False while there is no room for it."""
        pages = _pages(len(prompt_ids) + max_tokens)
        if pages > self._free_pages:
            return False
        self._free_pages -= pages
        self._pages[key] = pages
        self._adapter_of[key] = adapter
        self._manager.add_request(prompt_ids, request_id=key)
        return True

    def step(self) -> tuple[list[str], torch.Tensor]:
        """Next-token logits (rows, vocabulary) in float32 on the CPU, and the requests they belong to.

        A prompt longer than what is left of MAX_BATCH_TOKENS is computed in several steps, the last of which
        has its row.
        """
        if not self._processor.prepare_next_batch():
            raise RuntimeError("none of the requests could be scheduled")
        inputs = self._processor.inputs_and_outputs
        ends, keys, spans, end = [], [], [], 0
        for scheduled in inputs.requests_in_batch:
            key = scheduled.state.request_id
            end += scheduled.query_length
            spans.append((self._adapter_of[key], scheduled.query_length))
            if scheduled.has_new_token:
                keys.append(key)
                ends.append(end - 1)
        if self.adapters is not None:
            self.adapters.use(spans, ends if self._keeps_logits else None)
        batch = inputs.get_model_kwargs()
        # There is a mask, so it says nothing; but transformers would keep it in the model's configuration for
        # the time of a pass, and what another thread generates would come out wrong.
        del batch["is_causal"]
        ends_R = batch["logits_indices"][: len(ends)]
        if self._keeps_logits:
            logits_RV = self.model(**batch, logits_to_keep=ends_R).logits[0]
        else:
            logits_RV = self.model(**batch).logits[0, ends_R]
        return keys, logits_RV.float().cpu()

    def extend(self, key: str, token: int) -> None:
        """Go on with this token."""
        state = self._processor.scheduler.active_requests[key]
        state.generated_tokens.append(token)
        state.tokens_to_process = [token]

    def remove(self, key: str) -> None:
        """Forget a request; its pages are free at the next step."""
        self._manager.cancel_request(key)
        self._free_pages += self._pages.pop(key)
        del self._adapter_of[key]


def takes_logits_to_keep(model: Any) -> bool:
    """Whether the model can leave out the logits of tokens that nothing is drawn after."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def _pages(tokens: int) -> int:
    return math.ceil(tokens / PAGE_TOKENS)


def _page_bytes(model: Any) -> int:
    """Keys and values of all layers."""
    config = model.config.get_text_config()
    width = find_num_key_value_heads(config) * find_head_dim(config)
    return int(2 * config.num_hidden_layers * width * model.dtype.itemsize * PAGE_TOKENS)
