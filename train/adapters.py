"""What a stage starts training from: a model in full, a new adapter, an adapter given, or one on top of it.

The saved adapter names the model directory that it fits. Where training is on something else (an adapter
folded into the base, or what PiSSA leaves of it), `Start.others` holds the adapters whose sum with the
trained one fits that directory (``train/concatenate.py``).

The reference of dpo, kto, grpo and rloo is the policy before the first step, however it starts. new and
stack: TRL switches the adapter off, which leaves the model given, or the base with the adapter given folded
into it. continue, and pissa and olora: TRL is handed a PeftModel and keeps a frozen copy of its adapter,
named ref.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from posttrain.errors import UserError
from posttrain.hashing import adapter_base
from posttrain.models import adapter_weight_names, is_adapter, load_causal_lm
from train.concatenate import MATRIX, Part, read_part
from train.config import DpoConfig, KtoConfig, RewardConfig, TrainingStageConfig
from train.online_config import GrpoConfig, RlooConfig
from train.peft_config import START_FIELDS, AdapterSettings, PeftSettings
from train.quantized import loading_options, prepare, require_bitsandbytes

INITIAL = "initial_adapter.safetensors"
"""In the checkpoints directory: A and B as PiSSA or OLoRA drew them, which a resumed run starts from too."""


@dataclass(frozen=True)
class Start:
    """model: as the trainer takes it. lora: the adapter that the trainer puts on it, None where it has one
    already or trains every weight. others: what is added to the trained adapter when it is saved.
    loraplus_lr_ratio: see AdapterSettings.
    """

    model: Any
    lora: LoraConfig | None = None
    others: tuple[Part, ...] = ()
    loraplus_lr_ratio: float | None = None
    quantization: str | None = None

    @property
    def facts(self) -> dict[str, str]:
        """What the run's metrics say about it."""
        return {} if self.quantization is None else {"quantization": self.quantization}


def lora_config(settings: PeftSettings | None, task: TaskType) -> LoraConfig | None:
    """peft's LoraConfig for a task; for SEQ_CLS the head ``score`` is always trained and saved."""
    if settings is None:
        return None
    fields = PeftSettings.model_fields
    values = {name: value for name, value in dict(settings).items() if name in fields}
    if task == TaskType.SEQ_CLS:
        values["modules_to_save"] = sorted({*(settings.modules_to_save or []), "score"})
    return LoraConfig(task_type=task, **values)


def load_policy(path: Path, config: TrainingStageConfig, checkpoints: Path) -> Start:
    """The causal language model to train, in training precision. `path`: a model or an adapter directory.

    With ``peft: null`` an adapter directory is merged in memory, and every weight of the result is trained.

    Raises:
        UserError: see `check_start` and `require_bitsandbytes`.
    """
    if config.peft is None:
        if is_adapter(path):
            return Start(load_causal_lm(path, dtype=config.dtype).requires_grad_(True))
        return Start(load_base(AutoModelForCausalLM, path, config))
    check_start(path, config, TaskType.CAUSAL_LM)
    base = load_base(AutoModelForCausalLM, adapter_base(path) if is_adapter(path) else path, config)
    return adapt(base, path, config, TaskType.CAUSAL_LM, checkpoints)


def load_reference(path: Path, config: TrainingStageConfig) -> PreTrainedModel | None:
    """The frozen second copy that a loss with a reference needs; None where there is one without it.

    With LoRA there is (see above); with ``trainer.precompute_ref_log_probs`` its log-probabilities are
    computed once, before the first step.
    """
    if config.peft is not None or config.trainer.get("precompute_ref_log_probs", False):
        return None
    model: PreTrainedModel = load_policy(path, config, Path()).model
    return model


