"""Inputs: run directories, paths, patterns, Hub ids; content hashes and tokenizer fingerprints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import core_toy_stages
import pytest

from posttrain.errors import UserError
from posttrain.hashing import adapter_base, hash_dataset, hash_path
from posttrain.inputs import check_same_tokenizer, download, fingerprint_tokenizer, resolve
from posttrain.planning import Plan, plan_stage
from posttrain.rundir import SCHEMA_VERSION, describe_outputs


def make_run(path: Path, status: str = "complete", **files: str) -> Path:
    path.mkdir(parents=True)
    for name, text in files.items():
        target = path / name.replace("__", "/").replace("_json", ".json")
        target.parent.mkdir(exist_ok=True)
        target.write_text(text)
    outputs = describe_outputs(path)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "stage": "toy",
        "name": path.name,
        "status": status,
        "outputs_hash": outputs.pop("hash"),
        "outputs": outputs,
    }
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def test_run_directory_by_kind(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", model__config_json="{}", dataset_json='{"content_hash": "abc"}', note="x")
    model, data, whole = (resolve(str(run), kind) for kind in ("model", "dataset", "run"))
    assert (model.path, data.path, whole.path) == (run / "model", run, run)
    assert model.content_hash == hash_path(run / "model")
    assert data.content_hash == "abc"
    assert whole.manifest is not None
    assert whole.content_hash == whole.manifest["outputs_hash"]


def test_relative_and_absolute_paths_are_the_same_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "r", note="x")
    monkeypatch.chdir(tmp_path)
    assert resolve("r", "run").path == run
    assert resolve("r", "run").content_hash == resolve(str(run), "run").content_hash


@pytest.mark.parametrize("status", ["running", "failed"])
def test_unfinished_run_is_refused(tmp_path: Path, status: str) -> None:
    run = make_run(tmp_path / "r", status, note="x")
    with pytest.raises(UserError, match=rf"not complete \(status: {status}\)"):
        resolve(str(run), "run")


def test_run_whose_output_is_gone_or_changed_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", model__config_json="{}", note="x")
    (run / "note").write_text("longer")
    with pytest.raises(UserError, match="note is missing or has changed"):
        resolve(str(run), "model")


def test_wrong_kind_of_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", note="x")
    with pytest.raises(UserError, match="a toy run holds no model"):
        resolve(str(run), "model")
    (tmp_path / "plain").mkdir()
    with pytest.raises(UserError, match="is not a run directory"):
        resolve(str(tmp_path / "plain"), "run")
    with pytest.raises(UserError, match=r"neither config.json nor adapter_config.json"):
        resolve(str(tmp_path / "plain"), "model")


def test_missing_path_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "dialogues.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"no such file or directory\n    did you mean .*/dialogues.jsonl"):
        resolve(str(tmp_path / "dialogue.jsonl"), "file")
    with pytest.raises(UserError, match="this input takes a run directory, a path, or org/name"):
        resolve(str(tmp_path / "nothing" / "like" / "it"), "model")


def test_hub_ids_are_told_from_missing_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    found = resolve("org/name@v1.0", "model")
    assert (found.path, found.hub_id) == (None, "org/name@v1.0")
    assert found.content_hash != resolve("org/name@v2.0", "model").content_hash
    for ref, kind in (
        ("runs/name", "model"),
        ("org/name.jsonl", "dataset"),
        ("org/name", "file"),
        ("a/b/c", "model"),
    ):
        with pytest.raises(UserError, match="no such"):
            resolve(ref, kind)


def test_hub_that_does_not_answer_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="is not a local path, and the Hugging Face Hub did not give it"):
        download(resolve("surely-not/there", "model"))


def test_pattern_is_one_input_that_follows_its_files(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(name)
    first = resolve(str(tmp_path / "*.jsonl"), "file")
    assert first.path == tmp_path / "*.jsonl"
    (tmp_path / "b.jsonl").write_text("changed")
    assert resolve(str(tmp_path / "*.jsonl"), "file").content_hash != first.content_hash
    with pytest.raises(UserError, match="no file matches this pattern"):
        resolve(str(tmp_path / "*.parquet"), "file")


def test_directory_hash_sees_names_and_bytes_but_not_where_it_is(tmp_path: Path) -> None:
    for place in ("x", "y"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "w.bin").write_bytes(b"1")
    assert hash_path(tmp_path / "x") == hash_path(tmp_path / "y")
    (tmp_path / "y" / "w.bin").rename(tmp_path / "y" / "v.bin")
    assert hash_path(tmp_path / "x") != hash_path(tmp_path / "y")
    assert hash_dataset(tmp_path / "x") == hash_path(tmp_path / "x")


def copy_model(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps(content))


def test_fingerprint_ignores_training_state_and_survives_saving(tiny_model_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    expected = fingerprint_tokenizer(tiny_model_dir)
    model = copy_model(tiny_model_dir, tmp_path / "m")
    edit_json(model / "tokenizer.json", truncation={"max_length": 5}, padding={"strategy": "BatchLongest"})
    assert fingerprint_tokenizer(model) == expected
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer(["one", "two words"], padding=True, truncation=True, max_length=4)
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(tmp_path / "again")
    assert fingerprint_tokenizer(tmp_path / "again") == expected


def test_fingerprint_sees_vocabulary_special_tokens_and_template(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    expected = fingerprint_tokenizer(tiny_model_dir)
    special = copy_model(tiny_model_dir, tmp_path / "special")
    edit_json(special / "tokenizer_config.json", eos_token="<|pad|>")
    template = copy_model(tiny_model_dir, tmp_path / "template")
    (template / "chat_template.jinja").write_text("{{ messages }}")
    vocabulary = copy_model(tiny_model_dir, tmp_path / "vocabulary")
    edit_json(vocabulary / "tokenizer.json", normalizer={"type": "Lowercase"})
    for changed, which in ((special, "tokenizer"), (template, "chat_template"), (vocabulary, "tokenizer")):
        found = fingerprint_tokenizer(changed)
        assert [name for name in expected if found[name] != expected[name]] == [which]


def test_mismatch_names_both_inputs_and_what_differs(tiny_model_dir: Path, tmp_path: Path) -> None:
    other = copy_model(tiny_model_dir, tmp_path / "other")
    inputs = {"model": resolve(str(tiny_model_dir), "model"), "reward": resolve(str(other), "model")}
    assert set(check_same_tokenizer(inputs)) == {"model", "reward"}
    (other / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(
        UserError, match=r"model \(.*\) and reward \(.*other\) differ in chat template: "
    ) as caught:
        check_same_tokenizer(inputs)
    assert "must share both" in str(caught.value)


def test_models_that_bring_their_tokenizer_are_left_out_of_the_comparison(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core_toy_stages.install(monkeypatch)
    other = copy_model(tiny_model_dir, tmp_path / "other")
    (other / "chat_template.jinja").write_text("{{ messages }}")

    def plan(**inputs: Any) -> Plan:
        return plan_stage("toy", core_toy_stages.ToyConfig(text="x", **inputs), tmp_path / "run")

    found = plan(models={"sft": str(tiny_model_dir)}, judges=[str(other), str(tiny_model_dir)])
    assert set(found.fingerprints) == {"models.sft", "judges.0", "judges.1"}
    assert found.fingerprints["judges.0"] != found.fingerprints["judges.1"]
    with pytest.raises(UserError, match=r"models.sft \(.*\) and models.dpo \(.*\) differ in chat template"):
        plan(models={"sft": str(tiny_model_dir), "dpo": str(other)}, judges=[str(other)])


def test_model_without_tokenizer_is_refused_and_adapters_use_their_base(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "pipe" / "sft" / "model"
    bare.mkdir(parents=True)
    (bare / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds no tokenizer"):
        fingerprint_tokenizer(bare)
    edit = {"base_model_name_or_path": str(tiny_model_dir)}
    (bare / "adapter_config.json").write_text(json.dumps(edit))
    assert fingerprint_tokenizer(bare) == fingerprint_tokenizer(tiny_model_dir)


def test_adapter_finds_its_base_after_the_pipeline_moved(tmp_path: Path) -> None:
    adapter = tmp_path / "moved" / "sft" / "model"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "/gone/tiny/base/model"})
    )
    with pytest.raises(UserError, match="needs its base model /gone/tiny/base/model"):
        adapter_base(adapter)
    base = tmp_path / "moved" / "base" / "model"
    base.mkdir(parents=True)
    assert adapter_base(adapter) == base
