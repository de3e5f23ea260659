"""Truncation, the data cursor, random numbers, sampling and the split into micro-batches."""

from __future__ import annotations

import pytest
import torch

from train.ppo.engines.hf import draw
from train.ppo.experience import batch_share
from train.ppo.rollout import episode_prompts, episode_uniforms, truncate_at_eos

EOS = 1


@pytest.mark.parametrize(
    ("tokens", "kept", "finished"),
    [
        ([5, 6, EOS, 7, EOS], [5, 6, EOS], True),
        ([EOS, 5], [EOS], True),
        ([5, 6], [5, 6], False),
        ([5, 0, 6], [5, 0, 6], False),  # a pad token that was sampled is a token like any other
    ],
)
def test_truncate_at_eos(tokens: list[int], kept: list[int], finished: bool) -> None:
    assert truncate_at_eos(tokens, EOS) == (kept, finished)


def test_every_pass_sees_every_prompt_once_in_another_order() -> None:
    first, second = episode_prompts(10, 0, 0, 10), episode_prompts(10, 0, 10, 10)
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert first != episode_prompts(10, 1, 0, 10)


def test_the_cursor_is_a_number() -> None:
    """Any cut of the run into batches visits the same prompts."""
    whole = episode_prompts(7, 3, 0, 30)
    assert whole == [index for start in range(0, 30, 6) for index in episode_prompts(7, 3, start, 6)]


def test_random_numbers_depend_on_seed_and_episode() -> None:
    numbers = episode_uniforms(0, 64, 4, 5)
    assert numbers.shape == (4, 5)
    assert numbers.dtype == torch.float64
    assert torch.equal(numbers, episode_uniforms(0, 64, 4, 5))
    assert not torch.equal(numbers, episode_uniforms(0, 128, 4, 5))
    assert not torch.equal(numbers, episode_uniforms(1, 64, 4, 5))


def test_draw_inverts_the_distribution_function() -> None:
    logits = torch.tensor([0.2, 0.0, 0.5, 0.3]).log().expand(6, 4)
    uniforms = torch.tensor([0.0, 0.1999, 0.2001, 0.6999, 0.7001, 1 - 1e-12], dtype=torch.float64)
    tokens, logprobs = draw(logits, uniforms, 1.0)
    assert tokens.tolist() == [0, 0, 2, 2, 3, 3]
    torch.testing.assert_close(logprobs, torch.tensor([0.2, 0.2, 0.5, 0.5, 0.3, 0.3]).log())


def test_draw_uses_the_temperature() -> None:
    logits = torch.tensor([1.0, 0.0]).expand(20_000, 2)
    uniforms = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    for temperature in (0.5, 1.0, 2.0):
        tokens, _ = draw(logits, uniforms, temperature)
        expected = torch.softmax(torch.tensor([1.0, 0.0]) / temperature, -1)[1].item()
        assert tokens.float().mean().item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("mini_batches", "processes"), [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_processes_share_every_mini_batch(mini_batches: int, processes: int) -> None:
    shares = [batch_share(12, mini_batches, processes, rank) for rank in range(processes)]
    assert sorted(offset for share in shares for offset in share) == list(range(12))
    width, part = 12 // mini_batches, 12 // mini_batches // processes
    for m in range(mini_batches):
        together = {offset for share in shares for offset in share[m * part : (m + 1) * part]}
        assert together == set(range(m * width, (m + 1) * width))
