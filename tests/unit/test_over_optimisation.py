"""The fit, the peak and the table of the over-optimisation experiment, by hand."""

from __future__ import annotations

import math
import random

import pytest

from eval.over_optimisation import (
    Trajectory,
    fit_gao,
    markdown_table,
    moving_mean,
    scatter,
    summarise,
    trajectory,
)


def curve(distances: list[float], start: float, alpha: float, beta: float) -> list[float]:
    return [start + (d * (alpha - beta * math.log(d)) if d else 0.0) for d in distances]


def test_a_row_becomes_a_distance_and_kl_below_zero_counts_as_zero() -> None:
    rows = [{"kl": -0.2, "score": 0.1, "reward/gold": 0.7}, {"kl": 9.0, "score": 0.4, "reward/gold": 0.8}]
    assert trajectory(rows) == Trajectory([0.0, 3.0], [0.1, 0.4], [0.7, 0.8])


def test_a_run_without_gold_is_no_trajectory() -> None:
    with pytest.raises(KeyError, match="reward/gold"):
        trajectory([{"kl": 0.0, "score": 0.0}])


def test_moving_mean_takes_full_windows_only() -> None:
    assert moving_mean([1.0, 2.0, 6.0, 4.0], 3) == [3.0, 4.0]
    with pytest.raises(ValueError, match="2 updates are too few for a mean over 3"):
        moving_mean([1.0, 2.0], 3)


def test_kl_is_averaged_before_its_root_is_taken() -> None:
    run = Trajectory([1.0, 7.0], [0.0, 2.0], [0.4, 0.6])
    assert run.smoothed(2) == Trajectory([5.0], [1.0], [0.5])


def test_scatter_is_that_of_neighbours_and_not_of_the_trend() -> None:
    # Differences 1, -1, 1: mean square 1, half of it under the root.
    assert scatter([0.0, 1.0, 0.0, 1.0]) == pytest.approx(math.sqrt(0.5))
    trend = [0.01 * i for i in range(100)]
    assert scatter(trend) == pytest.approx(0.01 / math.sqrt(2))


def test_fit_finds_the_coefficients_of_a_curve_without_noise() -> None:
    d = [0.0, 0.5, 1.0, 2.0, 3.0, 5.0]
    fit = fit_gao(d, curve(d, 0.8, 0.1, 0.05))
    assert (fit.start, fit.alpha, fit.beta) == pytest.approx((0.8, 0.1, 0.05))
    assert fit.rmse == pytest.approx(0, abs=1e-9)
    assert fit.r2 == pytest.approx(1)
    # R' = alpha - beta - beta log d = 0 at log d = 0.1 / 0.05 - 1 = 1, where d (alpha - beta) = e / 20.
    assert fit.peak == pytest.approx(math.e)
    assert fit(math.e) == pytest.approx(0.8 + math.e / 20)
    assert fit(0.0) == pytest.approx(0.8)


def test_fit_equals_the_normal_equations() -> None:
    # Start and alpha alone decide at d = 0 and 1 (log 1 = 0); the mean of two points at each is exact there,
    # and d = e, where d log d = e, takes whatever beta is left: 0.9 = 0.5 + e (0.2 - beta).
    fit = fit_gao([0.0, 0.0, 1.0, 1.0, math.e], [0.4, 0.6, 0.6, 0.8, 0.9])
    assert (fit.start, fit.alpha, fit.beta) == pytest.approx((0.5, 0.2, 0.2 - 0.4 / math.e))
    assert fit.rmse == pytest.approx(math.sqrt(4 * 0.1**2 / 5))


def test_a_gold_reward_that_only_rises_has_no_peak() -> None:
    d = [0.0, 1.0, 2.0, 3.0, 4.0]
    assert fit_gao(d, curve(d, 0.5, 0.1, -0.01)).peak is None


def test_a_fit_is_judged_by_the_scatter_of_neighbouring_updates() -> None:
    noise = random.Random(0)
    d = [0.1 * i for i in range(60)]
    right = [value + noise.gauss(0, 0.02) for value in curve(d, 0.8, 0.1, 0.07)]
    wrong = [0.8 + (0.3 if 2 < x < 3 else 0.0) + noise.gauss(0, 0.02) for x in d]
    assert fit_gao(d, right).is_good
    assert not fit_gao(d, wrong).is_good


@pytest.mark.parametrize("distances", [[0.0, 1.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
def test_too_little_to_fit_is_refused(distances: list[float]) -> None:
    with pytest.raises(ValueError, match="four updates at different KL"):
        fit_gao(distances, [0.5] * len(distances))


def test_summary_of_a_run_that_over_optimises() -> None:
    gold = [0.5, 0.5, 0.7, 0.7, 0.4, 0.4]
    run = Trajectory([0.0, 1.0, 2.0, 2.0, 3.0, 5.0], [0.0, 1.0, 2.0, 2.0, 3.0, 3.0], gold)
    summary = summarise(run, window=2)
    assert (summary.gold_start, summary.gold_peak, summary.gold_end) == pytest.approx((0.5, 0.7, 0.4))
    assert (summary.proxy_start, summary.proxy_peak, summary.proxy_end) == pytest.approx((0.5, 2.0, 3.0))
    assert (summary.kl_peak, summary.kl_end) == pytest.approx((4.0, 17.0))
    assert summary.peak_update == 3
    # Squared steps 0, 0.04, 0, 0.09, 0: noise sqrt(0.13 / 5 / 2); a difference of two means of two has that.
    assert summary.fall == pytest.approx(0.3 / math.sqrt(0.013))
    assert not summary.over_optimised  # 2.6 errors are not enough


@pytest.mark.parametrize(("rise", "expected"), [(0.1, True), (-0.1, False)])
def test_over_optimised_needs_a_proxy_that_goes_on_rising(rise: float, expected: bool) -> None:
    gold = [0.5 + 0.01 * min(i, 40 - i) + 0.002 * (-1) ** i for i in range(41)]
    run = Trajectory([0.1 * i for i in range(41)], [rise * i for i in range(41)], gold)
    assert summarise(run).over_optimised is expected


def test_markdown_table() -> None:
    expected = "| proxy | gold |\n| --- | ---: |\n| 150 pairs | 0.8 |"
    assert markdown_table(["proxy", "gold"], [["150 pairs", "0.8"]]) == expected
