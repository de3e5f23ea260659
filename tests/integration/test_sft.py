"""The sft stage on the two-layer model: what it writes, what it trains, what it refuses."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from posttrain.errors import DataError, PosttrainError, UserError
from tests.integration.conftest import file_names, load_adapter, read_rows

MODEL_FILES = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
}


def test_writes_a_peft_directory_on_its_base(sft_run, tiny_model_dir):
    assert file_names(sft_run / "model") == MODEL_FILES
    settings = json.loads((sft_run / "model" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tiny_model_dir.resolve())
    assert settings["task_type"] == "CAUSAL_LM"
    assert json.loads((sft_run / "manifest.json").read_text())["status"] == "complete"
    kept = sorted(path.name for path in (sft_run / "checkpoints").iterdir())
    assert kept == ["checkpoint-3", "checkpoint-6"]


def test_trains_the_adapter_and_only_the_adapter(sft_run, tiny_model_dir, tmp_path):
    tensors = load_adapter(sft_run)
    assert len(tensors) == 2 * 2 * 7, "A and B of seven linear layers in each of two layers"
    assert all("lora_" in name for name in tensors)
    assert all(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    before = {name: p.clone() for name, p in base.named_parameters()}
    adapted = PeftModel.from_pretrained(base, sft_run / "model")
    frozen = {n.replace(".base_layer.", "."): p for n, p in adapted.get_base_model().named_parameters()}
    assert all(torch.equal(frozen[name], value) for name, value in before.items())


def test_logs_a_falling_loss_and_a_final_evaluation(sft_run):
    rows = read_rows(sft_run)
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0]
    assert [row["step"] for row in rows if "loss" in row] == [2, 3, 4, 6]
    assert [row["step"] for row in rows if "eval_loss" in row] == [6]
    metrics = json.loads((sft_run / "manifest.json").read_text())["metrics"]
    assert metrics["train_loss"] == losses[-1]
    assert metrics["rows"] == 48 and metrics["rows_dropped_too_long"] == 0
    assert math.isfinite(metrics["eval_loss"])


def test_loss_does_not_depend_on_the_accumulation_split(
    run_stage, tmp_path, tiny_model_dir, conversation_data
):
    whole, split = tmp_path / "whole", tmp_path / "split"
    inputs = {"model": tiny_model_dir, "data": conversation_data}
    run_stage("sft", whole, **inputs, trainer={"max_steps": 3, "logging_steps": 1})
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    run_stage("sft", split, **inputs, trainer={"max_steps": 3, "logging_steps": 1, **parts})
    for a, b in zip(read_rows(whole), read_rows(split), strict=True):
        for name in ("loss", "grad_norm", "eval_loss"):
            if name in a:
                assert a[name] == pytest.approx(b[name], rel=1e-4), (name, a, b)
    left, right = load_adapter(whole), load_adapter(split)
    # Adam divides by the square root of tiny second moments: rounding is amplified, a wrong scale far more.
    assert max((left[name] - right[name]).abs().max().item() for name in left) < 1e-3


def test_packed_dialogues_do_not_see_each_other(
    run_stage, tmp_path, tiny_model_dir, make_rows, write_dataset
):
    rows = make_rows["conversation"](8, 3)
    data = write_dataset(tmp_path / "data", "conversation", rows, rows[:2])
    one_step = {"max_steps": 1, "logging_steps": 1, "max_length": 256}
    losses = {}
    for packing in (False, True):
        run_dir = tmp_path / str(packing)
        run_stage("sft", run_dir, model=tiny_model_dir, data=data, trainer={**one_step, "packing": packing})
        first = read_rows(run_dir)[0]
        losses[packing] = (first["loss"], first["grad_norm"])
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)


def test_full_fine_tuning_writes_a_model(run_stage, tmp_path, tiny_model_dir, conversation_data):
    from transformers import AutoModelForCausalLM

    run_stage("sft", tmp_path / "run", model=tiny_model_dir, data=conversation_data, peft=None)
    written = file_names(tmp_path / "run" / "model")
    tokenizer_files = MODEL_FILES - {"adapter_config.json", "adapter_model.safetensors"}
    assert written == tokenizer_files | {"config.json", "generation_config.json", "model.safetensors"}
    old = AutoModelForCausalLM.from_pretrained(tiny_model_dir).state_dict()
    new = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").state_dict()
    assert all(not torch.equal(old[name], new[name]) for name in old)


def test_refuses_a_length_that_cuts_every_answer(run_stage, tmp_path, tiny_model_dir, conversation_data):
    with pytest.raises(DataError, match=r"trainer.max_length=4 cuts every supervised token") as failure:
        run_stage(
            "sft",
            tmp_path / "run",
            preflight=False,
            model=tiny_model_dir,
            data=conversation_data,
            trainer={"max_length": 4},
        )
    assert failure.value.exit_code == 2


def test_refuses_dialogues_without_an_assistant(
    run_stage, tmp_path, tiny_model_dir, make_rows, write_dataset
):
    rows = make_rows["conversation"](8, 0)
    for row in rows[2:4]:
        row["messages"] = row["messages"][:1]
    rows[2]["messages"] = [{"role": "user", "content": "Hello?"}]
    data = write_dataset(tmp_path / "data", "conversation", rows, rows[:2])
    with pytest.raises(DataError, match=r"2 of 8 dialogues .* conversation-2, conversation-3") as failure:
        run_stage("sft", tmp_path / "run", preflight=False, model=tiny_model_dir, data=data)
    assert failure.value.exit_code == 2
    assert not (tmp_path / "run" / "model").exists()


def test_leaves_out_and_counts_a_dialogue_in_a_hundred_without_an_assistant(
    run_stage, tmp_path, tiny_model_dir, make_rows, write_dataset
):
    rows = make_rows["conversation"](101, 0)
    rows[7]["messages"] = [{"role": "user", "content": "Hello?"}]
    data = write_dataset(tmp_path / "data", "conversation", rows, rows[:2])
    metrics = run_stage("sft", tmp_path / "run", model=tiny_model_dir, data=data, trainer={"max_steps": 1})
    dropped = metrics["rows_dropped_unsupervised"], metrics["rows_dropped_too_long"]
    assert (metrics["rows"], *dropped) == (100, 1, 0)


def _with_template(source: Path, target: Path, old: str, new: str) -> Path:
    shutil.copytree(source, target)
    template = (target / "chat_template.jinja").read_text()
    assert old in template
    (target / "chat_template.jinja").write_text(template.replace(old, new))
    return target


def test_refuses_a_template_without_generation_markers(
    run_stage, tmp_path, tiny_model_dir, conversation_data
):
    unmarked = _with_template(tiny_model_dir, tmp_path / "a", "{%- generation -%}", "")
    unmarked = _with_template(unmarked, tmp_path / "b", "{%- endgeneration -%}", "")
    with pytest.raises(UserError, match="generation"):
        run_stage("sft", tmp_path / "run", preflight=False, model=unmarked, data=conversation_data)
    run_stage(
        "sft",
        tmp_path / "all",
        model=unmarked,
        data=conversation_data,
        trainer={"assistant_only_loss": False, "max_steps": 1},
    )


def test_refuses_an_end_of_turn_outside_the_loss(run_stage, tmp_path, tiny_model_dir, conversation_data):
    old = "{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}"
    new = "{{- message['content'] -}}{%- endgeneration -%}{{- '<|im_end|>' -}}"
    endless = _with_template(tiny_model_dir, tmp_path / "a", old, new)
    with pytest.raises(DataError, match="never learn to stop"):
        run_stage("sft", tmp_path / "run", preflight=False, model=endless, data=conversation_data)


def test_refuses_an_adapter_under_an_adapter(run_stage, tmp_path, sft_run, conversation_data):
    with pytest.raises(UserError, match="stage: merge"):
        run_stage("sft", tmp_path / "run", model=sft_run, data=conversation_data)


def test_stops_at_a_loss_that_is_not_finite(run_stage, tmp_path, tiny_model_dir, conversation_data):
    with pytest.raises(PosttrainError, match=r"(loss|grad_norm) is (nan|inf).*learning_rate"):
        run_stage(
            "sft",
            tmp_path / "run",
            model=tiny_model_dir,
            data=conversation_data,
            trainer={"learning_rate": 1e30, "logging_steps": 1, "max_grad_norm": 0.0},
        )
    assert not (tmp_path / "run" / "model").exists()


def test_refuses_a_run_that_learns_nothing(run_stage, tmp_path, tiny_model_dir, conversation_data):
    with pytest.raises(PosttrainError, match="changed none"):
        run_stage(
            "sft",
            tmp_path / "run",
            model=tiny_model_dir,
            data=conversation_data,
            trainer={"learning_rate": 0.0, "max_steps": 1},
        )


def test_refuses_more_length_than_the_model_has_positions(
    run_stage, tmp_path, tiny_model_dir, conversation_data
):
    with pytest.raises(UserError, match="256 positions"):
        run_stage(
            "sft",
            tmp_path / "run",
            model=tiny_model_dir,
            data=conversation_data,
            trainer={"max_length": 512},
        )
