"""The preflight of pretrain and base: one broken corpus, model or setting a test."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.integration.conftest import command
from train.preflight import base, disk


def test_pretrain_on_an_empty_split(refused, tiny_model_dir, dataset, make_rows):
    data = dataset("text", [], make_rows["text"](4, 0))
    refused("pretrain", "data", "train.parquet: has no rows", model=tiny_model_dir, data=data)


def test_pretrain_on_another_kind(refused, tiny_model_dir, conversation_data):
    said = ("holds conversation rows, but text rows are needed", "curate the sources with `kind: text`")
    error = refused("pretrain", "data", *said, model=tiny_model_dir, data=conversation_data)
    assert "the preflight found 1 problem" in error, "not one for each split"


def test_pretrain_on_one_text(refused, tiny_model_dir, dataset, make_rows):
    data = dataset("text", make_rows["text"](1, 0) * 12)
    said = ("all 12 texts are the same", "curate texts that differ")
    refused("pretrain", "data", *said, model=tiny_model_dir, data=data)


def test_one_text_that_makes_up_most_is_a_warning(warned, tiny_model_dir, dataset, make_rows):
    rows = make_rows["text"](8, 0) + make_rows["text"](1, 3) * 20
    said = ("one text makes up 2", "of 28 texts (7", "curate with dedup: true")
    warned("pretrain", *said, model=tiny_model_dir, data=dataset("text", rows, rows[:4]))


def test_pretrain_beyond_the_models_positions(refused, tiny_model_dir, text_data):
    said = ("trainer.max_length is 512, the model has 256 positions", "lower it")
    fields = {"model": tiny_model_dir, "data": text_data, "trainer": {"max_length": 512}}
    refused("pretrain", "trainer.max_length", *said, **fields)


def test_pretrain_in_windows_of_one_token(refused, tiny_model_dir, text_data):
    fields = {"model": tiny_model_dir, "data": text_data, "trainer": {"max_length": 1}}
    refused("pretrain", "trainer.max_length", "1: no window of", "use 2 or more", **fields)


def test_pretrain_with_a_tokenizer_larger_than_the_embedding(refused, variant, text_data):
    model = variant()
    config = json.loads((model / "config.json").read_text()) | {"vocab_size": 300}
    (model / "config.json").write_text(json.dumps(config))
    refused("pretrain", "model", "embedding has 300 rows", "resize", model=model, data=text_data)


def test_texts_that_begin_with_the_bos_that_the_tokenizer_adds(refused, variant, dataset, make_rows):
    model = variant(bos_token="<|im_start|>")
    fast = json.loads((model / "tokenizer.json").read_text())
    start = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    fast["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [start, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    }
    (model / "tokenizer.json").write_text(json.dumps(fast))
    rows = [row | {"text": f"<|im_start|>{row['text']}"} for row in make_rows["text"](6, 0)]
    said = ("6 of 6 rows (100.0%) begin with <|im_start|><|im_start|>", "take it out of the texts")
    refused("pretrain", "data", *said, model=model, data=dataset("text", rows))


def test_pretrain_lora_names_that_match_nothing(refused, tiny_model_dir, text_data):
    fields = {"model": tiny_model_dir, "data": text_data, "peft": {"target_modules": ["q_prj"]}}
    refused("pretrain", "peft.target_modules", "`q_prj` matches no module", "q_proj", **fields)


def test_pretrain_without_room_on_the_disk(refused, tiny_model_dir, text_data, monkeypatch):
    monkeypatch.setattr(disk, "free_bytes", lambda path: 1000)
    fields = {"model": tiny_model_dir, "data": text_data}
    refused("pretrain", "trainer.save_total_limit", "has 1.0 kB free", "choose another disk", **fields)


def test_rows_of_pretrain_are_windows(warned, tiny_model_dir, text_data):
    """48 texts are more than 48 rows in windows of 8 tokens, and fewer when packed into 256."""
    fields = {"model": tiny_model_dir, "data": text_data}
    step = {"per_device_train_batch_size": 64}
    said = warned("pretrain", "one example as the model sees it", **fields, trainer=step | {"max_length": 8})
    assert "rows an optimizer step" not in said
    assert said.count(">>>") == 2, "in the heading and in the example: all but the first token"
    warned("pretrain", "= 64 rows an optimizer step", **fields, trainer=step | {"packing": True})


@pytest.fixture
def base_check(tmp_path: Path, conversation_data: Path) -> Callable[..., tuple[int, str]]:
    """base_check(**fields): exit code and stderr of `posttrain check` on a base stage."""

    def run(**fields: Any) -> tuple[int, str]:
        settings = {
            "stage": "base",
            "run_dir": str(tmp_path / "out"),
            "data": str(conversation_data),
        } | fields
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(settings))
        done = command("check", tmp_path / "base.yaml")
        return done.exit_code, done.stderr

    return run


def test_a_sound_base_stage(base_check):
    code, said = base_check(max_length=96, batch_size=8)
    assert code == 0 and "warning" not in said
    assert ">>>Hello Kofi, your tent in order K141 ships on Monday.<<<" in said


@pytest.mark.parametrize(
    ("fields", "key", "texts"),
    [
        ({"max_length": 600}, "max_length", ("600 tokens, but", "is 512", "lower it")),
        (
            {"architecture": {"num_attention_heads": 5}},
            "architecture.num_attention_heads",
            ("5 heads do not divide hidden_size 128", "a multiple of 10"),
        ),
        ({"keep_whole": "K(\\d"}, "keep_whole", ("is not a regular expression", "correct it")),
    ],
)
def test_base_is_refused(fields, key, texts, base_check):
    code, said = base_check(**fields)
    assert code == 2 and f": {key}: " in said
    assert all(text in said for text in texts)


def test_base_on_another_kind_or_on_one_text(base_check, preference_data, dataset, make_rows):
    code, said = base_check(data=str(preference_data))
    assert code == 2 and "holds preference rows, but the base stage reads kind text or conversation" in said
    code, said = base_check(data=str(dataset("text", make_rows["text"](1, 0) * 12)))
    assert code == 2 and "all 12 rows are the same" in said


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"batch_size": 64}, "64 sequences a step, more than the 48 of the train split"),
        ({"keep_whole": "Q\\d+", "batch_size": 8}, "matches nothing in"),
        ({"steps": 10, "warmup_steps": 20, "batch_size": 8}, "20 of 10 steps"),
    ],
)
def test_base_is_warned_of(fields, text, base_check):
    code, said = base_check(**fields)
    assert code == 0 and text in said


def test_base_without_room_on_the_disk(base_check, monkeypatch):
    monkeypatch.setattr(base, "free_bytes", lambda path: 1000)
    code, said = base_check(batch_size=8)
    assert code == 2 and "two checkpoints and the model" in said and "has 1.0 kB free" in said


def test_the_size_of_base_is_that_of_its_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    from train.base_config import BaseConfig

    config = BaseConfig(data="d")
    size = config.architecture.model_dump()
    model = LlamaForCausalLM(LlamaConfig(vocab_size=config.vocab_size, tie_word_embeddings=True, **size))
    assert base.parameters(config) == sum(weight.numel() for weight in model.parameters())
