"""Every YAML that ships is valid by the product's own check, and recipes say the same in both forms."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from posttrain.cli_check import Checked, check_file
from posttrain.known_models import known_config
from posttrain.pipeline import read_blocks
from posttrain.stage import execute_stage
from tests.unit.test_known_models import PUBLISHED

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
FILES = sorted(CONFIGS.rglob("*.y*ml"))
MODELS = "smollm2-135m qwen2.5-0.5b qwen3-4b llama-3.1-8b mistral-7b llama-3.3-70b".split()
STAGE_FILES = "sft reward dpo ppo grpo eval export serve".split()


def recipe(path: Path) -> str:
    return str(path.relative_to(CONFIGS))


def test_the_documented_configs_are_there():
    names = {recipe(path) for path in FILES}
    assert names >= {"tiny/pipeline.yaml", "hh_rlhf/tiny.yaml", "data/tldr.yaml"}
    assert names >= {f"{model}/{stage}.yaml" for model in MODELS for stage in (*STAGE_FILES, "pipeline")}


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Checked]:
    """Checks a file for another machine, once, in a folder where nothing has been made yet."""
    folder = tmp_path_factory.mktemp("elsewhere")

    @cache
    def check(path: Path) -> Checked:
        with contextlib.chdir(folder):
            return check_file(path, offline=True)

    return check


@pytest.mark.parametrize("path", FILES, ids=recipe)
def test_config_is_valid_wherever_it_will_run(path, elsewhere):
    """All of it; what only this machine lacks (a GPU, deepspeed, Triton) is not the file's business."""
    checked = elsewhere(path)
    assert checked.reviews
    assert checked.problems == []


@pytest.mark.parametrize("model", MODELS)
def test_every_trained_stage_of_a_recipe_is_looked_at_by_its_architecture(model, elsewhere):
    """Through the whole chain of stages, down to the published model."""
    config = yaml.safe_load((CONFIGS / model / "pipeline.yaml").read_text(encoding="utf-8"))
    known = known_config(config["vars"]["model"])
    assert known is not None
    published = PUBLISHED[known.stem.replace("--", "/")]
    notes = {
        review.name: " ".join(review.findings.notes)
        for review in elsewhere(CONFIGS / model / "pipeline.yaml").reviews
        if review.findings.notes
    }
    assert set(notes) == {"sft", "reward", "dpo", "ppo", "grpo"}
    policies = set(notes) - {"reward"}
    assert all(f"ForCausalLM of {published:,} parameters" in notes[name] for name in policies)
    assert "ForSequenceClassification of" in notes["reward"]


@pytest.mark.parametrize(
    "path", [f for f in FILES if f.parent.name in MODELS and f.stem != "pipeline"], ids=recipe
)
def test_a_stage_file_is_the_stage_of_the_pipeline(path):
    [alone] = read_blocks(path)
    stages = {block.name: block for block in read_blocks(path.parent / "pipeline.yaml")}
    together = stages[path.stem]
    assert (alone.kind, alone.run_dir) == (together.kind, together.run_dir)
    assert alone.config == together.config


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.json")), ids=recipe)
def test_a_deepspeed_configuration_shards_what_its_name_says(path):
    settings = json.loads(path.read_text(encoding="utf-8"))
    assert settings["zero_optimization"]["stage"] == int(path.stem[-1])
    batch = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert {settings[name] for name in batch} == {
        "auto"
    }  # the trainer's, or the two would contradict each other


PAIR = {"prompt": "Two and {}?", "chosen": "That is {}.", "rejected": "No idea, {}."}


def published_rows(number: int) -> dict[str, dict[str, Any]]:
    """One row of each data set in the columns it is published in, by its file below the data sets' folder."""
    text = {name: template.format(number) for name, template in PAIR.items()}
    turns = {
        side: [{"content": text["prompt"], "role": "user"}, {"content": text[side], "role": "assistant"}]
        for side in ("chosen", "rejected")
    }
    transcripts = {
        side: f"\n\nHuman: {text['prompt']}\n\nAssistant: {text[side]}" for side in ("chosen", "rejected")
    }
    zephyr = {"prompt": text["prompt"], "prompt_id": str(number), **turns, "messages": turns["chosen"]}
    return {
        "HuggingFaceH4/ultrafeedback_binarized/data/train_prefs-00000-of-00001.parquet": zephyr
        | {"score_chosen": 8.5, "score_rejected": 6.0},
        "Anthropic/hh-rlhf/helpful-base/train.jsonl.gz": transcripts,
        "Anthropic/hh-rlhf/harmless-base/train.jsonl.gz": {
            side: value.replace("Two", "Three") for side, value in transcripts.items()
        },
        "trl-lib/tldr/data/train-00000-of-00001.parquet": {
            "prompt": text["prompt"],
            "completion": text["chosen"],
        },
        "trl-lib/tldr-preference/data/train-00000-of-00001.parquet": text,
        "openai/gsm8k/main/train-00000-of-00001.parquet": {
            "question": text["prompt"],
            "answer": f"2 + {number} is {number + 2}.\n#### {number + 2}",
        },
    }


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `hf download` leaves of the data sets: their files and columns, with rows of our own."""
    from datasets import Dataset

    folder = tmp_path_factory.mktemp("hub")
    rows = [published_rows(number) for number in range(200)]
    for name in rows[0]:
        file = folder / name
        file.parent.mkdir(parents=True)
        table = Dataset.from_list([row[name] for row in rows])
        if file.suffix == ".parquet":
            table.to_parquet(file)
        else:
            table.to_json(file, compression="gzip")
    return folder


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("data/ultrafeedback", {"demos": 200, "prefs": 200, "prompts": 200}),
        ("data/hh-rlhf", {"demos": 400, "prefs": 400, "prompts": 400}),
        ("data/tldr", {"demos": 200, "prefs": 200, "prompts": 200}),
        ("data/gsm8k", {"demos": 200, "problems": 200}),
        ("qwen3-4b/pipeline", {"demos": 400, "prefs": 200, "prompts": 200, "problems": 200}),
    ],
)
def test_the_data_sets_are_read_from_the_columns_they_are_published_in(name, rows, hub, tmp_path):
    overrides = [f"vars.hub={hub}", f"output_dir={tmp_path}"]
    blocks = [block for block in read_blocks(CONFIGS / f"{name}.yaml", overrides) if block.kind == "curate"]
    assert {block.name for block in blocks} == set(rows)
    for block in blocks:
        metrics = execute_stage(block.kind, block.config, block.run_dir).manifest["metrics"]
        assert metrics["rows_in"] == rows[block.name]
        assert metrics["train_rows"] + metrics["eval_rows"] == rows[block.name]
    held_out = {block.name: eval_prompts(block.run_dir) for block in blocks}
    if {"demos", "prefs"} <= set(held_out):
        assert held_out["prefs"] <= held_out["demos"]


def eval_prompts(folder: Path) -> set[str]:
    """First user turns of the eval split."""
    from datasets import Dataset

    table = Dataset.from_parquet(str(folder / "eval.parquet"))
    column = "messages" if "messages" in table.column_names else "prompt"
    return {turns[0]["content"] for turns in table[column]}
