"""How requests are computed: together where that gives the model's own logits, otherwise in turns."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from serving.backends.vllm.batching import PAGE_TOKENS, AdaptersLike, PagedBatch
from serving.backends.vllm.turns import Turns

PROBE_LENGTHS = (9, 6)
PROBE_PROMPTS = (6, 2)
FLOAT32_TOLERANCE = 1e-3
HALF_TOLERANCE = 3e-2

log = logging.getLogger(__name__)


def choose_batching(
    model: Any, adapters: AdaptersLike | None, max_model_len: int, max_active: int
) -> Callable[[], PagedBatch | Turns]:
    """What makes an empty batch for `model`: PagedBatch, proven on a few tokens, or Turns, with a warning.

    Not every architecture computes several requests in one pass: some refuse, some would attend wrongly.

    Raises:
        ValueError: a model that keeps no key-value cache.
    """
    attention = model.config._attn_implementation
    with torch.inference_mode():
        if adapters is not None:
            adapters.use([])
        expected = [_plain_logits(model, length) for length in PROBE_LENGTHS]
        problem = _problem(model, expected)
    if problem is None:
        return partial(PagedBatch, model, adapters, max_model_len, max_active)
    log.warning(
        "%s cannot be computed in batches (%s): requests take turns, which is slower",
        type(model).__name__,
        problem,
    )
    model.set_attn_implementation(attention)
    with torch.inference_mode():
        if "past_key_values" not in model(input_ids=torch.tensor([[0]], device=model.device), use_cache=True):
            raise ValueError(f"{type(model).__name__} keeps no key-value cache: it cannot be served here")
    return partial(Turns, model, adapters)


def _problem(model: Any, expected: list[torch.Tensor]) -> str | None:
    """Why PagedBatch is not for this model."""
    if model.config.get_text_config().to_dict().get("attn_logit_softcapping") is not None:
        return "its attention caps its scores, which transformers leaves out in a batch"
    try:
        # As long as all probes together: then there is room for all of them, however little a cache may take.
        longest = PAGE_TOKENS * len(PROBE_LENGTHS)
        difference = _difference(PagedBatch(model, None, longest, len(PROBE_LENGTHS)), expected)
    except Exception as error:
        # Whatever keeps the model from being computed this way is no fault: there is the other way.
        return f"{type(error).__name__}: {error}".splitlines()[0]
    tolerance = FLOAT32_TOLERANCE if model.dtype == torch.float32 else HALF_TOLERANCE
    return None if difference <= tolerance else f"its logits would differ by {difference:.1e}"


def _plain_logits(model: Any, length: int) -> torch.Tensor:
    ids_1T = torch.arange(length, device=model.device)[None] % model.config.get_text_config().vocab_size
    logits_TV: torch.Tensor = model(input_ids=ids_1T, use_cache=False).logits[0].float().cpu()
    return logits_TV


def _difference(batch: PagedBatch, expected: list[torch.Tensor]) -> float:
    """Largest relative distance of a batch's logits from the expected ones, on forced answers."""
    seen = dict(zip("ab", PROBE_PROMPTS, strict=True))
    rows = dict(zip("ab", expected, strict=True))
    vocabulary = expected[0].shape[1]
    for key, length in seen.items():
        batch.add(key, [i % vocabulary for i in range(length)], len(rows[key]) - length, None)
    largest = 0.0
    while seen:
        keys, logits_RV = batch.step()
        for key, logits_V in zip(keys, logits_RV, strict=True):
            wanted_V = rows[key][seen[key] - 1]
            largest = max(largest, float((logits_V - wanted_V).norm() / wanted_V.norm().clamp_min(1e-30)))
            if seen[key] == len(rows[key]):
                batch.remove(key)
                del seen[key]
            else:
                batch.extend(key, seen[key] % vocabulary)
                seen[key] += 1
    return largest
