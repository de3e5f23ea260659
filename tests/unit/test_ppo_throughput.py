"""FLOPs by hand; the machine's rate exists and is measured once."""

from __future__ import annotations

import math

import pytest
import torch

from train.ppo.throughput import Attention, matmul_throughput, model_flops, utilisation


def test_flops_per_token_are_two_six_and_four_times_the_parameters() -> None:
    assert model_flops(1000, 10, trained=False) == 20_000
    assert model_flops(1000, 10, trained=True) == 60_000
    assert model_flops(1000, 10, trained=True, frozen_backbone=True) == 40_000
    assert model_flops(1000, 10, trained=False, frozen_backbone=True) == 20_000


def test_attention_adds_four_t_d_per_layer_and_twelve_when_trained() -> None:
    attention = Attention(layers=2, width=8, context=16)
    # 4 x 16 x 8 x 2 = 1024 per token forward, 3072 with the backward pass
    assert attention.flops_per_token == 1024
    assert model_flops(1000, 10, trained=False, attention=attention) == 30_240
    assert model_flops(1000, 10, trained=True, attention=attention) == 90_720
    assert model_flops(1000, 10, trained=True, frozen_backbone=True, attention=attention) == 70_720


def test_the_formula_counts_what_a_linear_layer_does() -> None:
    """torch counts a two-layer network: 2 N forward, 4 N backward, 2 N backward with frozen weights."""
    from torch.utils.flop_counter import FlopCounterMode

    def counted(trained: bool, frozen: bool) -> int:
        network = torch.nn.Sequential(
            torch.nn.Linear(16, 16, bias=False), torch.nn.Linear(16, 16, bias=False)
        )
        network.requires_grad_(not frozen)
        inputs = torch.ones(10, 16, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            output = network(inputs).sum()
            if trained:
                output.backward()
        return counter.get_total_flops()

    for trained, frozen in ((False, False), (True, False), (True, True)):
        assert counted(trained, frozen) == model_flops(512, 10, trained=trained, frozen_backbone=frozen)


def test_utilisation_by_hand() -> None:
    assert utilisation(3e12, 2.0, 6e12) == pytest.approx(0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rate_is_positive_finite_measured_once_and_draws_no_random_number(dtype: torch.dtype) -> None:
    before = torch.get_rng_state()
    rate = matmul_throughput(torch.device("cpu"), dtype)
    assert math.isfinite(rate)
    assert rate > 0
    assert matmul_throughput(torch.device("cpu"), dtype) == rate
    assert torch.equal(torch.get_rng_state(), before)
