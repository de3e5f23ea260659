"""Running one training stage on the two-layer model, and reading what it wrote."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CONFIGS = {
    "pretrain": "train.config:PretrainConfig",
    "sft": "train.config:SftConfig",
    "reward": "train.config:RewardConfig",
    "dpo": "train.config:DpoConfig",
    "kto": "train.config:KtoConfig",
    "orpo": "train.config:OrpoConfig",
    "cpo": "train.config:CpoConfig",
    "grpo": "train.online_config:GrpoConfig",
    "rloo": "train.online_config:RlooConfig",
    "merge": "train.config:MergeConfig",
}
TRAINER = {
    "max_steps": 6,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-2,
    "logging_steps": 2,
    "save_steps": 3,
}
PEFT = {"r": 4, "lora_alpha": 8}


def make_config(kind: str, **fields: Any) -> Any:
    """The configuration of a stage. `trainer` is laid over TRAINER, `peft` is PEFT unless given."""
    if kind != "merge":
        fields = {"peft": PEFT} | fields
        fields["trainer"] = TRAINER | fields.get("trainer", {})
    fields = {name: str(value) if isinstance(value, Path) else value for name, value in fields.items()}
    module, name = CONFIGS[kind].split(":")
    return getattr(importlib.import_module(module), name)(**fields)


@pytest.fixture(scope="session")
def run_stage() -> Callable[..., dict[str, Any]]:
    """run_stage(kind, run_dir, **fields) runs the stage for real and returns its metrics."""
    from posttrain.stage import execute_stage

    def run(kind: str, run_dir: Path, **fields: Any) -> dict[str, Any]:
        return execute_stage(kind, make_config(kind, **fields), run_dir).manifest["metrics"]

    return run


def read_rows(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without their times."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "time"} for line in lines]


def file_names(directory: Path) -> set[str]:
    """Relative names of all files under a directory."""
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def load_adapter(run_dir: Path) -> dict[str, Any]:
    """Tensors of the adapter in a run directory's model/."""
    from safetensors.torch import load_file

    return load_file(run_dir / "model" / "adapter_model.safetensors")


@pytest.fixture(scope="session")
def sft_run(
    tmp_path_factory: pytest.TempPathFactory,
    run_stage: Callable[..., dict[str, Any]],
    tiny_model_dir: Path,
    conversation_data: Path,
) -> Path:
    """A finished sft run: a LoRA adapter on the tiny model. Not to be written to."""
    run_dir = tmp_path_factory.mktemp("runs") / "sft"
    run_stage("sft", run_dir, model=tiny_model_dir, data=conversation_data)
    return run_dir


@pytest.fixture(scope="session")
def reward_run(
    tmp_path_factory: pytest.TempPathFactory,
    run_stage: Callable[..., dict[str, Any]],
    tiny_model_dir: Path,
    preference_data: Path,
    conversation_data: Path,
) -> Path:
    """A finished reward run, calibrated. Not to be written to."""
    run_dir = tmp_path_factory.mktemp("runs") / "reward"
    run_stage(
        "reward",
        run_dir,
        model=tiny_model_dir,
        data=preference_data,
        calibration_data=conversation_data,
        trainer={"max_steps": 12},
    )
    return run_dir