def load_base(auto: Any, path: Path, config: TrainingStageConfig, **options: Any) -> PreTrainedModel:
    """The model in `path` by a class of transformers, quantised if `config` says so."""
    if config.attn_implementation:
        options["attn_implementation"] = config.attn_implementation
    if config.quantization is not None:
        require_bitsandbytes(config.quantization)
        options |= loading_options(config.quantization)
    model: PreTrainedModel = auto.from_pretrained(path.resolve(), dtype=torch_dtype(config.dtype), **options)
    return model if config.quantization is None else prepare(model)


def adapt(
    base: PreTrainedModel, path: Path, config: TrainingStageConfig, task: TaskType, checkpoints: Path
) -> Start:
    """`base` with the adapter that `config` asks for, given in `path` or to be put on by the trainer."""
    settings = config.peft
    assert settings is not None
    ratio = settings.loraplus_lr_ratio
    quantization = None if config.quantization is None else config.quantization.name
    if settings.start == "continue":
        model = PeftModel.from_pretrained(base, path, is_trainable=True)
        model.peft_config["default"].base_model_name_or_path = base.name_or_path
        return Start(model, None, (), ratio, quantization)
    others: tuple[Part, ...] = ()
    if settings.start == "stack":
        base = PeftModel.from_pretrained(base, path).merge_and_unload(safe_merge=True)
        others = (read_part(path),)
    lora = lora_config(settings, task)
    assert lora is not None
    if not settings.changes_base:
        return Start(base, lora, others, ratio, quantization)
    with torch.random.fork_rng():  # randomised SVD draws; the same in a run that is resumed
        torch.manual_seed(config.seed)
        model, initial = initialise(base, lora, checkpoints / INITIAL)
    return Start(model, None, (*others, initial), ratio, quantization)


def initialise(base: PreTrainedModel, lora: LoraConfig, store: Path) -> tuple[PeftModel, Part]:
    """A PeftModel whose adapter took something out of the base weights, and that adapter with weight -1.

    A and B are kept in `store`: a singular vector may come out with another sign on another machine, and a
    run that resumes must take the same out of the base.
    """
    wanted = lora.init_lora_weights
    settings: Any
    if wanted == "olora" and any(isinstance(module, Conv1D) for module in base.modules()):
        raise UserError(
            "peft.init_lora_weights: peft's olora does not know the transposed layers (Conv1D) of this "
            "model; use pissa"
        )
    if store.exists():
        lora.init_lora_weights = True
        model = get_peft_model(base, lora)
        assert isinstance(model, PeftModel)
        settings = model.peft_config["default"]
        _take_out(model, load_file(store))
    else:
        model = get_peft_model(base, lora)
        assert isinstance(model, PeftModel)
        settings = model.peft_config["default"]
        settings.init_lora_weights = True  # else the copy for the reference would be taken out once more
        tensors = {name: tensor.contiguous() for name, tensor in _matrices(model).items()}
        store.parent.mkdir(parents=True, exist_ok=True)
        partial = store.with_suffix(".partial")
        save_file(tensors, partial, metadata={"format": "pt", "init_lora_weights": str(wanted)})
        partial.replace(store)
    initial = {name: tensor.detach().cpu().clone() for name, tensor in _matrices(model).items()}
    return model, Part(initial, settings, -1.0)


def _matrices(model: PeftModel) -> dict[str, Tensor]:
    state: dict[str, Tensor] = get_peft_model_state_dict(model)
    return {name: tensor for name, tensor in state.items() if "lora_" in name}


def _take_out(model: PeftModel, tensors: dict[str, Tensor]) -> None:
    """Set A and B and subtract s B A from the base weights, in the arithmetic of peft's pissa_init."""
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or f"{name}.lora_A.weight" not in tensors:
            continue
        a_RI, b_OR = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
        for matrices, tensor in ((layer.lora_A, a_RI), (layer.lora_B, b_OR)):
            matrices["default"].get_parameter("weight").data.copy_(tensor)
        base: Any = layer.get_base_layer()
        weight, turned = base.weight, isinstance(base, Conv1D)
        update = layer.scaling["default"] * b_OR @ a_RI
        whole = weight.data.float().T if turned else weight.data.float()
        rest = (whole - update).to(weight.dtype)
        weight.data = rest.T if turned else rest


