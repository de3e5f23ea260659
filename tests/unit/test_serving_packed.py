"""Packed weights give the products of the plain ones, for any number of rows, and only where they gain."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from serving.backends.vllm import packed
from serving.backends.vllm.packed import FEWEST_ROWS, pack_linear_layers, padded_rows


class Layers(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.biased = nn.Linear(256, 192, dtype=dtype)
        self.plain = nn.Linear(256, 320, bias=False, dtype=dtype)
        self.small = nn.Linear(8, 8, dtype=dtype)


@pytest.mark.parametrize("shape", [(1,), (3,), (FEWEST_ROWS,), (50,), (1, 2), (1, 17), (2, 3, 5)])
def test_products_are_those_of_the_plain_weights(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layers = Layers()
    hidden = torch.randn(*shape, 256)
    with torch.inference_mode():
        expected = layers.biased(hidden), layers.plain(hidden)
        assert pack_linear_layers(layers) == 2
        plain = []
        monkeypatch.setattr(packed.nn.functional, "linear", _counting(plain))
        found = layers.biased(hidden), layers.plain(hidden)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert len(plain) == (2 if hidden.shape[:-1].numel() < FEWEST_ROWS else 0)
    assert layers.small.forward.__func__ is nn.Linear.forward


def _counting(calls: list[None]):
    original = nn.functional.linear

    def linear(*arguments: torch.Tensor) -> torch.Tensor:
        calls.append(None)
        return original(*arguments)

    return linear


def test_few_numbers_of_rows_are_computed() -> None:
    assert [padded_rows(count) for count in (4, 5, 8, 29, 32, 33, 128, 129, 256)] == [
        4, 8, 8, 32, 32, 40, 128, 160, 256,
    ]  # fmt: skip
    assert len({padded_rows(count) for count in range(FEWEST_ROWS, 257)}) == 24


def test_other_precisions_and_large_models_have_no_second_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pack_linear_layers(Layers(torch.bfloat16)) == 0
    monkeypatch.setattr(packed, "MAX_BYTES", 4 * 256 * (192 + 320) - 1)
    assert pack_linear_layers(Layers()) == 0
