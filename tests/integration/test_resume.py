"""An interrupted run, started again, ends as an uninterrupted one: same weights to the bit, same metrics."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.conftest import load_adapter, make_config, read_rows
from train.checkpoints import is_complete, last_complete_checkpoint

KILLED = {"max_steps": 120, "logging_steps": 7, "save_steps": 10, "save_total_limit": 3}
"""Logging and saving fall on different steps, which is where a resumed running mean would show."""

PROGRAM = """
import sys
from pathlib import Path
from posttrain.stage import execute_stage
from train.config import SftConfig
execute_stage("sft", SftConfig.model_validate_json(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
"""


def assert_same_run(left: Path, right: Path) -> None:
    a, b = load_adapter(left), load_adapter(right)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert read_rows(left) == read_rows(right)


def cut_back(whole: Path, cut: Path, stop: int) -> None:
    """Copy a finished run as it was when it was killed just after the checkpoint of step `stop`."""
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "model")
    for checkpoint in (cut / "checkpoints").glob("checkpoint-*"):
        if int(checkpoint.name.split("-")[1]) > stop:
            (checkpoint / "COMPLETE").unlink()
    manifest = json.loads((cut / "manifest.json").read_text())
    (cut / "manifest.json").write_text(json.dumps(manifest | {"status": "running"}))


def kill_after_checkpoint(command: list[str], checkpoints: Path, step: int) -> None:
    """Start the command and kill -9 it as soon as a complete checkpoint of at least `step` is there."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        done = [path for path in checkpoints.glob("checkpoint-*") if is_complete(path)]
        if any(int(path.name.split("-")[1]) >= step for path in done):
            process.send_signal(signal.SIGKILL)
            break
        try:
            process.wait(timeout=0.005)
        except subprocess.TimeoutExpired:
            continue
        pytest.fail(f"the run ended before it could be killed: {process.stderr.read().decode()[-2000:]}")
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_killed_sft_resumes_to_the_bit(run_stage, tmp_path, tiny_model_dir, conversation_data):
    peft = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.2}
    fields = {"model": tiny_model_dir, "data": conversation_data, "peft": peft, "trainer": KILLED}
    config = make_config("sft", **fields)
    (tmp_path / "config.json").write_text(config.model_dump_json())
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "config.json"), str(killed)]
    kill_after_checkpoint(command, killed / "checkpoints", step=40)
    assert not (killed / "model").exists()
    reached = last_complete_checkpoint(killed / "checkpoints")

    shutil.copytree(reached, killed / "checkpoints" / "checkpoint-9999")
    (killed / "checkpoints" / "checkpoint-9999" / "optimizer.pt").unlink()
    metrics = run_stage("sft", killed, **fields)
    assert metrics["resumed_from_step"] == int(reached.name.split("-")[1]) < 120
    run_stage("sft", whole, **fields)
    assert_same_run(killed, whole)
    assert not (killed / "checkpoints" / "checkpoint-9999").exists()


@pytest.mark.parametrize("kind", ["pretrain", "sft", "reward", "dpo", "kto", "orpo", "cpo"])
@pytest.mark.parametrize("stop", [4, 11])
def test_resumes_from_what_a_killed_run_leaves(
    kind, stop, run_stage, tmp_path, tiny_model_dir, text_data, conversation_data, preference_data
):
    """A finished run's directory, set back to just after the checkpoint at `stop` (11: the last one, and not
    the last step of its epoch).
    """
    trainer = {
        "max_steps": 11,
        "logging_steps": 3,
        "save_steps": 4,
        "save_total_limit": 9,
        "num_train_epochs": 9,
    }
    peft = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.2}
    data = {"pretrain": text_data, "sft": conversation_data}.get(kind, preference_data)
    fields = {"model": tiny_model_dir, "data": data, "trainer": trainer, "peft": peft}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_stage(kind, whole, **fields)
    cut_back(whole, cut, stop)
    metrics = run_stage(kind, cut, **fields)
    assert metrics["resumed_from_step"] == stop
    assert_same_run(whole, cut)


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
@pytest.mark.parametrize("stop", [2, 6, 10])
def test_group_training_resumes_between_generations(
    kind, stop, run_stage, tmp_path, tiny_model_dir, tiny_reward_dir, prompt_data
):
    """After the first generation, at the end of the first pass over the prompts, and inside the second.

    48 prompts in generations of 16, each serving two optimizer steps: a pass has 6 steps.
    """
    trainer = {
        "max_steps": 12,
        "logging_steps": 3,
        "save_steps": 2,
        "save_total_limit": 9,
        "num_train_epochs": 9,
        "per_device_train_batch_size": 32,
        "num_generations": 2,
        "num_iterations": 2,
        "max_completion_length": 4,
        "beta": 0.05,
    }
    fields = {"model": tiny_model_dir, "reward": tiny_reward_dir, "data": prompt_data, "trainer": trainer}
    fields["max_prompt_tokens"] = 100
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_stage(kind, whole, **fields)
    cut_back(whole, cut, stop)
    assert run_stage(kind, cut, **fields)["resumed_from_step"] == stop
    assert_same_run(whole, cut)


def test_a_run_killed_before_its_first_checkpoint_starts_over(
    run_stage, tmp_path, tiny_model_dir, conversation_data
):
    fields = {"model": tiny_model_dir, "data": conversation_data}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_stage("sft", whole, **fields)
    cut_back(whole, cut, 0)
    metrics = run_stage("sft", cut, **fields)
    assert "resumed_from_step" not in metrics
    assert_same_run(whole, cut)


def test_a_truncated_file_makes_a_checkpoint_incomplete(sft_run, tmp_path):
    shutil.copytree(sft_run / "checkpoints", tmp_path / "checkpoints")
    assert last_complete_checkpoint(tmp_path / "checkpoints").name == "checkpoint-6"
    state = tmp_path / "checkpoints" / "checkpoint-6" / "trainer_state.json"
    state.write_bytes(state.read_bytes()[:-1])
    assert last_complete_checkpoint(tmp_path / "checkpoints").name == "checkpoint-3"
    assert last_complete_checkpoint(tmp_path / "nowhere") is None


def test_a_head_alone_resumes_to_the_bit(run_stage, tmp_path, tiny_model_dir, preference_data):
    """Its checkpoints hold the head only; the trunk comes from the model it started from."""
    fields = {"model": tiny_model_dir, "data": preference_data, "peft": None, "head_only": True}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_stage("reward", whole, **fields)
    cut_back(whole, cut, stop=3)
    assert run_stage("reward", cut, **fields)["resumed_from_step"] == 3
    a, b = (load_file(run / "model" / "model.safetensors") for run in (whole, cut))
    assert a.keys() == b.keys() and len(a) > 1
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert read_rows(whole) == read_rows(cut)
