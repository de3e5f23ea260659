"""What a memory prediction is asked for: one stage's step, as numbers and types."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from transformers import PreTrainedConfig

from train.peft_config import PeftSettings
from train.plan.fake import UNMASKED

Device = Literal["cpu", "cuda"]
Layout = Literal["full", "shared"]


@dataclass(frozen=True)
class Rollout:
    """Generation before an update: the longest prompt and response in tokens, and responses at a time.

    copied: type of a temporary copy of the weights to generate with, where there is one.
    """

    prompt: int
    response: int
    rows: int
    copied: torch.dtype | None = None


@dataclass(frozen=True)
class RewardModel:
    """A reward model that a stage of reinforcement learning holds. tokens: of one forward pass.

    adapter: its LoRA settings where it is an adapter on the policy's own base (layout shared of ppo).
    """

    config: PreTrainedConfig
    tokens: int
    adapter: PeftSettings | None = None


@dataclass(frozen=True)
class Request:
    """One training step on one device.

    kind: the stage's. rows, length: of a micro-batch, in sequences and tokens, pairs counting as two.
    labelled: its tokens that the output head is computed for (`train.supervised_head`), None for all. padded:
    whether sequences of a batch differ in length, so that attention needs a mask. packed: they stand end to
    end in one row. adapters_follow: LoRA matrices have the type of the weights, where peft would take
    float32. weights: type the weights are held in; autocast: type of the arithmetic, where another.
    accumulates: whether gradients of earlier micro-batches are there while the next one is computed.
    reference: whether the stage compares with a reference; with LoRA it is the model itself.
    """

    kind: str
    config: PreTrainedConfig
    peft: PeftSettings | None
    rows: int
    length: int
    device: Device
    weights: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    checkpointing: bool = False
    attention: str | None = None
    labelled: int | None = None
    padded: bool = True
    packed: bool = False
    accumulates: bool = False
    adapters_follow: bool = False
    reference: bool = False
    rollout: Rollout | None = None
    rewards: tuple[RewardModel, ...] = ()
    layout: Layout = "full"
    value: Literal["model", "head"] = "model"
    entropy: bool = False

    @property
    def kernel(self) -> str:
        """The attention to compute with. sdpa takes a mask of rows x length x length where sequences differ
        in length, and keeps one for every layer; flash and flex attention know lengths without a mask.
        """
        if self.attention == "eager":
            return "eager"
        masked = self.attention in (None, "sdpa") and (self.padded or self.packed)
        return "sdpa" if masked else UNMASKED

    def with_weights(self, dtype: torch.dtype) -> Request:
        """The same without autocast, weights and adapters in `dtype`: as sharded training computes."""
        return replace(self, weights=dtype, autocast=None, adapters_follow=True)
