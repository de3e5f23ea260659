"""Means, proportions and win rates with intervals. Pure functions over numpy arrays.

Every estimate is an `Interval` that says how it was made. Bootstrap intervals are the percentile
kind (Efron and Tibshirani 1993, ch. 13) and resample whole clusters, so several answers to one
prompt do not count as independent evidence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

Values = Sequence[float] | np.ndarray


@dataclass(frozen=True)
class Interval:
    """A point estimate with its two-sided confidence interval and the number of observations."""

    value: float
    low: float
    high: float
    n: int
    method: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class WinRate:
    """Share of comparisons won, a tie counting half, with its interval and the raw counts."""

    rate: Interval
    wins: int
    ties: int
    losses: int

    def as_dict(self) -> dict[str, Any]:
        return {**self.rate.as_dict(), "wins": self.wins, "ties": self.ties, "losses": self.losses}


def _array(values: Values) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"expected a non-empty one-dimensional sequence, got shape {array.shape}")
    if not np.isfinite(array).all():
        bad = int(np.flatnonzero(~np.isfinite(array))[0])
        raise ValueError(f"value {bad} is {array[bad]}: statistics need finite numbers")
    return array


def t_interval(values: Values, confidence: float = 0.95) -> Interval:
    """Mean with Student's t interval: mean +- t(n-1) * s / sqrt(n). One value gives a zero-width interval."""
    array = _array(values)
    mean = float(array.mean())
    if array.size == 1:
        return Interval(mean, mean, mean, 1, "t")
    half = float(stats.t.ppf(0.5 + confidence / 2, array.size - 1) * array.std(ddof=1) / np.sqrt(array.size))
    return Interval(mean, mean - half, mean + half, int(array.size), "t")


def wilson_interval(successes: float, n: int, confidence: float = 0.95) -> Interval:
    """Proportion with the score interval of Wilson (1927); `successes` may be fractional (half ties)."""
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"expected 0 <= successes <= n and n > 0, got {successes} of {n}")
    z = stats.norm.ppf(0.5 + confidence / 2)
    p = successes / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    low = 0.0 if successes == 0 else float(centre - half)
    high = 1.0 if successes == n else float(centre + half)
    return Interval(p, low, high, n, "wilson")


def bootstrap_means(
    values: Values, clusters: Sequence[Any] | None = None, samples: int = 2000, seed: int = 0
) -> np.ndarray:
    """Means of `samples` resamples, shape (samples,). Whole clusters are drawn, or single values."""
    array = _array(values)
    if clusters is None:
        sums, counts = array, np.ones_like(array)
    else:
        if len(clusters) != array.size:
            raise ValueError(f"{array.size} values but {len(clusters)} cluster labels")
        labels = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)[1]
        sums, counts = np.bincount(labels, weights=array), np.bincount(labels).astype(np.float64)
    rng = np.random.default_rng(seed)
    means = np.empty(samples)
    rows = max(1, 4_000_000 // sums.size)
    for start in range(0, samples, rows):
        drawn = rng.integers(0, sums.size, size=(min(rows, samples - start), sums.size))
        means[start : start + len(drawn)] = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    return means


def bootstrap_interval(
    values: Values,
    clusters: Sequence[Any] | None = None,
    confidence: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean with the percentile bootstrap interval, resampled by cluster (see `bootstrap_means`)."""
    array = _array(values)
    means = bootstrap_means(array, clusters, samples, seed)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(array.mean()), float(low), float(high), int(array.size), "bootstrap")


def proportion_interval(
    outcomes: Values,
    clusters: Sequence[Any] | None = None,
    confidence: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean of outcomes in {0, 0.5, 1}.

    Wilson when every observation is its own cluster, or when all outcomes are equal (a resample of
    equal values has no spread, and 0 of 20 is not certainty); the cluster bootstrap otherwise.
    """
    array = _array(outcomes)
    clustered = clusters is not None and len(set(map(str, clusters))) < array.size
    if not clustered or np.ptp(array) == 0:
        return wilson_interval(float(array.sum()), int(array.size), confidence)
    return bootstrap_interval(array, clusters, confidence, samples, seed)


def paired_difference(
    treatment: Values,
    control: Values,
    clusters: Sequence[Any] | None = None,
    confidence: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean of treatment - control over the same prompts, with the paired bootstrap interval."""
    a, b = _array(treatment), _array(control)
    if a.size != b.size:
        raise ValueError(f"paired comparison of {a.size} against {b.size} values")
    return bootstrap_interval(a - b, clusters, confidence, samples, seed)


def outcomes_of(first: Values, second: Values, tie_tolerance: float = 0.0) -> np.ndarray:
    """1 where `first` is higher, 0 where lower, 0.5 where they differ by at most `tie_tolerance`."""
    difference = _array(first) - _array(second)
    return np.where(np.abs(difference) <= tie_tolerance, 0.5, (difference > 0).astype(np.float64))


def win_rate(
    scores: Values,
    baseline_scores: Values,
    clusters: Sequence[Any] | None = None,
    tie_tolerance: float = 0.0,
    confidence: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> WinRate:
    """Share of prompts on which `scores` beats `baseline_scores`; ties are half a win."""
    outcomes = outcomes_of(scores, baseline_scores, tie_tolerance)
    if np.ptp(outcomes) == 0 and outcomes[0] != 0.5:
        rate = wilson_interval(float(outcomes.sum()), outcomes.size, confidence)
    else:
        rate = bootstrap_interval(outcomes, clusters, confidence, samples, seed)
    return WinRate(rate, int((outcomes == 1).sum()), int((outcomes == 0.5).sum()), int((outcomes == 0).sum()))


def correlation(x: Values, y: Values) -> dict[str, float | int | None]:
    """Pearson and Spearman correlation; None where one side is constant and neither is defined."""
    a, b = _array(x), _array(y)
    if a.size < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return {"pearson": None, "spearman": None, "n": int(a.size)}
    return {
        "pearson": float(stats.pearsonr(a, b).statistic),
        "spearman": float(stats.spearmanr(a, b).statistic),
        "n": int(a.size),
    }
