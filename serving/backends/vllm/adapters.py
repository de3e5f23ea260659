"""The adapters of a served model: all of them in memory, at most one of them in use at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel


class Adapters:
    """LoRA adapters on one model, changed in place: after `use(name)` the model computes with that adapter.

    The weights stay unmerged, so switching costs no arithmetic and leaves nothing behind.
    """

    def __init__(self, model: Any, directories: Mapping[str, Path]) -> None:
        """Load a PEFT directory for each name; afterwards the plain model is in use."""
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
        self._used: str | None = None

    def use(self, name: str | None) -> None:
        """Compute with the adapter `name` from now on, or with the plain model."""
        if name == self._used:
            return
        if name is None:
            self._layers.disable_adapter_layers()
        else:
            self._layers.set_adapter(self._inner[name])
            self._layers.enable_adapter_layers()
        self._used = name
