"""Several LoRA adapters as one, exactly: a sum of w_i s_i B_i A_i is [B_1 | B_2] [w_1 s_1 A_1; w_2 s_2 A_].

It is what a stage saves that trained on something else than the base model on disk: on an adapter folded into
it (``peft.start: stack``), or on what PiSSA left of it. For PiSSA (Meng et al. 2024, 2404.02948, appendix C)
W_res + s B A - W = s B A - s B_0 A_0, so that the initial adapter enters with weight -1.

peft has both as methods of a model in memory (``add_weighted_adapter`` with ``cat``, ``save_pretrained`` with
``path_initial_model_for_weight_conversion``). Neither is used, because the first keeps ``use_rslora`` of the
first adapter, which scales the result by sqrt(r), and the second drops ``modules_to_save`` and refuses rslora
together with rank patterns.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

ADAPTER_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
MATRIX = re.compile(r"\.lora_[AB]\.(\w+\.)?weight$|\.lora_embedding_[AB]")
"""Names of what `concatenate` adds up; a bias of B (peft's lora_bias) is not among them."""
_A_AND_B = ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B"))
_WHICH_LAYERS = ("layers_to_transform", "layers_pattern", "exclude_modules")


@dataclass(frozen=True)
class Part:
    """One adapter of a sum. tensors: under the names of an adapter file; weight: its factor."""

    tensors: dict[str, Tensor]
    config: LoraConfig
    weight: float = 1.0

    def matrices(self) -> dict[str, tuple[str, str]]:
        """Module name -> the names of its A [r, in] and B [out, r]."""
        found = {}
        for suffix_a, suffix_b in _A_AND_B:
            for name in self.tensors:
                if name.endswith(suffix_a):
                    stem = name.removesuffix(suffix_a)
                    found[stem.removeprefix(_PREFIX)] = (name, stem + suffix_b)
        return found

    def scaling(self, module: str, rank: int) -> float:
        """alpha / r of a module, or alpha / sqrt(r) with rslora, as peft looks alpha up."""
        patterns = self.config.alpha_pattern or {}
        alpha = patterns.get(get_pattern_key(list(patterns), module), self.config.lora_alpha)
        return alpha / (math.sqrt(rank) if self.config.use_rslora else rank)


def read_part(folder: Path, weight: float = 1.0) -> Part:
    """The LoRA adapter in a directory."""
    config = PeftConfig.from_pretrained(str(folder))
    assert isinstance(config, LoraConfig)
    return Part(load_file(folder / ADAPTER_FILE), config, weight)


def concatenate(parts: Sequence[Part]) -> tuple[dict[str, Tensor], LoraConfig]:
    """Tensors and settings of the one adapter that computes the weighted sum of `parts`.

    The sum is over A and B matrices; all else (biases, modules_to_save) is that of the first part.
    """
    tensors = {name: tensor for name, tensor in parts[0].tensors.items() if "lora_" not in name}
    ranks: dict[str, int] = {}
    names = {module: pair for part in parts for module, pair in part.matrices().items()}
    for module, (name_a, name_b) in names.items():
        rows, columns = [], []
        for part in parts:
            if name_a in part.tensors:
                a_RI, b_OR = part.tensors[name_a], part.tensors[name_b]
                factor = part.weight * part.scaling(module, a_RI.shape[0])
                rows.append((a_RI.float() * factor).to(a_RI.dtype))
                columns.append(b_OR)
        tensors[name_a], tensors[name_b] = torch.cat(rows, dim=0), torch.cat(columns, dim=1)
        ranks[module] = tensors[name_a].shape[0]
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {module: count for module, count in ranks.items() if count != rank}
    settings = replace(
        parts[0].config,
        r=rank,
        lora_alpha=rank,  # the scale is in A
        rank_pattern=others,
        alpha_pattern=dict(others),
        use_rslora=False,
        init_lora_weights=True,
        **_targets(parts, list(names)),
    )
    return tensors, settings


def _targets(parts: Sequence[Part], modules: list[str]) -> dict[str, Any]:
    """Settings that choose exactly `modules`: names shared by layers where that can be, else one by one."""
    configs = [part.config for part in parts]
    alike = all(len({_plain(vars(config)[name]) for config in configs}) == 1 for name in _WHICH_LAYERS)
    targets = [config.target_modules for config in configs]
    if alike and all(isinstance(target, (set, list)) for target in targets):
        return {"target_modules": {name for target in targets for name in target or ()}}
    return {"target_modules": set(modules), **dict.fromkeys(_WHICH_LAYERS)}


def _plain(value: object) -> object:
    return tuple(sorted(value)) if isinstance(value, (set, list)) else value


def save_concatenated(folder: Path, others: Sequence[Part]) -> None:
    """Replace the adapter in `folder` by its sum with `others`."""
    own = read_part(folder)
    tensors, settings = concatenate([own, *others])
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / ADAPTER_FILE, metadata={"format": "pt"})
    settings.save_pretrained(str(folder))


def saved_parameters(folder: Path) -> int:
    """How many numbers the adapter in `folder` holds; only headers are read."""
    with safe_open(folder / ADAPTER_FILE, framework="pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
