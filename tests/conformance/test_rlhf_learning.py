"""PPO improves a reward that is trivial to check, keeps KL under a target, and stops on nonsense."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ppo_tiny import LAYOUTS, LORA, PAD, ppo_config, ppo_trainer, weights
from torch import Tensor

from posttrain.errors import PosttrainError, UserError

LIKED = torch.arange(32, 64)


def share_of_liked_tokens(input_ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
    """Fraction of the sequence in the upper half of the vocabulary."""
    liked = torch.isin(input_ids_BT, LIKED) & attention_mask_BT.bool()
    return liked.sum(-1) / attention_mask_BT.sum(-1)


def learning_config(**overrides: Any) -> Any:
    settings: dict[str, Any] = {
        "total_episodes": 64 * 20,
        "batch_size": 64,
        "micro_batch_size": 64,
        "max_new_tokens": 8,
        "learning_rate": 3e-3,
        "missing_eos": {"mode": "none"},
        "kl_coef": 0.0,
    }
    return ppo_config(**(settings | overrides))


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_reward_goes_up(name: str) -> None:
    rate = {"full": 1e-2, "head": 4e-2}.get(name, 2e-2)
    config = learning_config(learning_rate=rate, **LAYOUTS[name])
    trainer = ppo_trainer(config, reward=share_of_liked_tokens)
    scores = [trainer.run_update()["score"] for _ in range(config.num_updates)]
    # A head on the policy's trunk starts from zero and learns slowly.
    gain = 0.05 if name == "head" else 0.1
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + gain, scores


def test_a_reward_for_ending_is_learned_through_the_missing_end_token() -> None:
    def nothing(input_ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
        return torch.zeros(len(input_ids_BT))

    config = learning_config(missing_eos={"mode": "replace", "value": -1.0})
    trainer = ppo_trainer(config, reward=nothing)
    rates = [trainer.run_update()["eos_rate"] for _ in range(10)]
    assert rates[-1] > rates[0] + 0.2, rates


def test_adaptive_controller_holds_kl_under_its_target() -> None:
    """The same run leaves the target far behind without a penalty."""
    target, runs = 3.0, {}
    controller = {"type": "adaptive", "target": target, "setpoint": 0.5, "horizon": 32}
    for name, settings in {"free": {}, "held": {"kl_coef": 0.1, "kl_controller": controller}}.items():
        trainer = ppo_trainer(learning_config(**settings), reward=share_of_liked_tokens)
        runs[name] = [trainer.run_update() for _ in range(20)]
    tail = {name: sum(row["kl"] for row in rows[-5:]) / 5 for name, rows in runs.items()}
    assert tail["free"] > 2 * target, tail
    assert tail["held"] < target, tail
    assert runs["held"][-1]["score"] > runs["held"][0]["score"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_stops_the_run(value: float) -> None:
    def broken(input_ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
        return torch.full((len(input_ids_BT),), value)

    trainer = ppo_trainer(ppo_config(), reward=broken)
    before = weights(trainer)
    with pytest.raises(
        PosttrainError, match="PPO update 1: 8 of 8 entries of the reward scores are not finite"
    ):
        trainer.run_update()
    assert all(torch.equal(before[name], weight) for name, weight in weights(trainer).items())


def test_weights_that_are_not_finite_stop_the_run() -> None:
    trainer = ppo_trainer(ppo_config(peft=LORA))
    trainer.run_update()
    with torch.no_grad():
        next(iter(trainer.updater.trained["policy"].values())).fill_(float("nan"))
    with pytest.raises(
        PosttrainError, match="PPO update 2: .* of the policy's log-probabilities are not finite"
    ):
        trainer.run_update()


def test_a_batch_that_is_masked_whole_moves_nothing() -> None:
    """No response ends, and truncated ones are masked: not even momentum may move the weights."""
    trainer = ppo_trainer(ppo_config(truncated="mask", max_new_tokens=1, missing_eos={"mode": "none"}))
    trainer.run_update()
    before = weights(trainer)
    trainer.eos_id = trainer.engine.eos_id + 1000  # nothing counts as finished from here on
    metrics = trainer.run_update()
    assert metrics["eos_rate"] == 0.0
    assert all(torch.equal(before[name], weight) for name, weight in weights(trainer).items())


def test_batch_must_divide_among_processes() -> None:
    trainer = ppo_trainer(ppo_config())
    with pytest.raises(UserError, match="multiple of 4"):
        type(trainer)(
            ppo_config(batch_size=12, num_mini_batches=4).model_copy(update={"batch_size": 10}),
            trainer.accelerator,
            trainer.networks,
            trainer.rewards,
            trainer.engine,
            trainer.prompts,
            eos_id=trainer.eos_id,
            pad_id=PAD,
        )
