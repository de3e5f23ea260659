"""Padding, batch composition and micro-batching change nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ppo_tiny import (
    CALIBRATION,
    EOS,
    PAD,
    causal_lm,
    ppo_config,
    ppo_trainer,
    randomise_adapter,
    reward_model,
    weights,
    without_timings,
)

from posttrain.models import score_ids
from train.ppo.models import TokenBatch, ValueNetwork, response_logprobs

PROMPTS = [[5, 9, 12], [7, 30, 31, 8, 44, 21, 60], [3, 3], [17, 18, 19, 20, 22]]
RESPONSES = [[40, 41, EOS], [50, EOS], [10, 11, 12, 13, 14, 15], [EOS]]


def together(pad: int = PAD) -> TokenBatch:
    return TokenBatch.build(PROMPTS, RESPONSES, pad, "cpu")


@pytest.fixture(scope="module")
def policy() -> Any:
    return causal_lm().eval()


@torch.no_grad()
def test_logprobs_and_values_do_not_depend_on_batch_mates(policy: Any) -> None:
    value = ValueNetwork(reward_model(), CALIBRATION)
    batch = together()
    logprobs, entropy = response_logprobs(policy, batch, 0.8, with_entropy=True)
    values = value(batch)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        alone = TokenBatch.build([prompt], [response], PAD, "cpu")
        length = len(response)
        one, one_entropy = response_logprobs(policy, alone, 0.8, with_entropy=True)
        torch.testing.assert_close(logprobs[row, :length], one[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(entropy[row, :length], one_entropy[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(values[row, :length], value(alone)[0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_logprobs_equal_a_plain_forward_without_any_padding(policy: Any) -> None:
    logprobs, _ = response_logprobs(policy, together(), 1.0)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        logits = policy(input_ids=torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        expected = [logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(response)]
        assert logprobs[row, : len(response)].tolist() == pytest.approx(expected, abs=1e-5)


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
    scores = score_ids(model, CALIBRATION, torch.tensor(ids), torch.tensor(mask))
    for sequence, score in zip(sequences, scores.tolist(), strict=True):
        tokens = torch.tensor([sequence])
        assert score == pytest.approx(
            score_ids(model, CALIBRATION, tokens, torch.ones_like(tokens)).item(), abs=1e-5
        )
        head = model.score(model.base_model(input_ids=tokens).last_hidden_state[0, -1])
        assert score == pytest.approx(head.item() - CALIBRATION["bias"], abs=1e-5)


@torch.no_grad()
def test_a_pad_token_inside_the_response_is_scored_like_any_other() -> None:
    """The last real token counts, not the first pad id: a policy can sample the pad token."""
    model = reward_model()
    ids = torch.tensor([[5, 9, PAD, 12, EOS]])
    score = score_ids(model, CALIBRATION, ids, torch.ones_like(ids))
    expected = (
        model.score(model.base_model(input_ids=ids).last_hidden_state[0, -1]).item() - CALIBRATION["bias"]
    )
    assert score.item() == pytest.approx(expected, abs=1e-6)


def test_what_stands_in_padded_positions_changes_nothing(peft: dict[str, Any] | None) -> None:
    """Two whole updates with other pad ids: same metrics and weights, to the bit."""
    results = []
    for pad in (PAD, 37):
        trainer = ppo_trainer(ppo_config(peft=peft), pad_id=pad)
        rows = [without_timings(trainer.run_update()) for _ in range(2)]
        results.append((rows, weights(trainer)))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[0][1][name], results[1][1][name]) for name in results[0][1])


@pytest.mark.parametrize("size", [1, 2, 8])
def test_micro_batches_change_only_rounding(peft: dict[str, Any] | None, size: int) -> None:
    """Losses, gradient norms and weights after an update; the responses differ in length."""
    base, other = (ppo_trainer(ppo_config(peft=peft, micro_batch_size=n)) for n in (3, size))
    expected, actual = (without_timings(trainer.run_update()) for trainer in (base, other))
    assert actual == pytest.approx(expected, abs=1e-5, rel=1e-4)
    after, after_other = weights(base), weights(other)
    for name, weight in after.items():
        torch.testing.assert_close(after_other[name], weight, rtol=0, atol=1e-5)


def test_advantages_are_whitened_over_response_tokens() -> None:
    trainer = ppo_trainer(ppo_config())
    experience, _ = trainer.collect(trainer.generate())
    inside = experience.advantages_BR[experience.mask_BR]
    assert inside.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert inside.var(unbiased=False).item() == pytest.approx(1.0, abs=1e-5)
    assert not experience.advantages_BR[~experience.mask_BR].any()
    assert len(set(experience.mask_BR.sum(-1).tolist())) > 1


def test_merged_policy_equals_adapter() -> None:
    trainer = ppo_trainer(ppo_config(peft={"r": 4, "lora_alpha": 8}))
    randomise_adapter(trainer)
    trainer.run_update()
    batch = together()
    with torch.no_grad():
        adapter, _ = response_logprobs(trainer.networks.policy, batch, 1.0)
        reference, _ = response_logprobs(trainer.reference, batch, 1.0)
        merged, _ = response_logprobs(trainer.networks.policy.merge_and_unload(), batch, 1.0)
    mask = batch.response_mask_BR
    torch.testing.assert_close(merged[mask], adapter[mask], rtol=0, atol=1e-5)
    assert (adapter - reference)[mask].abs().max() > 0.1
