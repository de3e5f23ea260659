"""A point estimate with its interval, and the checks every statistic makes of its input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

Values = Sequence[float] | np.ndarray
Clusters = Sequence[Any] | np.ndarray


@dataclass(frozen=True)
class Interval:
    """A point estimate with its two-sided confidence interval and the number of observations.

    `method` says how the interval was made; `standard_error` is None where the method has none.
    """

    value: float
    low: float
    high: float
    n: int
    method: str
    standard_error: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def finite_array(values: Values) -> np.ndarray:
    """The values as float64, shape (n,). Raises ValueError when empty, nested or not finite."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"expected a non-empty one-dimensional sequence, got shape {array.shape}")
    if not np.isfinite(array).all():
        bad = int(np.flatnonzero(~np.isfinite(array))[0])
        raise ValueError(f"value {bad} is {array[bad]}: statistics need finite numbers")
    return array


def unit_array(values: Values, what: str) -> np.ndarray:
    """`finite_array` of values in [0, 1]. Raises ValueError that calls them `what`."""
    array = finite_array(values)
    if array.min() < 0 or array.max() > 1:
        raise ValueError(f"{what} lie in [0, 1], got {array.min():g} to {array.max():g}")
    return array


def cluster_codes(clusters: Clusters | None, size: int) -> np.ndarray:
    """Cluster number of each of `size` observations, shape (size,); without clusters each is its own."""
    if clusters is None:
        return np.arange(size)
    if len(clusters) != size:
        raise ValueError(f"{size} values but {len(clusters)} cluster labels")
    return np.unique(np.asarray(clusters, dtype=str), return_inverse=True)[1]


def cluster_sums(values: Values, clusters: Clusters | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the values of each cluster, two arrays of shape (clusters,)."""
    array = finite_array(values)
    if clusters is None:
        return array, np.ones_like(array)
    codes = cluster_codes(clusters, array.size)
    return np.bincount(codes, weights=array), np.bincount(codes).astype(np.float64)


def mean_standard_error(values: Values, clusters: Clusters | None = None) -> float:
    """Standard error of the mean, robust to any dependence within clusters; nan with a single cluster.

    sqrt(G / (G - 1) * sum_g (sum of the deviations in cluster g)^2) / n, the sandwich of Liang and Zeger
    (1986) with the usual correction for G clusters. Where each value is its own cluster this is s / sqrt(n).
    """
    sums, counts = cluster_sums(values, clusters)
    if sums.size < 2:
        return float("nan")
    n = counts.sum()
    deviations = sums - counts * (sums.sum() / n)
    return float(np.sqrt(sums.size / (sums.size - 1) * (deviations**2).sum()) / n)


def t_interval(values: Values, confidence: float = 0.95, clusters: Clusters | None = None) -> Interval:
    """Mean with Student's t interval on G - 1 degrees of freedom, G the number of clusters (or of values).

    One value, or one cluster, gives a zero-width interval.
    """
    array = finite_array(values)
    mean = float(array.mean())
    error = mean_standard_error(array, clusters)
    if np.isnan(error):
        return Interval(mean, mean, mean, int(array.size), "t")
    groups = cluster_codes(clusters, array.size).max() + 1
    half = float(stats.t.ppf(0.5 + confidence / 2, groups - 1) * error)
    return Interval(mean, mean - half, mean + half, int(array.size), "t", error)


def correlation(x: Values, y: Values) -> dict[str, float | int | None]:
    """Pearson and Spearman correlation; None where one side is constant and neither is defined."""
    a, b = finite_array(x), finite_array(y)
    if a.size < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return {"pearson": None, "spearman": None, "n": int(a.size)}
    return {
        "pearson": float(stats.pearsonr(a, b).statistic),
        "spearman": float(stats.spearmanr(a, b).statistic),
        "n": int(a.size),
    }
