"""KTO on answers that are labelled each by itself: rows, preflight, and a published file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from data_prep.config import CurateConfig
from data_prep.dataset import read_split
from posttrain.models import load_tokenizer
from posttrain.stage import execute_stage
from tests.integration.conftest import load_adapter, read_rows
from train import kto
from train.encode import render_whole
from train.finish import train_and_save
from train.pairs import spread

SHARED = Path(os.environ.get("POSTTRAIN_SHARED_DATA", Path(__file__).parents[2] / "../shared/data"))
PUBLISHED = SHARED / "llamafactory_demo" / "data" / "kto_en_demo.json"


def test_every_batch_has_its_share_of_both_labels(labelled_data):
    rows = read_split(labelled_data, "train", "unpaired_preference")
    labels = spread(rows, seed=3)["label"]
    assert sum(labels) == 32 and len(labels) == 48
    assert {sum(labels[start : start + 6]) for start in range(0, 48, 6)} == {4}
    assert sorted(spread(rows, seed=3)["id"]) == sorted(rows["id"])
    assert spread(rows, seed=3)["id"] != spread(rows, seed=4)["id"] != rows["id"]
    good = rows.filter(lambda row: row["label"])
    assert len(spread(good, seed=0)) == 32


def test_trl_trains_on_the_answers_as_they_are_labelled(
    run_stage, tmp_path, tiny_model_dir, labelled_data, monkeypatch
):
    seen = []

    def look(trainer, *arguments):
        seen.append(trainer)
        return train_and_save(trainer, *arguments)

    monkeypatch.setattr(kto, "train_and_save", look)
    fields = {"model": tiny_model_dir, "data": labelled_data, "trainer": {"logging_steps": 1}}
    metrics = run_stage("kto", tmp_path / "run", **fields)
    assert (metrics["desirable"], metrics["undesirable"], metrics["answers_dropped_too_long"]) == (32, 16, 0)
    made = {(*row["prompt_ids"], *row["completion_ids"], row["label"]) for row in seen[0].train_dataset}
    rows = read_split(labelled_data, "train", "unpaired_preference").to_list()
    whole = render_whole(load_tokenizer(tiny_model_dir), [row["prompt"] + row["completion"] for row in rows])
    assert made == {(*ids, row["label"]) for ids, row in zip(whole, rows, strict=True)}
    logged = [row for row in read_rows(tmp_path / "run") if "loss" in row]
    assert logged[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    assert logged[-1]["rewards/margins"] > 0.1
    assert all(tensor.any() for name, tensor in load_adapter(tmp_path / "run").items() if "lora_B" in name)


def test_leaves_out_and_counts_what_does_not_fit(run_stage, tmp_path, tiny_model_dir, dataset, make_rows):
    rows = make_rows["unpaired_preference"](40, 0)
    rows[4]["completion"][0]["content"] += " Thank you." * 60
    fields = {"model": tiny_model_dir, "data": dataset("unpaired_preference", rows)}
    metrics = run_stage("kto", tmp_path / "run", trainer={"max_steps": 1, "max_length": 128}, **fields)
    assert (metrics["desirable"], metrics["answers_dropped_too_long"]) == (25, 1)


@pytest.mark.parametrize("label", [True, False])
def test_one_label_is_refused(label, refused, tiny_model_dir, dataset, make_rows):
    rows = [row | {"label": label} for row in make_rows["unpaired_preference"](12, 0)]
    said = (f"all 12 answers are labelled {str(label).lower()}", "curate answers with both labels")
    refused("kto", "data", *said, model=tiny_model_dir, data=dataset("unpaired_preference", rows))


def test_answers_labelled_both_ways(refused, warned, tiny_model_dir, dataset, make_rows, tmp_path):
    rows = make_rows["unpaired_preference"](12, 0)
    other = [row | {"label": not row["label"]} for row in rows]
    said = ("24 of 24 answers (100.0%) are there with the other label too", "keep one label of each answer")
    refused("kto", "data", *said, model=tiny_model_dir, data=dataset("unpaired_preference", rows + other))
    data = dataset("unpaired_preference", rows + other[:1])
    warned("kto", "2 of 13 answers (15.4%) are there with", model=tiny_model_dir, data=data)


def test_answers_that_are_too_long(refused, tiny_model_dir, labelled_data):
    said = ("48 of 48 answers (100.0%) are longer than trainer.max_length=16", "raise trainer.max_length")
    fields = {"model": tiny_model_dir, "data": labelled_data, "trainer": {"max_length": 16}}
    refused("kto", "trainer.max_length", *said, **fields)


def test_prompt_that_is_rendered_otherwise_before_an_answer(refused, variant, labelled_data):
    model = variant("'\\n<|im_start|>assistant\\n'", "'\\n<|im_start|>assistant: '")
    said = ("48 of 48 answers (100.0%) have a prompt whose tokens", "use a chat template whose generation")
    refused("kto", "model", *said, model=model, data=labelled_data)


def test_weights_outside_the_range_of_the_paper_are_a_warning(warned, tiny_model_dir, labelled_data):
    fields = {"model": tiny_model_dir, "data": labelled_data}
    said = warned(
        "kto",
        ": trainer.desirable_weight: ",
        "32 desirable answers x desirable_weight 1 to 16 undesirable x undesirable_weight 1 is 2:1",
        "set trainer.desirable_weight to between 0.5 and 0.667, or "
        "trainer.undesirable_weight to between 1.5 and 2\n",
        **fields,
    )
    assert ">>>" in said and "<|im_end|>" in said.rpartition(">>>")[2], "the answer is shown as trained"
    for trainer in ({"desirable_weight": 0.6}, {"undesirable_weight": 2.0}):
        assert "desirable_weight" not in warned("kto", "one example", **fields, trainer=trainer)


def test_weights_of_pairs_are_looked_at_too(warned, tiny_model_dir, preference_data):
    fields = {"model": tiny_model_dir, "data": preference_data}
    warned("kto", "is 3:1; the KTO paper", **fields, trainer={"desirable_weight": 3.0})
    assert "the KTO paper" not in warned("kto", "one example", **fields)


def test_a_last_batch_of_one_answer_is_a_warning(warned, tiny_model_dir, dataset, make_rows):
    data = dataset("unpaired_preference", make_rows["unpaired_preference"](25, 0))
    fields = {"model": tiny_model_dir, "data": data}
    said = (": trainer.per_device_train_batch_size: 4 leaves one of", "25 answers alone", "use 5, or")
    warned("kto", *said, **fields)
    whole = warned("kto", "one example", **fields, trainer={"dataloader_drop_last": True})
    assert "alone in the last batch" not in whole


def test_a_published_file_of_labelled_answers(run_stage, tmp_path, tiny_model_dir):
    """LLaMA-Factory's demonstration of KTO: 300 dialogues of up to six answers, a label each."""
    if not PUBLISHED.is_file():
        pytest.skip(f"{PUBLISHED} is not here; set POSTTRAIN_SHARED_DATA to the folder of shared test data")
    settings = {"kind": "unpaired_preference", "sources": [{"path": str(PUBLISHED)}]}
    made = execute_stage("curate", CurateConfig.model_validate(settings), tmp_path / "data").manifest[
        "metrics"
    ]
    assert made["rows_in"] == 300 and made["rows_out"] + sum(made["drops"].values()) == 300
    labels = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    rows = [row for split in ("train", "eval") for row in read_split(tmp_path / "data", split).to_list()]
    wanted = {(row["messages"][-1]["content"], row["label"]) for row in labels}
    assert {(row["completion"][0]["content"], row["label"]) for row in rows} == wanted
    # The tiny model reads 256 tokens: most of these dialogues are longer, so the preflight is left out.
    fields = {"model": tiny_model_dir, "data": tmp_path / "data", "preflight": False}
    metrics = run_stage("kto", tmp_path / "run", trainer={"max_steps": 4, "save_steps": 4}, **fields)
    kept = metrics["desirable"] + metrics["undesirable"]
    assert metrics["desirable"] > 5 < metrics["undesirable"]
    assert kept + metrics["answers_dropped_too_long"] == made["train_rows"]
    assert metrics["steps"] == 4
