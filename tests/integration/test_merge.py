"""The merge stage: the merged model computes what the adapter computes, and the directory is complete."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from transformers import AutoConfig, AutoModelForCausalLM

from posttrain.errors import PosttrainError, UserError
from posttrain.hashing import fingerprint_tokenizer
from posttrain.models import load_causal_lm, load_reward_model, load_tokenizer
from tests.integration.conftest import command, file_names, load_adapter, make_config
from train import merge
from train.merge_checks import Answer, check_greedy, check_merge, compare_greedy
from train.reward_scores import score_dialogues

METHODS = {
    "cat": {},
    "linear": {},
    "svd": {"svd_rank": 3},
    "ties": {"density": 0.5},
    "dare_linear": {"density": 0.5},
    "dare_ties": {"density": 0.5},
}


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
    assert fingerprint_tokenizer(merged_run / "model") == fingerprint_tokenizer(sft_run / "model")
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


@pytest.mark.parametrize("kind", ["conversation", "preference", "prompt", "text"])
def test_reports_the_difference_on_rows(kind, request, run_stage, tmp_path, sft_run):
    data = request.getfixturevalue(f"{kind}_data")
    metrics = run_stage("merge", tmp_path / "run", model=sft_run, data=data)
    assert 0 < metrics["max_logit_difference"] <= 1e-4 < metrics["max_logit_change_from_base"]
    assert metrics["max_logit_difference_as_saved"] == pytest.approx(
        metrics["max_logit_difference"], abs=1e-5
    )
    assert (metrics["greedy_prompts"], metrics["greedy_mismatches"]) == (8, 0)
    assert 8 <= metrics["greedy_tokens"] <= 8 * 32


def test_configs_are_those_of_transformers_4_and_the_model_is_the_same_to_5(merged_run, tiny_model_dir):
    """It adds the keys that transformers 4 reads; transformers 5 sees the configuration of the base."""
    written = json.loads((merged_run / "model" / "config.json").read_text())
    assert (
        written["rope_theta"] == written["rope_parameters"]["rope_theta"]
        and written["torch_dtype"] == "float32"
    )
    merged, base = (AutoConfig.from_pretrained(path) for path in (merged_run / "model", tiny_model_dir))
    assert merged.to_dict() | {"_name_or_path": ""} == base.to_dict() | {"_name_or_path": ""}
    settings = json.loads((merged_run / "model" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["additional_special_tokens"] == ["<|im_start|>"]
    ours, theirs = load_tokenizer(merged_run / "model"), load_tokenizer(tiny_model_dir)
    assert settings["chat_template"] == theirs.chat_template == ours.chat_template
    text = "<|im_start|>user\nWhere is my  order?<|im_end|>\n"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.all_special_ids == theirs.all_special_ids


def test_generation_settings_of_the_base_are_carried_over(run_stage, tmp_path, sft_run, tiny_model_dir):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(tiny_model_dir, base)
    settings = json.loads((base / "generation_config.json").read_text())
    settings |= {"do_sample": True, "temperature": 0.7, "top_k": 11, "eos_token_id": [1, 2]}
    (base / "generation_config.json").write_text(json.dumps(settings))
    shutil.copytree(sft_run / "model", adapter)
    own = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(own))
    metrics = run_stage("merge", tmp_path / "run", model=adapter)
    merged = load_causal_lm(tmp_path / "run" / "model").generation_config
    assert (merged.do_sample, merged.temperature, merged.top_k, merged.eos_token_id) == (
        True,
        0.7,
        11,
        [2, 1],
    )
    assert metrics["greedy_mismatches"] == 0


def test_carries_head_and_calibration_of_a_reward_model(run_stage, tmp_path, reward_run, tiny_tokenizer):
    metrics = run_stage("merge", tmp_path / "run", model=reward_run)
    adapted, before = load_reward_model(reward_run / "model")
    merged, after = load_reward_model(tmp_path / "run" / "model")
    assert before == after and before["n"] == 48
    dialogues = [[5, 6, 7, tiny_tokenizer.eos_token_id], [40, 41, tiny_tokenizer.eos_token_id]]
    left, right = score_dialogues(adapted, before, dialogues), score_dialogues(merged, after, dialogues)
    assert torch.allclose(left, right, atol=1e-4)
    assert not (tmp_path / "run" / "model" / "adapter_config.json").exists()
    assert "greedy_tokens" not in metrics


def test_saves_in_the_type_asked_for(run_stage, tmp_path, sft_run, merged_run):
    metrics = run_stage("merge", tmp_path / "run", model=sft_run, dtype="bfloat16")
    full = load_causal_lm(merged_run / "model").state_dict()
    half = load_causal_lm(tmp_path / "run" / "model", dtype="bfloat16").state_dict()
    assert all(torch.equal(half[name], full[name].to(torch.bfloat16)) for name in full)
    assert metrics["max_logit_difference"] <= 1e-4 < 1e-3 < metrics["max_logit_difference_as_saved"]
    assert metrics["greedy_mismatches_as_saved"] >= 0


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


def test_refuses_a_model_that_writes_something_else(monkeypatch, run_stage, tmp_path, sft_run):
    """The logits agree where they were compared, and an answer does not: the first difference is shown."""
    greedy = merge.greedy
    calls = []

    def wrong_after_the_merge(model, prompts, length, tokenizer):
        calls.append(isinstance(model, PeftModel))
        if not calls[-1]:
            model.lm_head.weight.data[[40, 50]] = -model.lm_head.weight.data[[50, 40]]
        return greedy(model, prompts, length, tokenizer)

    monkeypatch.setattr(merge, "greedy", wrong_after_the_merge)
    with pytest.raises(
        PosttrainError, match=r"Nothing was written. The first: prompt \d, token \d+: the adapter"
    ):
        run_stage("merge", tmp_path / "run", model=sft_run)
    assert calls == [True, False]
    assert not (tmp_path / "run" / "model").exists()


def test_a_tie_is_no_mismatch(tiny_tokenizer):
    scores = torch.zeros(3, 8)
    scores[1, 5], scores[1, 6], scores[2, 7] = 1.0, 1.0 - 1.5e-4, 1.0
    adapter, same, other = (Answer(ids, scores) for ids in ([3, 5, 7], [3, 5, 7], [3, 6, 4]))
    found = compare_greedy([adapter, adapter], [same, other], 1e-4, tiny_tokenizer)
    assert (found.tokens, found.mismatches, found.ties, found.first) == (4, 0, 1, None)
    found = compare_greedy([adapter, adapter], [same, other], 0.7e-4, tiny_tokenizer)
    assert (found.tokens, found.mismatches, found.ties) == (4, 1, 0)
    assert found.first.startswith("prompt 1, token 1: the adapter writes")
    with pytest.raises(PosttrainError, match="on 1 prompts"):
        check_greedy(found)


@pytest.fixture(scope="module")
def second_run(tmp_path_factory, run_stage, tiny_model_dir, conversation_data):
    """Another adapter of the tiny model, of the same rank and another scale."""
    run_dir = tmp_path_factory.mktemp("runs") / "second"
    peft = {"r": 4, "lora_alpha": 4, "use_rslora": True, "target_modules": ["q_proj", "up_proj"]}
    block = {"max_steps": 3, "learning_rate": 3e-2}
    run_stage("sft", run_dir, model=tiny_model_dir, data=conversation_data, peft=peft, trainer=block, seed=1)
    return run_dir


def both(first, second, weights=(0.6, -0.4)):
    return [
        {"model": str(run), "weight": weight} for run, weight in zip((first, second), weights, strict=True)
    ]


def combined_by_hand(sft_run, second_run, tiny_model_dir):
    """Weights of base + 0.6 (first - base) - 0.4 (second - base)."""
    first, second = (load_causal_lm(run / "model").state_dict() for run in (sft_run, second_run))
    base = load_causal_lm(tiny_model_dir).state_dict()
    return {n: w + 0.6 * (first[n] - w) - 0.4 * (second[n] - w) for n, w in base.items()}


@pytest.mark.parametrize("method", METHODS)
def test_combines_adapters(method, run_stage, tmp_path, sft_run, second_run, tiny_model_dir):
    fields = {"adapters": both(sft_run, second_run), "method": method, "greedy_tokens": 8, **METHODS[method]}
    metrics = run_stage("merge", tmp_path / "run", **fields)
    assert (metrics["adapters"], metrics["method"], metrics["greedy_mismatches"]) == (2, method, 0)
    assert 0 < metrics["max_logit_difference"] <= 1e-4 < metrics["max_logit_change_from_base"]
    merged = load_causal_lm(tmp_path / "run" / "model").state_dict()
    exact = combined_by_hand(sft_run, second_run, tiny_model_dir)
    gap = max((merged[name] - exact[name]).abs().max().item() for name in exact)
    assert (gap < 1e-5) == (method == "cat"), "the others are approximations"


@pytest.mark.parametrize("method", ["cat", "dare_ties"])
def test_writes_the_combination_as_an_adapter(
    method, run_stage, tmp_path, sft_run, second_run, tiny_model_dir
):
    fields = {"adapters": both(second_run, sft_run, (-0.4, 0.6)), "greedy_tokens": 8}
    fields |= {"method": method, **METHODS[method]}
    metrics = run_stage("merge", tmp_path / "adapter", output="adapter", **fields)
    run_stage("merge", tmp_path / "model", **fields)
    assert metrics["adapter_rank"] == {"cat": 8, "dare_ties": 4}[method]
    assert "adapter_model.safetensors" in file_names(tmp_path / "adapter" / "model")
    settings = json.loads((tmp_path / "adapter" / "model" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tiny_model_dir.resolve())
    left, right = (load_causal_lm(tmp_path / name / "model") for name in ("adapter", "model"))
    assert (_logits(left) - _logits(right)).abs().max() < 1e-4, "dare draws the same with the same seed"
    if method == "cat":  # the first adapter has rslora, whose scale peft would hand on
        exact = combined_by_hand(sft_run, second_run, tiny_model_dir)
        assert all(torch.allclose(w, exact[name], atol=1e-5) for name, w in left.state_dict().items())


def test_a_seed_decides_what_dare_leaves_out(run_stage, tmp_path, sft_run, second_run):
    fields = {
        "adapters": both(sft_run, second_run),
        "method": "dare_linear",
        "density": 0.5,
        "output": "adapter",
    }
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run_stage("merge", tmp_path / name, seed=seed, greedy_tokens=0, **fields)
    a, b, c = (load_adapter(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


def test_refuses_adapters_of_different_bases(run_stage, tmp_path, sft_run, second_run, tiny_model_dir):
    base, adapter = tmp_path / "base", tmp_path / "other"
    shutil.copytree(tiny_model_dir, base)
    shutil.copytree(second_run / "model", adapter)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    own = settings | {"base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(own))
    run_stage("merge", tmp_path / "same", adapters=both(sft_run, adapter), greedy_tokens=0)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.lm_head.weight.data[0] += 1
    model.save_pretrained(base)
    with pytest.raises(UserError) as refused:
        run_stage("merge", tmp_path / "run", adapters=both(sft_run, adapter))
    assert all(str(name) in str(refused.value) for name in (sft_run, tiny_model_dir, adapter, base))


def test_refuses_adapters_of_different_templates(run_stage, tmp_path, sft_run, second_run):
    shutil.copytree(second_run / "model", tmp_path / "other")
    (tmp_path / "other" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with pytest.raises(UserError, match=r"adapters.0.model \(.*adapters.1.model \(.*differ in chat template"):
        run_stage("merge", tmp_path / "run", adapters=both(sft_run, tmp_path / "other"))


def test_refuses_adapters_that_cannot_be_added(run_stage, tmp_path, sft_run, reward_run, tiny_model_dir):
    with pytest.raises(UserError, match=r"more than LoRA matrices \(.*score"):
        run_stage("merge", tmp_path / "run", adapters=both(sft_run, reward_run))
    with pytest.raises(UserError, match="already, there is nothing to merge"):
        run_stage("merge", tmp_path / "run", adapters=both(sft_run, tiny_model_dir))


def test_refuses_ranks_that_linear_cannot_add(
    run_stage, tmp_path, sft_run, conversation_data, tiny_model_dir
):
    fields = {
        "model": tiny_model_dir,
        "data": conversation_data,
        "trainer": {"max_steps": 1, "save_steps": 1},
    }
    run_stage("sft", tmp_path / "other", peft={"r": 2, "lora_alpha": 2}, **fields)
    with pytest.raises(UserError, match="cannot combine them by linear: .*same r value"):
        run_stage("merge", tmp_path / "run", adapters=both(sft_run, tmp_path / "other"), method="linear")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "set `model`"),
        ({"model": "a", "adapters": [{"model": "a"}, {"model": "b"}]}, "not both"),
        ({"adapters": [{"model": "a"}]}, "at least 2"),
        ({"model": "a", "method": "cat"}, "about several adapters"),
        ({"adapters": [{"model": "a"}, {"model": "b"}], "method": "ties"}, "needs density"),
        ({"adapters": [{"model": "a"}, {"model": "b"}], "density": 0.5}, "takes no density"),
        ({"adapters": [{"model": "a"}, {"model": "b"}], "svd_rank": 4}, "takes no svd_rank"),
        (
            {"adapters": [{"model": "a"}, {"model": "b"}], "output": "adapter", "dtype": "bfloat16"},
            "saved in float32",
        ),
    ],
)
def test_settings_that_contradict_each_other(fields, said):
    with pytest.raises(ValidationError, match=said):
        make_config("merge", **fields)


def test_the_command_takes_one_adapter_or_several(tmp_path, sft_run, second_run):
    assert command("merge", f"model={sft_run}", "--output", tmp_path / "one").exit_code == 0
    several = f"adapters=[{{model: {sft_run}, weight: 0.6}}, {{model: {second_run}, weight: 0.4}}]"
    done = command("merge", several, "method=linear", "--output", tmp_path / "two")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "two" / "model" / "model.safetensors").is_file()
