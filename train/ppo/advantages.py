"""Masked statistics, whitening and generalised advantage estimation.

All functions are pure. `reduce` sums a tensor over processes (identity on one process): statistics are
those of the global batch whatever the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]


def summed_by(accelerator: Accelerator) -> Reduce:
    """The reduction over the processes of `accelerator`."""
    return partial(accelerator.reduce, reduction="sum")


def local(total: Tensor) -> Tensor:
    """The reduction over a single process."""
    return total


def masked_moments(values: Tensor, mask: Tensor, reduce: Reduce = local) -> tuple[Tensor, Tensor]:
    """Mean and (population) variance of the entries where `mask` is true, over all processes.

    values, mask: same shape. Returns two scalars. Two passes, so that a large mean does not eat the variance.
    """
    kept = torch.where(mask, values, torch.zeros_like(values))
    total, count = reduce(torch.stack([kept.sum(), mask.sum().to(values.dtype)]))
    mean = total / count
    centred = torch.where(mask, values - mean, torch.zeros_like(values))
    variance = reduce(centred.square().sum()) / count
    return mean, variance


def whiten(
    values: Tensor, mask: Tensor, *, shift_mean: bool = True, reduce: Reduce = local, epsilon: float = 1e-8
) -> Tensor:
    """Scale the masked entries to variance 1 and, with `shift_mean`, to mean 0; the others become 0.

    Source: Huang et al. 2024 (N+ details): rewards are whitened with shift_mean=False, advantages with
    shift_mean=True.
    """
    mean, variance = masked_moments(values, mask, reduce)
    whitened = (values - mean) * torch.rsqrt(variance + epsilon)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, torch.zeros_like(values))


def gae(
    rewards_BR: Tensor, values_BR: Tensor, mask_BR: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns (Schulman et al. 2016, eq. 16), both zero outside the mask.

    mask_BR is true on a prefix of each row (the response); the value after its last token is 0, because the
    episode ends there. delta_t = r_t + gamma V_{t+1} - V_t; A_t = delta_t + gamma lam A_{t+1}; R_t = A_t +
    V_t.
    """
    mask = mask_BR.to(values_BR.dtype)
    values = values_BR * mask
    advantages = torch.zeros_like(values)
    following_advantage = torch.zeros_like(values[:, 0])
    following_value = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards_BR[:, t] + gamma * following_value - values[:, t]
        following_advantage = (delta + gamma * lam * following_advantage) * mask[:, t]
        following_value = values[:, t]
        advantages[:, t] = following_advantage
    return advantages, (advantages + values) * mask


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, reduce: Reduce = local) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over the mask: 1 is a perfect value network, 0 a constant."""
    _, residual = masked_moments(returns - values, mask, reduce)
    _, total = masked_moments(returns, mask, reduce)
    return 1 - residual / total.clamp(min=1e-12)
