"""How much arithmetic a PPO update takes, and how fast this machine does arithmetic: what MFU is made of.

Floating-point operations count a multiplication and an addition as two. Sources: Kaplan et al. 2020 (Scaling
Laws for Neural Language Models, arXiv 2001.08361), section 2.1, eq. 2.2: a forward pass takes 2 N per token
for N parameters outside the embeddings and a backward pass twice that; Chowdhery et al. 2022 (PaLM, arXiv
2204.02311), appendix B: attention adds 12 L H Q T per trained token, a third of it forward.

As in PaLM the numbers are those the model needs, not those spent: recomputation under activation
checkpointing does not count, nor does padding. MFU here is the share of a matrix multiplication's measured
rate, not of a data sheet's, so that it means something on any machine.
"""

from __future__ import annotations

import functools
import math
import time
from dataclasses import dataclass

import torch

FIRST_SIZE, CPU_LIMIT, DEVICE_LIMIT = 128, 2048, 8192
"""Widths of the square matrices that are tried: doubled from the first one up to the limit."""
SECONDS_PER_PRODUCT = 0.03
"""The width stops growing where one product of the next one would take longer."""
BUDGET = 0.25
"""Seconds of measuring; no product is begun after them."""


@dataclass(frozen=True)
class Attention:
    """Of a transformer: layers; width: heads times head size; context: tokens a query sees, mean length."""

    layers: int
    width: int
    context: float

    @property
    def flops_per_token(self) -> float:
        """Forward: queries times keys and weights times values, 2 T d each in every layer (as in PaLM without
        a discount for the causal half).
        """
        return 4 * self.context * self.width * self.layers


def model_flops(
    parameters: int,
    tokens: float,
    *,
    trained: bool,
    frozen_backbone: bool = False,
    attention: Attention | None = None,
) -> float:
    """Floating-point operations of one pass over `tokens` tokens: forward, and backward when `trained`.

    parameters: those that multiply each token: without embeddings, and with the output matrix only where the
    logits of every token are computed (else count it by itself: d x V parameters, response tokens).
    frozen_backbone: under LoRA the backward pass computes gradients of activations but none of weights, 2 N
    instead of 4 N; count the adapter's own parameters by another call. Attention has no weights of its own,
    so its backward pass is twice its forward either way.
    """
    forward = 2.0 * parameters
    backward = forward if frozen_backbone else 2 * forward
    per_token = forward + (backward if trained else 0.0)
    if attention is not None:
        per_token += attention.flops_per_token * (3 if trained else 1)
    return per_token * tokens


def utilisation(flops: float, seconds: float, flops_per_second: float) -> float:
    """Model FLOPs utilisation (PaLM, appendix B), a share: what was needed over what could have been done."""
    return flops / (seconds * flops_per_second)


@functools.cache
def matmul_throughput(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix multiplication on one device, the best of several; measured once per process.

    Takes less than half a second on two CPU cores, and at most three matrices of 8192 x 8192 of the device's
    memory. The random state is left as it is. Where others compute at the same time the rate is what they
    leave, and MFU can then come out above 1.
    """
    size, fastest, best = FIRST_SIZE, math.inf, 0.0
    limit = CPU_LIMIT if device.type == "cpu" else DEVICE_LIMIT
    _seconds_per_product(size, device, dtype)  # warm-up: threads, handles, choice of kernel
    started = time.perf_counter()
    while best == 0.0 or time.perf_counter() - started < BUDGET:
        fastest = min(fastest, _seconds_per_product(size, device, dtype))
        best = max(best, 2.0 * size**3 / fastest)
        if size < limit and 8 * fastest < SECONDS_PER_PRODUCT:
            size, fastest = 2 * size, math.inf
    return best


def _seconds_per_product(size: int, device: torch.device, dtype: torch.dtype) -> float:
    left = torch.full((size, size), 0.5, device=device, dtype=dtype)
    right = torch.full((size, size), 0.25, device=device, dtype=dtype)
    product = torch.empty_like(left)
    _wait(device)
    start = time.perf_counter()
    torch.mm(left, right, out=product)
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
