"""The adapters of a served model: all of them in memory, those of one forward pass mixed token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear, LoraLayer


class Adapters:
    """LoRA adapters on one model, changed in place.

    The weights stay unmerged. In a forward pass over tokens of several requests every adapter in use is
    active, and what it would add at a token of another request is multiplied by zero: since these are plain
    LoRA layers, without bias or dropout, each token gets exactly what it would get alone.
    """

    def __init__(self, model: Any, directories: Mapping[str, Path]) -> None:
        """Load a PEFT directory for each name; afterwards the plain model is in use.

        Raises:
            ValueError: an adapter has layers that cannot be told apart token by token.
        """
        self.names = tuple(directories)
        # Names of our own for peft: a client's name may be one that torch cannot give a submodule.
        self._inner = {name: f"served_{index:03}" for index, name in enumerate(directories)}
        peft: Any = None
        for name, directory in directories.items():
            if peft is None:
                peft = PeftModel.from_pretrained(model, str(directory), adapter_name=self._inner[name])
            else:
                peft.load_adapter(str(directory), adapter_name=self._inner[name])
        self._layers = peft.base_model
        self._layers.disable_adapter_layers()
        self._used: tuple[str, ...] = ()
        self._masks_T: dict[str, torch.Tensor] = {}
        self._head_rows_R: torch.Tensor | None = None
        self._hook_layers(model.get_output_embeddings())

    def use(self, spans: Sequence[tuple[str | None, int]], head_rows: Sequence[int] | None = None) -> None:
        """Say whose tokens the next forward pass computes.

        Args:
            spans: for each request in the order of its tokens, its adapter's name (None: the plain model) and
                how many tokens it has.
            head_rows: positions, among all tokens, of those that reach the output layer; None: all of them.
        """
        used = tuple(sorted({name for name, _ in spans if name is not None}))
        if used != self._used:
            if used:
                self._layers.set_adapter([self._inner[name] for name in used], inference_mode=True)
                self._layers.enable_adapter_layers()
            else:
                self._layers.disable_adapter_layers()
            self._used = used
        mixed = len({name for name, _ in spans}) > 1
        self._masks_T = {self._inner[name]: _mask(spans, name) for name in used} if mixed else {}
        self._head_rows_R = torch.tensor(head_rows) if mixed and head_rows is not None else None

    def _hook_layers(self, head: Any) -> None:
        for name, layer in self._layers.named_modules():
            if not isinstance(layer, LoraLayer):
                continue
            if not isinstance(layer, Linear) or any(each.bias is not None for each in layer.lora_B.values()):
                raise ValueError(
                    f"the adapter's layer '{name}' ({type(layer).__name__}) is no plain LoRA of a linear "
                    "layer; export the adapter merged into its base"
                )
            for inner, module in layer.lora_B.items():
                module.register_forward_pre_hook(self._masking(inner, layer is head))

    def _masking(self, inner: str, is_head: bool) -> Any:
        def mask(module: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
            mask_T = self._masks_T.get(inner)
            if mask_T is None:
                return None
            if is_head and self._head_rows_R is not None:
                mask_T = mask_T[self._head_rows_R]
            (hidden,) = inputs
            return (hidden * mask_T.to(hidden).reshape(*hidden.shape[:-1], 1),)

        return mask


def _mask(spans: Sequence[tuple[str | None, int]], name: str) -> torch.Tensor:
    return torch.tensor([float(owner == name) for owner, count in spans for _ in range(count)])
