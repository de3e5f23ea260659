"""Masked statistics and GAE against numbers worked out by hand and against the definition."""

from __future__ import annotations

import pytest
import torch

from train.ppo.advantages import explained_variance, gae, masked_moments, whiten


def test_moments_ignore_masked_entries() -> None:
    values = torch.tensor([[1.0, 3.0, 1000.0], [5.0, -1000.0, 7.0]])
    mask = torch.tensor([[True, True, False], [True, False, True]])
    mean, variance = masked_moments(values, mask)
    assert mean.item() == 4.0
    assert variance.item() == 5.0  # (9 + 1 + 1 + 9) / 4


def test_whitening_gives_mean_zero_and_variance_one_inside_the_mask() -> None:
    values = torch.tensor([[1.0, 3.0, 99.0], [5.0, 99.0, 7.0]])
    mask = torch.tensor([[True, True, False], [True, False, True]])
    whitened = whiten(values, mask)
    expected = torch.tensor([[-3.0, -1.0, 0.0], [1.0, 0.0, 3.0]]) / 5.0**0.5
    torch.testing.assert_close(whitened, expected)


def test_whitening_without_shift_keeps_the_mean() -> None:
    values = torch.tensor([[1.0, 3.0, 99.0], [5.0, 99.0, 7.0]])
    mask = torch.tensor([[True, True, False], [True, False, True]])
    whitened = whiten(values, mask, shift_mean=False)
    expected = torch.tensor([[-3.0, -1.0, 0.0], [1.0, 0.0, 3.0]]) / 5.0**0.5 + 4.0
    torch.testing.assert_close(whitened, torch.where(mask, expected, torch.zeros(())))


def test_statistics_are_those_of_all_processes() -> None:
    """`reduce` stands for the sum over ranks: here the other rank holds the values 5 and 7."""
    values, mask = torch.tensor([[1.0, 3.0]]), torch.ones(1, 2, dtype=torch.bool)
    others = iter([torch.tensor([12.0, 2.0]), torch.tensor(1.0 + 9.0)])
    mean, variance = masked_moments(values, mask, lambda total: total + next(others))
    assert (mean.item(), variance.item()) == (4.0, 5.0)


def test_gae_by_hand() -> None:
    # gamma 1, lambda 1/2; V after the last token is 0.
    # delta_1 = 2 - 1 = 1; delta_0 = 0 + 1 - 0.5 = 0.5; A_1 = 1, A_0 = 0.5 + 0.5 * 1 = 1.
    rewards, values = torch.tensor([[0.0, 2.0]]), torch.tensor([[0.5, 1.0]])
    advantages, returns = gae(rewards, values, torch.ones(1, 2, dtype=torch.bool), gamma=1.0, lam=0.5)
    torch.testing.assert_close(advantages, torch.tensor([[1.0, 1.0]]))
    torch.testing.assert_close(returns, torch.tensor([[1.5, 2.0]]))


def test_gae_stops_at_the_end_of_a_shorter_response() -> None:
    rewards, values = torch.tensor([[0.0, 2.0, 77.0]]), torch.tensor([[0.5, 1.0, 99.0]])
    mask = torch.tensor([[True, True, False]])
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=0.5)
    torch.testing.assert_close(advantages, torch.tensor([[1.0, 1.0, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[1.5, 2.0, 0.0]]))


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0)])
def test_gae_equals_its_definition(gamma: float, lam: float) -> None:
    """A_t = sum over l of (gamma lambda)^l delta_{t + l}, summed term by term."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    lengths = [1, 7, 3, 5, 2]
    mask = torch.tensor([[t < n for t in range(7)] for n in lengths])
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for row, length in enumerate(lengths):
        following = [*values[row, 1:length].tolist(), 0.0]
        deltas = [
            rewards[row, t].item() + gamma * following[t] - values[row, t].item() for t in range(length)
        ]
        for t in range(length):
            expected = sum((gamma * lam) ** i * deltas[t + i] for i in range(length - t))
            assert advantages[row, t].item() == pytest.approx(expected, abs=1e-12)
            assert returns[row, t].item() == pytest.approx(expected + values[row, t].item(), abs=1e-12)
        assert not advantages[row, length:].any()


def test_lambda_one_makes_the_return_the_sum_of_rewards_to_come() -> None:
    rewards, values = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[9.0, -3.0, 0.5]])
    _, returns = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=1.0, lam=1.0)
    torch.testing.assert_close(returns, torch.tensor([[7.0, 6.0, 4.0]]))


def test_explained_variance() -> None:
    returns, mask = torch.tensor([[1.0, 2.0, 3.0, 50.0]]), torch.tensor([[True, True, True, False]])
    assert explained_variance(returns.clone(), returns, mask).item() == 1.0
    assert explained_variance(torch.full_like(returns, 2.0), returns, mask).item() == pytest.approx(0.0)
    # residuals 0, 1, 0: variance 2/9 against 2/3.
    values = torch.tensor([[1.0, 1.0, 3.0, 0.0]])
    assert explained_variance(values, returns, mask).item() == pytest.approx(1 - (2 / 9) / (2 / 3))
