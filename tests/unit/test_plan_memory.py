"""What a step holds, read off the operations, against first principles for a Llama layer.

N tokens, width h, MLP width I, rank r, float32. Korthikanti et al. 2022 (arXiv 2205.05198), section 4.1,
count the same way for a GPT layer in 16 bits.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

from train.peft_config import PeftSettings
from train.plan.request import Request, RewardModel, Rollout
from train.plan.steps import trace_step
from train.plan.tracker import Trace

ROWS, LENGTH, WIDTH, MLP, HEADS, RANK = 2, 64, 48, 96, 4, 3
N = ROWS * LENGTH


def config(layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=200,
        hidden_size=WIDTH,
        intermediate_size=MLP,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        max_position_embeddings=128,
        pad_token_id=0,
    )


BASE = Request("sft", config(2), None, ROWS, LENGTH, "cpu", padded=False)
LORA = PeftSettings(r=RANK, lora_alpha=4)


def saved(trace: Trace) -> int:
    """Bytes of activations while the loss is computed: all of them are there then, and nothing else is."""
    return min(p.others["activations"] for p in trace.points if p.gradients == 0 and p.others.get("logits"))


def per_layer(request: Request) -> float:
    """Floats that one more layer keeps for the backward pass."""
    two, four = (
        saved(trace_step(replace(request, config=config(layers), attention=request.attention)))
        for layers in (2, 4)
    )
    return (four - two) / 2 / 4


def test_a_trained_layer_keeps_ten_widths_and_four_mlp_widths() -> None:
    """Each of the two norms: input, normed, scaled; attention: q, k, v, output; MLP: gate, its SiLU, up,
    their product. And per token one log-sum-exp a head, one scale a norm.
    """
    assert per_layer(BASE) == N * (10 * WIDTH + 4 * MLP + HEADS + 2)


def test_frozen_weights_keep_inputs_only_for_the_adapters() -> None:
    """The norms' weights are frozen, so what they scale is not kept; each adapter keeps its low-rank
    values.
    """
    request = replace(BASE, peft=LORA)
    assert per_layer(request) == N * (8 * WIDTH + 4 * MLP + HEADS + 2 + 7 * RANK)


def test_checkpointing_keeps_the_input_of_a_layer() -> None:
    assert per_layer(replace(BASE, checkpointing=True)) == N * WIDTH


def test_eager_attention_keeps_its_weights() -> None:
    """T x T for every head and sequence, and no log-sum-exp; the output is copied once to be transposed."""
    extra = per_layer(replace(BASE, attention="eager")) - per_layer(BASE)
    assert extra == pytest.approx(ROWS * HEADS * LENGTH**2, rel=0.1)


def test_sdpa_keeps_one_mask_a_layer_where_sequences_are_padded() -> None:
    extra = per_layer(replace(BASE, padded=True)) - per_layer(BASE)
    assert extra == ROWS * LENGTH**2


def test_weights_gradients_and_moments_are_those_of_the_model() -> None:
    trace = trace_step(BASE)
    layer = 4 * WIDTH**2 + 3 * WIDTH * MLP + 2 * WIDTH
    parameters = 2 * layer + 2 * 200 * WIDTH + WIDTH
    buffers = 2 * WIDTH // HEADS // 2 * 4  # rotary frequencies, kept twice
    steps = 4 * (2 * 9 + 3)  # one counter for each of the 21 tensors
    assert trace.standing["weights"] == 4 * parameters + buffers
    assert trace.standing["optimizer"] == 8 * parameters + steps
    assert max(point.gradients for point in trace.points) == 4 * parameters


def test_autocast_keeps_a_copy_of_every_matrix() -> None:
    trace = trace_step(replace(BASE, autocast=torch.bfloat16))
    matrices = 2 * (4 * WIDTH**2 + 3 * WIDTH * MLP)
    assert max(point.others.get("casts", 0) for point in trace.points) >= 2 * matrices


def test_accumulated_gradients_meet_the_next_forward_pass() -> None:
    """Then the worst moment has both."""

    def worst(trace: Trace) -> int:
        return max(point.gradients + point.passing for point in trace.points)

    alone, accumulated = (trace_step(replace(BASE, accumulates=value)) for value in (False, True))
    gradients = max(point.gradients for point in alone.points)
    assert worst(accumulated) == pytest.approx(worst(alone) + gradients, rel=0.02)


def test_a_full_reference_is_a_second_model_and_lora_needs_none() -> None:
    full = trace_step(replace(BASE, kind="dpo", reference=True))
    assert full.standing["other_models"] == full.standing["weights"]
    assert trace_step(replace(BASE, kind="dpo", reference=True, peft=LORA)).standing["other_models"] == 0


def test_on_a_gpu_the_fused_head_holds_one_tile_of_logits() -> None:
    """Triton kernels work in the tile that the product is written to: N x V floats, and the gradient of the
    output matrix, V x h.
    """
    trace = trace_step(replace(BASE, device="cuda"))
    tile, head = ROWS * (LENGTH - 1) * 32_768 * 4, 200 * WIDTH * 4
    logits = max(point.others.get("logits", 0) for point in trace.points)
    assert tile < logits < tile + 3 * head + 20 * N * WIDTH * 4


def test_a_rollout_holds_keys_and_values_of_every_row() -> None:
    """Two per layer, of rows x tokens x width."""
    rollout = Rollout(prompt=8, response=24, rows=2048)
    reward = RewardModel(config(2), 4096)
    trace = trace_step(replace(BASE, kind="grpo", rows=1, length=32, rollout=rollout, rewards=(reward,)))
    one = 2048 * WIDTH * 4  # of one layer and token, keys or values
    worst = max(trace.points, key=lambda point: point.passing)
    # 31 tokens were there, the 32nd is appended to a copy of one tensor at a time.
    assert 2 * 2 * 31 * one <= worst.others["kv_cache"] <= (2 * 2 * 32 + 32) * one
    assert trace.standing["other_models"] > 0.8 * trace.standing["weights"]
