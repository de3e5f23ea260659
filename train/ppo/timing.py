"""Seconds by phase, and how much of the machine's matrix throughput the update uses."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from train.ppo.experience import Experience
from train.ppo.networks import Networks, Trunk
from train.ppo.throughput import Attention, matmul_throughput, model_flops, utilisation


class Stopwatch:
    """Wall seconds by phase; a phase may be entered many times.

    A GPU is waited for at both ends of a phase, so that its work counts where it was asked for.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._asynchronous = device.type == "cuda"

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to `seconds[name]`."""
        start = self._now()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - start

    def _now(self) -> float:
        if self._asynchronous:
            torch.cuda.synchronize()
        return time.perf_counter()


class UpdateFlops:
    """Model FLOPs utilisation of the update phase of one process."""

    def __init__(self, networks: Networks, dtype: torch.dtype) -> None:
        self._dtype, self._device = dtype, networks.value_head.bias.device
        trunks = [networks.policy_trunk]
        if not networks.value_shares_trunk:
            trunks.append(networks.value_trunk)
        self._weights = [_multiplying(trunk) for trunk in trunks]
        self._models = [trunk.plain for trunk in trunks]
        head = networks.policy_trunk.plain.get_output_embeddings().weight
        self._head, self._head_trained = head.numel(), head.requires_grad

    def utilisation(self, experience: Experience, passes: float, seconds: float) -> float:
        """Share of the machine's matrix throughput that `passes` passes over the rollout used in
        `seconds`."""
        batches = [micro.tokens for mini in experience.mini_batches for micro in mini]
        tokens = sum(batch.real_tokens for batch in batches)
        mean_length = tokens / sum(len(batch.lengths) for batch in batches)
        flops = model_flops(
            self._head,
            sum(len(batch.target_N) for batch in batches),
            trained=True,
            frozen_backbone=not self._head_trained,
        )
        for (frozen, trained), model in zip(self._weights, self._models, strict=True):
            flops += model_flops(
                frozen, tokens, trained=True, frozen_backbone=True, attention=_attention(model, mean_length)
            )
            flops += model_flops(trained, tokens, trained=True)
        return utilisation(flops * passes, seconds, matmul_throughput(self._device, self._dtype))


def _multiplying(trunk: Trunk) -> tuple[int, int]:
    """Parameters that every token is multiplied with: frozen ones and trained ones."""
    model = trunk.plain
    embeddings = {id(p) for p in model.get_input_embeddings().parameters()}
    counts = [0, 0]
    for name, parameter in model.base_model.named_parameters():
        other = "lora_" in name and f".{trunk.adapter}." not in name
        if parameter.dim() >= 2 and id(parameter) not in embeddings and not other:
            counts[parameter.requires_grad] += parameter.numel()
    return counts[0], counts[1]


def _attention(model: PreTrainedModel, context: float) -> Attention:
    config = model.config.get_text_config()
    return Attention(config.num_hidden_layers, config.hidden_size, context)
