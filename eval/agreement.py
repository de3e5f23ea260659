"""How far annotators (or judges) agree beyond chance: kappas of Cohen and Fleiss, alpha of Krippendorff.

Items come first in every array. Intervals hold for items drawn from a population, the annotators as they
are; `clusters` names the prompt of each item where several items share one. Kappas take their standard
error from the delta method (the influence of each item), alpha its interval from the bootstrap over items.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from scipy import stats

from eval.statistics.bootstrap import Statistic, bootstrap_limits
from eval.statistics.intervals import Clusters, Interval, cluster_codes, mean_standard_error
from eval.statistics.proportions import wilson_interval

Weights = Literal["linear", "quadratic"]
Level = Literal["nominal", "ordinal", "interval"]


class UndefinedAgreement(ValueError):
    """Every rating is the same, so there is no chance agreement to compare with."""

    def __init__(self) -> None:
        super().__init__("all ratings are equal: agreement beyond chance is not defined")


def percent_agreement(a: Sequence[Any], b: Sequence[Any]) -> float:
    """Share of items to which two annotators gave the same label; chance is not taken out."""
    first, second = _same_length(a, b)
    return float(np.mean(first == second))


def cohen_kappa(
    a: Sequence[Any],
    b: Sequence[Any],
    weights: Weights | None = None,
    clusters: Clusters | None = None,
    confidence: float = 0.95,
) -> Interval:
    """Agreement of two annotators (Cohen 1960; weighted for ordered labels, Cohen 1968).

    Args:
        a, b: one label per item, shape (n,); labels are strings or numbers, in sorted order when weighted.
        weights: of a disagreement between labels k steps apart: 1 each (None), k, or k squared.
        clusters: prompt of each item, shape (n,).

    The standard error is the large-sample one of Fleiss, Cohen and Everitt (1969) times sqrt(n / (n - 1)).

    Raises UndefinedAgreement when all labels are equal, ValueError when lengths differ or nothing is given.
    """
    first, second = _same_length(a, b)
    labels, codes = np.unique(np.concatenate([first, second]), return_inverse=True)
    if labels.size < 2:
        raise UndefinedAgreement
    i, j = codes[: first.size], codes[first.size :]
    steps = np.abs(np.subtract.outer(np.arange(labels.size), np.arange(labels.size))).astype(np.float64)
    distance = {None: (steps > 0).astype(np.float64), "linear": steps, "quadratic": steps**2}[weights]
    rows, columns = (np.bincount(side, minlength=labels.size) / first.size for side in (i, j))
    observed, expected = float(distance[i, j].mean()), float(rows @ distance @ columns)
    # kappa = 1 - observed / expected disagreement; its derivative in the weight of one item follows.
    expected_change = (distance @ columns)[i] + (rows @ distance)[j] - 2 * expected
    influence = -(distance[i, j] - observed) / expected + observed * expected_change / expected**2
    name = "cohen" if weights is None else f"cohen-{weights}"
    largest = float(distance.max()) / expected
    return _interval(1 - observed / expected, influence, clusters, confidence, name, largest)


def fleiss_kappa(
    counts: np.ndarray | Sequence[Sequence[int]],
    clusters: Clusters | None = None,
    confidence: float = 0.95,
) -> Interval:
    """Agreement of m annotators per item, not necessarily the same ones (Fleiss 1971).

    Args:
        counts: how many annotators gave each label, shape (items, labels); every row sums to the same m >= 2.
        clusters: prompt of each item, shape (items,).

    The standard error holds away from kappa = 0 too (Gwet 2021), unlike the one of Fleiss (1971).

    Raises UndefinedAgreement when all labels are equal; ValueError when rows have different sums (items
    rated by different numbers of annotators: use `krippendorff_alpha`).
    """
    table = np.asarray(counts, dtype=np.float64)
    if table.ndim != 2 or table.size == 0:
        raise ValueError(f"counts have shape (items, labels), got {table.shape}")
    raters = table[0].sum()
    if (table.sum(axis=1) != raters).any() or raters < 2:
        raise ValueError(
            "every item needs the same number of ratings, at least 2; "
            "use krippendorff_alpha where ratings are missing"
        )
    shares = table.mean(axis=0) / raters
    expected = float((shares**2).sum())
    if expected == 1.0:
        raise UndefinedAgreement
    item_agreement = (table * (table - 1)).sum(axis=1) / (raters * (raters - 1))
    observed = float(item_agreement.mean())
    expected_change = 2 * (table @ shares / raters - expected)
    influence = (item_agreement - observed) / (1 - expected)
    influence -= (1 - observed) / (1 - expected) ** 2 * expected_change
    value = (observed - expected) / (1 - expected)
    return _interval(value, influence, clusters, confidence, "fleiss", 1 / (1 - expected))


def krippendorff_alpha(
    ratings: np.ndarray | Sequence[Sequence[float]],
    level: Level = "nominal",
    clusters: Clusters | None = None,
    confidence: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Agreement of any number of annotators, ratings missing or not (Krippendorff 2011).

    Args:
        ratings: shape (items, annotators), NaN where an annotator did not rate; labels as numbers.
        level: which difference between ratings counts how much.
        clusters: prompt of each item, shape (items,).

    Items with fewer than two ratings say nothing about agreement and are left out; `n` counts the others.
    The interval is the bootstrap's over items (or clusters), bias-corrected and accelerated.

    Raises UndefinedAgreement when all ratings are equal, ValueError when no item has two ratings.
    """
    table = np.asarray(ratings, dtype=np.float64)
    if table.ndim != 2:
        raise ValueError(f"ratings have shape (items, annotators), got {table.shape}")
    if np.isinf(table).any():
        raise ValueError("ratings are finite, or NaN where an annotator did not rate")
    codes = cluster_codes(clusters, len(table))
    kept = (~np.isnan(table)).sum(axis=1) >= 2
    if not kept.any():
        raise ValueError("no item has ratings by two annotators")
    table, codes = table[kept], np.unique(codes[kept], return_inverse=True)[1]
    make = _interval_alpha if level == "interval" else _categorical_alpha
    statistic = make(table, codes, level)
    units = int(codes.max()) + 1
    value = float(statistic(np.ones((1, units)))[0])
    if np.isnan(value):
        raise UndefinedAgreement
    if value == 1.0:
        falls = _largest_fall(table[~np.isnan(table)], level)
        return _interval(value, np.zeros(len(table)), codes, confidence, f"krippendorff-{level}", falls)
    low, high, error = bootstrap_limits(statistic, units, confidence, samples, seed)
    return Interval(value, float(low), float(high), len(table), f"krippendorff-{level}", float(error))


