"""QLoRA on a CUDA device: the base is held there in 4 bits, and the adapter learns. Skipped without a GPU."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.stage import execute_stage
from train import finish
from train.config import SftConfig

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("bitsandbytes") is None,
    reason="needs a CUDA device and bitsandbytes",
)


@pytest.mark.parametrize("quantization", [{"load_in_4bit": True}, {"load_in_8bit": True}])
def test_trains_an_adapter_on_a_quantised_base(
    quantization: dict[str, bool],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    tiny_model_dir: Path,
    conversation_data: Path,
) -> None:
    models = []
    fit = finish.fit

    def watched(trainer: Any, *arguments: Any, **options: Any) -> Any:
        models.append(trainer.model)
        return fit(trainer, *arguments, **options)

    monkeypatch.setattr(finish, "fit", watched)
    config = SftConfig.model_validate(
        {
            "model": str(tiny_model_dir),
            "data": str(conversation_data),
            "quantization": quantization,
            "trainer": {"max_steps": 6, "logging_steps": 1, "learning_rate": 1e-2, "bf16": True},
        }
    )
    execute_stage("sft", config, tmp_path / "run")
    weight = models[0].get_base_model().model.layers[0].mlp.up_proj.weight
    assert weight.device.type == "cuda"
    assert weight.dtype == (torch.uint8 if "load_in_4bit" in quantization else torch.int8)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0]
