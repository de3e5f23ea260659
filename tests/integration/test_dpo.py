"""The dpo stage on the two-layer model: reference, margins, files."""

from __future__ import annotations

import inspect
import json
import math
import re

import pytest
import torch
from trl import DPOTrainer

from posttrain.errors import UserError
from tests.integration.conftest import file_names, load_adapter, make_config, read_rows
from train.trainer_args import check
from train.trainer_rules import DPO_LOSSES, F_DIVERGENCE_LOSSES


@pytest.fixture(scope="module")
def dpo_run(tmp_path_factory, run_stage, tiny_model_dir, preference_data):
    run_dir = tmp_path_factory.mktemp("runs") / "dpo"
    run_stage("dpo", run_dir, model=tiny_model_dir, data=preference_data, trainer={"logging_steps": 1})
    return run_dir


def test_writes_an_adapter_on_the_reference(dpo_run, tiny_model_dir):
    assert file_names(dpo_run / "model") == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    settings = json.loads((dpo_run / "model" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tiny_model_dir.resolve())
    tensors = load_adapter(dpo_run)
    assert all(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)


def test_starts_at_the_reference_and_widens_the_margin(dpo_run):
    rows = [row for row in read_rows(dpo_run) if "loss" in row]
    first, last = rows[0], rows[-1]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6), (
        "policy equals reference before the first update"
    )
    assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-6)
    assert last["rewards/margins"] > 0.1 and last["loss"] < first["loss"]
    assert {"rewards/chosen", "rewards/rejected", "rewards/accuracies"} <= last.keys()


@pytest.mark.parametrize("peft", ["lora", None])
def test_precomputed_reference_gives_the_same_training(
    run_stage, tmp_path, tiny_model_dir, preference_data, peft
):
    losses = []
    settings = {} if peft else {"peft": None}
    for precompute in (False, True):
        run_dir = tmp_path / str(precompute)
        trainer = {
            "max_steps": 3,
            "logging_steps": 1,
            "learning_rate": 1e-3,
            "precompute_ref_log_probs": precompute,
        }
        run_stage("dpo", run_dir, model=tiny_model_dir, data=preference_data, trainer=trainer, **settings)
        losses.append([row["loss"] for row in read_rows(run_dir) if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0][0] == pytest.approx(math.log(2), abs=1e-6)


def test_refuses_an_adapter_as_the_model(run_stage, tmp_path, sft_run, preference_data):
    with pytest.raises(UserError, match=r"(?s)LoRA adapter.*stage: merge"):
        run_stage("dpo", tmp_path / "run", model=sft_run, data=preference_data)


def test_full_training_from_an_adapter_uses_the_merged_model_as_reference(
    run_stage, tmp_path, sft_run, preference_data
):
    trainer = {"max_steps": 2, "logging_steps": 1, "learning_rate": 1e-3}
    run_stage("dpo", tmp_path / "run", model=sft_run, data=preference_data, peft=None, trainer=trainer)
    first = read_rows(tmp_path / "run")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6), (
        "the reference is the adapted model, not its base"
    )
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_leaves_out_and_counts_pairs_that_do_not_fit(
    run_stage, tmp_path, tiny_model_dir, make_rows, write_dataset
):
    rows = make_rows["preference"](16, 0)
    rows[5]["chosen"] = [{"role": "assistant", "content": "very long " * 60}]
    data = write_dataset(tmp_path / "data", "preference", rows, rows[:4])
    metrics = run_stage("dpo", tmp_path / "run", model=tiny_model_dir, data=data, trainer={"max_length": 128})
    assert (metrics["pairs"], metrics["pairs_dropped_too_long"]) == (15, 1)


MIXES = [
    {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]},
    {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    {"loss_type": "sigmoid", "f_divergence_type": "js_divergence"},
    {"loss_type": "sigmoid", "use_weighting": True},
    {"loss_type": "sigmoid", "ld_alpha": 0.5},
]


@pytest.mark.parametrize(
    "block",
    [{"loss_type": loss} for loss in DPO_LOSSES] + MIXES,
    ids=lambda block: "+".join(
        [block["loss_type"]] if isinstance(block["loss_type"], str) else block["loss_type"]
    ),
)
def test_trains_with_every_loss_of_trl(run_stage, tmp_path, tiny_model_dir, preference_data, block):
    trainer = block | {"max_steps": 2, "logging_steps": 1, "learning_rate": 1e-3, "save_steps": 2}
    if block["loss_type"] == "exo_pair":
        trainer["label_smoothing"] = 1e-3
    fields = {"model": tiny_model_dir, "data": preference_data, "trainer": trainer}
    assert check(make_config("dpo", **fields), "w") == []
    metrics = run_stage("dpo", tmp_path / "run", **fields)
    assert metrics["steps"] == 2 and math.isfinite(metrics["eval_loss"])
    assert len([row for row in read_rows(tmp_path / "run") if "loss" in row]) == 2


def test_the_losses_known_here_are_those_of_trl():
    source = inspect.getsource(DPOTrainer)
    assert re.findall(r'if loss_type == "(\w+)"', source) == DPO_LOSSES
    listed = re.search(r"f_divergence_loss_types = \{([^}]*)\}", source).group(1)
    assert set(re.findall(r"\w+", listed)) == set(F_DIVERGENCE_LOSSES)
