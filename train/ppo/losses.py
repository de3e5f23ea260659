"""Token log-probabilities, KL estimators and the clipped objectives of PPO, as pure functions per token.

Nothing here averages: the trainer sums over the masked tokens of the global mini-batch and divides by their
number, so that neither padding nor the split into micro-batches or ranks changes a loss.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from train.ppo.logprobs import wide


def token_logprobs(logits_BRV: Tensor, tokens_BR: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability of each token at `temperature`, in nats, and the log-normaliser, both [B, R]."""
    scaled_BRV = _scale(logits_BRV, temperature)
    normaliser_BR = torch.logsumexp(scaled_BRV, dim=-1)
    return scaled_BRV.gather(-1, tokens_BR.unsqueeze(-1)).squeeze(-1) - normaliser_BR, normaliser_BR


def token_entropy(logits_BRV: Tensor, normaliser_BR: Tensor, temperature: float) -> Tensor:
    """Entropy of each position's distribution at `temperature`, in nats, [B, R]."""
    scaled_BRV = _scale(logits_BRV, temperature)
    probabilities_BRV = torch.exp(scaled_BRV - normaliser_BR.unsqueeze(-1))
    return normaliser_BR - torch.linalg.vecdot(probabilities_BRV, scaled_BRV)


def _scale(logits: Tensor, temperature: float) -> Tensor:
    logits = logits.to(wide(logits.dtype))
    return logits if temperature == 1.0 else logits / temperature


def kl_k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """log p/q: unbiased for KL(p || q) under samples of p, high variance (Schulman, Approximating KL)."""
    return logprobs - reference_logprobs


def kl_k2(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """(log p/q)^2 / 2: biased, low variance, never negative."""
    return (logprobs - reference_logprobs).square() / 2


def kl_k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """exp(-log p/q) - 1 + log p/q: unbiased and never negative."""
    log_ratio = logprobs - reference_logprobs
    return torch.expm1(-log_ratio) + log_ratio


class PolicyLoss(NamedTuple):
    """Per token: the loss, the ratio pi/pi_old, and if a clipped branch was the one taken."""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    cliprange: float,
    dual_clip: float | None = None,
) -> PolicyLoss:
    """max(-A rho, -A clip(rho, 1 - c, 1 + c)): the clipped surrogate (Schulman et al. 2017, eq. 7), negated.

    dual_clip d: where A < 0 the loss is at most -A d, so that a ratio that ran away on a bad token cannot
    dominate the batch (Ye et al. 2020, Mastering Complex Control in MOBA Games, eq. 5; d > 1).
    """
    ratio = torch.exp(logprobs - old_logprobs)
    plain = -advantages * ratio
    bounded = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    loss, clipped = torch.maximum(plain, bounded), bounded > plain
    if dual_clip is not None:
        ceiling = -advantages * dual_clip
        beyond = (advantages < 0) & (loss > ceiling)
        loss, clipped = torch.where(beyond, ceiling, loss), clipped | beyond
    return PolicyLoss(loss, ratio.detach(), clipped.detach())


KL_ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


def importance_weights(logprobs: Tensor, sampled_logprobs: Tensor, limit: float) -> Tensor:
    """min(pi_trainer / pi_engine, limit) per token, without gradient: truncated importance sampling.

    Corrects the policy gradient for an engine that sampled from slightly other probabilities than the
    trainer's (Yao et al. 2025, Your Efficient RL Framework Secretly Brings You Off-Policy RL Training).
    """
    return torch.exp(logprobs - sampled_logprobs).clamp(max=limit).detach()


class ValueLoss(NamedTuple):
    """Per token, [B, R] each: the loss and whether the clipped branch was the larger."""

    loss: Tensor
    clipped: Tensor


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, cliprange_value: float) -> ValueLoss:
    """max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / 2 (Huang et al. 2024, N+ details)."""
    bounded_values = torch.clamp(values, old_values - cliprange_value, old_values + cliprange_value)
    plain = (values - returns).square()
    bounded = (bounded_values - returns).square()
    return ValueLoss(torch.maximum(plain, bounded) / 2, (bounded > plain).detach())
