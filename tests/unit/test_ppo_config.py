"""What the PPO configuration refuses, and the learning-rate schedules."""

from __future__ import annotations

import pytest

from train.ppo.config import PpoStageConfig, check
from train.ppo.trainer import learning_rate_factor

INPUTS = {"model": "runs/sft", "reward": "runs/reward", "data": "runs/prompts"}


def test_defaults_are_those_of_the_paper() -> None:
    config = PpoStageConfig(**INPUTS)
    assert (config.num_ppo_epochs, config.num_mini_batches, config.cliprange, config.cliprange_value) == (
        4,
        1,
        0.2,
        0.2,
    )
    assert (config.vf_coef, config.gamma, config.lam, config.kl_coef, config.adam_epsilon) == (
        0.1,
        1,
        0.95,
        0.05,
        1e-5,
    )
    assert (config.missing_eos.mode, config.missing_eos.value) == ("replace", -1.0)


def test_mini_batches_must_divide_the_batch() -> None:
    with pytest.raises(ValueError, match="batch_size 10 is not divisible by num_mini_batches 4"):
        PpoStageConfig(**INPUTS, batch_size=10, num_mini_batches=4)


def test_dropout_is_not_a_setting() -> None:
    with pytest.raises(ValueError, match="lora_dropout"):
        PpoStageConfig(**INPUTS, peft={"r": 4, "lora_dropout": 0.1})


def test_trained_biases_would_move_the_reference() -> None:
    with pytest.raises(ValueError, match="bias is all: trained biases are part of the base"):
        PpoStageConfig(**INPUTS, peft={"r": 4, "bias": "all"})


def test_something_must_be_rewarded() -> None:
    nothing = INPUTS | {"reward": None}
    with pytest.raises(ValueError, match="nothing is rewarded"):
        PpoStageConfig(**nothing)
    monitor = {"function": "data_prep.tiny.rubric:reward", "weight": 0.0}
    with pytest.raises(ValueError, match="nothing is rewarded"):
        PpoStageConfig(**nothing, rewards={"functions": [monitor]})
    PpoStageConfig(**nothing, rewards={"functions": [monitor | {"weight": 1.0}]})
    with pytest.raises(ValueError, match="nothing is rewarded"):
        PpoStageConfig(**nothing, rewards={"repetition_penalty": {"ngram": 2, "weight": 0.0}})
    PpoStageConfig(**nothing, rewards={"length_penalty": {"per_token": 0.1, "free_tokens": 5}})


def test_a_tracker_that_does_not_exist_is_a_mistake_in_the_configuration() -> None:
    [problem] = check(PpoStageConfig(**INPUTS, report_to=["tensorbord"]), "ppo")
    assert problem.where == "ppo.report_to"
    assert "tensorboard" in problem.message


def test_a_horizon_that_could_make_the_coefficient_negative_is_refused() -> None:
    short = {"type": "adaptive", "target": 8.0, "horizon": 100}
    with pytest.raises(ValueError, match="horizon 100 is too short for batch_size 512"):
        PpoStageConfig(**INPUTS, batch_size=512, kl_controller=short)
    PpoStageConfig(**INPUTS, batch_size=256, kl_controller=short)


def test_best_needs_evaluations() -> None:
    with pytest.raises(ValueError, match="set held_out"):
        PpoStageConfig(**INPUTS, keep="best")


def test_k1_in_the_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="k1 in the loss pulls nowhere"):
        PpoStageConfig(**INPUTS, kl_in="loss")


def test_last_rollout_is_full() -> None:
    assert PpoStageConfig(**INPUTS, total_episodes=129, batch_size=64).num_updates == 3


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("linear", [1.0, 0.75, 0.5, 0.25]),
        ("cosine", [1.0, 0.8535534, 0.5, 0.1464466]),
        ("constant", [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_schedules(kind: str, expected: list[float]) -> None:
    assert [learning_rate_factor(kind, update, 0, 4) for update in range(4)] == pytest.approx(expected)


def test_warmup_starts_above_zero_and_ends_at_the_peak() -> None:
    factors = [learning_rate_factor("linear", update, 3, 7) for update in range(7)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25])
