"""From the name of a model to its architecture, whether it is there already or still has to be made.

A reference is a run directory, a model directory, a Hub id whose configuration ships with posttrain or is in
the local cache, or the run directory of an earlier stage, whose own `model` is followed until something is
there: sft-merged <- sft <- base, and base states its architecture in its settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from peft import PeftConfig
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig

from posttrain.errors import UserError
from posttrain.known_models import known_config
from posttrain.models import adapter_base, is_adapter
from posttrain.stage_file import StageBlock
from train.base_config import BaseConfig
from train.config import TrainingStageConfig
from train.merge_config import MergeConfig
from train.peft_config import AdapterSettings, PeftSettings
from train.ppo.config import PpoStageConfig

Stages = Mapping[Path, StageBlock]
"""Stages of the pipeline by their absolute run directory."""


@dataclass(frozen=True)
class FoundModel:
    """An architecture. directory: where its files are, None while a stage has yet to make it. adapter: LoRA
    settings where the reference is an adapter; base: what the adapter is on. notes: what was assumed.
    """

    config: PreTrainedConfig
    directory: Path | None
    adapter: PeftSettings | None = None
    base: str = ""
    notes: tuple[str, ...] = ()


def architecture(ref: str) -> PreTrainedConfig | None:
    """The configuration of a directory or a Hub id, from disk alone; None where there is none."""
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(ref, local_files_only=True)
    except (OSError, ValueError):
        return None
    return config


def find_model(ref: str, stages: Stages) -> FoundModel:
    """The architecture behind a reference. Raises UserError when nothing on the way has one."""
    path = Path(ref).expanduser()
    directory = path / "model" if (path / "model").is_dir() else path
    if is_adapter(directory):
        return _adapter(directory)
    if (directory / "config.json").is_file():
        config = architecture(str(directory))
        if config is None:
            raise UserError(f"{directory}: its config.json is not one that transformers knows")
        return FoundModel(config, directory, base=str(directory))
    block = stages.get(path.absolute())
    if block is not None:
        return _to_be_made(block, stages)
    shipped = None if path.exists() else known_config(ref)
    config = None if path.exists() else architecture(ref if shipped is None else str(shipped))
    if config is None:
        raise UserError(
            f"model {ref}: is neither a model directory, nor made by a stage of this file, nor a model whose "
            "architecture ships with posttrain, nor in the local cache of the Hugging Face Hub\n    download "
            "it (hf download), or name a directory that holds config.json"
        )
    return FoundModel(config, None, base=ref)


def _adapter(directory: Path) -> FoundModel:
    base = adapter_base(directory)
    config = architecture(str(base))
    if config is None:
        raise UserError(f"{directory}: its base model {base} has no config.json that transformers knows")
    saved = PeftConfig.from_pretrained(str(directory)).to_dict()
    known = {name: saved[name] for name in ("r", "lora_alpha") if name in saved}
    if saved.get("target_modules"):
        names = saved["target_modules"]
        known["target_modules"] = "all-linear" if isinstance(names, str) else sorted(names)
    return FoundModel(config, directory, PeftSettings(**known), str(base))


def _to_be_made(block: StageBlock, stages: Stages) -> FoundModel:
    settings = block.config
    if isinstance(settings, BaseConfig):
        note = (
            f"{block.name} is not trained yet: its vocabulary is taken as vocab_size {settings.vocab_size:,}"
        )
        notes = (note + ", keep_whole adds to it",) if settings.keep_whole else (note,)
        return FoundModel(base_config(settings), None, base=str(block.run_dir), notes=notes)
    if isinstance(settings, MergeConfig):
        found = find_model(next(iter(settings.refs.values())), stages)
        if settings.output == "adapter":
            return found
        return replace(found, adapter=None, base=str(block.run_dir))
    if isinstance(settings, (TrainingStageConfig, PpoStageConfig)):
        found = find_model(settings.model, stages)
        if settings.peft is None:
            return replace(found, adapter=None, base=str(block.run_dir))
        if found.adapter is not None and not isinstance(settings, PpoStageConfig):
            return replace(found, adapter=trained_adapter(settings.peft, found))
        return replace(found, adapter=settings.peft, base=settings.model)
    raise UserError(f"{block.run_dir}: stage {block.name} ({block.kind}) makes no model")


def trained_adapter(settings: PeftSettings | None, model: FoundModel) -> PeftSettings | None:
    """The LoRA settings of what is trained: with start: continue they are those of the adapter given."""
    if isinstance(settings, AdapterSettings) and settings.start == "continue":
        return model.adapter
    return settings


def base_config(settings: BaseConfig) -> LlamaConfig:
    """The architecture that the base stage builds, its vocabulary as large as asked for."""
    size = settings.architecture
    return LlamaConfig(
        vocab_size=settings.vocab_size, tie_word_embeddings=True, pad_token_id=0, **size.model_dump()
    )
