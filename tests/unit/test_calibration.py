"""Calibration of pairwise margins, against hand arithmetic and sklearn."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import brier_score_loss, roc_auc_score
from sklearn.metrics import log_loss as sklearn_log_loss

from posttrain.calibration import (
    brier,
    calibration_report,
    cross_fitted_temperature,
    expected_calibration_error,
    fit_temperature,
    log_loss,
    out_of_fold_temperature,
    pair_auc,
    reliability_bins,
    two_folds,
)

LOGIT_80 = math.log(4)  # sigmoid(log 4) = 0.8


def test_log_loss_and_brier_by_hand() -> None:
    margins = np.array([LOGIT_80, -LOGIT_80])
    assert log_loss(margins) == pytest.approx(-(math.log(0.8) + math.log(0.2)) / 2)
    assert brier(margins) == pytest.approx((0.2**2 + 0.8**2) / 2)
    assert log_loss(np.zeros(3)) == pytest.approx(math.log(2))


def test_log_loss_does_not_overflow() -> None:
    assert log_loss(np.array([-1e5])) == pytest.approx(1e5)


def test_against_sklearn_on_symmetrised_pairs() -> None:
    margins = np.random.default_rng(0).normal(0.7, 1.5, size=500)
    both = np.concatenate([margins, -margins])
    labels = np.repeat([1, 0], 500)
    probability = 1 / (1 + np.exp(-both))
    assert pair_auc(margins) == pytest.approx(roc_auc_score(labels, both), abs=1e-12)
    assert log_loss(margins) == pytest.approx(sklearn_log_loss(labels, probability), abs=1e-12)
    assert brier(margins) == pytest.approx(brier_score_loss(labels, probability), abs=1e-12)


def test_auc_counts_equality_as_half() -> None:
    assert pair_auc(np.zeros(5)) == 0.5
    assert pair_auc(np.array([1.0, 2.0])) == 1.0


def test_bins_and_ece_by_hand() -> None:
    # Four pairs at confidence 0.8, three of them right: accuracy 0.75, ECE 0.05. One tie, half right.
    margins = np.array([LOGIT_80, LOGIT_80, LOGIT_80, -LOGIT_80, 0.0])
    low, high = reliability_bins(margins, bins=5)
    assert (low["count"], low["confidence"], low["accuracy"]) == (1, 0.5, 0.5)
    assert (high["count"], high["accuracy"]) == (4, 0.75)
    assert high["confidence"] == pytest.approx(0.8)
    assert expected_calibration_error([low, high]) == pytest.approx(0.8 * 0.05)


def test_a_certain_margin_falls_in_the_last_bin() -> None:
    (row,) = reliability_bins(np.array([800.0]), bins=10)
    assert (row["low"], row["high"], row["count"]) == (pytest.approx(0.95), 1.0, 1)


def test_fitted_temperature_solves_the_one_bin_case() -> None:
    # All margins are +-1 and 3 of 4 are positive: the best T has sigmoid(1 / T) = 0.75.
    margins = np.array([1.0, 1.0, 1.0, -1.0])
    assert fit_temperature(margins) == pytest.approx(1 / math.log(3), rel=1e-4)


def test_temperature_recovers_overconfidence() -> None:
    rng = np.random.default_rng(2)
    strength = rng.normal(0, 2, size=20_000)
    first_wins = rng.random(20_000) < 1 / (1 + np.exp(-strength))
    margins = 3 * np.where(first_wins, strength, -strength)
    assert fit_temperature(margins) == pytest.approx(3.0, rel=0.05)
    before, after = calibration_report(margins), calibration_report(margins, fit_temperature(margins))
    assert before["ece"] > 0.08
    assert after["ece"] < 0.01
    assert after["log_loss"] < before["log_loss"]


def test_cross_fitting_never_uses_the_pairs_own_group() -> None:
    rng = np.random.default_rng(0)
    groups = [f"g{i % 6}" for i in range(60)]
    margins = rng.normal(0.5, 1, size=60)
    fold = two_folds(groups)
    assert all(len({fold[i] for i in range(60) if groups[i] == g}) == 1 for g in set(groups))
    temperature = cross_fitted_temperature(margins, groups)
    for side in (0, 1):
        assert set(temperature[fold == side]) == {fit_temperature(margins[fold != side])}


def test_one_group_leaves_the_temperature_alone() -> None:
    assert cross_fitted_temperature(np.array([1.0, -2.0]), ["a", "a"]).tolist() == [1.0, 1.0]


def test_each_fold_has_its_temperature_from_the_others() -> None:
    margins = np.array([1.0, 1.0, 1.0, -1.0, 2.0, 2.0, 2.0, -2.0])
    temperature = out_of_fold_temperature(margins, np.repeat([0, 1], 4))
    # Three of four pairs are right on both sides: T = margin / log 3 (see above), taken from the other side.
    assert temperature[:4] == pytest.approx(2 / math.log(3), rel=1e-4)
    assert temperature[4:] == pytest.approx(1 / math.log(3), rel=1e-4)
    assert out_of_fold_temperature(margins, np.zeros(8)).tolist() == [1.0] * 8
