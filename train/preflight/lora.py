"""LoRA: names of modules that match nothing in the model, matched as peft matches them."""

from __future__ import annotations

import difflib

from peft import TaskType
from torch import nn
from transformers.pytorch_utils import Conv1D

from posttrain.preflight import Findings
from train.peft_config import PeftSettings
from train.preflight.models import Size, measure

_ADAPTABLE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention, Conv1D)


def check_lora(settings: PeftSettings, model: nn.Module, task: TaskType, findings: Findings) -> Size | None:
    """The parameters of the run; None, with problems, when a name under `peft` matches no module, or when
    peft cannot adapt what is left. `model` is a skeleton, which is changed.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    before = len(findings.problems)
    for field, names in (
        ("target_modules", settings.target_modules),
        ("exclude_modules", settings.exclude_modules),
        ("modules_to_save", settings.modules_to_save),
    ):
        for name in names if isinstance(names, list) else []:
            found = [key for key in modules if _matches(field, name, key)]
            if not found:
                findings.fail(
                    f"peft.{field}", f"`{name}` matches no module of the model", _near(name, modules)
                )
            elif field == "target_modules":
                _check_type(name, found[0], modules, findings)
    if len(findings.problems) > before:
        return None
    try:
        return measure(model, settings, task)
    except ValueError as error:
        asked = [
            f"{field} {value}"
            for field in ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform")
            if (value := getattr(settings, field)) is not None
        ]
        findings.fail(
            "peft",
            f"peft refuses {', '.join(asked)}: {str(error).splitlines()[0]}",
            "leave linear layers to adapt: exclude fewer modules, name layers that are there (from 0), or "
            "drop the option that peft names",
        )
        return None


def _check_type(name: str, key: str, modules: dict[str, nn.Module], findings: Findings) -> None:
    module = modules[key]
    if not isinstance(module, _ADAPTABLE):
        inside = (other.rpartition(".")[2] for other in modules if other.startswith(f"{key}."))
        findings.fail(
            "peft.target_modules",
            f"`{name}` matches {key}, a {type(module).__name__}, which LoRA cannot adapt",
            f"name the linear layers in it: {', '.join(dict.fromkeys(inside)) or 'it has none'}",
        )


def _matches(field: str, name: str, key: str) -> bool:
    """As peft does: modules_to_save by the end of the name, the others by whole parts of it."""
    return key.endswith(name) if field == "modules_to_save" else key == name or key.endswith(f".{name}")


def _near(name: str, modules: dict[str, nn.Module]) -> str:
    """The remedy: the nearest names, or all names of layers."""
    leaves = sorted({key.rpartition(".")[2] for key in modules if not key.rpartition(".")[2].isdigit()})
    near = difflib.get_close_matches(name.rpartition(".")[2], leaves, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"the model has {', '.join(leaves)}"
