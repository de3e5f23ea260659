"""The GPU table, looking up models that do not exist yet, and how much a stage computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaConfig

from posttrain.errors import UserError
from posttrain.pipeline import load_pipeline, read_blocks
from train.plan.amounts import count, work_of
from train.plan.gpus import GPUS, find_gpu
from train.plan.layouts import Sizes
from train.plan.lookup import FoundModel, Stages, find_model
from train.plan.predict import candidates, usable
from train.plan.report import short
from train.plan.request import Request
from train.plan.stages import describe
from train.ppo.throughput import matmul_throughput

ROOT = Path(__file__).parents[2]


def test_every_gpu_has_plausible_numbers() -> None:
    for gpu in GPUS.values():
        assert 16e9 <= gpu.memory <= 200e9
        assert 50e12 <= gpu.flops <= 2500e12
        assert gpu.bandwidth is not None and 250e9 <= gpu.bandwidth <= 8e12
        assert gpu.format == ("float16" if gpu.name[:2] in ("T4", "V1") else "bfloat16")
        assert usable(gpu) < gpu.memory


def test_gpus_are_found_by_any_spelling() -> None:
    assert find_gpu("a100 80gb") is find_gpu("A100") is GPUS["A100-80GB"]
    assert find_gpu("rtx-4090") is GPUS["RTX4090"]


@pytest.mark.parametrize(("asked", "nearest"), [("H10", "H100-SXM"), ("RTX4080", "RTX4090"), ("L40", "L4")])
def test_an_unknown_gpu_names_the_nearest(asked: str, nearest: str) -> None:
    with pytest.raises(UserError, match=rf"did you mean {nearest}") as refused:
        find_gpu(asked)
    assert "known are T4, V100-16GB" in str(refused.value)


def test_this_machine_is_measured() -> None:
    # The very rate that was measured: how fast that is, with others on the machine, is nobody's to say.
    here = find_gpu("this", torch.float32)
    assert here.measured and here.memory > 1e9
    assert here.flops == matmul_throughput(torch.device("cuda" if here.cuda else "cpu"), torch.float32)


def pipeline(tmp_path: Path, stages: dict[str, Any]) -> tuple[dict[str, Any], Stages]:
    """The blocks of a pipeline by name, and by run directory."""
    path = tmp_path / "p.yaml"
    settings = {"name": "p", "output_dir": str(tmp_path / "runs"), "stages": stages}
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    blocks = load_pipeline(path).stages
    return dict(blocks), {block.run_dir.absolute(): block for block in blocks.values()}


def test_the_chain_leads_back_to_the_base_stage(tmp_path: Path) -> None:
    """ppo <- sft-merged <- sft <- base, none of which has run."""
    blocks, stages = pipeline(
        tmp_path,
        {
            "base": {"data": "d", "vocab_size": 777, "architecture": {"hidden_size": 64}},
            "sft": {"model": "${stage:base}", "data": "d", "peft": {"r": 4}},
            "merged": {"stage": "merge", "model": "${stage:sft}"},
        },
    )
    found = find_model(str(blocks["merged"].run_dir), stages)
    assert (found.config.vocab_size, found.config.hidden_size, found.adapter) == (777, 64, None)
    assert found.directory is None
    assert "vocab_size 777" in found.notes[0]
    adapter = find_model(str(blocks["sft"].run_dir), stages).adapter
    assert adapter is not None and adapter.r == 4


def test_the_chain_stops_at_a_model_that_is_there(tmp_path: Path, tiny_model_dir: Path) -> None:
    blocks, stages = pipeline(
        tmp_path,
        {"sft": {"model": str(tiny_model_dir), "data": "d"}, "dpo": {"model": "${stage:sft}", "data": "d"}},
    )
    found = find_model(str(blocks["sft"].run_dir), stages)
    assert found.config.hidden_size == 32
    assert found.directory == tiny_model_dir


def test_a_model_that_is_nowhere_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model acme/none: is neither a model directory"):
        find_model("acme/none", {})
    blocks, stages = pipeline(
        tmp_path, {"demos": {"stage": "curate", "kind": "text", "sources": [{"path": "x"}]}}
    )
    with pytest.raises(UserError, match="makes no model"):
        find_model(str(blocks["demos"].run_dir), stages)


def test_the_shared_layout_of_ppo_is_foreseen() -> None:
    """configs/tiny/pipeline.yaml: the reward model will be an adapter on the model that PPO starts from."""
    blocks = read_blocks(ROOT / "configs" / "tiny" / "pipeline.yaml", ["output_dir=/nonexistent"])
    stages = {block.run_dir.absolute(): block for block in blocks}
    by_name = {block.name: block for block in blocks}
    described = describe(by_name["ppo"], stages, "cpu", 1)
    assert described.request.layout == "shared"
    assert described.request.rewards[0].adapter is not None
    assert (described.request.rows, described.request.length) == (36, 224)  # 8192 tokens of 160 + 64
    full = read_blocks(
        ROOT / "configs" / "tiny" / "pipeline.yaml", ["output_dir=/nonexistent", "stages.ppo.peft=null"]
    )
    block = next(block for block in full if block.name == "ppo")
    assert describe(block, stages, "cpu", 1).request.layout == "full"


def tiny_request(**changes: Any) -> Request:
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
    )
    return Request(
        **({"kind": "sft", "config": config, "peft": None, "rows": 1, "length": 8, "device": "cpu"} | changes)
    )


def test_parameters_are_counted_by_what_they_do() -> None:
    layer = 4 * 16**2 + 3 * 16 * 32
    parameters = count(tiny_request())
    assert (parameters.frozen, parameters.trained, parameters.head) == (0, 2 * layer, 1600)
    assert parameters.sizes == Sizes(
        trained=2 * (layer + 32) + 2 * 1600 + 16,
        frozen=0,
        linear=0,
        layer=layer + 32,
        root=2 * 1600 + 16,
        matrix=0,
    )


def test_flops_of_a_step_are_six_per_parameter_and_token(tmp_path: Path, tiny_model_dir: Path) -> None:
    """Kaplan et al. 2020: 6 N for every trained token, and 12 L d T for attention (PaLM, appendix B)."""
    blocks, stages = pipeline(
        tmp_path,
        {
            "sft": {
                "model": str(tiny_model_dir),
                "data": "nowhere",
                "peft": None,
                "trainer": {
                    "max_steps": 7,
                    "max_length": 64,
                    "per_device_train_batch_size": 4,
                    "gradient_accumulation_steps": 3,
                },
            }
        },
    )
    described = describe(blocks["sft"], stages, "cpu", 2)
    parameters = count(described.request)
    work = work_of(described, parameters, 2)
    tokens = 4 * 3 * 2 * 64
    assert (work.steps, work.tokens_per_step, work.tokens) == (7, tokens, 7 * tokens)
    attention = 12 * 2 * 32 * 64  # 2 layers, width 32, sequences of 64 tokens
    assert work.flops_per_step == tokens * (6 * (parameters.trained + parameters.head) + attention)
    assert work.checkpoint == 12 * parameters.sizes.trained
    assert work.final == 4 * parameters.sizes.total


def test_candidates_begin_with_what_is_asked_for_and_end_with_the_slowest(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    blocks, stages = pipeline(tmp_path, {"sft": {"model": str(tiny_model_dir), "data": "nowhere"}})
    described = describe(blocks["sft"], stages, "cuda", 1)
    ways = [(layout.name, number, ckpt) for layout, number, ckpt in candidates(described, None, None)]
    assert ways[:2] == [("ddp", 1, False), ("ddp", 1, True)]
    assert [number for _, number, _ in ways] == sorted(number for _, number, _ in ways)
    assert ("zero3", 1, False) not in ways and ("zero3", 8, False) in ways
    assert ways[-1] == ("zero3-offload", 8, True)


def test_ppo_is_only_offered_what_it_runs_with(
    tiny_model_dir: Path, tiny_reward_dir: Path, tmp_path: Path
) -> None:
    blocks, stages = pipeline(
        tmp_path,
        {"ppo": {"model": str(tiny_model_dir), "reward": str(tiny_reward_dir), "data": "nowhere"}},
    )
    described = describe(blocks["ppo"], stages, "cuda", 1)
    assert {layout.name for layout, _, _ in candidates(described, None, None)} == {"ddp"}
    assert isinstance(described.model, FoundModel)


def test_sizes_have_four_signs_at_most() -> None:
    assert [short(n) for n in (7, 1234, 45_600_000, 162_800_000_000, 1.2e12)] == [
        "7",
        "1.23k",
        "45.6M",
        "163G",
        "1.2T",
    ]
