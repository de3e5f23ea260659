"""The eval stage on two-layer models: what it writes, that it repeats, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.tiny import rubric
from eval.config import EvalConfig
from eval.generation import encode_prompt
from eval.stage import run
from posttrain.errors import DataError, UserError
from posttrain.models import load_reward_model, load_tokenizer, score_ids
from posttrain.stage import execute_stage
from tests.integration.conftest import last_turns


@pytest.fixture(scope="module")
def gold_prompts(tmp_path_factory: pytest.TempPathFactory, write_dataset: Callable[..., Path]) -> Path:
    """Prompts of the support-desk world, the last user turn only so that they fit the tiny model."""
    rows = last_turns(24)
    return write_dataset(tmp_path_factory.mktemp("data") / "prompts", "prompt", rows[:4], rows[4:])


@pytest.fixture(scope="module")
def away_data(
    tmp_path_factory: pytest.TempPathFactory, make_rows: Any, write_dataset: Callable[..., Path]
) -> Path:
    """Preference pairs the wrong way round, of three kinds, without gold."""
    rows = [
        row
        | {"chosen": row["rejected"], "rejected": row["chosen"], "meta": json.dumps({"kind": f"k{i % 3}"})}
        for i, row in enumerate(make_rows["preference"](12, 4))
    ]
    return write_dataset(tmp_path_factory.mktemp("data") / "away", "preference", rows, rows)


@pytest.fixture(scope="module")
def full_config(
    tiny_model_dir: Path,
    other_model_dir: Path,
    tiny_reward_dir: Path,
    gold_prompts: Path,
    preference_data: Path,
    away_data: Path,
    text_data: Path,
    conversation_data: Path,
) -> dict[str, Any]:
    return {
        "models": {"sft": str(tiny_model_dir), "ppo": str(other_model_dir)},
        "baseline": "sft",
        "reward": str(tiny_reward_dir),
        "prompts": str(gold_prompts),
        "preferences": str(preference_data),
        "ood_preferences": str(away_data),
        "text": str(text_data),
        "conversations": str(conversation_data),
        "gold": "support_desk",
        "num_prompts": 16,
        "max_prompt_tokens": 200,
        "max_new_tokens": 24,
        "batch_size": 8,
        "bootstrap_samples": 200,
        "kl_target": 1000.0,
        "min_rm_accuracy": 1.0,
        "min_win_rate": 0.65,
        "require_gain": True,
        "seed": 1,
    }


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory, full_config: dict[str, Any]) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "eval"
    execute_stage("eval", EvalConfig(**full_config), run_dir)
    return run_dir


def read(run_dir: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    lines = (run_dir / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads((run_dir / "eval.json").read_text(encoding="utf-8")), [
        json.loads(line) for line in lines
    ]


def test_exact_set_of_files(full_run: Path) -> None:
    names = {path.name for path in full_run.iterdir() if not path.name.startswith(".")}
    assert names == {"config.yaml", "manifest.json", "eval.json", "samples.jsonl"}


def test_every_number_is_there(full_run: Path) -> None:
    results, samples = read(full_run)
    assert results["prompts"]["used"] == len(samples) == 16
    for name in ("sft", "ppo"):
        model = results["models"][name]
        assert set(model["perplexity"]) == {"text", "conversations"}
        for key in ("gold", "rm", "kl_k1", "kl_k3", "eos_rate", "tokens"):
            assert model[key]["low"] <= model[key]["value"] <= model[key]["high"]
            assert model[key]["n"] == 16
    assert results["models"]["sft"]["kl_k1"]["value"] == 0.0
    assert results["models"]["ppo"]["kl_k3"]["value"] > 0.1
    assert results["reward_model"]["pairs"] == 16
    assert {v["bar"] for v in results["verdicts"]} == {
        "min_rm_accuracy",
        "require_gain",
        "min_win_rate",
        "kl_target",
    }
    assert {v["bar"]: v["passed"] for v in results["verdicts"]}["kl_target"]


def test_samples_carry_the_rubric_score_of_their_own_text(full_run: Path, gold_prompts: Path) -> None:
    import pyarrow.parquet as pq

    facts = {
        row["id"]: json.loads(row["meta"])["facts"]
        for row in pq.read_table(gold_prompts / "eval.parquet").to_pylist()
    }
    results, samples = read(full_run)
    totals = []
    for sample in samples:
        answer = sample["answers"]["ppo"]
        expected = rubric.score(answer["text"], facts[sample["id"]], answer["finished"])
        assert answer["gold"] == pytest.approx(expected.total)
        assert answer["gold_parts"] == expected.parts
        totals.append(expected.total)
    assert results["models"]["ppo"]["gold"]["value"] == pytest.approx(sum(totals) / len(totals))


def test_reward_accuracy_equals_scoring_pair_by_pair(
    full_run: Path, tiny_reward_dir: Path, preference_data: Path
) -> None:
    import pyarrow.parquet as pq

    tokenizer = load_tokenizer(tiny_reward_dir)
    model, calibration = load_reward_model(tiny_reward_dir)

    def score(messages: list[dict[str, str]]) -> float:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            return float(score_ids(model, calibration, ids, torch.ones_like(ids)))

    rows = pq.read_table(preference_data / "eval.parquet").to_pylist()
    right = [score(row["prompt"] + row["chosen"]) > score(row["prompt"] + row["rejected"]) for row in rows]
    report = read(full_run)[0]["reward_model"]
    assert report["gold"]["accuracy"]["value"] == pytest.approx(sum(right) / len(right))
    assert report["gold"]["label_noise"] == 0.0


def test_pairs_of_another_kind_stand_beside_those_of_home(full_run: Path) -> None:
    report = read(full_run)[0]["reward_model"]
    away = report["out_of_distribution"]
    assert (report["pairs"], away["pairs"], away["gold"]) == (16, 12, None)
    home = report["labels"]["accuracy"]["value"]
    assert away["labels"]["drop"]["value"] == pytest.approx(home - away["labels"]["accuracy"]["value"])
    assert away["labels"]["transferred"]["temperature"] == report["labels"]["temperature"]


def test_accuracy_by_a_column_of_the_meta(
    full_config: dict[str, Any], away_data: Path, tmp_path: Path
) -> None:
    config = {"reward": full_config["reward"], "preferences": str(away_data), "subset_column": "kind"}
    execute_stage("eval", EvalConfig(**config), tmp_path / "eval")
    subsets = read(tmp_path / "eval")[0]["reward_model"]["labels"]["by_subset"]
    assert {name: part["n"] for name, part in subsets.items()} == {"k0": 4, "k1": 4, "k2": 4}
    with pytest.raises(DataError, match=r"no pair has `topic`.*\n.*meta_columns: \[topic\]"):
        execute_stage("eval", EvalConfig(**config | {"subset_column": "topic"}), tmp_path / "other")


def test_the_summary_is_the_headline_of_eval_json(full_run: Path) -> None:
    results, _ = read(full_run)
    manifest = json.loads((full_run / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["metrics"]["gold/ppo"] == results["models"]["ppo"]["gold"]["value"]
    assert manifest["metrics"]["rm_accuracy/gold"] == results["reward_model"]["gold"]["accuracy"]["value"]
    assert manifest["metrics"]["bars"] == 4
    assert {"generate.sft", "generate.ppo", "kl", "reward"} <= set(manifest["timings"])


def test_a_second_run_gives_the_same_bytes(
    full_run: Path, full_config: dict[str, Any], tmp_path: Path
) -> None:
    execute_stage("eval", EvalConfig(**full_config), tmp_path / "eval")
    for name in ("eval.json", "samples.jsonl"):
        assert (tmp_path / "eval" / name).read_bytes() == (full_run / name).read_bytes()


def test_a_model_against_itself_ties_everywhere(full_config: dict[str, Any], tmp_path: Path) -> None:
    config = full_config | {
        "models": {"sft": full_config["models"]["sft"], "same": full_config["models"]["sft"]}
    }
    execute_stage("eval", EvalConfig(**config), tmp_path / "eval")
    same = read(tmp_path / "eval")[0]["models"]["same"]
    assert (same["gold_win_rate"]["value"], same["gold_win_rate"]["ties"]) == (0.5, 16)
    assert same["kl_k1"]["value"] == 0.0


def test_a_reward_model_alone(full_config: dict[str, Any], tmp_path: Path) -> None:
    config = EvalConfig(reward=full_config["reward"], preferences=full_config["preferences"])
    execute_stage("eval", config, tmp_path / "eval")
    results, samples = read(tmp_path / "eval")
    assert (results["models"], samples, results["verdicts"]) == ({}, [], [])
    assert results["reward_model"]["labels"]["accuracy"]["n"] == 16


def test_perplexity_alone_without_prompts(full_config: dict[str, Any], tmp_path: Path) -> None:
    config = EvalConfig(models=full_config["models"], text=full_config["text"])
    execute_stage("eval", config, tmp_path / "eval")
    results, _ = read(tmp_path / "eval")
    assert set(results["models"]["ppo"]) == {"perplexity"}


def test_without_gold_the_reward_model_judges(full_config: dict[str, Any], tmp_path: Path) -> None:
    execute_stage("eval", EvalConfig(**full_config | {"gold": None}), tmp_path / "eval")
    results, _ = read(tmp_path / "eval")
    assert "gold" not in results["models"]["ppo"]
    assert "reward-model score" in next(v["what"] for v in results["verdicts"] if v["bar"] == "min_win_rate")


def test_prompts_without_facts_are_refused(
    full_config: dict[str, Any], make_rows: Any, write_dataset: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [row | {"meta": "{}"} for row in make_rows["prompt"](8, 0)]
    data = write_dataset(tmp_path / "prompts", "prompt", rows, rows)
    with pytest.raises(DataError, match=r"prompt prompt-. has no `facts` in its meta"):
        execute_stage("eval", EvalConfig(**full_config | {"prompts": str(data)}), tmp_path / "eval")


def test_prompts_that_do_not_fit_the_model_are_refused(full_config: dict[str, Any], tmp_path: Path) -> None:
    config = EvalConfig(**full_config | {"max_new_tokens": 250})
    with pytest.raises(UserError, match=r"reads at most 256 tokens.*max_new_tokens is 250"):
        execute_stage("eval", config, tmp_path / "eval")


def test_long_prompts_are_skipped_and_counted(
    full_config: dict[str, Any], gold_prompts: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    import pyarrow.parquet as pq

    rows = pq.read_table(gold_prompts / "eval.parquet").to_pylist()
    lengths = sorted(len(encode_prompt(tiny_tokenizer, row["prompt"])) for row in rows)
    changes = {"max_prompt_tokens": lengths[9], "num_prompts": 20}
    execute_stage("eval", EvalConfig(**full_config | changes), tmp_path / "eval")
    too_long = sum(length > lengths[9] for length in lengths)
    counts = read(tmp_path / "eval")[0]["prompts"]
    assert counts == {"available": 20, "too_long": too_long, "used": 20 - too_long}
    assert 0 < too_long < 20


def test_models_with_different_templates_are_refused(full_config: dict[str, Any], tmp_path: Path) -> None:
    changed = tmp_path / "model"
    shutil.copytree(full_config["models"]["ppo"], changed)
    tokenizer = load_tokenizer(changed)
    tokenizer.chat_template = tokenizer.chat_template + " "
    tokenizer.save_pretrained(changed)
    models = {"sft": full_config["models"]["sft"], "ppo": str(changed)}
    with pytest.raises(UserError, match="chat template"):
        execute_stage("eval", EvalConfig(**full_config | {"models": models}), tmp_path / "eval")


def test_run_is_the_registered_function() -> None:
    from posttrain.registry import load, stage_spec

    assert load(stage_spec("eval").run) is run
    assert load(stage_spec("eval").config) is EvalConfig
