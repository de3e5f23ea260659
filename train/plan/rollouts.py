"""Generation and scoring, without gradients, on tensors without data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from train.plan.request import Request
from train.plan.tracker import ACTIVATIONS, CASTS, KV_CACHE, LOGITS, MemoryTracker
from train.ppo.engines.hf import draw


@torch.no_grad()
def sample(policy: nn.Module, request: Request, tracker: MemoryTracker, cache: Callable[[], Any]) -> None:
    """The two worst moments of a rollout: reading the prompts, and the last token of the longest responses.

    cache: makes an empty one of the kind that the stage fills. The copy of the weights that an engine makes
    is held meanwhile.
    """
    rollout = request.rollout
    assert rollout is not None
    tracker.category = ACTIVATIONS
    copied = []
    if rollout.copied is not None:
        with tracker.counting_as(CASTS):
            copied = [torch.empty(p.shape, dtype=rollout.copied) for p in policy.parameters()]
    rows = rollout.rows
    read(policy, torch.zeros(rows, rollout.prompt, dtype=torch.long), cache())
    held = cache()
    with tracker.unnoted():
        read(policy, torch.zeros(rows, rollout.prompt + rollout.response - 1, dtype=torch.long), held)
    for layer in held.layers:
        for part in (layer.keys, layer.values):
            tracker.move(part, KV_CACHE)
    with tracker.counting_as(LOGITS):
        logits_BV = read(policy, torch.zeros(rows, 1, dtype=torch.long), held)
        draw(logits_BV, torch.zeros(rows), 1.0)
    del copied


def read(policy: nn.Module, ids_BT: Tensor, cache: Any) -> Tensor:
    """Logits after the last token, [B, V]; keys and values go into the cache."""
    output = policy(input_ids=ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
    logits: Tensor = output.logits[:, -1]
    return logits


@torch.no_grad()
def score(network: Any, tokens: int, request: Request) -> None:
    """A frozen reward model reading the responses, at most so many tokens at a time."""
    assert request.rollout is not None
    rows = min(max(tokens // request.length, 1), request.rollout.rows)
    ids_BT = torch.zeros(rows, request.length, dtype=torch.long)
    network.base_model(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), use_cache=False)
