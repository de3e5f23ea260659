"""The synthesize stage on the two-layer model: its files, its lineage, its random numbers, and stopping."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import online_rewards
import pytest
from judging_endpoint import KEY, endpoint

from data_prep.dataset import DATASET_FILES, read_kind, read_split
from posttrain.errors import RequeueError
from posttrain.rundir import read_manifest, read_rows
from tests.integration.conftest import command, file_names, write_stage
from train.reward_pairs import read_margins

__all__ = ["endpoint"]
ROOT = Path(__file__).resolve().parents[2]
OUTPUTS = (*DATASET_FILES, "answers.jsonl")
SIZES = {"n": 4, "max_prompt_tokens": 100, "max_new_tokens": 40, "train_prompts": 20, "eval_prompts": 8}


@pytest.fixture(scope="session")
def policy(tmp_path_factory, run_stage, tiny_model_dir, conversation_data) -> Path:
    """The tiny model trained until most of its answers end."""
    run_dir = tmp_path_factory.mktemp("runs") / "policy"
    trainer = {"max_steps": 60, "learning_rate": 5e-3, "save_steps": 60}
    run_stage("sft", run_dir, model=tiny_model_dir, data=conversation_data, peft=None, trainer=trainer)
    return run_dir


@pytest.fixture(scope="session")
def common(policy, tiny_reward_dir, prompt_data) -> dict[str, Any]:
    """Fields of a preference run."""
    return {
        **SIZES,
        "kind": "preference",
        "model": policy,
        "reward": tiny_reward_dir,
        "data": prompt_data,
        "batch_size": 6,
    }


@pytest.fixture(scope="session")
def pairs_run(tmp_path_factory, run_stage, common) -> Path:
    """A finished preference run. Not to be written to."""
    run_dir = tmp_path_factory.mktemp("runs") / "pairs"
    run_stage("synthesize", run_dir, **common)
    return run_dir


def outputs(run_dir: Path) -> dict[str, bytes]:
    return {name: (run_dir / name).read_bytes() for name in OUTPUTS}


def texts(run_dir: Path) -> dict[str, list[str]]:
    """The sampled answers by side and prompt."""
    rows = read_rows(run_dir / "answers.jsonl")
    return {
        f"{row['split']}/{row['row']['id']}": [answer["text"] for answer in row["answers"]] for row in rows
    }


def test_a_dataset_directory_with_lineage(pairs_run, common, policy, tiny_reward_dir):
    batches = {f"checkpoints/answers-{start:08d}.jsonl" for start in range(0, 28, 6)}
    records = {"manifest.json", "config.yaml", "metrics.jsonl"}
    assert file_names(pairs_run) - {".lock"} == {*OUTPUTS, *batches, *records}
    assert read_kind(pairs_run) == "preference"
    info = json.loads((pairs_run / "dataset.json").read_text(encoding="utf-8"))
    synthesis = info["synthesis"]
    parents = {parent["field"]: parent["content_hash"] for parent in read_manifest(pairs_run)["parents"]}
    assert set(parents) == {"model", "data", "reward"}
    assert synthesis["policy"] == {"name": "policy", "content_hash": parents["model"]}
    assert synthesis["scorer"]["reward"] == {"name": "reward", "content_hash": parents["reward"]}
    assert (synthesis["sampling"]["n"], synthesis["sampling"]["seed"]) == (4, 0)
    assert synthesis["sampled"] == 28 * 4
    assert synthesis["answers_left_out"].get("truncated", 0) == 28 * 4 - synthesis["finished"]
    assert 28 * 2 < synthesis["finished"] < 28 * 4
    scores = [row["score"] for row in synthesis["best_of_n"]]
    assert [row["n"] for row in synthesis["best_of_n"]] == [1, 2, 4]
    assert scores[0] < scores[1]
    assert info["rows_in"] + info["rows_repeated"] == sum(info["rows_out"].values()) + sum(
        info["drops"].values()
    )
    for name in ("card.md", "report.html"):
        text = (pairs_run / name).read_text(encoding="utf-8")
        assert "## Synthesis" in text
        assert parents["model"][:16] in text
        assert str(policy) not in text


def test_pairs_hold_the_best_and_the_worst_on_their_prompts_side(pairs_run, prompt_data):
    answered = read_rows(pairs_run / "answers.jsonl")
    prompts = {row["split"] + "/" + row["row"]["id"]: row for row in answered}
    for split in ("train", "eval"):
        rows = read_split(pairs_run, split, "preference").to_list()
        groups = set(read_split(prompt_data, split, "prompt")["group"])
        margins = read_margins(rows, "margin")
        for row, margin in zip(rows, margins, strict=True):
            one = prompts[f"{split}/{row['id'].rsplit('-', 2)[0]}"]
            finished = [answer for answer in one["answers"] if answer["finished"]]
            best = max(finished, key=lambda answer: answer["score"])
            worst = min(finished, key=lambda answer: answer["score"])
            assert row["chosen"] == [{"role": "assistant", "content": best["text"]}]
            assert row["rejected"] == [{"role": "assistant", "content": worst["text"]}]
            assert margin == pytest.approx(best["score"] - worst["score"])
            assert margin > 0
            assert row["prompt"] == one["row"]["prompt"]
            assert row["group"] in groups
            assert json.loads(row["meta"])["facts"] == json.loads(one["row"]["meta"])["facts"]


def test_every_prompt_without_a_pair_is_a_reject_with_its_line(pairs_run, prompt_data):
    info = json.loads((pairs_run / "dataset.json").read_text(encoding="utf-8"))
    rejects = read_rows(pairs_run / "rejects.jsonl")
    assert Counter(row["reason"] for row in rejects) == info["drops"]
    for reject in rejects:
        split = reject["file"].removesuffix(".parquet")
        prompt = read_split(prompt_data, split, "prompt")[reject["line"] - 1]["prompt"]
        assert reject["excerpt"] == prompt[-1]["content"]


def test_answers_depend_neither_on_the_batch_nor_on_n_nor_on_other_prompts(
    pairs_run, run_stage, common, tmp_path
):
    other = common | {"batch_size": 64, "n": 2, "train_prompts": 9, "rollout": {"max_rows": 5}}
    run_stage("synthesize", tmp_path / "other", **other)
    before = texts(pairs_run)
    found = texts(tmp_path / "other")
    assert len(found) == 9 + 8
    assert all(before[key][:2] == some for key, some in found.items())
    run_stage("synthesize", tmp_path / "seed", **other, seed=1)
    assert sum(found[key] != some for key, some in texts(tmp_path / "seed").items()) > 12


def test_demonstrations_are_selected_from_the_same_answers(pairs_run, run_stage, tmp_path):
    run_dir = tmp_path / "demos"
    fields = {"kind": "conversation", "answers": pairs_run}
    metrics = run_stage("synthesize", run_dir, **fields, conversation={"top_k": 2})
    assert (run_dir / "answers.jsonl").read_bytes() == (pairs_run / "answers.jsonl").read_bytes()
    rows = read_split(run_dir, "train", "conversation").to_list()
    best = {row["id"].rsplit("-", 2)[0]: row["chosen"] for row in read_split(pairs_run, "train").to_list()}
    for key, chosen in best.items():
        mine = [row for row in rows if row["id"].rsplit("-", 1)[0] == key]
        assert mine[0]["messages"][-1:] == chosen
        scores = [json.loads(row["meta"])["score"] for row in mine]
        assert scores == sorted(scores, reverse=True)
        assert len(mine) == 2
    old, new = (json.loads((path / "dataset.json").read_text())["synthesis"] for path in (pairs_run, run_dir))
    assert all(old[name] == new[name] for name in ("policy", "scorer", "sampling", "best_of_n"))
    assert metrics["train_rows"] == len(rows)


def test_the_training_stages_take_them(pairs_run, run_stage, tmp_path, tiny_model_dir):
    few = {"model": tiny_model_dir, "data": pairs_run, "trainer": {"max_steps": 2}}
    run_stage("dpo", tmp_path / "dpo", **few)
    run_stage("reward", tmp_path / "reward", **few, margin="margin")
    [data] = [at for at in read_manifest(tmp_path / "dpo")["parents"] if at["field"] == "data"]
    assert (data["stage"], data["run"]) == ("synthesize", "pairs")
    assert data["content_hash"] == read_manifest(pairs_run)["outputs"]["dataset"]


def test_functions_select_watch_and_abstain(run_stage, common, tmp_path):
    """The longest answer wins; a response of one token has no opinion and no score."""
    functions = [
        {"function": "online_rewards:watch", "name": "words", "arguments": {"factor": 2.0}},
        {"function": "online_rewards:constant", "weight": 0.0},
    ]
    fields = common | {"reward": None, "rewards": {"functions": functions}, "truncated": "mark", "n": 3}
    run_stage("synthesize", tmp_path / "run", **fields)
    for row in read_rows(tmp_path / "run" / "answers.jsonl"):
        for answer in row["answers"]:
            expected = None if answer["tokens"] == 1 else 2.0 * len(answer["text"].split())
            assert answer["score"] == expected
            assert answer["parts"]["constant"] == 1.0
    metas = [json.loads(row["meta"]) for row in read_split(tmp_path / "run", "train").to_list()]
    assert any(meta.get("truncated") for meta in metas)
    assert not all(meta.get("truncated") for meta in metas)


def test_continuous_batching_repeats_for_the_same_batches(run_stage, common, tmp_path):
    fields = common | {"train_prompts": 6, "eval_prompts": 6, "rollout": {"engine": "continuous"}}
    for name in ("first", "second"):
        run_stage("synthesize", tmp_path / name, **fields)
    assert outputs(tmp_path / "first") == outputs(tmp_path / "second")
    assert len({text for group in texts(tmp_path / "first").values() for text in group}) > 24


def test_a_reward_model_with_a_template_of_its_own_scores_the_text(
    run_stage, common, tmp_path, variant, tiny_reward_dir
):
    own = variant("<|im_start|>' + message['role']", "<|im_start|>the ' + message['role']", tiny_reward_dir)
    run_stage("synthesize", tmp_path / "run", **(common | {"reward": own, "train_prompts": 4}))
    answers = [answer for row in read_rows(tmp_path / "run" / "answers.jsonl") for answer in row["answers"]]
    assert all("model.reward.cut" in answer["parts"] for answer in answers)
    assert len({answer["score"] for answer in answers}) > 10


def test_long_prompts_are_dropped_and_counted(run_stage, common, tmp_path, write_dataset, make_rows):
    rows = make_rows["prompt"](6, 0)
    rows[2] = rows[2] | {"prompt": [{"role": "user", "content": "order " * 90}]}
    data = write_dataset(tmp_path / "data", "prompt", rows, make_rows["prompt"](3, 1))
    metrics = run_stage("synthesize", tmp_path / "run", **(common | {"data": data}))
    assert metrics["drops"]["prompt_too_long"] == 1
    assert metrics["prompts"] == 9
    again = run_stage("synthesize", tmp_path / "again", kind="conversation", answers=tmp_path / "run")
    assert again["drops"]["prompt_too_long"] == 1
    long = [
        row for row in read_rows(tmp_path / "run" / "rejects.jsonl") if row["reason"] == "prompt_too_long"
    ]
    assert [(row["file"], row["line"]) for row in long] == [("train.parquet", 3)]


def test_sigterm_and_on_to_the_same_end(run_stage, common, tmp_path):
    """SIGTERM in the third batch of five: it is finished and saved, and two are left."""

    def run(run_dir: Path) -> dict[str, Any]:
        arguments = {"call": 3, "sent": str(tmp_path / f"sent-{run_dir.name}")}
        function = {"function": "online_rewards:sigterm_once", "weight": 0.0, "arguments": arguments}
        online_rewards.SCORED.clear()
        return run_stage("synthesize", run_dir, **common, rewards={"functions": [function]})

    with pytest.raises(RequeueError, match="stopped at prompt batch 3 of 5 after SIGTERM"):
        run(tmp_path / "stopped")
    assert read_manifest(tmp_path / "stopped")["status"] == "interrupted"
    saved = sorted((tmp_path / "stopped" / "checkpoints").iterdir())
    assert [path.name for path in saved] == [f"answers-{start:08d}.jsonl" for start in (0, 6, 12)]
    stamps = [path.stat().st_mtime_ns for path in saved]
    (tmp_path / "sent-stopped").write_text("")
    run(tmp_path / "stopped")
    assert online_rewards.SCORED == [24, 16]
    assert [path.stat().st_mtime_ns for path in saved] == stamps
    (tmp_path / "sent-whole").write_text("")
    run(tmp_path / "whole")
    first, second = outputs(tmp_path / "stopped"), outputs(tmp_path / "whole")
    differing = {name for name in first if first[name] != second[name]}
    assert differing <= {"card.md", "report.html", "dataset.json"}  # they name the file that `sent` is


def test_a_judge_scores_and_its_key_is_in_no_file(endpoint, run_stage, common, tmp_path, monkeypatch):
    """It likes short answers, and says nothing about those with a K in them."""

    def verdict(text: str, count: int) -> tuple[int, str]:
        answer = text.split("ANSWER:")[1]
        return 200, "no idea" if "K" in answer else f"[[{max(10 - len(answer.split()), 1)}]]"

    endpoint.answer = verdict
    prompt = tmp_path / "judge.txt"
    prompt.write_text("Rate this.\n{prompt}\nANSWER:{answer}", encoding="utf-8")
    monkeypatch.setenv("JUDGE_KEY", KEY)
    address = f"http://127.0.0.1:{endpoint.server_address[1]}/v1"
    judge = {"base_url": address, "model": "j", "prompt": str(prompt), "api_key_env": "JUDGE_KEY"}
    fields = common | {"reward": None, "judge": judge | {"max_retries": 1}}
    metrics = run_stage("synthesize", tmp_path / "run", **fields)
    answers = [one for row in read_rows(tmp_path / "run" / "answers.jsonl") for one in row["answers"]]
    finished = [one for one in answers if one["finished"]]
    silent = [one for one in finished if "K" in one["text"]]
    assert metrics["answers_left_out"]["judge_without_verdict"] == len(silent) > 0
    assert all(one["score"] is None for one in silent)
    scored = [one for one in finished if one["score"] is not None]
    assert scored
    assert all(one["score"] == max(10 - len(one["text"].split()), 1) for one in scored)
    parents = {at["field"] for at in read_manifest(tmp_path / "run")["parents"]}
    assert parents == {"model", "data", "judge.prompt"}
    written = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not any(KEY.encode() in data for data in written)


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 75)])
def test_a_killed_process_goes_on_to_the_same_bytes(common, tmp_path, sent, code):
    """Real processes: the first dies in its third batch, the second finishes; a third is not interrupted."""
    module = tmp_path / "killing.py"
    module.write_text(
        "import os, pathlib\ncalls = []\n"
        "def once(completions, name, number):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 3 and not pathlib.Path(name).exists():\n"
        "        pathlib.Path(name).touch()\n"
        "        os.kill(os.getpid(), number)\n"
        "    return [0.0] * len(completions)\n",
        encoding="utf-8",
    )
    paths = os.pathsep.join([str(ROOT), str(tmp_path)])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    arguments = {"name": "marker", "number": int(sent)}
    functions = [{"function": "killing:once", "weight": 0.0, "arguments": arguments}]

    def start(name: str) -> subprocess.CompletedProcess[str]:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        file = write_stage(folder, "synthesize", common | {"rewards": {"functions": functions}})
        arguments = [sys.executable, "-m", "posttrain", "synthesize", str(file)]
        return subprocess.run(
            arguments, env=environment, cwd=folder, capture_output=True, text=True, timeout=120, check=False
        )

    first = start("killed")
    assert first.returncode == code, first.stderr[-2000:]
    count = len(list((tmp_path / "killed" / "out" / "checkpoints").iterdir()))
    assert count == (2 if sent == signal.SIGKILL else 3)
    again = start("killed")
    assert again.returncode == 0, again.stderr[-2000:]
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "marker").touch()
    assert start("whole").returncode == 0
    assert outputs(tmp_path / "killed" / "out") == outputs(tmp_path / "whole" / "out")


def test_a_side_without_rows_is_an_error_that_says_why(common, tmp_path):
    file = write_stage(tmp_path, "synthesize", common | {"preference": {"min_margin": 1000.0}})
    done = command("synthesize", file)
    assert done.exit_code == 2
    assert re.search(r"no preference row is left on the train side \(\d+ below_min_margin", done.stderr)
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_a_prompt_file_that_lacks_a_place_and_a_missing_key_are_found_by_check(common, tmp_path, monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    prompt = tmp_path / "judge.txt"
    prompt.write_text("How good is {answer}?", encoding="utf-8")
    judge = {
        "base_url": "http://127.0.0.1:9/v1",
        "model": "j",
        "prompt": str(prompt),
        "api_key_env": "JUDGE_KEY",
    }
    done = command("check", write_stage(tmp_path, "synthesize", common | {"reward": None, "judge": judge}))
    assert done.exit_code == 2
    output = done.output + done.stderr
    assert "judge.prompt" in output
    assert "holds no {prompt}" in output
    assert "the environment variable JUDGE_KEY is not set" in output


def test_the_preflight_refuses_what_would_fail_later(refused, common, tiny_reward_dir, tiny_model_dir):
    refused("synthesize", "model", "is a reward model", **(common | {"model": tiny_reward_dir}))


def test_the_preflight_refuses_a_reward_model_without_a_score_head(refused, common, tiny_model_dir):
    refused("synthesize", "reward", "holds no score head", **(common | {"reward": tiny_model_dir}))


def test_the_preflight_refuses_what_does_not_fit_the_context(refused, common):
    said = "max_prompt_tokens 100 + max_new_tokens 250 = 350 tokens"
    refused("synthesize", "max_prompt_tokens", said, **(common | {"max_new_tokens": 250}))


def test_the_preflight_refuses_answers_of_another_stage(refused, policy):
    refused("synthesize", "answers", "holds no scored answers", kind="conversation", answers=policy)
