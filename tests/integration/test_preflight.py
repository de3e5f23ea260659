"""The preflight: models, machine and disk, one broken thing a test (exit code 2; key, value and remedy in the
message; nothing written); what it shows, and when it runs.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock

from tests.integration.conftest import PEFT, command, write_stage
from train.preflight import disk, rows


def edit_config(model: Path, **values: Any) -> Path:
    config = json.loads((model / "config.json").read_text()) | values
    (model / "config.json").write_text(json.dumps(config))
    return model


def test_tokenizer_larger_than_the_embedding(refused, variant, conversation_data):
    model = edit_config(variant(), vocab_size=300)
    said = ("the tokenizer's highest id is", "embedding has 300 rows", "resize the model's embedding")
    refused("sft", "model", *said, model=model, data=conversation_data)


def test_weights_that_are_cut_off(refused, variant, conversation_data):
    model = variant()
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[:5000])
    said = (
        "model.safetensors: is not a complete safetensors file (5,000 bytes",
        "download or save the model again",
    )
    refused("sft", "model", *said, model=model, data=conversation_data)


def test_architecture_without_a_classifier(refused, tiny_model_dir, tmp_path, preference_data):
    model = tmp_path / "recurrent"
    shutil.copytree(tiny_model_dir, model)
    config = {"model_type": "recurrent_gemma", "vocab_size": 500, "num_hidden_layers": 1, "hidden_size": 32}
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 256}))
    said = ("recurrent_gemma has no reward model", "another architecture")
    refused("reward", "model", *said, model=model, data=preference_data)


def test_an_adapter_on_an_adapter(refused, untrained_adapter_dir, conversation_data):
    said = (f"{untrained_adapter_dir} is a LoRA adapter", "stage: merge")
    refused("sft", "model", *said, model=untrained_adapter_dir, data=conversation_data)


@pytest.mark.parametrize(
    ("field", "value", "texts"),
    [
        ("target_modules", ["q_porj", "v_proj"], ("`q_porj` matches no module", "did you mean q_proj")),
        ("exclude_modules", ["lm_heads"], ("`lm_heads` matches no module", "did you mean lm_head")),
        (
            "modules_to_save",
            ["embed_token"],
            ("`embed_token` matches no module", "did you mean embed_tokens"),
        ),
        (
            "target_modules",
            ["mlp"],
            ("`mlp` matches model.layers.0.mlp, a LlamaMLP", "gate_proj, up_proj, down_proj"),
        ),
    ],
)
def test_lora_names_that_match_nothing(refused, tiny_model_dir, conversation_data, field, value, texts):
    fields = {"model": tiny_model_dir, "data": conversation_data, "peft": PEFT | {field: value}}
    refused("sft", f"peft.{field}", *texts, **fields)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [7]},
    ],
)
def test_lora_that_is_left_without_a_module(refused, tiny_model_dir, conversation_data, settings):
    fields = {"model": tiny_model_dir, "data": conversation_data, "peft": PEFT | settings}
    values = [str(value) for value in settings.values()]
    refused("sft", "peft", "peft refuses", *values, "leave linear layers to adapt", **fields)


def test_fp16_without_a_gpu(tmp_path, tiny_model_dir, conversation_data, monkeypatch):
    """transformers refuses it where there is no GPU, the preflight where it would not."""
    fields = {"model": tiny_model_dir, "data": conversation_data, "trainer": {"fp16": True}}
    done = command("sft", write_stage(tmp_path, "sft", fields))
    assert done.exit_code == 2
    assert "trainer" in done.stderr
    assert "fp16" in done.stderr
    assert not (tmp_path / "out").exists()


def test_float16_weights_on_a_cpu(refused, tiny_model_dir, conversation_data):
    fields = {"model": tiny_model_dir, "data": conversation_data, "dtype": "float16"}
    refused("sft", "dtype", "float16, but there is no GPU here", "use dtype: float32", **fields)


@pytest.mark.usefixtures("old_gpu")
def test_bf16_that_the_gpu_lacks(refused, tiny_model_dir, conversation_data):
    said = (
        "true, but Tesla T4 does not compute in bfloat16",
        "set trainer.bf16: false, or trainer.fp16: true",
    )
    refused(
        "sft", "trainer.bf16", *said, model=tiny_model_dir, data=conversation_data, trainer={"bf16": True}
    )


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        ("2", ("WORLD_SIZE is 2, but RANK is not set", "start with torchrun --nproc-per-node 2")),
        ("two", ("WORLD_SIZE in the environment is 'two', not a number", "unset it")),
    ],
)
def test_world_size_that_no_launcher_has_set(
    tmp_path, tiny_model_dir, conversation_data, monkeypatch, value, texts
):
    monkeypatch.setenv("WORLD_SIZE", value)
    monkeypatch.delenv("RANK", raising=False)
    done = command("sft", write_stage(tmp_path, "sft", {"model": tiny_model_dir, "data": conversation_data}))
    assert done.exit_code == 2
    assert "1 mistake in the configuration" in done.stderr
    assert all(text in done.stderr for text in texts), done.stderr
    assert not (tmp_path / "out").exists()


def test_batch_that_is_dropped_because_it_is_never_full(refused, tiny_model_dir, conversation_data):
    trainer = {"per_device_train_batch_size": 64, "dataloader_drop_last": True}
    said = ("64 x 1 process(es) = 64 rows a batch, the train split has 48", "use at most 48")
    fields = {"model": tiny_model_dir, "data": conversation_data, "trainer": trainer}
    refused("sft", "trainer.per_device_train_batch_size", *said, **fields)


def test_no_room_on_the_disk(refused, tiny_model_dir, conversation_data, monkeypatch):
    monkeypatch.setattr(disk, "free_bytes", lambda path: 1_000_000)
    said = ("6 checkpoints of", "trained parameters x 12 bytes", "1.0 MB free", "choose another disk")
    fields = {"model": tiny_model_dir, "data": conversation_data, "peft": None}
    refused("sft", "trainer.save_total_limit", *said, trainer={"save_total_limit": 5}, **fields)


def test_output_directory_of_something_else(tmp_path, tiny_model_dir, conversation_data):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    path = write_stage(tmp_path, "sft", {"model": tiny_model_dir, "data": conversation_data})
    for name in ("check", "sft"):
        done = command(name, path)
        assert done.exit_code == 2
        assert f"{tmp_path / 'out'}: is not a run directory (it holds thesis.txt" in done.stderr
        assert "choose another output directory" in done.stderr
    assert [item.name for item in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_output_directory_that_another_process_writes(tmp_path, tiny_model_dir, conversation_data):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".lock-holder.json").write_text(json.dumps({"pid": 4711, "host": "node7"}))
    path = write_stage(tmp_path, "sft", {"model": tiny_model_dir, "data": conversation_data})
    with FileLock(out / ".lock", is_singleton=False):
        done = command("check", path)
    assert done.exit_code == 2
    assert f"{out}: is being written by process 4711 on node7" in done.stderr
    assert "wait for it to end" in done.stderr
    assert not (out / "manifest.json").exists()


def test_a_sound_stage_passes_and_shows_its_loss_mask(tmp_path, tiny_model_dir, conversation_data):
    path = write_stage(tmp_path, "sft", {"model": tiny_model_dir, "data": conversation_data})
    done = command("check", path, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["valid"] is True
    assert (report["problems"], report["warnings"], report["not_looked_at"]) == ([], [], {})
    example = report["examples"]["sft"]
    assert "".join(text for text, _ in example).startswith("<|im_start|>system\nYou are the support desk")
    [answer] = [text for text, supervised in example if supervised]
    assert answer.startswith("Hello ") and answer.endswith("<|im_end|>")
    assert f">>>{answer}<<<" in command("check", path).stderr


def test_a_sample_of_many_rows_is_said_to_be_one(warned, tiny_model_dir, conversation_data, monkeypatch):
    monkeypatch.setattr(rows, "SAMPLE", 20)
    warned(
        "sft",
        "looked at 20 of 48 train rows, drawn with seed 0",
        model=tiny_model_dir,
        data=conversation_data,
    )


def test_everything_is_reported_together(refused, variant, conversation_data):
    model = variant(pad_token="<|im_end|>")
    fields = {"model": model, "data": conversation_data, "trainer": {"max_length": 4}, "dtype": "float16"}
    error = refused("sft", "dtype", "float16", "use dtype: float32", **fields)
    assert "the preflight found 4 problems" in error
    assert "sft.yaml:6: model: " in error
    assert "trainer.max_length: " in error


def test_no_check_starts_without_looking(tmp_path, tiny_model_dir, dataset, make_rows):
    data = dataset("conversation", make_rows["conversation"](1, 0) * 12)
    path = write_stage(tmp_path, "sft", {"model": tiny_model_dir, "data": data})
    assert command("sft", path).exit_code == 2
    done = command("sft", path, "--no-check", "trainer.max_steps=1")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "model").is_dir()


@pytest.fixture
def pipeline(tmp_path: Path, tiny_model_dir: Path, prompt_data: Path, tiny_reward_dir: Path) -> Path:
    """A data stage, an sft stage that reads it and cuts every answer, and a ppo stage on what is there."""
    source = {"generator": "support_desk", "rows": 40}
    sft = {"stage": "sft", "model": str(tiny_model_dir), "data": "${stage:demos}"}
    ppo = {"model": str(tiny_model_dir), "reward": str(tiny_reward_dir), "data": str(prompt_data)}
    stages = {
        "demos": {"stage": "curate", "kind": "conversation", "sources": [source]},
        "tune": sft | {"trainer": {"max_steps": 2, "max_length": 16}},
        "ppo": ppo | {"stage": "ppo", "peft": PEFT, "max_prompt_tokens": 64, "max_new_tokens": 8},
    }
    path = tmp_path / "pipe.yaml"
    document = {"name": "demo", "output_dir": str(tmp_path / "runs"), "report": False, "stages": stages}
    path.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    return path


def test_check_says_what_it_could_not_look_at(pipeline, tmp_path):
    done = command("check", pipeline)
    assert done.exit_code == 0, done.output
    assert "tune: not looked at yet: data: is still to be made by stage demos" in done.stderr
    assert "ppo: one example" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_stage_is_looked_at_once_its_data_is_made(pipeline, tmp_path):
    done = command("run", pipeline, "--until", "tune")
    assert done.exit_code == 2
    assert "stages.tune.trainer.max_length: " in done.stderr
    assert "keep no token to learn from at trainer.max_length=16" in done.stderr
    assert sorted(item.name for item in (tmp_path / "runs" / "demo").iterdir()) == ["demos", "pipeline.json"]
    again = command("check", pipeline)
    assert again.exit_code == 2
    assert "stages.tune.trainer.max_length: " in again.stderr


def test_what_is_there_is_looked_at_before_anything_starts(pipeline, tmp_path):
    done = command("run", pipeline, "stages.ppo.max_prompt_tokens=3")
    assert done.exit_code == 2
    assert "override stages.ppo.max_prompt_tokens=3: stages.ppo.max_prompt_tokens: " in done.stderr
    assert "Raise it or curate shorter prompts" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("some-org/some-model", "some-org/some-model is on the Hugging Face Hub"),
        ("/models/base", "/models/base: no such model"),
    ],
)
def test_models_that_are_not_here_are_not_looked_at_yet(warned, tmp_path, conversation_data, model, reason):
    warned("sft", f"sft: not looked at yet: model: {reason}", model=model, data=conversation_data)
    done = command("check", tmp_path / "sft.yaml", "--json")
    assert list(json.loads(done.stdout)["not_looked_at"]["sft"]) == ["model"]


def test_rows_in_one_sequence_of_a_recurrent_model_are_a_warning(
    warned, tiny_model_dir, tmp_path, conversation_data
):
    model = tmp_path / "recurrent"
    shutil.copytree(tiny_model_dir, model)
    config = {"model_type": "recurrent_gemma", "vocab_size": 500, "num_hidden_layers": 1, "hidden_size": 32}
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 256}))
    fields = {"model": model, "data": conversation_data, "trainer": {"packing": True}}
    said = warned("sft", "trainer.packing", "recurrent_gemma is recurrent", "set packing: false", **fields)
    assert "measures that before it trains" in said
