"""Kappas and alpha, against statsmodels, sklearn, published tables and hand arithmetic."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score
from statsmodels.stats.inter_rater import cohens_kappa
from statsmodels.stats.inter_rater import fleiss_kappa as statsmodels_fleiss

from eval.agreement import (
    UndefinedAgreement,
    cohen_kappa,
    fleiss_kappa,
    krippendorff_alpha,
    percent_agreement,
)
from eval.statistics import wilson_interval

NAN = float("nan")
KRIPPENDORFF_2011 = np.array(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, NAN, NAN, NAN],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NAN, 3],
        [NAN, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NAN],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NAN],
    ]
).T
"""Ratings of 12 units by 4 observers, worked by hand in Krippendorff, Computing Krippendorff's
Alpha-Reliability (2011), sec. C: nominal .743, interval .849; ordinal .815."""


def two_raters(n: int = 200, labels: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    a = rng.integers(0, labels, size=n)
    return a, np.where(rng.random(n) < 0.6, a, rng.integers(0, labels, size=n))


@pytest.mark.parametrize("weights", [None, "linear", "quadratic"])
def test_cohen_equals_sklearn_and_statsmodels(weights: str | None) -> None:
    a, b = two_raters()
    found = cohen_kappa(a, b, weights)
    assert found.value == pytest.approx(cohen_kappa_score(a, b, weights=weights), abs=1e-9)
    table = np.zeros((4, 4))
    np.add.at(table, (a, b), 1)
    distance = np.abs(np.subtract.outer(np.arange(4), np.arange(4)))
    matrix = None if weights is None else distance ** (1 if weights == "linear" else 2)
    oracle = cohens_kappa(table, weights=matrix)
    assert found.value == pytest.approx(oracle.kappa, abs=1e-9)
    assert found.standard_error * np.sqrt(199 / 200) == pytest.approx(oracle.std_kappa, abs=1e-9)


def test_cohen_by_hand_and_with_words() -> None:
    # 3 of 4 agree; each says yes half the time or three times in four: chance 1/2, kappa 1/2.
    a, b = ["yes", "yes", "no", "no"], ["yes", "yes", "no", "yes"]
    assert percent_agreement(a, b) == 0.75
    assert cohen_kappa(a, b).value == pytest.approx(0.5)


def test_fleiss_equals_statsmodels() -> None:
    rng = np.random.default_rng(1)
    counts = rng.multinomial(5, [0.5, 0.3, 0.2], size=60)
    counts[:20] = np.eye(3, dtype=int)[rng.integers(0, 3, 20)] * 5
    assert fleiss_kappa(counts).value == pytest.approx(statsmodels_fleiss(counts), abs=1e-9)


def test_fleiss_error_is_the_jackknifes() -> None:
    counts = np.random.default_rng(2).multinomial(4, [0.5, 0.5], size=400)
    left_out = np.array([fleiss_kappa(np.delete(counts, i, axis=0)).value for i in range(400)])
    jackknife = np.sqrt(399 / 400 * ((left_out - left_out.mean()) ** 2).sum())
    assert fleiss_kappa(counts).standard_error == pytest.approx(jackknife, rel=0.01)


def test_fleiss_of_two_raters_with_equal_margins_is_cohens() -> None:
    a, b = [0, 0, 1, 1, 0, 1], [0, 1, 1, 1, 0, 0]
    counts = [[(x == k) + (y == k) for k in (0, 1)] for x, y in zip(a, b, strict=True)]
    assert fleiss_kappa(counts).value == pytest.approx(cohen_kappa(a, b).value)


@pytest.mark.parametrize(
    ("level", "published"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)]
)
def test_alpha_of_the_published_example(level: str, published: float) -> None:
    found = krippendorff_alpha(KRIPPENDORFF_2011, level)
    assert found.value == pytest.approx(published, abs=0.0006)
    assert found.n == 11
    assert found.low < found.value < found.high


@pytest.mark.parametrize("level", ["nominal", "ordinal", "interval"])
def test_alpha_equals_its_definition_over_pairs(level: str) -> None:
    """Every pair of ratings of one item against every pair of ratings at all, one by one."""
    table = KRIPPENDORFF_2011[:11]
    labels, counts = np.unique(table[~np.isnan(table)], return_counts=True)

    def distance(c: float, k: float) -> float:
        low, high = sorted((np.searchsorted(labels, c), np.searchsorted(labels, k)))
        if level == "nominal":
            return float(c != k)
        if level == "interval":
            return float((c - k) ** 2)
        return float((counts[low : high + 1].sum() - (counts[low] + counts[high]) / 2) ** 2)

    rows = [row[~np.isnan(row)] for row in table]
    every = np.concatenate([row for row in rows if row.size > 1])
    observed = sum(
        sum(distance(c, k) for c, k in itertools.permutations(row, 2)) / (row.size - 1)
        for row in rows
        if row.size > 1
    )
    expected = sum(distance(c, k) for c, k in itertools.permutations(every, 2)) / (every.size - 1)
    assert krippendorff_alpha(table, level).value == pytest.approx(1 - observed / expected, abs=1e-9)


def test_two_ways_to_one_alpha_interval() -> None:
    # With two labels nominal, ordinal and interval differences are the same up to a factor.
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 2, size=(80, 1))
    table = np.where(rng.random((80, 3)) < 0.8, truth, 1 - truth).astype(float)
    table[rng.random((80, 3)) < 0.1] = NAN
    nominal, ordinal, interval = (
        krippendorff_alpha(table, level) for level in ("nominal", "ordinal", "interval")
    )
    for other in (ordinal, interval):
        assert (other.value, other.low, other.high) == pytest.approx(
            (nominal.value, nominal.low, nominal.high), abs=1e-9
        )


def test_repeated_items_narrow_nothing_when_clustered() -> None:
    a, b = two_raters(60)
    clusters = np.repeat(np.arange(60), 3)
    repeated = cohen_kappa(np.repeat(a, 3), np.repeat(b, 3), clusters=clusters)
    once = cohen_kappa(a, b)
    assert (repeated.value, repeated.standard_error) == pytest.approx((once.value, once.standard_error))
    table = np.stack([a, b], axis=1)
    alpha = krippendorff_alpha(np.repeat(table, 3, axis=0), clusters=clusters)
    assert alpha.high - alpha.low == pytest.approx(np.ptp(krippendorff_interval(table)), rel=0.1)


def krippendorff_interval(table: np.ndarray) -> tuple[float, float]:
    found = krippendorff_alpha(table)
    return found.low, found.high


def test_equal_ratings_are_refused_by_name() -> None:
    for undefined in (
        lambda: cohen_kappa([1, 1], [1, 1]),
        lambda: fleiss_kappa([[3, 0], [3, 0]]),
        lambda: krippendorff_alpha([[1, 1], [1, 1]]),
        lambda: krippendorff_alpha([[1, 1], [1, 1]], "interval"),
    ):
        with pytest.raises(UndefinedAgreement, match="all ratings are equal"):
            undefined()


def test_impossible_tables_are_refused() -> None:
    with pytest.raises(ValueError, match="krippendorff_alpha where ratings are missing"):
        fleiss_kappa([[2, 1], [1, 1]])
    with pytest.raises(ValueError, match="no item has ratings by two"):
        krippendorff_alpha([[1, NAN], [NAN, 2]])
    with pytest.raises(ValueError, match="two labels per item"):
        cohen_kappa([1, 2], [1])


def test_perfect_agreement_on_few_items_is_not_certainty() -> None:
    # 0 disagreements of 10 may be up to Wilson's 0.2775; chance would give 1/2.
    labels = [0, 1] * 5
    expected = 1 - 2 * wilson_interval(0, 10).high
    for found in (
        cohen_kappa(labels, labels),
        fleiss_kappa([[3, 0], [0, 3]] * 5),
        krippendorff_alpha(np.stack([labels, labels], axis=1)),
    ):
        assert (found.value, found.high) == (1.0, 1.0)
        assert found.low == pytest.approx(expected, abs=0.03)
    ordinal, interval = (
        krippendorff_alpha(np.stack([labels, labels], axis=1), level) for level in ("ordinal", "interval")
    )
    assert ordinal.low == pytest.approx(interval.low)
    # Two prompts of five items each are two pieces of evidence.
    assert cohen_kappa(labels, labels, clusters=[0] * 5 + [1] * 5).low < expected - 0.4


def test_the_interval_stays_below_one() -> None:
    labels = np.arange(40) % 2
    other = labels.copy()
    other[0] = 1 - other[0]
    found = cohen_kappa(labels, other)
    assert found.low < found.value - (found.high - found.value) < found.value < found.high < 1


def test_a_missing_label_is_no_label() -> None:
    """NaN equals NaN to numpy's `unique`, so two annotators would agree on what neither said."""
    with pytest.raises(ValueError, match="a label is NaN"):
        cohen_kappa([1.0, float("nan"), 2.0], [1.0, float("nan"), 1.0])
    with pytest.raises(ValueError, match="ratings are finite"):
        krippendorff_alpha([[1.0, float("inf")], [1.0, 2.0]], "interval")
