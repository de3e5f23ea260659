"""Statistics of the evaluation, against hand arithmetic and scipy."""

from __future__ import annotations

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from eval.statistics import (
    bootstrap_interval,
    bootstrap_limits,
    bootstrap_means,
    clopper_pearson_interval,
    correlation,
    mean_standard_error,
    paired_difference,
    proportion_interval,
    t_interval,
    wilson_interval,
)
from eval.statistics.bootstrap import JACKKNIFE_GROUPS, jackknife, mean_statistic
from eval.win_rate import counted_win_rate, outcomes_of, win_rate


def test_t_interval_by_hand() -> None:
    # mean 3, s = sqrt(2.5), t(4) = 2.7764, half width 2.7764 * 1.5811 / sqrt(5) = 1.9632
    found = t_interval([1, 2, 3, 4, 5])
    assert (found.value, found.n, found.method) == (3.0, 5, "t")
    assert found.low == pytest.approx(3 - 1.96324, abs=1e-4)
    assert found.high == pytest.approx(3 + 1.96324, abs=1e-4)


def test_t_interval_of_one_value_has_no_width() -> None:
    assert (t_interval([7.0]).low, t_interval([7.0]).high) == (7.0, 7.0)


def test_wilson_by_hand() -> None:
    # 8 of 10, z = 1.96: centre (0.8 + 0.19207) / 1.38415, half 1.41592 * sqrt(0.016 + 0.009604)
    found = wilson_interval(8, 10)
    assert found.low == pytest.approx(0.49016, abs=1e-5)
    assert found.high == pytest.approx(0.94331, abs=1e-5)


@pytest.mark.parametrize(("successes", "n"), [(0, 20), (3, 17), (20, 20), (170, 320)])
def test_wilson_equals_scipy(successes: int, n: int) -> None:
    oracle = stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
    found = wilson_interval(successes, n)
    assert (found.low, found.high) == pytest.approx((oracle.low, oracle.high), abs=1e-12)


def test_wilson_of_all_successes_is_not_certain() -> None:
    found = wilson_interval(20, 20)
    assert found.high == 1.0
    assert found.low == pytest.approx(20 / (20 + 1.959964**2), abs=1e-6)


@pytest.mark.parametrize(("successes", "n"), [(-1, 5), (6, 5), (0, 0)])
def test_wilson_refuses_impossible_counts(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match=f"{successes} of {n}"):
        wilson_interval(successes, n)


def test_bootstrap_is_close_to_the_t_interval_on_normal_data() -> None:
    values = np.random.default_rng(3).normal(5, 2, size=400)
    boot, exact = bootstrap_interval(values, samples=4000), t_interval(values)
    assert boot.value == exact.value
    assert boot.low == pytest.approx(exact.low, abs=0.03)
    assert boot.high == pytest.approx(exact.high, abs=0.03)


def test_bootstrap_draws_whole_clusters() -> None:
    # Two clusters with means 0 and 1, three times as many rows in the second: the only possible resampled
    # means are 0, 3/4 and 1. Drawing rows instead would give others.
    means = bootstrap_means([0, 1, 1, 1], clusters=["a", "b", "b", "b"], samples=500)
    assert set(means) == {0.0, 0.75, 1.0}


def test_repeating_every_row_narrows_a_plain_interval_but_not_a_clustered_one() -> None:
    values = np.random.default_rng(0).normal(size=60)
    repeated, clusters = np.repeat(values, 9), np.repeat(np.arange(60), 9)
    once = bootstrap_interval(values)
    clustered = bootstrap_interval(repeated, clusters)
    plain = bootstrap_interval(repeated)
    assert clustered.high - clustered.low == pytest.approx(once.high - once.low, rel=0.1)
    assert plain.high - plain.low < 0.5 * (once.high - once.low)


def test_bootstrap_is_seeded() -> None:
    values = [0.1, 0.9, 0.4, 0.3]
    assert bootstrap_interval(values, seed=4) == bootstrap_interval(values, seed=4)
    assert bootstrap_interval(values, seed=4) != bootstrap_interval(values, seed=5)


