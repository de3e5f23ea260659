"""The ppo stage in a run directory: exact outputs, resume after a kill, and what it says to the user."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from posttrain.errors import DataError, UserError
from posttrain.models import load_causal_lm, load_tokenizer
from posttrain.stage import execute_stage
from train.ppo.config import PpoStageConfig

LORA = {"r": 4, "lora_alpha": 8}
Settings = Callable[..., PpoStageConfig]


@pytest.fixture
def settings(tiny_model_dir: Path, tiny_reward_dir: Path, prompt_data: Path) -> Settings:
    def make(**overrides: Any) -> PpoStageConfig:
        values = {
            "model": str(tiny_model_dir),
            "reward": str(tiny_reward_dir),
            "data": str(prompt_data),
            "total_episodes": 24,
            "batch_size": 4,
            "micro_batch_size": 2,
            "max_prompt_tokens": 128,
            "max_new_tokens": 6,
            "num_ppo_epochs": 2,
            "learning_rate": 1e-3,
            "save_every": 2,
            "log_samples_every": 2,
            "peft": LORA,
        }
        return PpoStageConfig(**(values | overrides))

    return make


def rows_without_times(run_dir: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    timed = ("time", "seconds", "tokens_per_second")
    return [{name: value for name, value in row.items() if not name.startswith(timed)} for row in rows]


def test_lora_run_writes_an_adapter_on_the_sft_model(
    tmp_path: Path, settings: Settings, tiny_model_dir: Path
) -> None:
    run_dir = tmp_path / "ppo"
    result = execute_stage("ppo", settings(), run_dir)
    assert sorted(path.name for path in (run_dir / "model").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    adapter = json.loads((run_dir / "model" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(tiny_model_dir.resolve())
    assert adapter["task_type"] == "CAUSAL_LM"
    generation = json.loads((run_dir / "model" / "generation_config.json").read_text())
    tokenizer = load_tokenizer(run_dir / "model")
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    tuned, base = load_causal_lm(run_dir / "model"), load_causal_lm(tiny_model_dir)
    ids = torch.arange(3, 20).unsqueeze(0)
    with torch.no_grad():
        assert (tuned(input_ids=ids).logits - base(input_ids=ids).logits).abs().max() > 1e-4

    metrics = result.manifest["metrics"]
    assert metrics["updates"] == 6
    assert metrics["episodes"] == 24
    assert metrics["prompts"] == 48
    assert metrics["prompts_dropped"] == 0
    assert [row["step"] for row in rows_without_times(run_dir)] == [1, 2, 3, 4, 5, 6]
    samples = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [2] * 4 + [4] * 4 + [6] * 4
    assert samples[0]["prompt"].endswith("<|im_start|>assistant\n")
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step-2", "step-4"]


def test_full_run_writes_a_model(tmp_path: Path, settings: Settings, tiny_model_dir: Path) -> None:
    run_dir = tmp_path / "ppo"
    execute_stage("ppo", settings(peft=None, total_episodes=4), run_dir)
    before, after = (load_file(path / "model.safetensors") for path in (tiny_model_dir, run_dir / "model"))
    assert before.keys() == after.keys()
    assert sum(not torch.equal(before[name], after[name]) for name in before) > len(before) / 2


@pytest.mark.parametrize("peft", [None, LORA], ids=["full", "lora"])
def test_killed_run_resumes_to_the_same_end(
    tmp_path: Path, settings: Settings, peft: dict[str, Any] | None
) -> None:
    config = settings(peft=peft)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    execute_stage("ppo", config, whole)
    # A child that dies by SIGKILL inside its fourth update, after a metrics row that no checkpoint covers.
    program = (
        "import os, signal, sys, pathlib\n"
        "from posttrain.stage import execute_stage\n"
        "from train.ppo.config import PpoStageConfig\n"
        "from train.ppo.trainer import PpoTrainer\n"
        "optimise = PpoTrainer.optimise\n"
        "def dying(self, *args):\n"
        "    if self.step == 3:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return optimise(self, *args)\n"
        "PpoTrainer.optimise = dying\n"
        "config = PpoStageConfig.model_validate_json(sys.argv[1])\n"
        "execute_stage('ppo', config, pathlib.Path(sys.argv[2]))\n"
    )
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    child = subprocess.run(
        [sys.executable, "-c", program, config.model_dump_json(), str(killed)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr[-2000:]
    assert [row["step"] for row in rows_without_times(killed)] == [1, 2, 3]
    assert not (killed / "model").exists()
    shutil.copytree(killed / "checkpoints" / "step-2", killed / "checkpoints" / "step-5")
    (killed / "checkpoints" / "step-5" / "COMPLETE").unlink()

    result = execute_stage("ppo", config, killed)
    assert result.status == "completed"
    assert rows_without_times(killed) == rows_without_times(whole)
    assert (killed / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    name = "adapter_model.safetensors" if peft else "model.safetensors"
    ours, theirs = (load_file(run / "model" / name) for run in (killed, whole))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_long_prompts_are_dropped_and_counted(
    tmp_path: Path,
    settings: Settings,
    write_dataset: Callable[..., Path],
    make_rows: dict[str, Callable[..., Any]],
) -> None:
    rows = make_rows["prompt"](6, 0)
    rows[2]["prompt"] = [{"role": "user", "content": "please " * 100}]
    data = write_dataset(tmp_path / "data", "prompt", rows, rows)
    config = settings(data=str(data), total_episodes=4, max_prompt_tokens=64)
    metrics = execute_stage("ppo", config, tmp_path / "ppo").manifest["metrics"]
    assert (metrics["prompts"], metrics["prompts_dropped"]) == (5, 1)


def test_no_prompt_left_is_an_error(tmp_path: Path, settings: Settings) -> None:
    with pytest.raises(
        DataError, match=r"all 48 are longer than max_prompt_tokens=3, the shortest has \d+ tokens"
    ):
        execute_stage("ppo", settings(max_prompt_tokens=3), tmp_path / "ppo")


def test_sequences_must_fit_the_models(tmp_path: Path, settings: Settings) -> None:
    with pytest.raises(
        UserError, match=r"max_prompt_tokens 250 \+ max_new_tokens 20 = 270 tokens.*at most 256"
    ):
        execute_stage("ppo", settings(max_prompt_tokens=250, max_new_tokens=20), tmp_path / "ppo")


def test_adapter_on_an_adapter_is_refused(tmp_path: Path, settings: Settings) -> None:
    first = tmp_path / "first"
    execute_stage("ppo", settings(total_episodes=4), first)
    with pytest.raises(UserError, match="is a LoRA adapter"):
        execute_stage("ppo", settings(model=str(first), total_episodes=4), tmp_path / "second")
    # Full fine-tuning starts from the adapter merged in memory, and KL to it is 0 at first.
    result = execute_stage("ppo", settings(model=str(first), total_episodes=4, peft=None), tmp_path / "third")
    assert result.manifest["metrics"]["kl"] == 0.0
