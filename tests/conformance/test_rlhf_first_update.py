"""Before the first step the policy is the reference; in the first step it is the policy that sampled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ppo_tiny import CALIBRATION, EOS, ppo_config, ppo_trainer, randomise_adapter, reward_model

from train.ppo.models import TokenBatch


@pytest.mark.parametrize("mini_batches", [1, 2])
@pytest.mark.parametrize(("temperature", "bf16"), [(1.0, False), (0.7, False), (1.0, True)])
def test_first_ratio_is_exactly_one(
    peft: dict[str, Any] | None, mini_batches: int, temperature: float, bf16: bool
) -> None:
    """Equal to the bit: the scoring pass and the first epoch run the same rows with the same padding."""
    config = ppo_config(
        peft=peft,
        num_ppo_epochs=1,
        num_mini_batches=mini_batches,
        temperature=temperature,
        bf16=bf16,
        missing_eos={"mode": "none"},
    )
    trainer = ppo_trainer(config)
    for _ in range(3):
        metrics = trainer.run_update()
        assert metrics["ratio_deviation_first"] == 0.0
        if mini_batches == 1:
            assert metrics["ratio"] == 1.0
            assert metrics["approxkl"] == 0.0
            assert metrics["clipfrac"] == 0.0
            # Advantages are whitened: their mean is 0, and so is the loss at ratio 1.
            assert metrics["loss_policy"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["kl"] != 0.0


def test_later_passes_move_the_ratio() -> None:
    metrics = ppo_trainer(ppo_config(num_ppo_epochs=2)).run_update()
    assert metrics["ratio_deviation_first"] == 0.0
    assert metrics["ratio_deviation"] > 1e-4


def test_kl_is_exactly_zero_at_the_start(peft: dict[str, Any] | None) -> None:
    metrics = ppo_trainer(ppo_config(peft=peft)).run_update()
    assert metrics["kl"] == 0.0
    assert metrics["kl_k3"] == 0.0


def test_kl_is_that_to_the_frozen_reference() -> None:
    trainer = ppo_trainer(ppo_config(peft={"r": 4, "lora_alpha": 8}))
    before = {name: p.clone() for name, p in trainer.reference.named_parameters()}
    randomise_adapter(trainer)
    first = trainer.run_update()
    assert first["kl"] > 0.1
    for name, parameter in trainer.reference.named_parameters():
        assert torch.equal(parameter, before[name])
        assert not parameter.requires_grad


def test_value_network_starts_as_the_calibrated_reward_model() -> None:
    """Its value before the last token's successor is the reward model's score there, bias included."""
    trainer = ppo_trainer(ppo_config())
    ids = [5, 9, 12, 7, 30, EOS]
    # The position that predicts a token after EOS has read EOS, where the reward model is read.
    batch = TokenBatch.build([ids], [[3]], pad_id=0, device="cpu")
    value = trainer.networks.value(batch)[0, 0]
    tokens = torch.tensor([ids])
    score = reward_model()(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[0, 0]
    torch.testing.assert_close(value, score - CALIBRATION["bias"])


def test_training_the_value_network_leaves_the_reward_model_alone() -> None:
    trainer = ppo_trainer(ppo_config())
    scorer = trainer.reward.model
    before = {name: p.clone() for name, p in scorer.named_parameters()}
    started = {name: p.clone() for name, p in trainer.networks.value.named_parameters()}
    trainer.run_update()
    assert all(torch.equal(p, before[name]) for name, p in scorer.named_parameters())
    assert all(not torch.equal(p, started[name]) for name, p in trainer.networks.value.named_parameters())


def test_lora_trains_the_adapter_and_nothing_else_of_the_policy() -> None:
    trainer = ppo_trainer(ppo_config(peft={"r": 4, "lora_alpha": 8}))
    before = {name: p.clone() for name, p in trainer.networks.policy.named_parameters()}
    trainer.run_update()
    changed = {
        name for name, p in trainer.networks.policy.named_parameters() if not torch.equal(p, before[name])
    }
    assert changed == {name for name in before if "lora_" in name}


def test_dropout_is_off_in_every_network() -> None:
    """The models are built with attention dropout 0.1; nothing may be in training mode, updates included."""
    trainer = ppo_trainer(ppo_config())
    trainer.run_update()
    for network in (trainer.networks, trainer.reference, trainer.reward.model):
        assert not any(module.training for module in network.modules())
