"""Before the first step the policy is the reference; in the first step it is the policy that sampled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ppo_tiny import (
    BIAS,
    EOS,
    LAYOUTS,
    LORA,
    adapted_reward_model,
    frozen_weights,
    ppo_config,
    ppo_trainer,
    randomise_adapter,
    reward_model,
    weights,
)

from train.ppo.batches import TokenBatch


@pytest.mark.parametrize("mini_batches", [1, 2])
@pytest.mark.parametrize(("temperature", "bf16"), [(1.0, False), (0.7, False), (1.0, True)])
def test_first_ratio_is_exactly_one(
    layout: dict[str, Any], mini_batches: int, temperature: float, bf16: bool
) -> None:
    """Equal to the bit: the scoring pass and the first epoch run the same rows with the same padding."""
    config = ppo_config(
        num_ppo_epochs=1,
        num_mini_batches=mini_batches,
        temperature=temperature,
        bf16=bf16,
        missing_eos={"mode": "none"},
        **layout,
    )
    trainer = ppo_trainer(config)
    for _ in range(3):
        metrics = trainer.run_update()
        assert metrics["ratio_deviation_first"] == 0.0
        if mini_batches == 1:
            assert metrics["ratio"] == pytest.approx(1.0, abs=1e-6)
            assert metrics["approxkl"] == 0.0
            assert metrics["clipfrac"] == 0.0
            # Advantages are whitened: their mean is 0, and so is the loss at ratio 1.
            assert metrics["loss_policy"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["kl"] != 0.0


def test_later_passes_move_the_ratio() -> None:
    metrics = ppo_trainer(ppo_config(num_ppo_epochs=2)).run_update()
    assert metrics["ratio_deviation_first"] == 0.0
    assert metrics["ratio_deviation"] > 1e-4


def test_kl_is_exactly_zero_at_the_start(layout: dict[str, Any]) -> None:
    metrics = ppo_trainer(ppo_config(**layout)).run_update()
    assert metrics["kl"] == 0.0
    assert metrics["kl_k3"] == 0.0


@pytest.mark.parametrize("name", ["lora", "shared", "head"])
def test_kl_is_that_to_the_model_without_its_adapter(name: str) -> None:
    trainer = ppo_trainer(ppo_config(**LAYOUTS[name]))
    randomise_adapter(trainer)
    assert trainer.run_update()["kl"] > 0.1


def test_only_what_is_trained_changes(layout: dict[str, Any]) -> None:
    """Reference, reward model and a shared base stay as they are, whatever adapters were switched on."""
    trainer = ppo_trainer(ppo_config(**layout))
    frozen, trained = frozen_weights(trainer), weights(trainer)
    for _ in range(2):
        trainer.run_update()
    assert frozen, "every layout has something frozen"
    after = frozen_weights(trainer)
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    moved = weights(trainer)
    assert all(not torch.equal(moved[name], value) for name, value in trained.items())


@pytest.mark.parametrize("name", ["lora", "shared", "head"])
def test_lora_trains_adapters_and_heads_only(name: str) -> None:
    trained = ppo_trainer(ppo_config(**LAYOUTS[name])).updater.trained
    assert all("lora_" in parameter for parameter in trained["policy"])
    if name == "lora":
        return
    heads = [parameter for parameter in trained["value"] if "lora_" not in parameter]
    assert heads == ["value_head.score.weight"]
    assert (len(trained["value"]) > 1) == (name == "shared")


def test_passes_leave_no_gradient_behind(layout: dict[str, Any]) -> None:
    """Neither on what is frozen nor on what the optimizers have consumed."""
    trainer = ppo_trainer(ppo_config(**layout))
    trainer.run_update()
    assert [name for name, p in trainer.networks.named_parameters() if p.grad is not None] == []
    trained = set(weights(trainer))
    assert trained == {name for name, p in trainer.networks.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", ["full", "shared"])
def test_value_network_starts_as_the_calibrated_reward_model(name: str) -> None:
    """Its value before the last token's successor is the reward model's score there, bias included."""
    trainer = ppo_trainer(ppo_config(**LAYOUTS[name]))
    model = reward_model() if name == "full" else adapted_reward_model()[0]
    ids = [5, 9, 12, 7, 30, EOS]
    # The position that predicts a token after EOS has read EOS, where the reward model is read.
    value = trainer.networks.value(TokenBatch.build([ids], [[3]], pad_id=0, device="cpu"))[0]
    tokens = torch.tensor([ids])
    score = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[0, 0] - BIAS
    torch.testing.assert_close(value, score, rtol=0, atol=1e-5)
    reward = trainer.networks.reward(TokenBatch.build([ids[:-1]], [ids[-1:]], pad_id=0, device="cpu"))[0]
    torch.testing.assert_close(reward, score, rtol=0, atol=1e-5)


def test_a_value_head_on_the_policy_starts_at_zero() -> None:
    trainer = ppo_trainer(ppo_config(**LAYOUTS["head"]))
    batch = TokenBatch.build([[5, 9]], [[12, 7, EOS]], pad_id=0, device="cpu")
    assert trainer.networks.policy_and_value(batch, 1.0)[1].tolist() == [0.0] * 3


def test_dropout_is_off_in_every_network(layout: dict[str, Any]) -> None:
    """The models are built with attention dropout 0.1; nothing may be in training mode, updates included."""
    trainer = ppo_trainer(ppo_config(**layout))
    trainer.run_update()
    assert not any(module.training for module in trainer.networks.modules())


def test_a_lora_policy_needs_no_second_base() -> None:
    """In layout shared all four networks are one set of base weights."""
    trainer = ppo_trainer(ppo_config(peft=LORA, layout="shared"))
    shapes = [tuple(p.shape) for name, p in trainer.networks.named_parameters() if "embed_tokens" in name]
    assert shapes == [(64, 32)]
