"""The chunked log-probabilities against the plain ones, in value and in gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from train.ppo.logprobs import chunk_tokens, linear_logprobs, plain_head
from train.ppo.losses import token_entropy, token_logprobs

TEMPERATURE = 0.7


def inputs(trained_weight: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(11, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(17, 6, generator=generator, dtype=torch.float64, requires_grad=trained_weight)
    return hidden, weight, torch.randint(17, (11,), generator=generator)


@pytest.mark.parametrize("trained_weight", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("chunk", [1, 4, 11, 100])
def test_equals_the_plain_computation(trained_weight: bool, chunk: int) -> None:
    hidden, weight, target = inputs(trained_weight)
    logits = hidden @ weight.T
    normaliser = torch.logsumexp(logits / TEMPERATURE, -1)
    expected = (logits / TEMPERATURE).gather(1, target[:, None]).squeeze(1) - normaliser
    probabilities = torch.softmax(logits / TEMPERATURE, -1)
    entropy = -(probabilities * probabilities.log()).sum(-1)
    pull = torch.linspace(-1, 2, 11, dtype=torch.float64)
    (expected * pull + 0.3 * entropy * pull.cos()).sum().backward()
    wanted = [hidden.grad, weight.grad]
    hidden, weight, target = inputs(trained_weight)
    logprobs, entropies = linear_logprobs(hidden, weight, target, TEMPERATURE, with_entropy=True, chunk=chunk)
    torch.testing.assert_close(logprobs, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(entropies, entropy.detach(), rtol=1e-12, atol=1e-12)
    (logprobs * pull + 0.3 * entropies * pull.cos()).sum().backward()
    torch.testing.assert_close(hidden.grad, wanted[0], rtol=1e-10, atol=1e-12)
    if trained_weight:
        torch.testing.assert_close(weight.grad, wanted[1], rtol=1e-10, atol=1e-12)
    else:
        assert weight.grad is None


def test_without_gradient_the_values_are_the_same_to_the_bit() -> None:
    hidden, weight, target = inputs(False)
    hidden, weight = hidden.detach().float(), weight.float()
    with torch.no_grad():
        quiet, _ = linear_logprobs(hidden, weight, target, TEMPERATURE, with_entropy=True, chunk=4)
    loud, _ = linear_logprobs(hidden.requires_grad_(), weight, target, TEMPERATURE, chunk=4)
    assert torch.equal(quiet, loud.detach())


def test_autocast_computes_products_in_bfloat16_and_sums_in_float32() -> None:
    hidden, weight, target = inputs(False)
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, _ = linear_logprobs(hidden.float(), weight.float(), target, 1.0)
    exact, _ = linear_logprobs(hidden.detach(), weight, target, 1.0)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), exact, rtol=0, atol=0.1)
    assert not torch.equal(logprobs, exact.float())


def test_losses_agree_with_it() -> None:
    hidden, weight, target = inputs(False)
    logits = (hidden @ weight.T).detach().float()
    plain, normaliser = token_logprobs(logits, target, TEMPERATURE)
    fused, entropy = linear_logprobs(hidden.detach(), weight, target, TEMPERATURE, with_entropy=True)
    torch.testing.assert_close(plain, fused.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        token_entropy(logits, normaliser, TEMPERATURE), entropy.float(), rtol=1e-5, atol=1e-6
    )


def test_a_chunk_is_bounded_by_its_bytes() -> None:
    assert chunk_tokens(32_000) * 32_000 * 4 <= 64 * 2**20
    assert chunk_tokens(10**9) == 16


def test_only_a_single_matrix_counts_as_plain() -> None:
    assert plain_head(nn.Linear(4, 8, bias=False))
    assert not plain_head(nn.Linear(4, 8))
    assert not plain_head(nn.Sequential(nn.Linear(4, 8, bias=False)))
    assert not plain_head(None)
