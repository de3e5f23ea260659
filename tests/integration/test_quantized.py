"""Adapters trained on a quantised base (QLoRA), on a GPU or a CPU; skipped where bitsandbytes is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from posttrain.models import load_causal_lm, load_reward_model
from tests.integration.conftest import load_adapter, read_rows
from train import finish
from train.adapters import load_base
from train.config import SftConfig
from train.peft_config import QuantizationSettings
from train.quantized import require_bitsandbytes

INSTALLED = importlib.util.find_spec("bitsandbytes") is not None
needs_bitsandbytes = pytest.mark.skipif(not INSTALLED, reason="bitsandbytes is not installed")
NF4 = {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"}
STEPS = {"max_steps": 4, "logging_steps": 1, "save_steps": 2}


@pytest.fixture
def wide_model_dir(tmp_path, tiny_tokenizer):
    """One Llama layer of width 64: bitsandbytes quantises blocks of 64."""
    from transformers import LlamaForCausalLM

    from tests.conftest import llama_config

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    LlamaForCausalLM(llama_config(tiny_tokenizer, **sizes)).save_pretrained(tmp_path / "wide")
    tiny_tokenizer.save_pretrained(tmp_path / "wide")
    return tmp_path / "wide"


@pytest.fixture
def models(monkeypatch) -> list[Any]:
    """The models that were trained, as the trainer held them."""
    seen = []
    fit = finish.fit

    def watched(trainer: Any, *arguments: Any, **options: Any) -> Any:
        seen.append(trainer.model)
        return fit(trainer, *arguments, **options)

    monkeypatch.setattr(finish, "fit", watched)
    return seen


def weight_type(model: Any) -> torch.dtype:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return base.model.layers[0].mlp.up_proj.weight.dtype


@needs_bitsandbytes
@pytest.mark.parametrize(
    ("quantization", "stored"), [(NF4, torch.uint8), ({"load_in_8bit": True}, torch.int8)]
)
def test_trains_an_adapter_on_a_quantised_base(
    quantization, stored, run_stage, tmp_path, models, wide_model_dir, conversation_data
):
    fields = {"model": wide_model_dir, "data": conversation_data, "trainer": STEPS}
    metrics = run_stage("sft", tmp_path / "run", quantization=quantization, **fields)
    assert weight_type(models[0]) == stored
    assert metrics["quantization"] == {torch.uint8: "4-bit nf4", torch.int8: "8-bit"}[stored]
    losses = [row["loss"] for row in read_rows(tmp_path / "run") if "loss" in row]
    assert losses[-1] < losses[0]
    settings = json.loads((tmp_path / "run" / "model" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(wide_model_dir.resolve())
    assert not (tmp_path / "run" / "model" / "config.json").exists()
    assert all(tensor.any() for name, tensor in load_adapter(tmp_path / "run").items() if "lora_B" in name)


@needs_bitsandbytes
def test_the_reference_of_a_continued_adapter_is_what_it_was(
    run_stage, tmp_path, models, wide_model_dir, conversation_data, preference_data
):
    fields = {"quantization": NF4, "trainer": STEPS}
    run_stage("sft", tmp_path / "sft", model=wide_model_dir, data=conversation_data, **fields)
    peft = {"start": "continue"}
    run_stage("dpo", tmp_path / "dpo", model=tmp_path / "sft", data=preference_data, peft=peft, **fields)
    assert read_rows(tmp_path / "dpo")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert {p.dtype for n, p in models[-1].named_parameters() if ".ref." in n} == {torch.bfloat16}
    assert weight_type(models[-1]) == torch.uint8


@needs_bitsandbytes
def test_a_reward_model_keeps_its_head_in_full(run_stage, tmp_path, wide_model_dir, preference_data):
    fields = {"quantization": NF4, "trainer": STEPS | {"bf16": True}}
    run_stage("reward", tmp_path / "run", model=wide_model_dir, data=preference_data, **fields)
    model, _ = load_reward_model(tmp_path / "run" / "model")
    assert model.score.weight.shape == (1, 64)


@needs_bitsandbytes
def test_is_merged_into_the_model_as_it_is_on_disk(run_stage, tmp_path, wide_model_dir, conversation_data):
    fields = {"model": wide_model_dir, "data": conversation_data, "trainer": STEPS}
    run_stage("sft", tmp_path / "run", quantization=NF4, **fields)
    metrics = run_stage("merge", tmp_path / "merged", model=tmp_path / "run")
    assert metrics["trained_on"] == "4-bit nf4"
    merged, base = load_causal_lm(tmp_path / "merged" / "model"), load_causal_lm(wide_model_dir)
    assert torch.equal(merged.model.embed_tokens.weight, base.model.embed_tokens.weight)
    assert merged.model.layers[0].mlp.up_proj.weight.dtype == torch.float32


@needs_bitsandbytes
def test_only_linear_layers_are_quantised(wide_model_dir, conversation_data):
    config = SftConfig(model="m", data="d", quantization=QuantizationSettings(**NF4))
    model = load_base(AutoModelForCausalLM, wide_model_dir, config)
    quantised = {name for name, p in model.named_parameters() if p.dtype == torch.uint8}
    assert {name.split(".")[-2] for name in quantised} == {
        f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")
    }
    assert not any(p.requires_grad for p in model.parameters())


def test_without_bitsandbytes_it_is_refused(monkeypatch, refused, tiny_model_dir, conversation_data):
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    fields = {"model": tiny_model_dir, "data": conversation_data, "quantization": {"load_in_4bit": True}}
    said = ("4-bit nf4 needs bitsandbytes", "not installed", "pip install 'posttrain[qlora]'")
    refused("sft", "quantization", *said, **fields)


def test_an_old_bitsandbytes_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.44.1")
    with pytest.raises(ValueError, match=r"needs bitsandbytes 0.45 or newer, this is 0.44.1"):
        require_bitsandbytes(QuantizationSettings(load_in_8bit=True))
