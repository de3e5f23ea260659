"""Memory under DDP, ZeRO and FSDP2 against hand arithmetic and the figures of the ZeRO paper."""

from __future__ import annotations

import pytest

from posttrain.errors import UserError
from train.plan.layouts import LAYOUTS, Memory, Sizes, find_layout, plain, quantised, sharded
from train.plan.tracker import Point, Trace

GB = 1e9


def states(parameters: float, itemsize: int, passing: dict[str, int] | None = None) -> Trace:
    """A trace whose weights and gradients have `itemsize` bytes, moments float32 for float32 weights."""
    count = int(parameters)
    standing = {"weights": itemsize * count, "optimizer": 2 * itemsize * count, "other_models": 0}
    return Trace(standing, [Point(itemsize * count, dict(passing or {}))])


def without_buffers(memory: Memory) -> float:
    return memory.total - memory.device.get("buffers", 0.0)


def test_seven_billion_in_float32_take_16_bytes_each() -> None:
    """Weights 4, gradients 4, two moments 8."""
    memory = plain(states(7e9, 4))
    assert memory.total == 16 * 7e9
    assert memory.device == {"weights": 28e9, "gradients": 28e9, "optimizer": 56e9}


@pytest.mark.parametrize(("layout", "gigabytes"), [("zero1", 31.4), ("zero2", 16.6), ("zero3", 1.9)])
def test_the_figures_of_the_zero_paper(layout: str, gigabytes: float) -> None:
    """Rajbhandari et al. 2020, figure 1: 7.5 billion parameters, mixed precision Adam, 64 devices."""
    sizes = Sizes(trained=int(7.5e9), frozen=0)
    memory = sharded(LAYOUTS[layout], states(7.5e9, 2), sizes, 64, 2)
    assert without_buffers(memory) / GB == pytest.approx(gigabytes, abs=0.05)


@pytest.mark.parametrize("layout", ["zero3", "fsdp2"])
def test_full_sharding_on_eight_holds_an_eighth(layout: str) -> None:
    sizes = Sizes(trained=int(7e9), frozen=0, layer=int(2e8), root=int(2e8))
    memory = sharded(LAYOUTS[layout], states(7e9, 2), sizes, 8, 2)
    assert without_buffers(memory) == pytest.approx(16 * 7e9 / 8)


def test_activations_are_not_sharded_and_sixteen_bit_weights_need_no_casts() -> None:
    trace = states(1e9, 2, {"activations": 500, "casts": 300})
    memory = sharded(LAYOUTS["zero3"], trace, Sizes(int(1e9), 0), 8, 2)
    assert memory.device["activations"] == 500
    assert "casts" not in memory.device


def test_the_worst_moment_depends_on_how_much_gradients_weigh() -> None:
    """At the end of the backward pass gradients are all there, at its start activations are."""
    points = [Point(1000, {"activations": 100}), Point(0, {"activations": 600})]
    trace = Trace({"weights": 0, "optimizer": 0, "other_models": 0}, points)
    assert plain(trace).total == 1100
    sizes = Sizes(trained=0, frozen=0)
    assert without_buffers(sharded(LAYOUTS["zero2"], trace, sizes, 4, 2)) == 600


def test_offload_moves_states_to_the_host() -> None:
    sizes = Sizes(trained=int(1e9), frozen=0)
    trace = states(1e9, 2)
    half = sharded(LAYOUTS["zero2-offload"], trace, sizes, 4, 2)
    assert without_buffers(half) == 2e9  # the weights
    assert half.host == 14e9 / 4
    everything = sharded(LAYOUTS["zero3-offload"], trace, sizes, 4, 2)
    assert without_buffers(everything) == 0
    assert everything.device["buffers"] > 0
    assert everything.host == 16e9 / 4


def test_lora_shards_states_of_the_adapter_only() -> None:
    """1 G frozen, 10 M trained: weights 2 bytes everywhere, 14 bytes of gradients and states over N."""
    sizes = Sizes(trained=10_000_000, frozen=1_000_000_000)
    trace = Trace({"weights": 0, "optimizer": 0, "other_models": 0}, [Point(20_000_000, {})])
    memory = sharded(LAYOUTS["zero2"], trace, sizes, 4, 2)
    assert without_buffers(memory) == pytest.approx(2 * 1.01e9 + 14 * 1e7 / 4)


def test_ddp_holds_gradients_twice_with_several_devices() -> None:
    assert plain(states(1e6, 4), devices=2, bucket_bytes=4_000_000).total == 20e6
    assert plain(states(1e6, 4), devices=1, bucket_bytes=4_000_000).total == 16e6


def test_nf4_takes_4_127_bits_for_a_frozen_linear_weight() -> None:
    """Dettmers et al. 2023, section 3; the embedding stays in bfloat16, one matrix is written out."""
    sizes = Sizes(trained=0, frozen=1_100_000, linear=1_000_000, matrix=10_000)
    before = Memory({"weights": 2 * 1_100_000})
    memory = quantised(before, sizes, 2)
    assert memory.device["weights"] == pytest.approx(200_000 + 1_000_000 * 4.127 / 8, rel=1e-4)
    assert memory.device["buffers"] == 20_000


def test_a_misspelt_layout_names_the_nearest() -> None:
    assert find_layout("single") is LAYOUTS["ddp"]
    with pytest.raises(UserError, match="did you mean zero3"):
        find_layout("zero-3")
