"""`posttrain plan` on files as users have them, and its predictions against what the real stages allocate."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_prep.dataset import read_split
from posttrain.stage import execute_stage
from posttrain.stage_file import load_stage_file
from tests.integration.conftest import command, write_stage

ROOT = Path(__file__).parents[2]
TOLERANCE = 0.15
LARGER = {"hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 256}
"""Large enough that tensors are most of what is allocated."""


@pytest.fixture(scope="module")
def allocated() -> Callable[[Callable[[], object]], float]:
    """allocated(run): what torch's allocator gave out at the worst moment; that of scripts/bench_plan.py."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import bench_plan
    finally:
        sys.path.pop(0)
    return bench_plan.allocated


@pytest.fixture(scope="module")
def larger_model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """Two layers of width 128."""
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("larger") / "model"
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=tiny_tokenizer.pad_token_id,
        eos_token_id=tiny_tokenizer.eos_token_id,
        bos_token_id=None,
        **LARGER,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tiny_tokenizer.save_pretrained(directory)
    return directory


def predicted(path: Path, *arguments: str) -> dict[str, Any]:
    """The one stage of a file, as the command writes it."""
    done = command("plan", path, "--gpu", "this", "--strategy", "single", "--json", *arguments)
    assert done.exit_code == 0, done.output
    [stage] = json.loads(done.stdout)["stages"]
    return stage


