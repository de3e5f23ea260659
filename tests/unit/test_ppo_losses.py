"""Log-probabilities, KL estimators and clipped losses against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from train.ppo.losses import (
    importance_weights,
    kl_k1,
    kl_k2,
    kl_k3,
    policy_loss,
    token_entropy,
    token_logprobs,
    value_loss,
)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_token_logprobs_and_entropy(temperature: float) -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.25])
    logits = (temperature * probabilities.log() + 3.0).reshape(1, 1, 3)
    logprobs, normaliser = token_logprobs(logits, torch.tensor([[1]]), temperature)
    assert logprobs.item() == pytest.approx(math.log(0.25), abs=1e-6)
    entropy = token_entropy(logits, normaliser, temperature)
    assert entropy.item() == pytest.approx(1.5 * math.log(2), abs=1e-6)


def test_temperature_divides_the_logits() -> None:
    logits = torch.tensor([[[2.0, 0.0]]])
    logprobs, _ = token_logprobs(logits, torch.tensor([[0]]), temperature=2.0)
    assert logprobs.item() == pytest.approx(-math.log(1 + math.exp(-1)))


def test_kl_estimators_by_hand() -> None:
    p, q = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    assert kl_k1(p, q).item() == pytest.approx(math.log(2))
    assert kl_k2(p, q).item() == pytest.approx(math.log(2) ** 2 / 2)
    assert kl_k3(p, q).item() == pytest.approx(0.5 - 1 + math.log(2))  # exp(-log 2) - 1 + log 2
    assert kl_k3(p, p).item() == 0.0


def test_k1_and_k3_have_the_kl_divergence_as_expectation() -> None:
    p, q = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.2, 0.3, 0.5]).double()
    exact = (p * (p / q).log()).sum()
    for estimator in (kl_k1, kl_k3):
        torch.testing.assert_close((p * estimator(p.log(), q.log())).sum(), exact)


def test_policy_loss_in_its_four_regions() -> None:
    """cliprange 0.2: the gradient of the bad direction is always kept, that of the good one cut."""
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1])
    advantages = torch.tensor([2.0, -2.0, 2.0, -2.0, 3.0])
    result = policy_loss(ratio.log(), torch.zeros(5), advantages, cliprange=0.2)
    torch.testing.assert_close(result.loss, torch.tensor([-2.4, 3.0, -1.0, 1.6, -3.3]))
    torch.testing.assert_close(result.ratio, ratio)
    assert result.clipped.tolist() == [True, False, False, True, False]


def test_policy_loss_gradient_vanishes_where_clipped() -> None:
    logprobs = torch.tensor([1.5, 1.1]).log().requires_grad_()
    policy_loss(logprobs, torch.zeros(2), torch.ones(2), cliprange=0.2).loss.sum().backward()
    # d(-A rho)/d log p = -A rho where not clipped.
    torch.testing.assert_close(logprobs.grad, torch.tensor([0.0, -1.1]))


def test_dual_clip_bounds_the_loss_of_a_bad_token() -> None:
    """A = -1 and ratio 10: without it the loss is 10, with it 3; a positive advantage is not touched."""
    logprobs = torch.tensor([10.0, 10.0]).log().requires_grad_()
    old, advantages = torch.zeros(2), torch.tensor([-1.0, 1.0])
    assert policy_loss(logprobs, old, advantages, 0.2).loss.tolist() == pytest.approx([10.0, -1.2])
    bounded = policy_loss(logprobs, old, advantages, 0.2, dual_clip=3.0)
    assert bounded.loss.tolist() == pytest.approx([3.0, -1.2])
    assert bounded.clipped.tolist() == [True, True]
    bounded.loss.sum().backward()
    assert logprobs.grad is not None and logprobs.grad.tolist() == [0.0, 0.0]


def test_importance_weights_are_cut_and_carry_no_gradient() -> None:
    logprobs = torch.tensor([0.0, -1.0, 1.0], requires_grad=True)
    weights = importance_weights(logprobs, torch.tensor([0.0, 0.0, -1.0]), limit=2.0)
    assert weights.tolist() == pytest.approx([1.0, 0.36788, 2.0], abs=1e-5)
    assert not weights.requires_grad


def test_value_loss_by_hand() -> None:
    old, returns = torch.tensor([0.0, 0.0, 0.0]), torch.tensor([1.0, 0.0, 0.1])
    values = torch.tensor([0.5, 0.5, 0.1])
    # 0: plain 0.25, clipped to 0.2: 0.64. 1: plain 0.25, clipped 0.04. 2: inside the range, exact.
    result = value_loss(values, old, returns, cliprange_value=0.2)
    torch.testing.assert_close(result.loss, torch.tensor([0.32, 0.125, 0.0]))
    assert result.clipped.tolist() == [True, False, False]
