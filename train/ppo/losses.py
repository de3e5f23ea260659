"""Token log-probabilities, KL estimators and the clipped objectives of PPO, as pure functions per token.

Nothing here averages: the trainer sums over the masked tokens of the global mini-batch and divides by their
number, so that neither padding nor the split into micro-batches or ranks changes a loss.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def token_logprobs(logits_BRV: Tensor, tokens_BR: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability of each token at `temperature`, in nats, and the log-normaliser, both [B, R]."""
    scaled_BRV = _scale(logits_BRV, temperature)
    normaliser_BR = torch.logsumexp(scaled_BRV, dim=-1)
    return scaled_BRV.gather(-1, tokens_BR.unsqueeze(-1)).squeeze(-1) - normaliser_BR, normaliser_BR


@torch.no_grad()
def token_entropy(logits_BRV: Tensor, normaliser_BR: Tensor, temperature: float) -> Tensor:
    """Entropy of each position's distribution at `temperature`, in nats, [B, R], without gradient."""
    scaled_BRV = _scale(logits_BRV, temperature)
    probabilities_BRV = torch.exp(scaled_BRV - normaliser_BR.unsqueeze(-1))
    return normaliser_BR - torch.einsum("brv,brv->br", probabilities_BRV, scaled_BRV)


def _scale(logits: Tensor, temperature: float) -> Tensor:
    return logits.float() if temperature == 1.0 else logits.float() / temperature


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
    """Per token, [B, R] each: the loss, the ratio pi/pi_old, and if the clipped branch was the larger."""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, cliprange: float) -> PolicyLoss:
    """max(-A rho, -A clip(rho, 1 - c, 1 + c)): the clipped surrogate (Schulman et al. 2017, eq. 7),
    negated.
    """
    ratio = torch.exp(logprobs - old_logprobs)
    plain = -advantages * ratio
    bounded = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return PolicyLoss(torch.maximum(plain, bounded), ratio.detach(), (bounded > plain).detach())


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
