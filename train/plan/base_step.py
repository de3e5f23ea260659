"""One step of the base stage, on tensors without data: its own loss and optimizers."""

from __future__ import annotations

from typing import Any

import torch
from peft import TaskType

from train.base import build_optimizers, weighted_loss
from train.base_config import BaseConfig
from train.plan.fake import build, fake_mode, give_storage
from train.plan.request import Request
from train.plan.steps import backward
from train.plan.tracker import OPTIMIZER, STEP, WEIGHTS, MemoryTracker, Trace


def trace_base(request: Request, config: BaseConfig) -> Trace:
    """What a step of the base stage holds, from the second one on."""
    mode = fake_mode()
    model: Any = give_storage(build(request.config, TaskType.CAUSAL_LM, request.weights), mode)
    model.train()
    tracker = MemoryTracker()
    with mode, tracker:
        tracker.hold([model], WEIGHTS)
        tracker.separate_head(model.base_model)
        ids = torch.zeros(request.rows, request.length, dtype=torch.long)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "weights": torch.zeros(ids.shape)}
        optimizers = build_optimizers(model, config)
        for step in range(2):
            tracker.forget_peaks()
            backward(request, tracker, lambda: weighted_loss(model, batch)[0])
            with tracker.counting_as(STEP if step else OPTIMIZER):
                for optimizer in optimizers:
                    optimizer.step()
            for optimizer in optimizers:
                optimizer.zero_grad()
        return tracker.trace()