def test_coverage_of_the_bootstrap_interval() -> None:
    rng = np.random.default_rng(11)
    covered = 0
    for trial in range(300):
        found = bootstrap_interval(rng.beta(2, 1, size=120), samples=400, seed=trial)
        covered += found.low <= 2 / 3 <= found.high
    assert 0.91 <= covered / 300 <= 0.98


def test_limits_equal_scipy_for_both_methods() -> None:
    # The same generator draws the same resamples in both.
    values = np.random.default_rng(5).exponential(size=83)
    for method, theirs in (("bca", "BCa"), ("percentile", "percentile")):
        oracle = stats.bootstrap(
            (values,), np.mean, n_resamples=999, method=theirs, rng=np.random.default_rng(7)
        )
        low, high, error = bootstrap_limits(
            *mean_statistic(values), samples=999, seed=7, method=method, widen=False
        )
        assert (low, high) == pytest.approx(tuple(oracle.confidence_interval), abs=1e-9)
        assert error == pytest.approx(oracle.standard_error, abs=1e-9)


def test_many_units_are_left_out_in_groups() -> None:
    values = np.random.default_rng(5).exponential(size=2500) ** 2
    oracle = stats.bootstrap(
        (values,), np.mean, n_resamples=999, method="BCa", rng=np.random.default_rng(7)
    ).confidence_interval
    percentile = bootstrap_limits(*mean_statistic(values), samples=999, seed=7, method="percentile")
    low, high, _ = bootstrap_limits(*mean_statistic(values), samples=999, seed=7, widen=False)
    assert len(jackknife(*mean_statistic(values))) == JACKKNIFE_GROUPS
    assert (low, high) == pytest.approx(tuple(oracle), abs=0.1 * abs(oracle.high - percentile[1]) + 0.002)


def test_cluster_limits_equal_scipys_of_the_ratio_of_sums() -> None:
    rng = np.random.default_rng(6)
    values, clusters = rng.exponential(size=200), rng.integers(0, 40, size=200)
    sums, counts = np.bincount(clusters, weights=values), np.bincount(clusters).astype(float)
    oracle = stats.bootstrap(
        (sums, counts),
        lambda s, c, axis=-1: s.sum(axis) / c.sum(axis),
        paired=True,
        n_resamples=999,
        method="BCa",
        rng=np.random.default_rng(1),
    )
    low, high, _ = bootstrap_limits(*mean_statistic(values, clusters), samples=999, seed=1, widen=False)
    # Labels sort as text here and as numbers there, which permutes the clusters: equal up to resampling.
    assert (low, high) == pytest.approx(tuple(oracle.confidence_interval), abs=0.03)


def test_few_units_widen_the_interval() -> None:
    values = np.random.default_rng(1).normal(size=8)
    plain = bootstrap_limits(*mean_statistic(values), method="percentile", widen=False)
    wide = bootstrap_limits(*mean_statistic(values), method="percentile")
    assert wide[1] - wide[0] > 1.15 * (plain[1] - plain[0])


def test_standard_error_equals_statsmodels_cluster_robust_one() -> None:
    rng = np.random.default_rng(2)
    values, clusters = rng.choice([0, 0.5, 1], size=300), rng.integers(0, 50, size=300)
    fitted = sm.OLS(values, np.ones(300))
    plain, robust = fitted.fit(), fitted.fit(cov_type="cluster", cov_kwds={"groups": clusters})
    assert mean_standard_error(values) == pytest.approx(plain.bse[0], abs=1e-9)
    assert mean_standard_error(values, clusters) == pytest.approx(robust.bse[0], abs=1e-9)


@pytest.mark.parametrize(("successes", "n"), [(0, 20), (3, 17), (20, 20), (170, 320)])
def test_clopper_pearson_equals_statsmodels(successes: int, n: int) -> None:
    low, high = proportion_confint(successes, n, method="beta")
    found = clopper_pearson_interval(successes, n)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-9)


def test_clopper_pearson_refuses_half_a_success() -> None:
    with pytest.raises(ValueError, match="2.5"):
        clopper_pearson_interval(2.5, 5)


