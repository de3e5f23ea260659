"""Rollouts come from the current policy's own distribution, adapter included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ppo_tiny import (
    EOS,
    LAYOUTS,
    PAD,
    causal_lm,
    experience_of,
    ppo_config,
    ppo_trainer,
    prompts,
    randomise_adapter,
)

from train.ppo.batches import TokenBatch
from train.ppo.engines.hf import HfSampler, draw
from train.ppo.rollout import episode_uniforms


def sample_slowly(model: Any, prompt: list[int], uniforms: torch.Tensor, temperature: float) -> list[int]:
    """One prompt, no cache, no padding: the definition of the sampler."""
    response: list[int] = []
    for number in uniforms:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + response])).logits[:, -1]
        response.append(draw(logits, number.reshape(1), temperature)[0].item())
        if response[-1] == EOS:
            break
    return response


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_batched_sampling_equals_sampling_one_by_one(temperature: float) -> None:
    model, texts = causal_lm().eval(), prompts()
    uniforms = episode_uniforms(0, 0, len(texts), 12)
    samples = HfSampler(EOS, PAD, temperature)(model, texts, uniforms)
    expected = [sample_slowly(model, p, u, temperature) for p, u in zip(texts, uniforms, strict=True)]
    assert samples.responses == expected
    lengths = {len(response) for response in expected}
    assert len(lengths) > 3, "the test needs rows that end at different times"


def test_responses_do_not_depend_on_batch_mates() -> None:
    model, texts = causal_lm().eval(), prompts()
    uniforms = episode_uniforms(0, 0, len(texts), 12)
    sampler = HfSampler(EOS, PAD)
    whole = sampler(model, texts, uniforms).responses
    parts = [sampler(model, texts[i : i + 5], uniforms[i : i + 5]).responses for i in range(0, len(texts), 5)]
    assert whole == [response for part in parts for response in part]


def test_generation_config_cannot_leak_in() -> None:
    model, texts = causal_lm().eval(), prompts(8)
    uniforms = episode_uniforms(0, 0, 8, 12)
    expected = HfSampler(EOS, PAD)(model, texts, uniforms)
    model.generation_config.update(
        do_sample=False,
        temperature=0.1,
        top_k=1,
        top_p=0.1,
        repetition_penalty=5.0,
        max_new_tokens=2,
        eos_token_id=9,
    )
    assert HfSampler(EOS, PAD)(model, texts, uniforms) == expected


@pytest.mark.parametrize("name", ["lora", "shared", "head"])
def test_rollouts_use_the_adapter(name: str) -> None:
    """With the same random numbers, an adapter that does something gives other samples, whose recorded
    log-probabilities are those of the policy with its adapter and not those of the base model."""
    config = ppo_config(**LAYOUTS[name])
    plain, adapted = ppo_trainer(config), ppo_trainer(config)
    randomise_adapter(adapted)
    before, after = plain.generate(), adapted.generate()
    assert before.prompts == after.prompts
    assert before.responses != after.responses
    batch = TokenBatch.build(after.prompts, after.responses, PAD, "cpu")
    recorded = torch.tensor([value for row in after.sampled_logprobs for value in row])
    with torch.no_grad():
        policy = adapted.networks.policy(batch, 1.0).logprobs
        base = adapted.networks.reference(batch, 1.0)
    torch.testing.assert_close(recorded, policy, rtol=0, atol=1e-5)
    assert (recorded - base).abs().mean() > 0.1


def test_rollouts_follow_the_updates(layout: dict[str, Any]) -> None:
    """The gap between the log-probabilities of sampling and of training stays at rounding while weights
    move.
    """
    trainer = ppo_trainer(ppo_config(learning_rate=1e-2, **layout))
    for _ in range(4):
        metrics = trainer.run_update()
        assert metrics["rollout_gap"] < 1e-5
    assert metrics["kl_k3"] > 0.01


def test_at_learning_rate_zero_nothing_drifts(layout: dict[str, Any]) -> None:
    trainer = ppo_trainer(
        ppo_config(learning_rate=0.0, value_learning_rate=0.0 if "value" in layout else 1e-3, **layout)
    )
    for _ in range(3):
        metrics = trainer.run_update()
        assert metrics["rollout_gap"] < 1e-5
        assert metrics["kl"] == 0.0
        assert metrics["ratio_deviation"] == 0.0


def test_missing_end_tokens_are_counted_and_scored() -> None:
    trainer = ppo_trainer(ppo_config(missing_eos={"mode": "replace", "value": -7.0}))
    experience = experience_of(trainer)
    finished = torch.tensor([response[-1] == EOS for response in experience.rollout.responses])
    assert 0 < finished.sum() < len(finished)
    assert finished.tolist() == experience.rollout.finished
    assert (experience.shaped_B[~finished] == -7.0).all()
    assert torch.equal(experience.shaped_B[finished], experience.scores_B[finished])
    # KL is 0 in the first rollout, so the sum of rewards to come is the score at every token (gamma = 1).
    lengths = experience.mask_BR.sum(-1)
    rows = torch.arange(len(lengths))
    torch.testing.assert_close(experience.returns_BR[rows, lengths - 1], experience.shaped_B)
