"""The merge stage: the merged model computes what the adapter computes, and the directory is complete."""

from __future__ import annotations

import shutil

import pytest
import torch

from posttrain.errors import PosttrainError, UserError
from posttrain.models import load_causal_lm, load_reward_model
from tests.integration.conftest import file_names
from train.merge import check_merge
from train.reward_scores import score_dialogues


@pytest.fixture(scope="module")
def merged_run(tmp_path_factory, run_stage, sft_run):
    run_dir = tmp_path_factory.mktemp("runs") / "merged"
    run_stage("merge", run_dir, model=sft_run)
    return run_dir


def _logits(model):
    ids = torch.arange(3, 103)[None]
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_writes_a_complete_model(merged_run, sft_run, tiny_tokenizer):
    assert file_names(merged_run / "model") == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for name in ("chat_template.jinja", "tokenizer.json"):
        assert (merged_run / "model" / name).read_bytes() == (sft_run / "model" / name).read_bytes()
    model = load_causal_lm(merged_run / "model")
    assert model.generation_config.eos_token_id == tiny_tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tiny_tokenizer.pad_token_id
    assert model.config.eos_token_id == tiny_tokenizer.eos_token_id


def test_computes_what_the_adapter_computes(merged_run, sft_run, tiny_model_dir):
    merged = _logits(load_causal_lm(merged_run / "model"))
    adapted = _logits(load_causal_lm(sft_run / "model"))
    base = _logits(load_causal_lm(tiny_model_dir))
    assert (merged - adapted).abs().max() < 1e-4
    assert (merged - base).abs().max() > 1e-2


def test_reports_the_difference_on_dialogues(run_stage, tmp_path, sft_run, conversation_data):
    metrics = run_stage("merge", tmp_path / "run", model=sft_run, data=conversation_data)
    assert 0 < metrics["max_logit_difference"] <= 1e-4 < metrics["max_logit_change_from_base"]


def test_carries_head_and_calibration_of_a_reward_model(run_stage, tmp_path, reward_run, tiny_tokenizer):
    run_stage("merge", tmp_path / "run", model=reward_run)
    adapted, before = load_reward_model(reward_run / "model")
    merged, after = load_reward_model(tmp_path / "run" / "model")
    assert before == after and before["n"] == 48
    dialogues = [[5, 6, 7, tiny_tokenizer.eos_token_id], [40, 41, tiny_tokenizer.eos_token_id]]
    left, right = score_dialogues(adapted, before, dialogues), score_dialogues(merged, after, dialogues)
    assert torch.allclose(left, right, atol=1e-4)
    assert not (tmp_path / "run" / "model" / "adapter_config.json").exists()


def test_saves_in_the_type_asked_for(run_stage, tmp_path, sft_run, merged_run):
    run_stage("merge", tmp_path / "run", model=sft_run, dtype="bfloat16")
    full = load_causal_lm(merged_run / "model").state_dict()
    half = load_causal_lm(tmp_path / "run" / "model", dtype="bfloat16").state_dict()
    assert all(torch.equal(half[name], full[name].to(torch.bfloat16)) for name in full)


def test_refuses_a_tolerance_it_cannot_keep(run_stage, tmp_path, sft_run):
    with pytest.raises(PosttrainError, match="more than tolerance"):
        run_stage("merge", tmp_path / "run", model=sft_run, tolerance=1e-12)
    assert not (tmp_path / "run" / "model").exists()


def test_refuses_an_adapter_that_does_nothing():
    with pytest.raises(PosttrainError, match="does nothing"):
        check_merge(0.0, 0.0, 1e-4)
    with pytest.raises(PosttrainError, match="more than tolerance"):
        check_merge(float("nan"), 1.0, 1e-4)


def test_refuses_a_full_model(run_stage, tmp_path, tiny_model_dir):
    with pytest.raises(UserError, match="nothing to merge"):
        run_stage("merge", tmp_path / "run", model=tiny_model_dir)


def test_names_a_missing_base_model(run_stage, tmp_path, sft_run):
    adapter = tmp_path / "adapter"
    shutil.copytree(sft_run / "model", adapter)
    settings = (adapter / "adapter_config.json").read_text()
    base = settings.split('"base_model_name_or_path": "')[1].split('"')[0]
    (adapter / "adapter_config.json").write_text(settings.replace(base, "/nowhere/base"))
    with pytest.raises(UserError, match="/nowhere/base"):
        run_stage("merge", tmp_path / "run", model=adapter)