def test_score_interval_at_the_effective_size_by_hand() -> None:
    # Two prompts in four answers, means 1 and 1/2: p = 3/4, deviations +-1/2, SE = sqrt(2 * 1/2) / 4 = 1/4,
    # n_eff = (3/16) / (1/16) = 3, t(1) = 12.7062, so the interval is Wilson's with n = 3 and that quantile.
    found = proportion_interval([1, 1, 1, 0], ["a", "a", "b", "b"])
    t = 12.706204736
    centre, half = (0.75 + t**2 / 6) / (1 + t**2 / 3), t / (1 + t**2 / 3) * (0.1875 / 3 + t**2 / 36) ** 0.5
    assert found.standard_error == 0.25
    assert (found.low, found.high) == pytest.approx((centre - half, centre + half), abs=1e-9)


def test_equal_outcomes_count_each_cluster_once() -> None:
    assert proportion_interval([1, 1, 1, 1], ["a", "a", "b", "b"]).low == wilson_interval(2, 2).low
    assert proportion_interval([0, 0, 0]).high == wilson_interval(0, 3).high


def test_many_independent_outcomes_give_nearly_wilsons_interval() -> None:
    outcomes = np.repeat([1.0, 0.0], [1700, 1500])
    found, wilson = proportion_interval(outcomes), wilson_interval(1700, 3200)
    assert (found.low, found.high) == pytest.approx((wilson.low, wilson.high), abs=2e-5)


def test_proportions_outside_the_unit_interval_are_refused() -> None:
    with pytest.raises(ValueError, match="0 to 2"):
        proportion_interval([0, 1, 2])


def test_outcomes_and_ties() -> None:
    assert outcomes_of([1.0, 0.5, 0.2], [0.5, 0.5, 0.9]).tolist() == [1.0, 0.5, 0.0]
    assert outcomes_of([0.1 + 0.2], [0.3], tie_tolerance=1e-9).tolist() == [0.5]
    assert outcomes_of([0.1 + 0.2], [0.3]).tolist() == [1.0]


def test_win_rate_counts_a_tie_as_half() -> None:
    found = counted_win_rate(outcomes_of([1, 1, 0, 0.5], [0, 0.5, 0, 1]))
    assert (found.wins, found.ties, found.losses) == (2, 1, 1)
    assert found.rate.value == 0.625


def test_win_rate_of_all_wins_keeps_an_interval() -> None:
    found = win_rate([1.0] * 30)
    assert (found.low, found.high) == (wilson_interval(30, 30).low, 1.0)
    assert found.low == pytest.approx(0.8865, abs=1e-3)


def test_win_rate_against_itself_is_one_half() -> None:
    found = counted_win_rate(outcomes_of([0.3, 0.9], [0.3, 0.9]))
    assert (found.rate.value, found.rate.low, found.rate.high, found.ties) == (0.5, 0.5, 0.5, 2)


def test_ties_narrow_a_win_rate_and_clusters_widen_it() -> None:
    decided, tied = [1.0, 0.0] * 40, [1.0, 0.5, 0.5, 0.0] * 20
    assert win_rate(tied).standard_error == pytest.approx(win_rate(decided).standard_error / 2**0.5)
    clustered = win_rate([1.0] * 40 + [0.0] * 40, np.repeat(np.arange(20), 4))
    assert clustered.standard_error > 1.9 * win_rate(decided).standard_error


def test_paired_difference_is_narrower_than_the_two_means() -> None:
    rng = np.random.default_rng(0)
    difficulty = rng.normal(0, 3, size=200)
    control, treatment = difficulty, difficulty + 0.2 + rng.normal(0, 0.1, size=200)
    paired = paired_difference(treatment, control)
    assert paired.low > 0
    assert bootstrap_interval(treatment).low < bootstrap_interval(control).high


def test_mismatched_lengths_name_both() -> None:
    with pytest.raises(ValueError, match="3 against 2"):
        paired_difference([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="3 values but 1 cluster"):
        bootstrap_means([1, 2, 3], clusters=["a"])


def test_not_a_number_is_refused() -> None:
    with pytest.raises(ValueError, match="value 1 is nan"):
        t_interval([1.0, float("nan")])


def test_correlation_of_a_monotone_and_a_constant() -> None:
    found = correlation([1, 2, 3, 4], [1, 4, 9, 16])
    assert found["spearman"] == pytest.approx(1.0)
    assert found["pearson"] == pytest.approx(0.98437, abs=1e-4)
    assert correlation([1, 2, 3], [5, 5, 5])["pearson"] is None
