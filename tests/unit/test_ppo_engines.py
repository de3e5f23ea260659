"""Rollout engines: sampling parameters, configuration, drawing, the cache, vLLM as far as it runs here."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from torch import nn
from transformers.cache_utils import DynamicLayer
from trl.generation.vllm_generation import VLLMGeneration
from trl.import_utils import is_vllm_available

from posttrain.errors import PosttrainError, UserError
from train.ppo.engines.base import SamplingParams
from train.ppo.engines.config import ContinuousSettings, RolloutConfig, VllmSettings
from train.ppo.engines.continuous import batching_config
from train.ppo.engines.hf import CACHE_GROWTH, DRAW_BLOCK, GrowingLayer, draw
from train.ppo.engines.vllm_engine import (
    VllmEngine,
    check_server,
    check_settings,
    merged_into,
    require_vllm,
    vllm_arguments,
)

SAMPLING = SamplingParams(max_new_tokens=8, temperature=0.7)


@pytest.mark.parametrize(
    ("name", "value"), [("top_k", 50), ("top_p", 0.9), ("min_p", 0.1), ("repetition_penalty", 1.2)]
)
def test_anything_but_temperature_is_refused(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{name} is {value}.*softmax"):
        SamplingParams(8, **{name: value})


def test_neutral_values_are_accepted() -> None:
    assert SamplingParams(8, 1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0).temperature == 1.0


@pytest.mark.parametrize(("tokens", "temperature"), [(0, 1.0), (8, 0.0), (8, -1.0), (8, math.nan)])
def test_lengths_and_temperatures_are_positive(tokens: int, temperature: float) -> None:
    with pytest.raises(UserError, match="max_new_tokens|temperature"):
        SamplingParams(tokens, temperature)


def test_config_is_read_without_torch() -> None:
    code = "import sys, train.ppo.engines.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_settings_of_another_engine_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"rollout\.vllm sets mode, but rollout\.engine is hf"):
        RolloutConfig(vllm=VllmSettings(mode="server"))
    chosen = RolloutConfig(engine="continuous", continuous=ContinuousSettings(page_size=32))
    assert RolloutConfig(**chosen.model_dump()) == chosen


def test_draw_finds_the_token_across_blocks() -> None:
    """Probability 1/4 each on the last token of a block, the first of the next, and two of a part block."""
    size = 2 * DRAW_BLOCK + 10
    tokens = [DRAW_BLOCK - 1, DRAW_BLOCK, 2 * DRAW_BLOCK, size - 1]
    logits = torch.full((6, size), -math.inf)
    logits[:, tokens] = 0.3
    uniforms = torch.tensor([0.0, 0.2499, 0.2501, 0.5, 0.7501, 1 - 2**-53], dtype=torch.float64)
    drawn, logprobs = draw(logits, uniforms, 0.7)
    assert drawn.tolist() == [tokens[i] for i in (0, 0, 1, 2, 3, 3)]
    torch.testing.assert_close(logprobs, torch.full((6,), math.log(0.25)))


def test_draw_equals_the_search_over_the_whole_vocabulary() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 3000, generator=generator) * 3
    uniforms = torch.rand(500, generator=generator, dtype=torch.float64)
    drawn, logprobs = draw(logits, uniforms, 0.8)
    reference = torch.log_softmax(logits.double() / 0.8, -1)
    cumulative = reference.exp().cumsum(-1)
    rows = torch.arange(500)
    below = torch.where(drawn > 0, cumulative[rows, (drawn - 1).clamp(min=0)], 0.0)
    assert (below - 1e-6 <= uniforms).all()
    assert (uniforms <= cumulative[rows, drawn] + 1e-6).all()
    torch.testing.assert_close(logprobs.double(), reference[rows, drawn], rtol=0, atol=1e-5)


def test_draw_never_returns_a_token_of_probability_zero() -> None:
    """Also where rounding takes the threshold to the total: uniforms next to 1 and the mass at the front."""
    logits = torch.full((4, 1000), -math.inf)
    logits[:, 3], logits[:, 300] = 0.0, -80.0
    uniforms = torch.tensor([0.0, 0.5, 1 - 2**-53, 1.0], dtype=torch.float64)
    drawn, logprobs = draw(logits, uniforms, 1.0)
    assert set(drawn.tolist()) <= {3, 300}
    assert torch.isfinite(logprobs).all()


def test_draw_reports_what_is_not_finite() -> None:
    _, logprobs = draw(torch.full((2, 600), math.nan), torch.tensor([0.1, 0.9], dtype=torch.float64), 1.0)
    assert logprobs.isnan().all()


def test_growing_cache_holds_what_the_concatenating_one_does() -> None:
    generator = torch.Generator().manual_seed(0)
    growing, plain = GrowingLayer(), DynamicLayer()
    rows = 4
    for step in range(2 * CACHE_GROWTH + 7):
        shape = (rows, 2, 5 if step == 0 else 1, 3)
        keys, values = (torch.randn(shape, generator=generator) for _ in range(2))
        for ours, theirs in zip(growing.update(keys, values), plain.update(keys, values), strict=True):
            assert torch.equal(ours, theirs)
        if step in (3, CACHE_GROWTH + 1):
            kept = torch.tensor([0, 2, 3][: rows - 1])
            growing.batch_select_indices(kept)
            plain.batch_select_indices(kept)
            rows -= 1
        assert growing.get_seq_length() == plain.get_seq_length() == 5 + step


def test_paged_cache_is_sized_by_the_longest_sequences() -> None:
    config = batching_config(ContinuousSettings(), [5, 30, 10], 20, 2, accelerated=False, half=False, seed=7)
    assert (config.page_size, config.max_requests_per_batch, config.seed) == (16, 2, 7)
    # 30 + 20 tokens are 4 pages of 16; two rows and a spare one: 9 pages in 85 % of the cache.
    assert config.num_blocks == 11
    assert config.max_batch_tokens == 45
    assert config.return_logprobs
    assert not config.auto_switch_to_flash


def test_paged_cache_follows_the_settings() -> None:
    settings = ContinuousSettings(page_size=8, max_blocks=7, max_batch_tokens=10, max_memory=0.25)
    config = batching_config(settings, [5, 30], 20, 64, accelerated=True, half=True, seed=0)
    assert (config.page_size, config.num_blocks, config.max_batch_tokens) == (8, 7, 10)
    assert config.max_memory_percent == 0.25
    assert config.auto_switch_to_flash
    with pytest.raises(UserError, match=r"max_blocks 7 holds 56 tokens.*make 57.*at least 8"):
        batching_config(settings, [5, 37], 20, 64, accelerated=True, half=True, seed=0)


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_vllm_arguments_are_those_trl_takes(mode: Any) -> None:
    arguments = vllm_arguments(
        VllmSettings(mode=mode), SAMPLING, eos_id=5, max_prompt_tokens=100, max_rows=64
    )
    assert set(arguments) <= set(inspect.signature(VLLMGeneration.__init__).parameters)
    assert (arguments["temperature"], arguments["max_completion_length"]) == (0.7, 8)
    assert (arguments["top_p"], arguments["top_k"], arguments["min_p"]) == (1.0, 0, 0.0)
    assert arguments["repetition_penalty"] == 1.0
    assert arguments["generation_kwargs"] == {"ignore_eos": True, "stop_token_ids": [5]}
    assert arguments["logprobs"] == 0
    assert arguments.get("max_model_length") == (108 if mode == "colocate" else None)
    assert arguments.get("server_port") == (8000 if mode == "server" else None)


def test_vllm_settings_are_checked_before_loading() -> None:
    with pytest.raises(UserError, match="tensor_parallel_size 2 does not divide.*3"):
        check_settings(VllmSettings(tensor_parallel_size=2), SAMPLING, 3, 100)
    with pytest.raises(UserError, match="max_model_length 107 is less than.*108"):
        check_settings(VllmSettings(max_model_length=107), SAMPLING, 1, 100)
    check_settings(VllmSettings(tensor_parallel_size=2, max_model_length=108), SAMPLING, 4, 100)


def test_server_must_report_logprobs_at_the_temperature() -> None:
    check_server({"model_config": {"logprobs_mode": "processed_logprobs"}})
    with pytest.raises(UserError, match="reports raw_logprobs.*--logprobs-mode processed_logprobs"):
        check_server({"model_config": {"logprobs_mode": "raw_logprobs"}})


@pytest.mark.skipif(is_vllm_available(), reason="vLLM is installed")
def test_missing_vllm_names_the_field_and_the_remedies() -> None:
    with pytest.raises(
        UserError, match=r"rollout\.engine is vllm.*pip install 'trl\[vllm\]'.*hf.*continuous"
    ):
        require_vllm()


class FakeGeneration:
    """Stands in for TRL's VLLMGeneration: merges as it does, returns what it was told to."""

    def __init__(self, policy: nn.Module, responses: Any = None, logprobs: Any = None) -> None:
        self.policy, self.responses, self.logprobs = policy, responses, logprobs
        self.max_completion_length = 0
        self.sent: list[dict[str, torch.Tensor]] = []

    def sync_weights(self) -> None:
        self.policy.merge_adapter()
        self.sent.append({name: p.detach().clone() for name, p in self.policy.named_parameters()})
        self.policy.unmerge_adapter()

    def generate(self, prompts: list[list[int]], images: None, num_generations: int) -> Any:
        assert (images, num_generations) == (None, 1)
        return prompts, self.responses, self.logprobs, None