def check_start(path: Path, config: TrainingStageConfig, task: TaskType) -> None:
    """Raise UserError where `path` cannot be what ``peft.start`` makes of it. No weight is loaded."""
    settings = config.peft
    assert settings is not None
    if settings.start == "new":
        refuse_adapter(path, config.model)
        return
    if not is_adapter(path):
        raise UserError(
            f"peft.start: {settings.start} needs an adapter directory, and model {config.model} is a full "
            "model\n    remove peft.start to train a new adapter on it"
        )
    given = PeftConfig.from_pretrained(str(path))
    if not isinstance(given, LoraConfig) or given.task_type != task:
        raise UserError(
            f"peft.start: {settings.start} takes a LORA adapter of task {task.value} here, model "
            f"{config.model} is a {given.peft_type.value} adapter of task {given.task_type}\n"
            "    name another adapter"
        )
    if settings.start == "stack":
        _check_stackable(path, config.model)
    else:
        _check_continued(settings, given, config)


def has_reference(config: TrainingStageConfig) -> bool:
    """Whether the stage compares the policy with what it was."""
    if isinstance(config, GrpoConfig):  # TRL's default is 0
        return bool(config.trainer.get("beta", 0.0))
    return isinstance(config, (DpoConfig, KtoConfig, RlooConfig))


def refuse_adapter(path: Path, ref: str) -> None:
    """Raise UserError when `path` is an adapter directory, where a full model is needed."""
    if is_adapter(path):
        raise UserError(
            f"model: {ref} is a LoRA adapter. What is trained on top of it would name a base model that "
            "exists nowhere\n    set peft.start to continue (train it further) or to stack (a new adapter on "
            "it), or merge it first (stage: merge, model: that run) and start from the merged model"
        )


def _check_stackable(path: Path, ref: str) -> None:
    more = [name for name in adapter_weight_names(path) if not MATRIX.search(name)]
    if more:
        raise UserError(
            f"peft.start: stack saves the adapter {ref} and a new one as one, which holds for LoRA matrices "
            f"only, and it has {len(more)} other tensors ({more[0]})\n    merge it first (stage: merge) and "
            "use start: new, or use start: continue"
        )


def _check_continued(settings: AdapterSettings, given: LoraConfig, config: TrainingStageConfig) -> None:
    differing = []
    for name in sorted(settings.model_fields_set - {*START_FIELDS}):
        asked, has = vars(settings)[name], vars(given)[name]
        if name == "modules_to_save" and isinstance(config, RewardConfig):
            asked, has = {*(asked or []), "score"}, set(has or [])
        if name == "target_modules" and asked == "all-linear":
            continue  # peft saves the names that it stood for
        if isinstance(has, (set, list)) and asked is not None:
            asked, has = sorted(asked), sorted(has)
        if (asked or None) != (has or None):
            differing.append(f"{name} {asked} (the adapter has {has})")
    if differing:
        raise UserError(
            f"peft.start: continue trains the adapter {config.model} as it is, but peft asks for "
            f"{'; '.join(differing)}\n    remove that, or use start: stack"
        )
    if given.bias != "none" and has_reference(config):
        raise UserError(
            f"model: the adapter {config.model} has trained biases ({given.bias}), which are part of the "
            "base; the reference would move with them\n    merge it first (stage: merge) and use start: new"
        )
    targets = given.target_modules or ()
    if not isinstance(config, RewardConfig) and not isinstance(targets, str) and "lm_head" in targets:
        raise UserError(
            f"model: the adapter {config.model} adapts lm_head, whose weight TRL's loss reads directly\n"
            "    merge it first (stage: merge) and use start: new"
        )


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a configuration's ``dtype``."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
