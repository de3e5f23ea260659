"""Several adapters of one base in one server: what may be served so, and the files that say it.

    1/weights/                   the base model, plain
    1/adapters/<name>/           adapter_config.json, adapter_model.safetensors
    1/multi_lora.json            {name: path as the server sees it}
    1/model.json                 enable_lora, max_loras, max_lora_rank

vLLM takes LoRA in its plain form only, and one largest rank for all of them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain.errors import UserError
from posttrain.hashing import adapter_base, hash_path
from posttrain.models import is_adapter
from serving.repository import ADAPTERS

MULTI_LORA = "multi_lora.json"
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM takes for max_lora_rank (vllm.config.lora.MaxLoRARanks)."""
_FILES = ("adapter_config.json", "adapter_model.safetensors")


def check_adapters(base: Path, base_hash: str, adapters: Mapping[str, Path]) -> int:
    """The smallest max_lora_rank that holds all adapters.

    Raises UserError when `base` is itself an adapter, or one of `adapters` was not trained on it or is not of
    a kind that a server applies unmerged.
    """
    if is_adapter(base):
        raise UserError(f"model: {base} is an adapter; with `adapters`, name their base model")
    ranks = [_check_adapter(name, path, base, base_hash) for name, path in adapters.items()]
    return next(rank for rank in LORA_RANKS if rank >= max(ranks))


def _check_adapter(name: str, path: Path, base: Path, base_hash: str) -> int:
    where = f"adapters.{name}: {path}"
    if not is_adapter(path):
        raise UserError(f"{where}: is no adapter (no adapter_config.json)")
    settings = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    trained_on = adapter_base(path)
    if trained_on.resolve() != base.resolve() and hash_path(trained_on) != base_hash:
        raise UserError(
            f"{where}: was trained on {trained_on}, which is not the model {base}\n"
            "    name the base that all adapters were trained on"
        )
    obstacles = {
        f"peft_type {settings.get('peft_type')}": settings.get("peft_type") != "LORA",
        "use_dora": settings.get("use_dora"),
        "lora_bias": settings.get("lora_bias"),
        "modules_to_save": settings.get("modules_to_save"),
        "trainable_token_indices": settings.get("trainable_token_indices"),
        f"bias {settings.get('bias')}": settings.get("bias", "none") != "none",
        "no adapter_model.safetensors": not (path / "adapter_model.safetensors").is_file(),
    }
    found = [what for what, there in obstacles.items() if there]
    rank = max([settings.get("r", 0), *(settings.get("rank_pattern") or {}).values()])
    if rank > LORA_RANKS[-1]:
        found.append(f"rank {rank}, more than {LORA_RANKS[-1]}")
    if found:
        raise UserError(
            f"{where}: cannot be served unmerged ({', '.join(found)})\n"
            "    export it by itself: as `model` it is merged into its base"
        )
    return int(rank)


def write_adapters(version_dir: Path, adapters: Mapping[str, Path], mount: str) -> None:
    """Copy the adapters and write multi_lora.json.

    mount: the version folder as the server sees it, with a final slash, or "" for relative paths.
    """
    for name, path in adapters.items():
        target = version_dir / ADAPTERS / name
        target.mkdir(parents=True)
        for file in _FILES:
            shutil.copyfile(path / file, target / file)
        config = target / "adapter_config.json"
        settings: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
        settings.update(base_model_name_or_path=f"{mount}weights", inference_mode=True)
        config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    paths = {name: f"{mount}{ADAPTERS}/{name}" for name in adapters}
    (version_dir / MULTI_LORA).write_text(json.dumps(paths, indent=2) + "\n", encoding="utf-8")
