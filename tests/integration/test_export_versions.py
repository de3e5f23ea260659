"""Versions of an export: added, never changed; and several adapters of one base in one repository."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from posttrain.errors import UserError
from posttrain.models import load_causal_lm
from posttrain.stage import execute_stage
from serving.config import ExportConfig
from serving.golden import read_golden
from serving.repository import describe_files, read_export, read_index, version_dir, weights_dir
from tests.conftest import random_adapter

FIELDS = {"name": "desk", "golden_prompts": 3, "golden_tokens": 6}


def _export(run_dir: Path, model: Path, **fields):
    config = ExportConfig(**(FIELDS | {"model": str(model)} | fields))
    return execute_stage("export", config, run_dir)


@pytest.fixture(scope="module")
def two_versions(tmp_path_factory, tiny_model_dir):
    run_dir = tmp_path_factory.mktemp("runs") / "export"
    _export(run_dir, tiny_model_dir)
    before = describe_files(run_dir / "model_repository" / "desk" / "1")
    done = _export(run_dir, tiny_model_dir, max_model_len=128, num_versions=2)
    assert done.status == "completed"
    assert done.manifest["metrics"]["version"] == 2
    return run_dir, before


def test_other_inputs_add_a_version_and_leave_the_first_as_it_is(two_versions):
    run_dir, before = two_versions
    assert describe_files(run_dir / "model_repository" / "desk" / "1") == before
    first, second = read_export(run_dir, "1"), read_export(run_dir)
    assert (first["version"], first["max_model_len"]) == ("1", 256)
    assert (second["version"], second["max_model_len"]) == ("2", 128)
    engine = json.loads((version_dir(run_dir, second) / "model.json").read_text())
    assert engine["model"] == "/models/desk/2/weights"
    config = (run_dir / "model_repository" / "desk" / "config.pbtxt").read_text()
    assert "num_versions: 2" in config
    index = read_index(run_dir)
    assert (index["version"], index["max_model_len"]) == ("2", 128), "the newest version's own fields"


def test_a_version_that_exists_is_refused_and_stays(tmp_path, two_versions, tiny_model_dir):
    run_dir = tmp_path / "export"
    shutil.copytree(two_versions[0], run_dir)
    files = describe_files(run_dir / "model_repository")
    with pytest.raises(UserError, match="already has a version 1(.|\n)*the next one \\(3\\)"):
        _export(run_dir, tiny_model_dir, version=1, max_model_len=64, max_output_tokens=8)
    assert describe_files(run_dir / "model_repository") == files
    done = _export(run_dir, tiny_model_dir, version=7, max_model_len=64, max_output_tokens=8)
    assert done.manifest["metrics"]["version"] == 7
    assert list(read_index(run_dir)["versions"]) == ["1", "2", "7"]


def test_the_same_content_is_no_new_version(tmp_path, two_versions, tiny_model_dir):
    run_dir = tmp_path / "export"
    shutil.copytree(two_versions[0], run_dir)
    config = ExportConfig(**FIELDS, model=str(tiny_model_dir), max_model_len=128, num_versions=1)
    execute_stage("export", config, run_dir)
    execute_stage("export", config, run_dir, force=True)
    assert list(read_index(run_dir)["versions"]) == ["1", "2"]
    assert "num_versions: 1" in (run_dir / "model_repository" / "desk" / "config.pbtxt").read_text()
    read_export(run_dir)
    shutil.rmtree(run_dir / "model_repository" / "desk" / "1")
    assert execute_stage("export", config, run_dir).status == "completed"
    assert list(read_index(run_dir)["versions"]) == ["2"], "a removed version is no longer listed"


def test_a_rerun_that_adds_nothing_leaves_config_pbtxt_untouched(tmp_path, two_versions, tiny_model_dir):
    run_dir = tmp_path / "export"
    shutil.copytree(two_versions[0], run_dir)
    file = run_dir / "model_repository" / "desk" / "config.pbtxt"
    before = file.stat()
    config = ExportConfig(**FIELDS, model=str(tiny_model_dir), max_model_len=128, num_versions=2)
    execute_stage("export", config, run_dir, force=True)
    assert list(read_index(run_dir)["versions"]) == ["1", "2"]
    after = file.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_an_export_interrupted_after_the_move_leaves_the_listed_versions_valid(
    tmp_path, two_versions, tiny_model_dir, monkeypatch
):
    run_dir = tmp_path / "export"
    shutil.copytree(two_versions[0], run_dir)

    def interrupted(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("serving.repository.fsync_path", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _export(run_dir, tiny_model_dir, max_model_len=64, max_output_tokens=8)
    assert (run_dir / "model_repository" / "desk" / "3").is_dir()
    assert read_export(run_dir)["version"] == "2"
    assert read_export(run_dir, "1")["version"] == "1"
    done = _export(run_dir, tiny_model_dir, max_model_len=64, max_output_tokens=8)
    assert done.manifest["metrics"]["version"] == 4


def test_a_damaged_newest_version_is_replaced_by_a_new_one(tmp_path, two_versions, tiny_model_dir):
    run_dir = tmp_path / "export"
    shutil.copytree(two_versions[0], run_dir)
    (run_dir / "model_repository" / "desk" / "2" / "model.json").unlink()
    done = _export(run_dir, tiny_model_dir, max_model_len=128, num_versions=2)
    assert done.manifest["metrics"]["version"] == 3
    assert read_export(run_dir)["version"] == "3"
    with pytest.raises(UserError, match="desk/2/model.json: is missing"):
        read_export(run_dir, "2")


@pytest.mark.parametrize("fields", [{"name": "other"}, {"target": "triton-python"}])
def test_a_repository_is_of_one_model_and_one_target(tmp_path, two_versions, tiny_model_dir, fields):
    run_dir = tmp_path / "export"
    shutil.copytree(two_versions[0], run_dir)
    with pytest.raises(UserError, match=f"{next(iter(fields))}: (.|\n)*export to another directory"):
        _export(run_dir, tiny_model_dir, **fields)
    assert list(read_index(run_dir)["versions"]) == ["1", "2"]


def test_a_failed_rerun_leaves_the_versions_that_are_there(tmp_path, two_versions, tiny_model_dir):
    run_dir = tmp_path / "export"
    shutil.copytree(two_versions[0], run_dir)
    files = describe_files(run_dir / "model_repository")
    with pytest.raises(UserError, match="max_model_len: 257"):
        _export(run_dir, tiny_model_dir, max_model_len=257, max_output_tokens=8)
    assert describe_files(run_dir / "model_repository") == files
    assert not list(run_dir.glob(".staging-*"))
    assert read_export(run_dir)["version"] == "2"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, tiny_model_dir):
    root = tmp_path_factory.mktemp("adapters")
    return {
        "formal": random_adapter(root / "formal", tiny_model_dir, seed=1, r=4),
        "brief": random_adapter(root / "brief", tiny_model_dir, seed=2, r=12),
    }


@pytest.fixture(scope="module")
def several(tmp_path_factory, tiny_model_dir, adapters):
    run_dir = tmp_path_factory.mktemp("runs") / "several"
    names = {name: str(path) for name, path in adapters.items()}
    _export(run_dir, tiny_model_dir, adapters=names)
    return run_dir


def test_adapters_stand_beside_their_plain_base(several, adapters, tiny_model_dir):
    manifest = read_export(several)
    folder = version_dir(several, manifest)
    engine = json.loads((folder / "model.json").read_text())
    assert (engine["enable_lora"], engine["max_lora_rank"], engine["max_loras"]) == ("true", 16, 2)
    assert json.loads((folder / "multi_lora.json").read_text()) == {
        name: f"/models/desk/1/adapters/{name}" for name in adapters
    }
    base, trained = load_causal_lm(weights_dir(several, manifest)), load_causal_lm(tiny_model_dir)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(base(ids).logits, trained(ids).logits)
        for name, path in adapters.items():
            ours = PeftModel.from_pretrained(load_causal_lm(tiny_model_dir), str(folder / "adapters" / name))
            theirs = PeftModel.from_pretrained(load_causal_lm(tiny_model_dir), str(path))
            assert torch.equal(ours(ids).logits, theirs(ids).logits)
            assert not torch.allclose(ours(ids).logits, trained(ids).logits, atol=1e-2)
    assert set(manifest["adapters"]) == set(adapters)
    assert len({entry["content_hash"] for entry in manifest["adapters"].values()}) == 2
    assert str(tiny_model_dir) not in (folder / "adapters" / "brief" / "adapter_config.json").read_text()


@pytest.mark.parametrize("kind", ["plain", "adapter", "served adapters"])
def test_golden_answers_hold_one_model_at_a_time(tmp_path, tiny_model_dir, adapters, monkeypatch, kind):
    loaded: list[weakref.ref] = []

    def load_alone(path, **options):
        gc.collect()
        assert not [model for model in loaded if model() is not None], "the one before is still referenced"
        model = load_causal_lm(path, **options)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr("serving.golden.load_causal_lm", load_alone)
    model = adapters["formal"] if kind == "adapter" else tiny_model_dir
    names = {name: str(path) for name, path in adapters.items()} if kind == "served adapters" else {}
    _export(tmp_path / "export", model, adapters=names)
    assert len(loaded) == 2 + 2 * len(names)


def test_the_golden_set_has_every_adapter_and_the_base(several, adapters):
    golden = read_golden(version_dir(several, read_export(several)))
    assert set(golden.served) == {"", *adapters}
    ids = {
        name: [a.token_ids for a in next(iter(columns.values()))] for name, columns in golden.served.items()
    }
    assert ids["formal"] != ids[""] != ids["brief"] != ids["formal"]
    for columns in golden.served.values():
        first, second = columns.values()
        assert [a.token_ids for a in first] == [a.token_ids for a in second]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "cannot be served unmerged \\(use_dora\\)"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": 1024}, "rank 1024, more than 512"),
        ({"peft_type": "IA3"}, "peft_type IA3"),
    ],
)
def test_adapters_that_no_server_applies_are_refused(tmp_path, tiny_model_dir, adapters, change, message):
    shutil.copytree(adapters["brief"], tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=f"adapters.odd: (.|\n)*{message}"):
        _export(tmp_path / "export", tiny_model_dir, adapters={"odd": str(tmp_path / "adapter")})
    assert not (tmp_path / "export" / "model_repository").exists()


def test_adapters_of_another_base_are_refused(tmp_path, tiny_model_dir, adapters):
    shutil.copytree(tiny_model_dir, tmp_path / "base")
    model = load_causal_lm(tmp_path / "base")
    with torch.no_grad():
        model.lm_head.weight += 0.1
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="adapters.brief: (.|\n)*was trained on(.|\n)*which is not the model"):
        _export(tmp_path / "export", tmp_path / "base", adapters={"brief": str(adapters["brief"])})


def test_the_base_of_adapters_must_be_plain(tmp_path, adapters):
    with pytest.raises(UserError, match="is an adapter; with `adapters`, name their base model"):
        _export(tmp_path / "export", adapters["formal"], adapters={"brief": str(adapters["brief"])})
