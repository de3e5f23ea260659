"""An eval run judged by the gold rubric and a reward model, and compared with another: the whole way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from data_prep.tiny import world
from eval.config import EvalConfig
from eval.judging.config import JudgeConfig
from posttrain.cli import app
from posttrain.models import (
    load_causal_lm,
    load_chat_tokenizer,
    load_reward_model,
    score_ids,
    whole_dialogue,
)
from posttrain.stage import execute_stage

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def eval_run(
    tmp_path_factory: pytest.TempPathFactory,
    write_dataset: Callable[..., Path],
    tiny_model_dir: Path,
    tiny_reward_dir: Path,
) -> Path:
    """Two models of random weights on 24 prompts of the support desk."""
    place = tmp_path_factory.mktemp("judged")
    rows = [
        {
            "id": record.id,
            "source": record.source,
            "group": record.group,
            "meta": record.meta,
            "prompt": record.content_columns()["prompt"][-1:],
        }
        for record in world.generate("prompt", 28, seed=5)
    ]
    prompts = write_dataset(place / "prompts", "prompt", rows[:4], rows[4:])
    other = place / "other"
    shutil.copytree(tiny_model_dir, other)
    model = load_causal_lm(tiny_model_dir)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    model.save_pretrained(other)
    config = EvalConfig(
        models={"sft": str(tiny_model_dir), "ppo": str(other)},
        reward=str(tiny_reward_dir),
        prompts=str(prompts),
        gold="support_desk",
        max_prompt_tokens=200,
        max_new_tokens=16,
        bootstrap_samples=100,
    )
    execute_stage("eval", config, place / "eval", console=QUIET)
    return place / "eval"


def reward(model_dir: Path, row: dict[str, Any], name: str) -> float:
    """The reward model's score of one answer as a finished dialogue, alone in its batch."""
    model, calibration = load_reward_model(model_dir)
    tokenizer = load_chat_tokenizer(model_dir)
    answer = {"role": "assistant", "content": row["answers"][name]["text"]}
    ids = tokenizer(whole_dialogue(tokenizer, [*row["prompt"], answer]), add_special_tokens=False)[
        "input_ids"
    ]
    with torch.no_grad():
        return float(
            score_ids(model, calibration, torch.tensor([ids[-256:]]), torch.ones(1, len(ids[-256:])))
        )


def test_the_judges_say_what_the_scores_of_the_run_say(
    eval_run: Path, tiny_reward_dir: Path, tmp_path: Path
) -> None:
    config = JudgeConfig.model_validate(
        {
            "answers": [{"run": str(eval_run)}],
            "baseline": "sft",
            "bootstrap_samples": 100,
            "judges": {"gold": {"kind": "gold"}, "rm": {"kind": "reward", "model": str(tiny_reward_dir)}},
        }
    )
    execute_stage("judge", config, tmp_path / "judge", console=QUIET)
    results = json.loads((tmp_path / "judge" / "judge.json").read_text())
    samples = [json.loads(line) for line in (eval_run / "samples.jsonl").read_text().splitlines()]
    answers = [row["answers"] for row in samples]
    evaluated = json.loads((eval_run / "eval.json").read_text())
    scores = {
        "gold": [[both[name]["gold"] for name in ("ppo", "sft")] for both in answers],
        "rm": [[reward(tiny_reward_dir, row, name) for name in ("ppo", "sft")] for row in samples],
    }
    for judge, pairs in scores.items():
        (pair,) = results["judges"][judge]["pairs"]
        difference = np.diff(np.array(pairs)[:, ::-1]).ravel()
        counts = [int((difference > 1e-9).sum()), int((difference < -1e-9).sum())]
        assert [pair["win_rate"]["wins"], pair["win_rate"]["losses"]] == counts
    evaluated = json.loads((eval_run / "eval.json").read_text())
    gold = results["judges"]["gold"]["pairs"][0]["win_rate"]["value"]
    assert gold == pytest.approx(evaluated["models"]["ppo"]["gold_win_rate"]["value"])
    assert results["agreement"][0]["n"] == len(samples) == 24


def test_two_models_of_one_run_are_compared_by_everything_in_its_samples(eval_run: Path) -> None:
    result = CliRunner().invoke(
        app, ["compare", str(eval_run), str(eval_run), "--model", "sft=ppo", "--json"]
    )
    assert result.exit_code == 0
    figures: dict[str, Any] = json.loads(result.stdout)
    assert {row["metric"] for row in figures["metrics"]} >= {"gold", "rm", "finished", "kl_k1", "tokens"}
    sample = json.loads((eval_run / "samples.jsonl").read_text().splitlines()[0])
    assert sample["meta"]["facts"]
    assert sample["source"]
    assert figures["contamination"]["sft -> ppo"]["a"]["status"] == "unknown"
