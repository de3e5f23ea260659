"""The export stage: the exact files, readable by anyone and by older releases, and still the same model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from posttrain.errors import PosttrainError, UserError
from posttrain.hashing import hash_file
from posttrain.inputs import resolve
from posttrain.models import load_causal_lm, load_tokenizer
from posttrain.stage import execute_stage
from serving.config import ExportConfig
from serving.golden import read_golden
from serving.parity import reference_answer
from serving.repository import describe_files, read_export, version_dir, weights_dir
from serving.weights import write_model
from tests.integration.conftest import file_names

REPOSITORY = {
    "desk/config.pbtxt",
    "desk/1/golden.json",
    "desk/1/model.json",
    "desk/1/weights/chat_template.jinja",
    "desk/1/weights/config.json",
    "desk/1/weights/generation_config.json",
    "desk/1/weights/model.safetensors",
    "desk/1/weights/tokenizer.json",
    "desk/1/weights/tokenizer_config.json",
}
CONVERSATION = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Where is order K100?"},
]


def _export(run_dir: Path, model: Path, **fields):
    config = ExportConfig(**({"model": str(model), "name": "desk"} | fields))
    execute_stage("export", config, run_dir)
    return run_dir


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tiny_model_dir):
    return _export(tmp_path_factory.mktemp("runs") / "export", tiny_model_dir)


def _weights(export_dir):
    return weights_dir(export_dir, read_export(export_dir))


def _logits(model):
    with torch.no_grad():
        return model(torch.arange(3, 103)[None]).logits


def test_writes_exactly_these_files_readable_by_all(exported):
    root = exported / "model_repository"
    assert file_names(root) == REPOSITORY
    assert {oct(path.stat().st_mode & 0o777) for path in root.rglob("*") if path.is_file()} == {"0o644"}
    assert {oct(path.stat().st_mode & 0o777) for path in (root, *root.rglob("*")) if path.is_dir()} == {
        "0o755"
    }
    assert not list(exported.glob(".staging-*"))


def test_the_manifest_describes_every_file_and_where_they_come_from(exported, tiny_model_dir):
    manifest = read_export(exported)
    root = exported / "model_repository"
    assert set(manifest["files"]) == REPOSITORY
    assert all(entry["sha256"] == hash_file(root / name) for name, entry in manifest["files"].items())
    source = manifest["source"]
    assert Path(source["path"]) == tiny_model_dir
    assert (exported / source["relative_path"]).resolve() == tiny_model_dir.resolve()
    assert source["adapter"] is False
    assert manifest["fingerprints"] == source["fingerprints"]
    assert manifest["max_model_len"] == 256
    assert manifest["limits"]["max_output_tokens"] == 256


def test_computes_and_reads_what_the_trained_model_does(exported, tiny_model_dir):
    weights = _weights(exported)
    assert torch.equal(_logits(load_causal_lm(weights)), _logits(load_causal_lm(tiny_model_dir)))
    ours, theirs = load_tokenizer(weights), load_tokenizer(tiny_model_dir)
    rendered = theirs.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True)
    assert ours.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True) == rendered
    assert ours(rendered)["input_ids"] == theirs(rendered)["input_ids"]
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert set(ours.all_special_ids) == set(theirs.all_special_ids)
    generation = load_causal_lm(weights).generation_config
    assert (generation.eos_token_id, generation.pad_token_id) == (theirs.eos_token_id, theirs.pad_token_id)


def test_says_it_in_words_that_older_releases_know(exported):
    weights = _weights(exported)
    config = json.loads((weights / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert config["rope_scaling"] is None
    assert config["torch_dtype"] == "float32"
    settings = json.loads((weights / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["additional_special_tokens"] == ["<|im_start|>"]
    assert "extra_special_tokens" not in settings
    assert settings["chat_template"] == (weights / "chat_template.jinja").read_text()


def test_an_adapter_is_merged(tmp_path, sft_run, tiny_model_dir):
    export_dir = _export(tmp_path / "export", sft_run)
    merged = _logits(load_causal_lm(_weights(export_dir)))
    assert torch.equal(merged, _logits(load_causal_lm(sft_run / "model")))
    assert not torch.allclose(merged, _logits(load_causal_lm(tiny_model_dir)), atol=1e-3)
    manifest = read_export(export_dir)
    assert manifest["source"]["adapter"] is True
    assert manifest["lineage"]["stage"] == "sft"
    assert {parent["field"] for parent in manifest["lineage"]["parents"]} == {"model", "data"}


def test_a_merge_run_is_compared_with_the_adapter_that_it_merged(tmp_path, run_stage, sft_run):
    run_stage("merge", tmp_path / "merged", model=sft_run)
    found = resolve(str(tmp_path / "merged"), "model")
    record = {
        "schema_version": 1,
        "stage": "eval",
        "status": "complete",
        "name": "eval",
        "parents": [{"field": "models.tuned", "content_hash": found.manifest["parents"][0]["content_hash"]}],
        "metrics": {"win_rate": 0.6},
    }
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "manifest.json").write_text(json.dumps(record))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text('{"schema_version": 99}')
    export_dir = _export(tmp_path / "export", tmp_path / "merged", golden_prompts=4, golden_tokens=8)
    manifest = read_export(export_dir)
    assert manifest["lineage"]["stage"] == "merge"
    assert manifest["evaluation"] == [{"run": "eval", "model": "tuned", "metrics": {"win_rate": 0.6}}]
    golden = read_golden(version_dir(export_dir, manifest))
    assert list(golden.served[""]) == ["adapter", "merged"]
    assert golden.base is not None
    assert manifest["golden"]["identical"] == manifest["golden"]["prompts"] == 4
    assert manifest["golden"]["max_logprob_delta"] < 1e-4


def test_the_golden_answers_are_those_of_generate(exported, tiny_model_dir):
    golden = read_golden(version_dir(exported, read_export(exported)))
    model, tokenizer = load_causal_lm(tiny_model_dir), load_tokenizer(tiny_model_dir)
    assert len({prompt["text"] for prompt in golden.prompts}) == len(golden.prompts) >= 12
    for prompt, answer in zip(golden.prompts, golden.served[""]["trained"], strict=True):
        expected = reference_answer(model, tokenizer, prompt["messages"], golden.max_new_tokens)
        assert (prompt["text"], prompt["token_ids"]) == (expected.prompt, expected.prompt_ids)
        assert answer.token_ids == expected.ids
        ids = torch.tensor([expected.prompt_ids + expected.ids])
        with torch.no_grad():
            logits = model(ids).logits[0, len(expected.prompt_ids) - 1 : -1]
        logprobs = torch.log_softmax(logits, dim=-1)
        chosen = logprobs.gather(-1, torch.tensor(expected.ids)[:, None])[:, 0]
        assert torch.allclose(chosen, torch.tensor(answer.logprobs), atol=1e-4)
        assert [int(position[0][0]) for position in answer.top] == answer.token_ids


def test_the_precision_is_the_one_asked_for(tmp_path, tiny_model_dir):
    export_dir = _export(tmp_path / "export", tiny_model_dir, dtype="bfloat16", mount_path=None)
    model = load_causal_lm(_weights(export_dir), dtype="bfloat16")
    assert json.loads((_weights(export_dir) / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert next(model.parameters()).dtype == torch.bfloat16
    engine = json.loads((_weights(export_dir).parent / "model.json").read_text())
    assert engine == {
        "model": "weights",
        "dtype": "bfloat16",
        "max_model_len": 256,
        "gpu_memory_utilization": 0.9,
    }


def test_a_tokenizer_that_adds_a_token_is_exported_without_the_habit(tmp_path, tiny_model_dir):
    source = tmp_path / "model"
    shutil.copytree(tiny_model_dir, source)
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    }
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    trained = load_tokenizer(source)
    assert trained("hello")["input_ids"][0] == 1
    served = load_tokenizer(_weights(_export(tmp_path / "export", source)))
    assert served("hello")["input_ids"] == trained("hello", add_special_tokens=False)["input_ids"]


def test_a_refused_export_leaves_no_repository(tmp_path, tiny_model_dir):
    with pytest.raises(UserError, match="257 tokens.*max_position_embeddings is 256"):
        _export(tmp_path / "export", tiny_model_dir, max_model_len=257, max_output_tokens=8)
    assert not (tmp_path / "export" / "model_repository").exists()
    assert not (tmp_path / "export" / "export.json").exists()


def test_an_export_that_answers_otherwise_is_not_published(tmp_path, tiny_model_dir, monkeypatch):
    """The weights are damaged between being written and being compared."""

    def write_damaged(config, source, weights):
        allowed = write_model(config, source, weights)
        model = load_causal_lm(weights)
        with torch.no_grad():
            model.lm_head.weight.copy_(model.lm_head.weight.roll(1, dims=0))
        model.save_pretrained(weights)
        return allowed

    run_dir = _export(tmp_path / "export", tiny_model_dir)
    before, index = describe_files(run_dir / "model_repository"), (run_dir / "export.json").read_text()
    monkeypatch.setattr("serving.export.write_model", write_damaged)
    with pytest.raises(
        PosttrainError, match="nothing was published(.|\n)*first difference at token 0"
    ) as caught:
        _export(run_dir, tiny_model_dir, max_model_len=128)
    assert caught.value.exit_code == 1
    assert describe_files(run_dir / "model_repository") == before
    assert (run_dir / "export.json").read_text() == index
    assert not list(run_dir.glob(".staging-*"))


def test_a_model_whose_answers_are_not_finite_is_not_published(tmp_path, tiny_model_dir):
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    model = load_causal_lm(tmp_path / "model")
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(PosttrainError, match="log-probability: not finite"):
        _export(tmp_path / "export", tmp_path / "model")
    assert not (tmp_path / "export" / "model_repository").exists()
    assert not (tmp_path / "export" / "export.json").exists()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("desk/1/weights/chat_template.jinja", lambda p: p.write_text("x"), "is not what was exported"),
        ("desk/1/weights/extra.bin", lambda p: p.write_text("x"), "is not what was exported"),
        ("desk/1/model.json", lambda p: p.unlink(), "is missing"),
    ],
)
def test_a_changed_export_is_noticed(tmp_path, exported, name, change, message):
    copy = tmp_path / "copy"
    shutil.copytree(exported, copy)
    read_export(copy)
    change(copy / "model_repository" / name)
    with pytest.raises(UserError, match=f"{name}: {message}"):
        read_export(copy)


def test_a_directory_that_is_no_export_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not an export"):
        read_export(tmp_path)


def test_the_same_export_twice_gives_the_same_bytes(tmp_path, exported, tiny_model_dir):
    again = _export(tmp_path / "export", tiny_model_dir)
    assert describe_files(again / "model_repository") == describe_files(exported / "model_repository")
