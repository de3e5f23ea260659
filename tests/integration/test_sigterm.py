"""SIGTERM in the stages that train with TRL: a checkpoint of the step, exit code 75, and the same end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from posttrain.errors import RequeueError
from posttrain.rundir import read_manifest
from tests.integration.conftest import read_rows, write_stage
from tests.integration.test_resume import assert_same_run
from train.stopping import MEANS_FILE

ROOT = Path(__file__).resolve().parents[2]
TRAINER = {"max_steps": 10, "logging_steps": 4, "save_steps": 3, "num_train_epochs": 9}
"""Step 5 is between two log rows and two checkpoints, 6 ends an epoch, 10 is the last, within an epoch."""
PEFT = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.2}
GROUPS = {
    "learning_rate": 1e-2,
    "max_steps": 8,
    "logging_steps": 5,
    "save_steps": 4,
    "num_train_epochs": 9,
    "per_device_train_batch_size": 32,
    "num_generations": 2,
    "num_iterations": 2,
    "max_completion_length": 4,
    "beta": 0.05,
}


@pytest.fixture
def sigterm_at(monkeypatch):
    """sigterm_at(step): the process sends itself SIGTERM in its micro-step of that number, once."""
    run, calls = transformers.Trainer.training_step, []

    def at(step: int) -> None:
        def training_step(self, *arguments, **keywords):
            calls.append(1)
            if len(calls) == step:
                signal.raise_signal(signal.SIGTERM)
            return run(self, *arguments, **keywords)

        calls.clear()
        monkeypatch.setattr(transformers.Trainer, "training_step", training_step)

    return at


@pytest.fixture
def data_of(conversation_data, preference_data, text_data):
    return lambda kind: {"sft": conversation_data, "pretrain": text_data}.get(kind, preference_data)


def checkpoints(run_dir: Path) -> set[str]:
    return {path.name for path in (run_dir / "checkpoints").glob("checkpoint-*")}


@pytest.mark.parametrize(
    ("kind", "stop"),
    [("sft", 5), ("reward", 5), ("dpo", 5), ("sft", 10)]
    + [
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [(kind, 5) for kind in ("pretrain", "kto", "orpo", "cpo")] + [("sft", 4), ("sft", 6)]
    ],
)
def test_goes_on_to_the_same_end(kind, stop, run_stage, tmp_path, tiny_model_dir, data_of, sigterm_at):
    fields = {"model": tiny_model_dir, "data": data_of(kind), "trainer": TRAINER, "peft": PEFT}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run_stage(kind, whole, **fields)
    sigterm_at(stop)
    with pytest.raises(RequeueError, match=f"stopped at step {stop} of 10 after SIGTERM"):
        run_stage(kind, stopped, **fields)
    assert f"checkpoint-{stop}" in checkpoints(stopped)
    assert (stopped / "checkpoints" / f"checkpoint-{stop}" / MEANS_FILE).exists()
    assert read_manifest(stopped)["status"] == "interrupted"
    assert run_stage(kind, stopped, **fields)["resumed_from_step"] == stop
    assert_same_run(whole, stopped)


@pytest.mark.parametrize("stop", [pytest.param(6, marks=pytest.mark.slow), 8])
def test_what_an_epoch_ends_with_is_done_once(
    stop, run_stage, tmp_path, tiny_model_dir, conversation_data, sigterm_at
):
    trainer = TRAINER | {"eval_strategy": "epoch", "save_strategy": "epoch", "logging_strategy": "epoch"}
    fields = {"model": tiny_model_dir, "data": conversation_data, "trainer": trainer | {"max_steps": 12}}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run_stage("sft", whole, **fields)
    sigterm_at(stop)
    with pytest.raises(RequeueError):
        run_stage("sft", stopped, **fields)
    assert [row["step"] for row in read_rows(stopped)] == [6, 6]
    assert run_stage("sft", stopped, **fields)["resumed_from_step"] == stop
    assert_same_run(whole, stopped)


@pytest.mark.parametrize("kind", ["grpo", pytest.param("rloo", marks=pytest.mark.slow)])
def test_groups_stop_where_no_answer_is_left(
    kind, run_stage, tmp_path, tiny_model_dir, tiny_reward_dir, prompt_data, sigterm_at
):
    """One generation serves steps 5 and 6: asked in step 5, training ends after step 6."""
    fields = {"model": tiny_model_dir, "reward": tiny_reward_dir, "data": prompt_data, "trainer": GROUPS}
    fields["max_prompt_tokens"] = 100
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run_stage(kind, whole, **fields)
    sigterm_at(5)
    with pytest.raises(RequeueError, match="stopped at step 6 of 8"):
        run_stage(kind, stopped, **fields)
    assert run_stage(kind, stopped, **fields)["resumed_from_step"] == 6
    assert_same_run(whole, stopped)


@pytest.mark.parametrize("stop", [pytest.param(5, marks=pytest.mark.slow), 8])
def test_folds_are_not_trained_again(stop, run_stage, tmp_path, tiny_model_dir, preference_data, sigterm_at):
    """Four steps a fold: SIGTERM in the first step of the second fold, and in its last."""
    fields = {"model": tiny_model_dir, "data": preference_data, "trainer": TRAINER | {"max_steps": 4}}
    fields |= {"folds": 3, "peft": PEFT | {"init_lora_weights": "pissa_niter_2"}}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run_stage("reward", whole, **fields)
    sigterm_at(stop)
    place = f"step {stop - (stop - 1) // 4 * 4} of 4 of fold {(stop - 1) // 4 + 1} of 3"
    with pytest.raises(RequeueError, match=f"stopped at {place}"):
        run_stage("reward", stopped, **fields)
    sigterm_at(100)
    run_stage("reward", stopped, **fields)
    assert (stopped / "folds.jsonl").read_text() == (whole / "folds.jsonl").read_text()
    assert_same_run(whole, stopped)
    assert sorted(path.name for path in (stopped / "checkpoints" / "folds").iterdir()) == [
        f"fold-{number}.json" for number in range(3)
    ]


@pytest.mark.slow
def test_the_command_exits_with_75_and_again_with_0(
    run_stage, tmp_path, tiny_model_dir, tiny_reward_dir, prompt_data
):
    """A real process, which gets SIGTERM while it scores the answers of its third generation."""
    once = tmp_path / "sent"
    functions = [{"function": "online_rewards:sigterm_once", "arguments": {"call": 3, "sent": str(once)}}]
    fields = {"model": tiny_model_dir, "reward": tiny_reward_dir, "data": prompt_data, "trainer": GROUPS}
    fields |= {"rewards": {"functions": functions}, "max_prompt_tokens": 100}
    file = write_stage(tmp_path, "grpo", fields)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "integration")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}

    def start() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "posttrain", "grpo", str(file)]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=120, check=False
        )

    first = start()
    assert first.returncode == 75, first.stderr[-2000:]
    assert "stopped at step 6 of 8 after SIGTERM" in first.stderr
    assert read_manifest(tmp_path / "out")["status"] == "interrupted"
    second = start()
    assert second.returncode == 0, second.stderr[-2000:]
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["metrics"]["resumed_from_step"] == 6
    run_stage("grpo", tmp_path / "whole", **fields)
    assert_same_run(tmp_path / "whole", tmp_path / "out")
