"""The kto stage on the two-layer model: rows made of pairs, reference, files."""

from __future__ import annotations

import json

import pytest

from data_prep.dataset import read_split
from posttrain.errors import UserError
from posttrain.models import load_tokenizer
from tests.integration.conftest import file_names, load_adapter, read_rows
from train import kto
from train.encode import encode_pairs
from train.finish import train_and_save
from train.pairs import unpair

ADAPTER_FILES = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def kto_run(tmp_path_factory, run_stage, tiny_model_dir, preference_data):
    run_dir = tmp_path_factory.mktemp("runs") / "kto"
    run_stage("kto", run_dir, model=tiny_model_dir, data=preference_data, trainer={"logging_steps": 1})
    return run_dir


def test_each_pair_gives_a_desirable_and_an_undesirable_row(preference_data):
    pairs = read_split(preference_data, "train", "preference")
    rows = unpair(pairs, seed=3)
    assert rows.column_names == ["prompt", "completion", "label"]
    assert rows["label"] == [True, False] * len(pairs)
    for label, side in ((True, "chosen"), (False, "rejected")):
        made = [json.dumps([row["prompt"], row["completion"]]) for row in rows if row["label"] is label]
        assert sorted(made) == sorted(json.dumps([pair["prompt"], pair[side]]) for pair in pairs)
    assert rows.to_list() == unpair(pairs, seed=3).to_list() != unpair(pairs, seed=4).to_list()


def test_the_two_answers_to_a_prompt_are_half_the_data_apart(preference_data):
    pairs = read_split(preference_data, "train", "preference").add_column("number", list(range(48)))
    pairs = pairs.map(lambda row: {"prompt": [{"role": "user", "content": str(row["number"])}]})
    prompts = [row["prompt"][0]["content"] for row in unpair(pairs, seed=0)]
    places = {name: [place for place, other in enumerate(prompts) if other == name] for name in prompts}
    assert {abs(a - b) for a, b in places.values()} <= {47, 49}


def test_writes_an_adapter_on_the_reference(kto_run, tiny_model_dir):
    assert file_names(kto_run / "model") == ADAPTER_FILES
    assert {path.name for path in kto_run.iterdir()} >= {"config.yaml", "manifest.json", "metrics.jsonl"}
    settings = json.loads((kto_run / "model" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tiny_model_dir.resolve())
    tensors = load_adapter(kto_run)
    assert all(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)


def test_starts_at_the_reference_and_widens_the_margin(kto_run):
    rows = [row for row in read_rows(kto_run) if "loss" in row]
    first, last = rows[0], rows[-1]
    assert first["loss"] == pytest.approx(0.5, abs=1e-5), "policy equals reference before the first update"
    assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-5) == first["kl"]
    assert last["rewards/margins"] > 0.1 and last["loss"] < first["loss"]
    assert read_rows(kto_run)[-1].keys() >= {"eval_loss", "eval_rewards/margins"}


def test_trl_trains_on_the_tokens_of_the_pairs(
    run_stage, tmp_path, tiny_model_dir, preference_data, monkeypatch
):
    seen = []

    def look(trainer, *arguments):
        seen.append(trainer)
        return train_and_save(trainer, *arguments)

    monkeypatch.setattr(kto, "train_and_save", look)
    trainer = {"max_steps": 1, "save_steps": 1}
    run_stage("kto", tmp_path / "run", model=tiny_model_dir, data=preference_data, trainer=trainer)
    rows = seen[0].train_dataset
    made = sorted(row["prompt_ids"] + row["completion_ids"] for row in rows)
    tokenizer = load_tokenizer(tiny_model_dir)
    pairs = encode_pairs(tokenizer, read_split(preference_data, "train", "preference").to_list())
    assert made == sorted(side for pair in pairs for side in pair)
    assert all(row["completion_ids"][-1] == tokenizer.eos_token_id for row in rows)
    assert all(row["KL_completion_ids"][-1] == tokenizer.eos_token_id for row in rows)


@pytest.mark.parametrize("precompute", [False, True])
def test_full_training_has_a_frozen_copy_as_reference(
    run_stage, tmp_path, sft_run, preference_data, precompute
):
    """Also from an adapter, where the reference is the adapted model and not its base."""
    trainer = {
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "precompute_ref_log_probs": precompute,
    }
    run_stage("kto", tmp_path / "run", model=sft_run, data=preference_data, peft=None, trainer=trainer)
    first = read_rows(tmp_path / "run")[0]
    assert first["loss"] == pytest.approx(0.5, abs=1e-5)
    names = {"config.json", "generation_config.json", "model.safetensors"}
    assert file_names(tmp_path / "run" / "model") == names | {
        name for name in ADAPTER_FILES if not name.startswith("adapter")
    }


def test_refuses_an_adapter_as_the_model(run_stage, tmp_path, sft_run, preference_data):
    with pytest.raises(UserError, match=r"(?s)LoRA adapter.*stage: merge"):
        run_stage("kto", tmp_path / "run", model=sft_run, data=preference_data)
