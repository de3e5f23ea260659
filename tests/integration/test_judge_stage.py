"""An eval run judged by the gold rubric and a reward model, and compared with another: the whole way."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from eval.annotate import assignment as assignments
from eval.annotate import votes
from eval.annotate.database import Database
from eval.annotate.store import open_study
from eval.annotate.votes import Opinion
from eval.config import EvalConfig
from eval.judging.config import JudgeConfig
from posttrain.cli import app
from posttrain.models import (
    load_chat_tokenizer,
    load_reward_model,
    score_ids,
    whole_dialogue,
)
from posttrain.stage import execute_stage
from tests.integration.conftest import last_turns

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def eval_run(
    tmp_path_factory: pytest.TempPathFactory,
    write_dataset: Callable[..., Path],
    tiny_model_dir: Path,
    other_model_dir: Path,
    tiny_reward_dir: Path,
) -> Path:
    """Two models of random weights on 24 prompts of the support desk."""
    place = tmp_path_factory.mktemp("judged")
    rows = last_turns(28)
    prompts = write_dataset(place / "prompts", "prompt", rows[:4], rows[4:])
    config = EvalConfig(
        models={"sft": str(tiny_model_dir), "ppo": str(other_model_dir)},
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


def test_votes_on_a_run_are_what_the_judge_of_people_counts(
    eval_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An eval run becomes a study, its votes a file, and the file a judge."""
    monkeypatch.chdir(tmp_path)
    for arguments in (
        ["create", "name=people", f"items={eval_run}", "pairs=[[sft,ppo]]", "overlap=2", "max_items=9"],
        ["annotators", "add", "ann"],
        ["annotators", "add", "bob"],
    ):
        done = CliRunner().invoke(app, ["annotate", *arguments])
        assert done.exit_code == 0, done.output
    wins, clusters = vote_on_everything(Database("annotate.db"))
    done = CliRunner().invoke(app, ["annotate", "export", "--votes", "votes.jsonl"])
    assert done.exit_code == 0, done.output
    config = JudgeConfig.model_validate(
        {
            "answers": [{"run": str(eval_run)}],
            "models": ["sft", "ppo"],
            "baseline": "sft",
            "bootstrap_samples": 100,
            "judges": {"people": {"kind": "votes", "path": "votes.jsonl"}},
        }
    )
    execute_stage("judge", config, tmp_path / "judge", console=QUIET)
    results = json.loads((tmp_path / "judge" / "judge.json").read_text())
    (pair,) = results["judges"]["people"]["pairs"]
    assert (pair["win_rate"]["n"], len(wins), clusters) == (18, 18, 9)
    assert pair["win_rate"]["value"] == pytest.approx(sum(wins) / 18, abs=1e-12)
    assert 0.0 < sum(wins) / 18 < 1.0


def vote_on_everything(database: Database) -> tuple[list[float], int]:
    """Votes of everybody on everything: a win of ppo is 1, a tie a half; and how many items there are."""
    study = open_study(database)
    with database.reading() as session:
        people = session.run("SELECT id FROM annotators ORDER BY name")
    wins: list[float] = []
    items = set()
    choices = itertools.cycle(["a", "b", "a", "tie", "both_bad", "a", "b"])
    for person in people:
        while True:
            with database.writing() as session:
                task = assignments.current(session, study, person["id"], 1.8e9)
                if task is None:
                    break
                (row,) = session.run(
                    "SELECT i.id, i.first_model, i.second_model, s.swapped FROM assignments s "
                    "JOIN items i ON i.id = s.item WHERE s.id = :id",
                    id=task.assignment,
                )
            choice = next(choices)
            seen = [row["first_model"], row["second_model"]][:: -1 if row["swapped"] else 1]
            wins.append(float(seen["ab".index(choice)] == "ppo") if choice in ("a", "b") else 0.5)
            items.add(row["id"])
            votes.vote(
                database, study, person["id"], task.assignment, task.nonce, choice, Opinion(), 1.8e9 + 1
            )
    database.close()
    return wins, len(items)


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
