"""The short way through LoRA layers against peft's own: values, gradients, and where it must step aside."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from train.ppo.lora_linear import fuse_lora, lora_linear


class Pair(nn.Module):
    """Two linear layers, one with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def adapted(dtype: torch.dtype = torch.float64, **settings: Any) -> PeftModel:
    torch.manual_seed(0)
    values = {"r": 3, "lora_alpha": 5, "target_modules": ["first", "second"], "init_lora_weights": False}
    return get_peft_model(Pair().to(dtype), LoraConfig(**(values | settings)), autocast_adapter_dtype=False)


def outcome(model: PeftModel, x: Tensor) -> list[Tensor]:
    """Output, gradient of the input, gradients of all that is trained."""
    x = x.detach().requires_grad_(True)
    model.zero_grad()
    out = model(x)
    (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    assert x.grad is not None
    return [out.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def inputs(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def test_equals_peft_in_value_and_gradients() -> None:
    plain = adapted()
    fused = copy.deepcopy(plain)
    assert fuse_lora(fused) == 2
    expected, found = outcome(plain, inputs()), outcome(fused, inputs())
    assert len(expected) == len(found) == 6
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def test_gradients_are_those_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(2)
    x, w, a, b = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((4, 6), (5, 6), (2, 6), (5, 2))
    )
    trained = [x.requires_grad_(), a.requires_grad_(), b.requires_grad_()]
    assert torch.autograd.gradcheck(lambda x, a, b: lora_linear(x, w, None, a, b, 0.7), trained)


def test_it_is_the_short_way_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(
        "train.ppo.lora_linear.lora_linear",
        lambda x, *rest: calls.append(x.shape) or lora_linear(x, *rest),
    )
    model = adapted()
    fuse_lora(model)
    model(inputs())
    assert len(calls) == 2


@pytest.mark.parametrize(
    "settings",
    [{"use_dora": True}, {"lora_dropout": 0.5}, {"lora_bias": True, "target_modules": ["first"]}],
    ids=["dora", "dropout", "lora_bias"],
)
def test_other_kinds_go_through_peft(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = adapted(**settings).eval()
    fused = copy.deepcopy(plain)
    fuse_lora(fused)
    monkeypatch.setattr("train.ppo.lora_linear.lora_linear", None)
    assert torch.equal(fused(inputs()), plain(inputs()))


def test_switched_off_merged_and_second_adapters_are_respected() -> None:
    plain = adapted()
    fused = copy.deepcopy(plain)
    fuse_lora(fused)
    with fused.disable_adapter():
        base = fused(inputs())
    assert torch.equal(
        base,
        plain.get_base_model().second.base_layer(
            torch.tanh(plain.get_base_model().first.base_layer(inputs()))
        ),
    )
    for model in (plain, fused):
        torch.manual_seed(3)
        model.add_adapter("other", LoraConfig(r=2, target_modules=["first"], init_lora_weights=False))
        model.get_base_model().double()
        model.set_adapter("other")
    torch.testing.assert_close(fused(inputs()), plain(inputs()), rtol=1e-12, atol=1e-13)
    assert not torch.allclose(fused(inputs()), base)
    before = fused(inputs())
    fused.merge_adapter()
    torch.testing.assert_close(fused(inputs()), before, rtol=1e-10, atol=1e-12)


def test_under_autocast_it_rounds_no_more_than_peft_does() -> None:
    errors: dict[str, list[Tensor]] = {"fused": [], "plain": []}
    for seed in range(20):
        models = {"plain": adapted(torch.float32)}
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in models["plain"].parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
        models["fused"] = copy.deepcopy(models["plain"])
        fuse_lora(models["fused"])
        x = torch.randn(2, 5, 6, generator=generator)
        exact = outcome(models["plain"], x)
        for name, model in models.items():
            with torch.autocast("cpu", torch.bfloat16):
                rounded = outcome(model, x)
            assert rounded[0].dtype == torch.bfloat16
            assert [part.dtype for part in rounded[1:]] == [torch.float32] * 5
            both = zip(rounded, exact, strict=True)
            errors[name].append(torch.stack([(r - e).abs().mean() / e.abs().mean() for r, e in both]))
    ours, theirs = (torch.stack(errors[name]).mean() for name in ("fused", "plain"))
    assert 0 < ours < 1.1 * theirs < 0.02
