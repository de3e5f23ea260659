"""The orpo and cpo stages on the two-layer model: TRL's experimental trainers on the pairs of dpo."""

from __future__ import annotations

import json
import math

import pytest

from data_prep.dataset import read_split
from posttrain.models import load_tokenizer
from tests.integration.conftest import file_names, load_adapter, read_rows
from train import reference_free
from train.encode import encode_pairs
from train.finish import train_and_save

BLOCKS = [
    ("orpo", {}),
    ("cpo", {}),
    ("cpo", {"loss_type": "simpo", "cpo_alpha": 0.0}),
    ("cpo", {"loss_type": "alphapo", "alpha": 0.25}),
]


@pytest.mark.parametrize(("kind", "block"), BLOCKS, ids=["orpo", "cpo", "simpo", "alphapo"])
def test_trains_and_writes_an_adapter(
    kind, block, run_stage, tmp_path, tiny_model_dir, preference_data, monkeypatch
):
    seen = []

    def look(trainer, *arguments):
        seen.append(trainer)
        return train_and_save(trainer, *arguments)

    monkeypatch.setattr(reference_free, "train_and_save", look)
    run_dir = tmp_path / "run"
    metrics = run_stage(
        kind, run_dir, model=tiny_model_dir, data=preference_data, trainer={"logging_steps": 1} | block
    )
    assert file_names(run_dir / "model") == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    settings = json.loads((run_dir / "model" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tiny_model_dir.resolve())
    assert all(tensor.any() for name, tensor in load_adapter(run_dir).items() if "lora_B" in name)
    rows = [row for row in read_rows(run_dir) if "loss" in row]
    assert len(rows) == 6 and rows[-1]["loss"] < rows[0]["loss"]
    assert (metrics["pairs"], metrics["pairs_dropped_too_long"]) == (48, 0)
    assert math.isfinite(metrics["eval_loss"])

    made = [(row["chosen_input_ids"], row["rejected_input_ids"]) for row in seen[0].train_dataset]
    pairs = read_split(preference_data, "train", "preference").to_list()
    assert made == encode_pairs(load_tokenizer(tiny_model_dir), pairs), "the tokens that dpo and reward see"
