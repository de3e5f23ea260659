"""`posttrain check --offline`: what it finds about models that are not here, and what it leaves alone."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from posttrain.cli import app
from posttrain.known_models import known_config

STAGES: dict[str, dict[str, Any]] = {
    "demos": {"stage": "curate", "kind": "conversation", "sources": [{"path": "none.jsonl"}]},
    "prefs": {"stage": "curate", "kind": "preference", "sources": [{"path": "none.jsonl"}]},
    "prompts": {"stage": "curate", "kind": "prompt", "sources": [{"path": "none.jsonl"}]},
    "sft": {"model": "Qwen/Qwen2.5-0.5B-Instruct", "data": "${stage:demos}"},
    "sft-merged": {"stage": "merge", "model": "${stage:sft}"},
    "reward": {"model": "${stage:sft-merged}", "data": "${stage:prefs}"},
    "dpo": {"model": "${stage:sft-merged}", "data": "${stage:prefs}"},
    "grpo": {"model": "${stage:sft-merged}", "reward": "${stage:reward}", "data": "${stage:prompts}"},
    "ppo": {
        "model": "${stage:sft-merged}",
        "reward": "${stage:reward}",
        "data": "${stage:prompts}",
        "peft": {},
    },
}


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Checks the pipeline above, with other fields, without a network; gives exit code and report."""

    def no_network(*_: object, **__: object) -> None:
        raise AssertionError("the check has opened a connection")

    def run(*options: str, **changes: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        more = {name: body for name, body in changes.items() if name.replace("_", "-") not in STAGES}
        stages = {
            name: body | changes.get(name.replace("-", "_"), {}) for name, body in STAGES.items()
        } | more
        file = tmp_path / "pipe.yaml"
        file.write_text(yaml.safe_dump({"name": "demo", "stages": stages}))
        done = CliRunner().invoke(app, ["check", str(file), "--json", *options])
        return done.exit_code, json.loads(done.stdout)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    return run


def refused(outcome: tuple[int, dict[str, Any]], field: str, *texts: str) -> None:
    code, report = outcome
    assert code == 2
    [problem] = report["problems"]
    assert problem["where"].endswith(f": stages.{field}"), problem
    text = f"{problem['message']} {problem['remedy']}"
    assert all(part in text for part in texts), text


def test_every_stage_is_looked_at_through_the_chain(check):
    code, report = check("--offline")
    assert (code, report["problems"]) == (0, [])
    notes = {name: " ".join(said) for name, said in report["notes"].items()}
    assert set(notes) == {"sft", "reward", "dpo", "grpo", "ppo"}
    lora = 8_798_208  # r 16: 16 * (in + out) summed over the seven linear layers of each of 24 blocks
    assert f"Qwen2ForCausalLM of 494,032,768 parameters, {lora:,} trained" in notes["dpo"]
    assert (
        f"Qwen2ForSequenceClassification of 494,033,664 parameters, {lora + 896:,} trained" in notes["reward"]
    )
    unseen = report["not_looked_at"]
    assert "only its architecture was looked at" in unseen["sft"]["model"]
    assert "only its architecture was looked at" in unseen["ppo"]["reward"]
    assert "machine that runs it" in unseen["dpo"]["machine"]
    assert list(Path().iterdir()) == [Path("pipe.yaml")]


def test_without_offline_nothing_is_said_of_models_that_are_not_here(check):
    code, report = check(dpo={"peft": {"target_modules": ["query"]}})
    assert (code, report["notes"]) == (0, {})


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "grpo", "ppo"])
def test_a_lora_name_that_the_architecture_lacks(check, stage):
    outcome = check("--offline", **{stage: {"peft": {"target_modules": ["q_porj"]}}})
    refused(outcome, f"{stage}.peft.target_modules", "`q_porj` matches no module", "did you mean q_proj")


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_rows_longer_than_the_model_has_positions(check, stage):
    outcome = check("--offline", **{stage: {"trainer": {"max_length": 40_000}}})
    refused(outcome, f"{stage}.trainer.max_length", "40000", "32768 positions")


@pytest.mark.parametrize("stage", ["grpo", "ppo"])
def test_prompts_and_answers_longer_than_the_models_have_positions(check, stage):
    code, report = check("--offline", **{stage: {"max_prompt_tokens": 40_000}})
    assert code == 2
    fields = [problem["where"].rpartition(": ")[2] for problem in report["problems"]]
    assert fields == [f"stages.{stage}.max_prompt_tokens", f"stages.{stage}.reward"]
    assert all("reads at most 32768" in problem["message"] for problem in report["problems"])


@pytest.mark.parametrize("stage", ["reward", "dpo", "grpo"])
def test_an_adapter_that_is_not_merged(check, stage):
    outcome = check("--offline", **{stage: {"model": "${stage:sft}"}})
    refused(outcome, f"{stage}.model", "will be a LoRA adapter", "put a merge stage between them")


@pytest.mark.parametrize("start", ["continue", "stack"])
def test_training_goes_on_from_an_adapter_that_is_still_to_be_made(check, start):
    settings = {"model": "${stage:sft}", "peft": {"start": start}}
    sft = {"peft": {"r": 4, "init_lora_weights": "pissa"}}
    code, report = check("--offline", sft=sft, dpo=settings)
    assert (code, report["problems"]) == (0, [])
    rank_4, rank_16 = "2,199,552 trained", "8,798,208 trained"
    assert (rank_4 if start == "continue" else rank_16) in " ".join(report["notes"]["dpo"])