def adapted() -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    policy = get_peft_model(model, LoraConfig(r=4, target_modules=["0", "1"], init_lora_weights=False))
    return policy.eval()


def test_vllm_gets_merged_weights_and_the_policy_keeps_its_own_to_the_bit() -> None:
    policy = adapted()
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    inputs = torch.randn(5, 16)
    expected = policy(inputs)
    generation = FakeGeneration(policy)
    generation.sync_weights()
    drifted = [name for name, p in policy.named_parameters() if not torch.equal(p, before[name])]
    assert drifted, "merging and unmerging leaves rounding behind, which is what the engine undoes"
    for parameter, (_, original) in zip(policy.parameters(), before.items(), strict=True):
        parameter.data.copy_(original)

    engine = VllmEngine(generation, policy)
    for _ in range(3):
        engine.sync(policy)
    assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters())
    assert torch.equal(policy(inputs), expected)
    assert len(merged_into(policy)) == 4
    sent = generation.sent[-1]["base_model.model.0.base_layer.weight"]
    delta = policy.base_model.model[0].get_delta_weight("default")
    torch.testing.assert_close(sent, before["base_model.model.0.base_layer.weight"] + delta)


def test_vllm_results_become_samples() -> None:
    policy = adapted()
    generation = FakeGeneration(policy, [[4, 5], [6]], [[[-0.5], [-1.5]], [[None]]])
    engine = VllmEngine(generation, policy)
    samples = engine(policy, [[1], [2]], torch.zeros(2, 7))
    assert samples.responses == [[4, 5], [6]]
    assert samples.logprobs[0] == [-0.5, -1.5]
    assert math.isnan(samples.logprobs[1][0])
    assert generation.max_completion_length == 7
    assert not engine.uses_uniforms
    generation.logprobs = None
    with pytest.raises(PosttrainError, match="without log-probabilities"):
        engine(policy, [[1], [2]], torch.zeros(2, 7))
