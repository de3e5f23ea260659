"""Adapters as one: the sum of their updates, in every form that peft gives a scale or a rank."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from train.concatenate import MATRIX, concatenate, read_part, save_concatenated, saved_parameters


class Net(nn.Module):
    """Two layers of the same names, and a head."""

    def __init__(self) -> None:
        super().__init__()
        pairs = [nn.ModuleDict({"up": nn.Linear(6, 8), "down": nn.Linear(8, 6)}) for _ in range(2)]
        self.body = nn.ModuleDict({"layers": nn.ModuleList(pairs)})
        self.head = nn.Linear(6, 3)

    def forward(self, x_BI: torch.Tensor) -> torch.Tensor:
        for layer in self.body["layers"]:
            x_BI = layer["down"](layer["up"](x_BI))
        return self.head(x_BI)


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def updates(model: PeftModel) -> dict[str, torch.Tensor]:
    """Weights of the merged model less those of the plain one."""
    merged, plain = model.merge_and_unload().state_dict(), net().state_dict()
    return {name: merged[name] - plain[name] for name in plain}


def adapter(folder, seed, **settings):
    torch.manual_seed(seed)
    model = get_peft_model(net(), LoraConfig(init_lora_weights=False, **settings))
    model.save_pretrained(str(folder))
    return updates(model)


def assert_sum(tmp_path, first, second, weight=1.0):
    """The directory `a` with `b` added computes the sum of both."""
    left, right = adapter(tmp_path / "a", 1, **first), adapter(tmp_path / "b", 2, **second)
    save_concatenated(tmp_path / "a", [read_part(tmp_path / "b", weight)])
    both = updates(PeftModel.from_pretrained(net(), tmp_path / "a"))
    for name in both:
        assert torch.allclose(both[name], left[name] + weight * right[name], atol=1e-6), name
    return read_part(tmp_path / "a")


def test_scales_that_differ(tmp_path):
    first = {"r": 2, "lora_alpha": 16, "use_rslora": True, "target_modules": ["up", "down"]}
    second = {"r": 3, "lora_alpha": 5, "target_modules": ["up", "down"]}
    part = assert_sum(tmp_path, first, second, weight=-0.5)
    assert (part.config.r, part.config.lora_alpha, part.config.use_rslora) == (5, 5, False)
    assert part.config.target_modules == {"up", "down"} and not part.config.rank_pattern


def test_modules_that_differ(tmp_path):
    first = {
        "r": 2,
        "target_modules": ["up", "down"],
        "rank_pattern": {"down": 3},
        "alpha_pattern": {"up": 7},
    }
    part = assert_sum(tmp_path, first, {"r": 4, "target_modules": ["up", "head"]})
    ranks = {name: part.tensors[pair[0]].shape[0] for name, pair in part.matrices().items()}
    assert ranks == {
        "body.layers.0.up": 6,
        "body.layers.1.up": 6,
        "body.layers.0.down": 3,
        "body.layers.1.down": 3,
        "head": 4,
    }


def test_layers_that_differ(tmp_path):
    """The combination names its modules one by one: names alone would adapt both layers."""
    first = {"r": 2, "target_modules": ["up"], "layers_to_transform": [1]}
    part = assert_sum(tmp_path, first, {"r": 2, "target_modules": ["down"], "layers_to_transform": [0]})
    assert part.config.target_modules == {"body.layers.1.up", "body.layers.0.down"}


def test_what_is_no_lora_matrix_is_that_of_the_first(tmp_path):
    adapter(tmp_path / "a", 1, target_modules=["up"], modules_to_save=["head"])
    adapter(tmp_path / "b", 2, target_modules=["up"])
    own = read_part(tmp_path / "a")
    tensors, _ = concatenate([own, read_part(tmp_path / "b")])
    assert torch.equal(tensors["base_model.model.head.weight"], own.tensors["base_model.model.head.weight"])


def test_counts_what_is_saved(tmp_path):
    adapter(tmp_path / "a", 1, r=2, target_modules=["up"])
    assert saved_parameters(tmp_path / "a") == 2 * (2 * 6 + 8 * 2)


@pytest.mark.parametrize(
    ("name", "adds_up"),
    [
        ("base_model.model.model.layers.0.q_proj.lora_A.weight", True),
        ("base_model.model.model.embed_tokens.lora_embedding_B", True),
        ("base_model.model.model.layers.0.q_proj.lora_B.bias", False),
        ("base_model.model.model.layers.0.q_proj.lora_magnitude_vector", False),
        ("base_model.model.score.weight", False),
    ],
)
def test_a_bias_of_b_is_no_matrix(name, adds_up):
    assert bool(MATRIX.search(name)) == adds_up
