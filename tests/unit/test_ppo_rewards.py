"""Missing end tokens, reward placement and the KL controllers."""

from __future__ import annotations

import pytest
import torch

from train.ppo.config import KlController, MissingEos
from train.ppo.rewards import KlCoefficient, shape_scores, token_rewards

SCORES = torch.tensor([2.0, 2.0, -3.0])
FINISHED = torch.tensor([True, False, False])


def test_replace_overwrites_the_score_of_unfinished_responses() -> None:
    shaped = shape_scores(SCORES, FINISHED, MissingEos(mode="replace", value=-1.0), None)
    assert shaped.tolist() == [2.0, -1.0, -1.0]


def test_penalty_is_added_to_their_score() -> None:
    shaped = shape_scores(SCORES, FINISHED, MissingEos(mode="penalty", value=-1.0), None)
    assert shaped.tolist() == [2.0, 1.0, -4.0]


def test_none_leaves_them_alone() -> None:
    assert shape_scores(SCORES, FINISHED, MissingEos(mode="none"), None).tolist() == SCORES.tolist()


def test_clipping_comes_before_the_missing_end_token() -> None:
    shaped = shape_scores(SCORES, FINISHED, MissingEos(mode="penalty", value=-1.0), 1.5)
    assert shaped.tolist() == [1.5, 0.5, -2.5]


def test_a_positive_penalty_is_refused() -> None:
    with pytest.raises(ValueError, match="reward responses that never end"):
        MissingEos(mode="penalty", value=1.0)


def test_score_lands_on_the_last_response_token_and_kl_on_every_one() -> None:
    mask = torch.tensor([[True, True, False], [True, True, True], [True, False, False]])
    kl = torch.tensor([[1.0, 2.0, 50.0], [0.0, -1.0, 4.0], [3.0, 50.0, 50.0]])
    rewards = token_rewards(torch.tensor([10.0, 20.0, 30.0]), kl, mask, kl_coef=0.5)
    expected = torch.tensor([[-0.5, 9.0, 0.0], [0.0, 0.5, 18.0], [28.5, 0.0, 0.0]])
    torch.testing.assert_close(rewards, expected)


def test_fixed_coefficient_does_not_move() -> None:
    coefficient = KlCoefficient(0.05, KlController(type="fixed", target=1.0))
    coefficient.update(100.0, 64)
    assert coefficient.value == 0.05


@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        (6.0, 1.0),
        (6.6, 1 + 0.1 * 64 / 640),
        (60.0, 1 + 0.2 * 64 / 640),
        (0.0, 1 - 0.2 * 64 / 640),
    ],
)
def test_adaptive_coefficient_follows_ziegler(kl: float, factor: float) -> None:
    coefficient = KlCoefficient(0.05, KlController(type="adaptive", target=6.0, horizon=640))
    coefficient.update(kl, 64)
    assert coefficient.value == pytest.approx(0.05 * factor)


def test_setpoint_moves_the_equilibrium_below_the_target() -> None:
    coefficient = KlCoefficient(0.05, KlController(type="adaptive", target=10.0, setpoint=0.6, horizon=640))
    coefficient.update(6.0, 64)
    assert coefficient.value == pytest.approx(0.05)
    coefficient.update(10.0, 64)
    assert coefficient.value > 0.05


def test_adaptive_controller_needs_a_target() -> None:
    with pytest.raises(ValueError, match="kl_controller.target"):
        KlController(type="adaptive")
