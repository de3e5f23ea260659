"""What saves memory changes no result: activations computed again, frozen matrices in bfloat16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ppo_tiny import PAD, ppo_config, ppo_trainer, randomise_adapter, reward_model, weights, without_timings
from torch import nn

from posttrain.errors import UserError
from posttrain.models import score_ids
from train.ppo.batches import TokenBatch
from train.ppo.networks import Networks, ScoreHead
from train.ppo.recompute import checkpoint_layers
from train.ppo.trainer import PpoTrainer


def trained(trainer: PpoTrainer) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Metrics and weights of two updates by a policy whose adapter does something."""
    randomise_adapter(trainer)
    return [without_timings(trainer.run_update()) for _ in range(2)], weights(trainer)


def assert_same(
    found: tuple[list[dict[str, float]], dict[str, torch.Tensor]],
    expected: tuple[list[dict[str, float]], dict[str, torch.Tensor]],
) -> None:
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    assert all(torch.equal(found[1][name], expected[1][name]) for name in expected[1])


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_activation_checkpointing_changes_nothing(layout: dict[str, Any], packed: bool) -> None:
    """Layers are computed again under the adapter and the packing of their own forward pass."""
    config = ppo_config(**layout)
    plain, checkpointed = (ppo_trainer(config, packed=packed) for _ in range(2))
    assert checkpointed.networks.packed is packed
    checkpointed.networks.checkpoint_activations()
    assert_same(trained(checkpointed), trained(plain))


def bytes_kept(networks: Networks) -> int:
    """Bytes that autograd keeps for the backward passes of policy and value network, each tensor once."""
    kept: dict[tuple[int, int], int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr(), tensor.storage_offset()] = tensor.nbytes
        return tensor

    batch = TokenBatch.build([[5, 9, 12]] * 4, [[7, 30, 31, 8, 44, 21, 60]] * 4, PAD, "cpu")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logprobs, values = networks.policy(batch, 1.0).logprobs, networks.value(batch)
    own = {p.untyped_storage().data_ptr() for p in networks.parameters()}
    assert logprobs.requires_grad and values.requires_grad
    return sum(size for (storage, _), size in kept.items() if storage not in own)


def test_activation_checkpointing_keeps_less() -> None:
    trainer = ppo_trainer(ppo_config(), packed=False)
    whole = bytes_kept(trainer.networks)
    trainer.networks.checkpoint_activations()
    assert bytes_kept(trainer.networks) < whole / 2


def test_models_without_such_layers_are_refused() -> None:
    with pytest.raises(UserError, match=r"Linear has no layers that can be.*\n.*micro_batch_tokens"):
        checkpoint_layers(nn.Linear(2, 2))  # type: ignore[arg-type]


def test_frozen_matrices_in_bfloat16_change_nothing_under_autocast(layout: dict[str, Any]) -> None:
    config = ppo_config(bf16=True, **layout)
    plain, held = (ppo_trainer(config) for _ in range(2))
    held.networks.hold_frozen_in(torch.bfloat16)
    frozen = [
        module.weight
        for name, module in held.networks.named_modules()
        if isinstance(module, nn.Linear) and "lora_" not in name and not module.weight.requires_grad
    ]
    assert sum(weight.dtype == torch.bfloat16 for weight in frozen) >= 14, "two layers of seven matrices"
    assert all(p.dtype == torch.float32 for p in weights(held).values())
    assert_same(trained(held), trained(plain))


def test_frozen_embeddings_and_heads_stay_float32() -> None:
    networks = ppo_trainer(ppo_config(bf16=True)).networks
    networks.hold_frozen_in(torch.bfloat16)
    assert networks.reward_head is not None
    embedding = networks.reference_trunk.plain.get_input_embeddings()
    kept = [embedding.weight, *networks.value_head.parameters(), *networks.reward_head.parameters()]
    assert {p.dtype for p in kept} == {torch.float32}


def test_scores_are_not_rounded_to_bfloat16() -> None:
    """A bfloat16 number has 8 bits: a score of 5 would be off by up to 0.02, and many would tie."""
    head = ScoreHead(nn.Linear(32, 1, bias=False), 0.25)
    hidden_ND = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    expected = head(hidden_ND)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(head(hidden_ND), expected)
    ids = torch.randint(2, 60, (16, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        scores = score_ids(reward_model(), {"bias": 0.0}, ids, torch.ones_like(ids))
    assert scores.dtype == torch.float32
    assert (scores.bfloat16().float() != scores).any()
