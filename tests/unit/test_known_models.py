"""The architectures that ship with posttrain are the published ones: built, they have as many parameters."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from posttrain.known_models import known_config, known_models

PUBLISHED = {  # parameters of the safetensors files, as the model cards on the Hub count them
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-4B-Base": 4_022_468_096,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
}


def test_every_shipped_architecture_has_a_published_count():
    assert known_models() == sorted(PUBLISHED)


@pytest.mark.parametrize("name", known_models())
def test_it_has_as_many_parameters_as_published(name):
    path = known_config(name)
    assert path is not None
    config = AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]
    assert type(model).__name__ == json.loads(path.read_text())["architectures"][0]


@pytest.mark.parametrize(
    "ref",
    ["Qwen/Qwen3-4B", "Qwen/Qwen3-4B@main", "models/Qwen/Qwen3-4B", "/data/models/Qwen/Qwen3-4B"],
)
def test_a_hub_id_a_revision_and_a_download_of_it_are_known(ref):
    path = known_config(ref)
    assert path is not None
    assert json.loads(path.read_text())["num_hidden_layers"] == 36


@pytest.mark.parametrize("ref", ["Qwen/Qwen3-4", "Qwen3-4B", "other/Qwen3-4B", "runs/tiny/sft", "", "../x"])
def test_what_is_not_among_them_is_not_guessed(ref):
    assert known_config(ref) is None
