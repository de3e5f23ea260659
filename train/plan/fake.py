"""Models without data that compute shapes: built on the meta device, then given storages that hold nothing.

`posttrain plan` never loads or allocates a weight: FakeTensorMode (PyTorch's own, torch.compile traces with
it) answers every operation with the shape, type and storage size of its result.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import TaskType, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from trl.kernels import chunked_logprob

from posttrain.errors import UserError
from posttrain.preflight import Findings
from train.adapters import lora_config
from train.peft_config import PeftSettings
from train.preflight.models import skeleton

UNMASKED = "posttrain_unmasked"
"""Attention without scores or masks in memory: PyTorch's, told only that it is causal."""


def fake_mode() -> FakeTensorMode:
    """A mode in which real index tensors may be mixed with tensors without data."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def build(
    config: PreTrainedConfig, task: TaskType, dtype: torch.dtype, attention: str | None = None
) -> nn.Module:
    """The modules of an architecture on the meta device, weights in `dtype`; attention: of its layers, else
    the model's own. Raises UserError for an architecture without such a model.
    """
    findings = Findings()
    model: Any = skeleton(copy.deepcopy(config), task, "model", findings)
    if model is None:
        raise UserError(findings.problems[0].message)
    text = model.config.get_text_config()
    if task == TaskType.SEQ_CLS and text.pad_token_id is None:
        text.pad_token_id = 0  # the reward stage takes the tokenizer's
    if attention is not None:
        model.config.get_text_config()._attn_implementation = attention
    return model.to(dtype)


def adapt(
    model: nn.Module, settings: PeftSettings | None, task: TaskType, *, follow: bool = False
) -> nn.Module:
    """The model under LoRA; itself, all of it trained, without settings. follow: adapters get the type of the
    weights instead of float32. Raises UserError where peft refuses the settings.
    """
    if settings is None:
        return model
    lora: Any = lora_config(settings, task)
    lora.init_lora_weights = True  # pissa and olora would decompose weights that have no values
    try:
        with torch.device("meta"):
            adapted: Any = get_peft_model(model, lora)  # type: ignore[arg-type]
    except ValueError as error:
        raise UserError(f"peft: {str(error).splitlines()[0]}") from error
    if follow:
        dtype = next(p.dtype for p in adapted.parameters() if not p.requires_grad)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    return adapted


def give_storage(module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Replace meta parameters and buffers by fake ones on the CPU; what is shared stays shared."""
    made: dict[int, Any] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
        return made[id(tensor)]

    with mode:
        for part in module.modules():
            for table in (part._parameters, part._buffers):
                for name, tensor in table.items():
                    if tensor is not None and tensor.device.type == "meta":
                        table[name] = fake(tensor)  # type: ignore[assignment]
    return module


@contextmanager
def tiles_in_place(wanted: bool) -> Iterator[None]:
    """Inside, TRL's fused head allocates what it does on a GPU, where Triton kernels turn each tile of logits
    into its statistics and its gradient in place; the torch code that stands in for them on a CPU needs
    several float32 copies of the tile.
    """
    if not wanted:
        yield
        return
    names = ("_forward_tile", "_backward_tile")
    before = {name: vars(chunked_logprob)[name] for name in names}
    vars(chunked_logprob).update(dict.fromkeys(names, _nothing))
    try:
        yield
    finally:
        vars(chunked_logprob).update(before)


def _nothing(*_: Any, **__: Any) -> None:
    return None


AttentionInterface.register(UNMASKED, sdpa_attention_forward)
AttentionMaskInterface.register(UNMASKED, _nothing)
