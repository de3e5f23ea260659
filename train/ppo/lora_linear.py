"""LoRA layers in three products: x W^T into the output, x A^T, and B added to the output in place.

peft's own forward pass computes the same function and walks over the output three times more (product with B,
scale, sum), in the backward pass too. A plain LoRA layer with one adapter switched on takes this way; every
other case (DoRA, dropout, merged or mixed adapters, quantised bases) goes through peft as it is.

    y = x W^T + b + s (x A^T) B^T                 (Hu et al. 2021, LoRA, arXiv 2106.09685, eq. 3)
    dx = dy W + s (dy B) A,  dA = s (dy B)^T x,  dB = s dy^T (x A^T)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


def fuse_lora(model: nn.Module) -> int:
    """From now on the LoRA layers of `model` take the short way where it applies; how many there are.

    Layers whose base is not a plain linear layer, quantised ones above all, are left alone.
    """
    layers: list[Any] = [
        module
        for module in model.modules()
        if type(module) is LoraLinear and type(module.get_base_layer()) is nn.Linear
    ]
    for layer in layers:
        layer.forward = partial(_forward, layer, layer.forward)
    return len(layers)


def lora_linear(
    x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scaling: float
) -> Tensor:
    """x W^T + b + scaling (x A^T) B^T for x of [..., I]: [..., O], in the autocast type where that is on.

    Differentiable once, in x, A and B; W and b are constants.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    bias_O = None if bias_O is None else bias_O.to(dtype)
    with torch.autocast(device, enabled=False):
        out_NO = _LoraLinear.apply(
            x.flatten(0, -2).to(dtype),
            weight_OI.detach().to(dtype),
            bias_O,
            a_RI.to(dtype),
            b_OR.to(dtype),
            scaling,
        )
    return out_NO.unflatten(0, x.shape[:-1])


def _forward(layer: Any, plain: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    name = layer.active_adapters[0] if len(layer.active_adapters) == 1 else None
    base = layer.get_base_layer()
    if (
        name not in layer.lora_A
        or layer.disable_adapters
        or layer.merged
        or name in layer.lora_variant
        or layer.lora_bias[name]
        or args
        or kwargs
        or base.weight.requires_grad
        or not isinstance(layer.lora_dropout[name], nn.Identity)
    ):
        return plain(x, *args, **kwargs)
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    return lora_linear(x, base.weight, base.bias, a, b, layer.scaling[name])


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_NI: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        a_RI: Tensor,
        b_OR: Tensor,
        scaling: float,
    ) -> Tensor:
        out_NO = functional.linear(x_NI, weight_OI, bias_O)
        low_NR = x_NI @ a_RI.T
        out_NO.addmm_(low_NR, b_OR.T, alpha=scaling)
        ctx.save_for_backward(x_NI, weight_OI, a_RI, b_OR, low_NR)
        ctx.scaling = scaling
        return out_NO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_NO: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, weight_OI, a_RI, b_OR, low_NR = ctx.saved_tensors
        by_x, _, _, by_a, by_b, _ = ctx.needs_input_grad
        d_x = d_a = d_b = None
        if by_b:
            d_b = (d_out_NO.T @ low_NR).mul_(ctx.scaling)
        if by_x or by_a:
            d_low_NR = (d_out_NO @ b_OR).mul_(ctx.scaling)
            if by_a:
                d_a = d_low_NR.T @ x_NI
            if by_x:
                d_x = (d_out_NO @ weight_OI).addmm_(d_low_NR, a_RI)
        return d_x, None, None, d_a, d_b, None