def _largest_fall(ratings: np.ndarray, level: Level) -> float:
    """The largest distance between two ratings over the mean one that chance alone would give."""
    if level == "nominal":
        shares = np.unique(ratings, return_counts=True)[1] / ratings.size
        return float(1 / ((1 - (shares**2).sum()) * ratings.size / (ratings.size - 1)))
    on_scale = stats.rankdata(ratings) if level == "ordinal" else ratings
    return float(np.ptp(on_scale) ** 2 / (2 * on_scale.var(ddof=1)))


def _unit_sums(values: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Rows of `values` (items, ...) added up by cluster, shape (clusters, ...)."""
    sums = np.zeros((codes.max() + 1, *values.shape[1:]))
    np.add.at(sums, codes, values)
    return sums


def _alpha(observed: np.ndarray, expected: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(expected > 0, 1 - observed / expected, np.nan)


def _categorical_alpha(table: np.ndarray, codes: np.ndarray, level: Level) -> Statistic:
    """Alpha of nominal or ordinal ratings as a function of cluster weights, by the coincidence matrix."""
    labels = np.unique(table[~np.isnan(table)])
    counts = np.stack([(table == label).sum(axis=1) for label in labels], axis=1).astype(np.float64)
    ratings = counts.sum(axis=1)
    pairs = counts[:, :, None] * counts[:, None, :] - counts[:, :, None] * np.eye(labels.size)
    coincidences = _unit_sums(pairs / (ratings - 1)[:, None, None], codes).reshape(codes.max() + 1, -1)
    marginals = _unit_sums(counts, codes)

    def statistic(weights: np.ndarray) -> np.ndarray:
        totals = weights @ marginals
        n = totals.sum(axis=1)
        if level == "nominal":
            distance = np.broadcast_to(1 - np.eye(labels.size), (len(weights), labels.size, labels.size))
        else:
            middle = np.cumsum(totals, axis=1) - totals / 2
            distance = (middle[:, :, None] - middle[:, None, :]) ** 2
        observed = ((weights @ coincidences).reshape(distance.shape) * distance).sum(axis=(1, 2))
        expected = np.einsum("bc,bck,bk->b", totals, distance, totals) / (n - 1)
        return _alpha(observed, expected)

    return statistic


def _interval_alpha(table: np.ndarray, codes: np.ndarray, _: Level) -> Statistic:
    """Alpha for squared differences, by sums and sums of squares, so that ratings may be continuous."""
    present = ~np.isnan(table)
    table = table - table[present].mean()
    counts = present.sum(axis=1).astype(np.float64)
    total, squares = np.nansum(table, axis=1), np.nansum(table**2, axis=1)
    within = _unit_sums(2 * (counts * squares - total**2) / (counts - 1), codes)
    sums = _unit_sums(np.stack([counts, total, squares], axis=1), codes)

    def statistic(weights: np.ndarray) -> np.ndarray:
        n, first, second = (weights @ sums).T
        return _alpha(weights @ within, 2 * (n * second - first**2) / (n - 1))

    return statistic


def _same_length(a: Sequence[Any], b: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(a), np.asarray(b)
    if first.ndim != 1 or first.size == 0 or first.shape != second.shape:
        raise ValueError(f"two labels per item are needed, got shapes {first.shape} and {second.shape}")
    for side in (first, second):
        if side.dtype.kind == "f" and np.isnan(side).any():
            raise ValueError("a label is NaN: leave out items that one of the two did not label")
    return first, second


def _interval(
    value: float,
    influence: np.ndarray,
    clusters: Clusters | None,
    confidence: float,
    method: str,
    largest: float,
) -> Interval:
    """Kappa with Student's t interval for log(1 - kappa), which stays below 1 and holds near it.

    `largest` is by how much kappa falls per item of full disagreement. Without any disagreement there is no
    error to estimate: the lower limit then is kappa at the upper limit of Wilson's interval for 0 of G
    disagreements, G the number of clusters. A single cluster has no standard error and a zero-width interval.
    """
    error = mean_standard_error(influence, clusters)
    groups = int(cluster_codes(clusters, influence.size).max()) + 1
    if value == 1.0:
        low = 1 - largest * wilson_interval(0, groups, confidence).high
        return Interval(value, max(low, -1.0), value, influence.size, method, 0.0)
    if np.isnan(error):
        return Interval(value, value, value, influence.size, method)
    factor = float(np.exp(stats.t.ppf(0.5 + confidence / 2, groups - 1) * error / (1 - value)))
    low, high = max(1 - (1 - value) * factor, -1.0), 1 - (1 - value) / factor
    return Interval(value, low, high, influence.size, method, error)
