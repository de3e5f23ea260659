"""Padding, batch composition and micro-batching change nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ppo_tiny import (
    BIAS,
    EOS,
    LAYOUTS,
    PAD,
    experience_of,
    model_config,
    networks,
    ppo_config,
    ppo_trainer,
    randomise_adapter,
    reward_model,
    weights,
    without_timings,
)
from transformers import Gemma2Config, Gemma2ForCausalLM

from posttrain.models import score_ids
from train.ppo.batches import TokenBatch
from train.ppo.layouts import full_networks
from train.ppo.networks import Networks

PROMPTS = [[5, 9, 12], [7, 30, 31, 8, 44, 21, 60], [3, 3], [17, 18, 19, 20, 22]]
RESPONSES = [[40, 41, EOS], [50, EOS], [10, 11, 12, 13, 14, 15], [EOS]]


def together(packed: bool = False) -> TokenBatch:
    return TokenBatch.build(PROMPTS, RESPONSES, PAD, "cpu", packed=packed)


def by_row(batch: TokenBatch, values_N: torch.Tensor) -> list[list[float]]:
    lengths = batch.response_mask_BR.sum(-1).tolist()
    return [part.tolist() for part in values_N.split(lengths)]


@pytest.fixture(params=[False, True], ids=["logits", "fused"])
def nets(request: pytest.FixtureRequest, layout: dict[str, Any]) -> Networks:
    """Networks with an adapter that does something, by way of the logits and of the chunked product."""
    trainer = ppo_trainer(ppo_config(**layout))
    randomise_adapter(trainer)
    trainer.networks.fused = request.param
    return trainer.networks


@torch.no_grad()
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_nothing_depends_on_batch_mates(nets: Networks, packed: bool) -> None:
    batch = together(packed)
    outputs = nets.policy(batch, 0.8, entropy=True)
    quantities = [*outputs, nets.value(batch), nets.reference(batch, 0.8)]
    scores = nets.reward(batch)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        alone = TokenBatch.build([prompt], [response], PAD, "cpu")
        single = nets.policy(alone, 0.8, entropy=True)
        others = [*single, nets.value(alone), nets.reference(alone, 0.8)]
        for whole, one in zip(quantities, others, strict=True):
            assert by_row(batch, whole)[row] == pytest.approx(one.tolist(), abs=1e-5)
        assert scores[row].item() == pytest.approx(nets.reward(alone).item(), abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_logprobs_equal_a_plain_forward_without_any_padding(nets: Networks, packed: bool) -> None:
    batch = together(packed)
    logprobs = by_row(batch, nets.policy(batch, 1.0).logprobs)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        with nets.sampling() as policy:
            logits = policy(input_ids=torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        expected = [logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(response)]
        assert logprobs[row] == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side_changes_nothing(nets: Networks, side: str) -> None:
    """The model run by hand with padding, mask and positions on either side gives the same
    log-probabilities."""
    batch = together()
    width = max(len(p) + len(r) for p, r in zip(PROMPTS, RESPONSES, strict=True)) + 3
    logprobs = by_row(batch, nets.policy(batch, 1.0).logprobs)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        pad = width - len(prompt) - len(response)
        before, after = (pad, 0) if side == "left" else (0, pad)
        ids = torch.tensor([[PAD] * before + prompt + response + [PAD] * after])
        mask = torch.tensor([[0] * before + [1] * (width - pad) + [0] * after])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with nets.sampling() as policy:
            logits = (
                policy(input_ids=ids, attention_mask=mask, position_ids=positions).logits[0].log_softmax(-1)
            )
        first = before + len(prompt) - 1
        expected = [logits[first + i, token].item() for i, token in enumerate(response)]
        assert logprobs[row] == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_reward_score_does_not_depend_on_padding_or_batch_mates(side: str) -> None:
    model = reward_model()
    sequences = [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    width = max(map(len, sequences)) + 4
    ids, mask = [], []
    for sequence in sequences:
        room = width - len(sequence)
        left = {"left": room, "right": 0, "both": room // 2}[side]
        ids.append([PAD] * left + sequence + [PAD] * (room - left))
        mask.append([0] * left + [1] * len(sequence) + [0] * (room - left))
    scores = score_ids(model, {"bias": BIAS}, torch.tensor(ids), torch.tensor(mask))
    for sequence, score in zip(sequences, scores.tolist(), strict=True):
        tokens = torch.tensor([sequence])
        assert score == pytest.approx(
            score_ids(model, {"bias": BIAS}, tokens, torch.ones_like(tokens)).item(), abs=1e-5
        )
        head = model.score(model.base_model(input_ids=tokens).last_hidden_state[0, -1])
        assert score == pytest.approx(head.item() - BIAS, abs=1e-5)


@torch.no_grad()
def test_a_pad_token_inside_the_response_is_scored_like_any_other() -> None:
    """The last real token counts, not the first pad id: a policy can sample the pad token."""
    model = reward_model()
    ids = torch.tensor([[5, 9, PAD, 12, EOS]])
    score = score_ids(model, {"bias": BIAS}, ids, torch.ones_like(ids))
    expected = model.score(model.base_model(input_ids=ids).last_hidden_state[0, -1]).item() - BIAS
    assert score.item() == pytest.approx(expected, abs=1e-6)


def test_what_stands_in_padded_positions_changes_nothing(layout: dict[str, Any]) -> None:
    """Two whole updates with other pad ids: same metrics and weights, to the bit."""
    results = []
    for pad in (PAD, 37):
        trainer = ppo_trainer(ppo_config(**layout), pad_id=pad)
        rows = [without_timings(trainer.run_update()) for _ in range(2)]
        results.append((rows, weights(trainer)))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[0][1][name], results[1][1][name]) for name in results[0][1])


@pytest.mark.parametrize(
    "settings", [{"micro_batch_size": 1}, {"micro_batch_size": 8}, {"micro_batch_tokens": 40}]
)
@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_micro_batches_change_only_rounding(
    layout: dict[str, Any], settings: dict[str, int], aggregation: str
) -> None:
    """Losses, gradient norms and weights after an update; the responses differ in length."""
    common = {"loss_aggregation": aggregation, "adam_epsilon": 1e-3, **layout}
    base, other = (ppo_trainer(ppo_config(**common, **mine)) for mine in ({}, settings))
    expected, actual = (without_timings(trainer.run_update()) for trainer in (base, other))
    assert actual == pytest.approx(expected, abs=1e-6, rel=1e-5)
    after, after_other = weights(base), weights(other)
    for name, weight in after.items():
        torch.testing.assert_close(after_other[name], weight, rtol=0, atol=1e-6)


def test_advantages_are_whitened_over_response_tokens() -> None:
    experience = experience_of(ppo_trainer(ppo_config()))
    inside = experience.advantages_BR[experience.mask_BR]
    assert inside.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert inside.var(unbiased=False).item() == pytest.approx(1.0, abs=1e-5)
    assert not experience.advantages_BR[~experience.mask_BR].any()
    assert len(set(experience.mask_BR.sum(-1).tolist())) > 1


def test_merged_policy_equals_adapter() -> None:
    trainer = ppo_trainer(ppo_config(**LAYOUTS["lora"]))
    randomise_adapter(trainer)
    trainer.run_update()
    batch = together()
    with torch.no_grad():
        adapter = trainer.networks.policy(batch, 1.0).logprobs
        reference = trainer.networks.reference(batch, 1.0)
        merged_model = trainer.networks.policy_model.merge_and_unload()
        logits = merged_model(input_ids=batch.input_ids_BT).logits.flatten(0, 1)[batch.predict_N]
    merged = logits.log_softmax(-1).gather(1, batch.target_N.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(merged, adapter, rtol=0, atol=1e-5)
    assert (adapter - reference).abs().max() > 0.1


def test_packing_changes_only_rounding(layout: dict[str, Any]) -> None:
    """Two updates on packed sequences and on padded rows; both ways are taken."""
    results = []
    for packed in (False, True):
        trainer = ppo_trainer(ppo_config(adam_epsilon=1e-3, micro_batch_size=None, **layout), packed=packed)
        assert trainer.networks.packed == packed
        rows = [without_timings(trainer.run_update()) for _ in range(2)]
        results.append((rows, weights(trainer)))
    for one, two in zip(results[0][0], results[1][0], strict=True):
        assert two == pytest.approx(one, abs=1e-5, rel=1e-4)
    for name, weight in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], weight, rtol=0, atol=1e-5)


def test_a_model_that_packing_does_not_fit_keeps_padded_rows() -> None:
    """Gemma 2 caps its attention scores, which the packed attention does not: the trial finds out."""
    torch.manual_seed(0)
    settings = model_config().to_dict() | {
        "head_dim": 8,
        "attn_logit_softcapping": 0.5,
        "query_pre_attn_scalar": 8,
    }
    kept = {
        name: settings[name]
        for name in settings
        if name not in ("model_type", "architectures", "rope_parameters")
    }
    model = Gemma2ForCausalLM(Gemma2Config(**kept)).eval()
    nets = full_networks(model, None, 0.0, None, "head")
    nets.choose_paths(PROMPTS[:2], PAD, packing=True)
    assert not nets.packed
    assert nets.fused == (model.config.final_logit_softcapping is None)


def test_switching_adapters_changes_nothing_that_is_trainable() -> None:
    nets = networks(ppo_config(**LAYOUTS["shared"]))
    flags = {name: p.requires_grad for name, p in nets.named_parameters()}
    batch = together()
    before = nets.policy(batch, 1.0).logprobs.detach()
    for trunk in (nets.value_trunk, nets.reference_trunk, nets.reward_trunk, nets.policy_trunk):
        assert trunk is not None
        with trunk.active():
            assert {name: p.requires_grad for name, p in nets.named_parameters()} == flags
    assert {name: p.requires_grad for name, p in nets.named_parameters()} == flags
    assert torch.equal(nets.policy(batch, 1.0).logprobs, before)


@torch.no_grad()
def test_both_ways_to_a_value_head_on_the_policy_agree() -> None:
    trainer = ppo_trainer(ppo_config(**LAYOUTS["head"]))
    randomise_adapter(trainer)
    nets = trainer.networks
    nets.value_head.score.weight.normal_()
    results = []
    for nets.fused in (True, False):
        tokens, values = nets.policy_and_value(together(), 0.8, entropy=True)
        results.append((tokens.logprobs, tokens.entropy, values))
    for fused, plain in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=0, atol=1e-5)
    torch.testing.assert_close(results[0][2], nets.value(together()), rtol=0, atol=1e-5)


def test_gradients_reach_the_adapter_in_use_and_no_other() -> None:
    nets = networks(ppo_config(**LAYOUTS["shared"]))
    nets.choose_paths(PROMPTS[:2], PAD, packing=False)
    nets.policy(together(), 1.0).logprobs.sum().backward()
    touched = {name for name, p in nets.named_parameters() if p.grad is not None}
    assert touched == set(nets.trained()["policy"])
    nets.zero_grad()
    nets.value(together()).sum().backward()
    touched = {name for name, p in nets.named_parameters() if p.grad is not None}
    assert touched == set(nets.trained()["value"])
