"""The pretrain stage on the two-layer model: windows, loss on every token, files."""

from __future__ import annotations

import json

import pytest
import torch

from data_prep.dataset import read_split
from posttrain.errors import DataError
from posttrain.models import load_tokenizer
from tests.integration.conftest import file_names, load_adapter, read_rows
from train import pretrain
from train.finish import train_and_save


def test_trains_on_every_token_and_writes_an_adapter(
    run_stage, tmp_path, tiny_model_dir, text_data, monkeypatch
):
    seen = []

    def look(trainer, *arguments):
        seen.append(trainer)
        return train_and_save(trainer, *arguments)

    monkeypatch.setattr(pretrain, "train_and_save", look)
    trainer = {"max_length": 8, "logging_steps": 1}
    metrics = run_stage("pretrain", tmp_path / "run", model=tiny_model_dir, data=text_data, trainer=trainer)
    assert file_names(tmp_path / "run" / "model") == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    tensors = load_adapter(tmp_path / "run")
    assert all(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)
    rows = [row for row in read_rows(tmp_path / "run") if "loss" in row]
    assert rows[-1]["loss"] < rows[0]["loss"]

    tokenizer = load_tokenizer(tiny_model_dir)
    texts = list(read_split(text_data, "train", "text")["text"])
    windows = list(seen[0].train_dataset["input_ids"])
    assert metrics["documents"] == 48 and metrics["rows"] == len(windows) > 48
    assert max(map(len, windows)) == 8 and min(map(len, windows)) > 1
    joined = tokenizer.decode([token for window in windows for token in window])
    lost = sum(len(tokenizer(text)["input_ids"]) % 8 == 0 for text in texts)
    assert joined.count(tokenizer.eos_token) == 48 - lost, "an end token alone in its window has no loss"
    assert joined.replace(tokenizer.eos_token, "") == "".join(texts)
    batch = next(iter(seen[0].get_train_dataloader()))
    assert torch.equal(batch["labels"] != -100, batch["input_ids"] != tokenizer.pad_token_id)


def test_packing_keeps_all_tokens(run_stage, tmp_path, tiny_model_dir, text_data):
    trainer = {"max_length": 64, "packing": True, "max_steps": 2, "save_steps": 2}
    run_stage("pretrain", tmp_path / "run", model=tiny_model_dir, data=text_data, trainer=trainer, peft=None)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["status"] == "complete"
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_refuses_conversations(run_stage, tmp_path, tiny_model_dir, conversation_data):
    with pytest.raises(DataError, match="text rows are needed"):
        run_stage("pretrain", tmp_path / "run", preflight=False, model=tiny_model_dir, data=conversation_data)