@pytest.mark.parametrize(
    ("kind", "peft", "trainer"),
    [
        ("sft", None, {}),
        ("sft", {"r": 8}, {"bf16": True}),
        ("dpo", {"r": 8}, {"activation_checkpointing": True}),
    ],
)
def test_predicted_is_what_the_stage_allocates(
    kind: str,
    peft: Any,
    trainer: dict[str, Any],
    tmp_path: Path,
    larger_model_dir: Path,
    conversation_data: Path,
    preference_data: Path,
    allocated: Callable[[Callable[[], object]], float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # the profiler sees one thread
    settings = {
        "max_steps": 2,
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-3,
        "save_strategy": "no",
    }
    data = conversation_data if kind == "sft" else preference_data
    fields = {"model": larger_model_dir, "data": data, "peft": peft, "trainer": settings | trainer}
    path = write_stage(tmp_path, kind, fields)
    stage = predicted(path)
    block = load_stage_file(kind, path)
    measured = allocated(lambda: execute_stage(kind, block.config, block.run_dir, preflight=False))
    assert stage["total"] == pytest.approx(measured, rel=TOLERANCE)
    assert stage["lengths"]["measured"]
    assert stage["total"] == pytest.approx(sum(stage["memory"].values()))


def test_the_tiny_pipeline_is_planned_on_a_fresh_clone(tmp_path: Path) -> None:
    done = command("plan", ROOT / "configs" / "tiny" / "pipeline.yaml", f"output_dir={tmp_path}", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert set(report) == {"config", "gpu", "mfu", "assumptions", "stages", "unplanned"}
    assert [stage["name"] for stage in report["stages"]] == ["base", "sft", "reward", "dpo", "ppo"]
    assert not report["unplanned"]
    for stage in report["stages"]:
        assert stage["fits"] and stage["layout"] == "ddp" and stage["gpus"] == 1
        assert stage["total"] == pytest.approx(sum(stage["memory"].values()))
        assert stage["flops_per_step"] > 0 and stage["checkpoint_bytes"] > 0 and stage["model_bytes"] > 0
        assert stage["lengths"] == {
            "mean": stage["lengths"]["longest"],
            "longest": stage["lengths"]["longest"],
            "measured": False,
        }
    steps = {stage["name"]: stage["steps"] for stage in report["stages"]}
    assert steps == {"base": 1000, "sft": None, "reward": None, "dpo": 50, "ppo": 24}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("kind_of_data", "answers_a_row"), [("unpaired_preference", 1), ("preference", 2)])
def test_kto_sees_each_labelled_answer_once_and_each_pair_twice(
    kind_of_data: str,
    answers_a_row: int,
    tmp_path: Path,
    tiny_model_dir: Path,
    labelled_data: Path,
    preference_data: Path,
) -> None:
    data = {"unpaired_preference": labelled_data, "preference": preference_data}[kind_of_data]
    trainer = {"per_device_train_batch_size": 4, "num_train_epochs": 1, "max_steps": -1}
    fields = {"model": tiny_model_dir, "data": data, "peft": {"r": 4}, "trainer": trainer}
    stage = predicted(write_stage(tmp_path, "kto", fields))
    rows = len(read_split(data, "train"))
    assert stage["lengths"]["measured"]
    assert stage["steps"] == -(-rows * answers_a_row // 4)


def test_a_reward_model_whose_architecture_names_no_pad_token(tmp_path: Path) -> None:
    path = write_stage(tmp_path, "reward", {"model": "Qwen/Qwen2.5-0.5B", "data": "runs/none", "peft": {}})
    done = command("plan", path, "--gpu", "H100", "--gpus", "1", "--strategy", "single", "--json")
    assert done.exit_code == 0, done.output
    [stage] = json.loads(done.stdout)["stages"]
    assert stage["total"] > 1e9


LARGE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
"""The widths of an 8 B Llama, four layers of it, so that a trace takes a second: 1.9 billion parameters."""


@pytest.fixture
def large_stage(tmp_path: Path) -> Path:
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "config.json").write_text(json.dumps(LARGE), encoding="utf-8")
    settings = {
        "stage": "sft",
        "model": str(tmp_path / "large"),
        "data": str(tmp_path / "nowhere"),
        "peft": None,
        "trainer": {"bf16": True, "max_length": 1024, "per_device_train_batch_size": 1, "max_steps": 10},
    }
    path = tmp_path / "large.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def test_the_cheapest_layout_that_fits_is_shown_with_those_that_do_not(large_stage: Path) -> None:
    """1.9 billion parameters take 30 GB of states: not on one A10G, sharded on several."""
    done = command("plan", large_stage, "--gpu", "A10G", "--gpus", "4", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    [stage] = report["stages"]
    usable = report["gpu"]["usable"]
    assert stage["fits"] and stage["total"] <= usable
    assert stage["gpus"] == 4
    rejected = stage["too_large"]
    assert rejected[0]["layout"] == "ddp"
    assert all(choice["total"] > usable for choice in rejected)
    assert rejected[0]["memory"]["weights"] == pytest.approx(4 * stage["parameters"]["total"], rel=1e-3)
    shown = command("plan", large_stage, "--gpu", "A10G", "--gpus", "4")
    assert "is the cheapest that fits 21.9 GB. Cheaper, and too large: ddp x4" in shown.stdout


def test_what_does_not_fit_says_so_with_the_numbers(large_stage: Path) -> None:
    done = command("plan", large_stage, "--gpu", "T4", "--strategy", "single")
    assert done.exit_code == 0, done.output
    assert "sft: does not fit T4: single needs " in done.stdout
    assert " of 14.3 GB; take a smaller batch" in done.stdout


def test_qlora_holds_frozen_matrices_in_four_bits(large_stage: Path) -> None:
    def weights(method: str) -> float:
        done = command(
            "plan", large_stage, "--gpu", "H100", "--method", method, "--strategy", "single", "--json"
        )
        assert done.exit_code == 0, done.output
        [stage] = json.loads(done.stdout)["stages"]
        return stage["memory"]["weights"]

    layers = 4 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    rest = 2 * 128256 * 4096
    assert weights("lora") == pytest.approx(4 * (layers + rest), rel=0.03)
    assert weights("qlora") == pytest.approx(4.127 / 8 * layers + 2 * rest, rel=0.03)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpu", "H10"), "did you mean H100-SXM?"),
        (("--strategy", "zero-3"), "did you mean zero3?"),
        (("--method", "dora"), "is not one of full, lora, qlora"),
        (("model=acme/none",), "is neither a model directory"),
        (("trainer.max_lenght=4",), "did you mean `max_length`?"),
    ],
)
def test_mistakes_are_named(large_stage: Path, arguments: tuple[str, ...], message: str) -> None:
    done = command("plan", large_stage, *arguments)
    assert done.exit_code == 2, done.output
    assert message in done.stderr


def test_a_layout_that_a_stage_refuses_leaves_it_unplanned(tmp_path: Path) -> None:
    pipeline = ROOT / "configs" / "tiny" / "pipeline.yaml"
    done = command("plan", pipeline, f"output_dir={tmp_path}", "--strategy", "zero3", "--gpus", "2", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert [stage["name"] for stage in report["stages"]] == ["sft", "reward", "dpo"]
    assert report["unplanned"] == {
        "base": "base runs on one device or under DDP, not under zero3",
        "ppo": "ppo runs on one device or under DDP, not under zero3",
    }


def test_fp16_can_be_planned_where_there_is_no_gpu(large_stage: Path) -> None:
    """It takes what bf16 takes."""

    def total(*settings: str) -> float:
        done = command(
            "plan", large_stage, *settings, "--gpu", "V100", "--strategy", "zero3", "--gpus", "8", "--json"
        )
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)["stages"][0]["total"]

    assert total("trainer.bf16=false", "trainer.fp16=true") == total()


def test_a_file_without_training_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "merge.yaml"
    path.write_text(f"stage: merge\nmodel: {tmp_path}\n", encoding="utf-8")
    done = command("plan", path)
    assert done.exit_code == 2
    assert "has no training stage" in done.stderr