@pytest.mark.parametrize("start", ["continue", "stack"])
def test_a_full_model_where_an_adapter_is_to_go_on(check, start):
    outcome = check("--offline", dpo={"peft": {"start": start}})
    refused(outcome, "dpo.peft.start", f"{start} needs an adapter", "remove it")


def test_a_reward_adapter_is_continued_by_a_reward_stage_alone(check):
    again = {"stage": "reward", "model": "${stage:reward}", "data": "${stage:prefs}"}
    go_on = {"peft": {"start": "continue"}}
    code, report = check("--offline", again=again | go_on)
    assert (code, report["problems"]) == (0, [])
    assert "8,799,104 trained" in " ".join(report["notes"]["again"])
    outcome = check("--offline", reward=go_on | {"model": "${stage:sft}"})
    refused(outcome, "reward.peft.start", "an adapter of a reward model")


def test_a_head_alone_needs_little_room(check):
    code, report = check("--offline", reward={"peft": None, "head_only": True})
    assert code == 0
    assert "494,033,664 parameters, 896 trained" in " ".join(report["notes"]["reward"])


def merging(*references: str, **more: Any) -> dict[str, Any]:
    return {"model": None, "adapters": [{"model": reference} for reference in references], **more}


def test_what_several_adapters_are_merged_into_is_followed(check):
    code, report = check("--offline", sft_merged=merging("${stage:sft}", "${stage:sft}"))
    assert (code, report["problems"]) == (0, [])
    assert "Qwen2ForCausalLM of 494,032,768 parameters" in " ".join(report["notes"]["dpo"])
    outcome = check("--offline", sft_merged=merging("${stage:sft}", "Qwen/Qwen2.5-0.5B-Instruct"))
    refused(outcome, "sft-merged.adapters.1.model", "is a full model, not an adapter")


def test_nothing_to_merge(check):
    refused(check("--offline", sft={"peft": None}), "sft-merged.model", "nothing to merge")


@pytest.mark.parametrize("stage", ["dpo", "ppo"])
def test_a_reward_model_as_the_model_to_start_from(check, stage):
    refused(
        check("--offline", **{stage: {"model": "${stage:reward}"}}), f"{stage}.model", "is a reward model"
    )


@pytest.mark.parametrize("stage", ["grpo", "ppo"])
def test_a_language_model_as_reward_model(check, stage):
    outcome = check("--offline", **{stage: {"reward": "${stage:sft-merged}"}})
    refused(outcome, f"{stage}.reward", "without a score head")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"ppo": {"layout": "shared", "peft": None}}, "it needs `peft`"),
        ({"ppo": {"layout": "shared"}, "reward": {"peft": None}}, "is a full model, not a LoRA adapter"),
        (
            {"ppo": {"layout": "shared"}, "reward": {"model": "Qwen/Qwen2.5-0.5B-Instruct"}},
            "is not the policy's",
        ),
    ],
)
def test_networks_that_cannot_share_a_base(check, changes, text):
    refused(check("--offline", **changes), "ppo.layout", "shared is not possible", text)


def test_what_only_this_machine_lacks_is_not_looked_at(check, monkeypatch):
    """A package and a number format that another machine may have."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    trainer = {"deepspeed": "zero3.json", "tf32": True, "bf16": True}
    code, report = check("--offline", sft={"trainer": trainer})
    assert (code, report["problems"]) == (0, [])
    assert {"trainer.deepspeed", "trainer.tf32", "machine"} <= set(report["not_looked_at"]["sft"])
    code, report = check(sft={"trainer": trainer})
    assert code == 2
    assert [problem["remedy"] for problem in report["problems"]][0] == "pip install 'posttrain[deepspeed]'"


def test_the_rest_of_such_a_block_is_still_checked(check, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    trainer = {"deepspeed": "zero3.json", "learning_rat": 1.0e-5}
    refused(
        check("--offline", sft={"trainer": trainer}),
        "sft.trainer.learning_rat",
        "did you mean `learning_rate`",
    )
    trainer = {"deepspeed": "zero3.json", "eval_strategy": "epoch", "load_best_model_at_end": True}
    refused(check("--offline", sft={"trainer": trainer}), "sft.trainer", "load_best_model_at_end")


def test_a_model_that_does_not_ship_is_left_out(check):
    code, report = check("--offline", sft={"model": "org/model"})
    assert code == 0
    assert report["notes"] == {}
    assert report["not_looked_at"]["sft"]["model"].startswith("org/model is on the Hugging Face Hub")


def test_a_model_that_is_here_is_followed_too(check):
    """Its own stage says what it lacks; the stages after it are looked at by its architecture."""
    known = known_config("Qwen/Qwen2.5-0.5B")
    assert known is not None
    Path("local/model").mkdir(parents=True)
    shutil.copyfile(known, "local/model/config.json")
    code, report = check("--offline", sft={"model": "local/model"})
    assert code == 2
    assert any("holds no weights" in problem["message"] for problem in report["problems"])
    assert set(report["notes"]) == {"reward", "dpo", "grpo", "ppo"}
    assert "Qwen2ForCausalLM of 494,032,768 parameters" in report["notes"]["dpo"][0]
    Path("local/model/config.json").write_text("{}")
    code, report = check("--offline", sft={"model": "local/model"})
    assert code == 2
    assert any("configuration cannot be read" in problem["message"] for problem in report["problems"])
    assert report["notes"] == {}
