"""Proportions, and other means of values in [0, 1], with intervals that stay inside [0, 1]."""

from __future__ import annotations

import numpy as np
from scipy import stats

from eval.statistics.intervals import (
    Clusters,
    Interval,
    Values,
    cluster_codes,
    mean_standard_error,
    unit_array,
)


def wilson_interval(successes: float, n: int, confidence: float = 0.95) -> Interval:
    """Proportion with the score interval of Wilson (1927); `successes` may be fractional (half ties)."""
    _require_counts(successes, n)
    low, high = _score_limits(successes / n, n, float(stats.norm.ppf(0.5 + confidence / 2)))
    p = successes / n
    return Interval(p, low, high, n, "wilson", float(np.sqrt(p * (1 - p) / n)))


def clopper_pearson_interval(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Proportion with the exact interval of Clopper and Pearson (1934): never covers less than stated."""
    _require_counts(successes, n)
    if successes != int(successes):
        raise ValueError(f"the exact interval counts whole successes, got {successes}; use Wilson's for ties")
    found = stats.binomtest(int(successes), n).proportion_ci(confidence, method="exact")
    p = successes / n
    return Interval(
        p, float(found.low), float(found.high), n, "clopper-pearson", float(np.sqrt(p * (1 - p) / n))
    )


def proportion_interval(
    outcomes: Values, clusters: Clusters | None = None, confidence: float = 0.95
) -> Interval:
    """Mean of outcomes in [0, 1] (a tie is 0.5), observations of one cluster depending on each other.

    The score interval of Wilson at the effective sample size p (1 - p) / SE^2, where SE is the
    cluster-robust standard error and the quantile is Student's t on G - 1 degrees of freedom, as for
    surveys (Korn and Graubard 1998; Dean and Pagano 2015). Ties make SE smaller and n_eff larger; clusters
    do the opposite. With all outcomes 0 or all 1 there is no variance to estimate and each cluster counts
    once: 0 of 20 prompts is not certainty. All ties give a zero-width interval.
    """
    array = unit_array(outcomes, "outcomes")
    groups = int(cluster_codes(clusters, array.size).max()) + 1
    p, error = float(array.mean()), mean_standard_error(array, clusters)
    if groups == 1 or p in (0.0, 1.0):
        found = wilson_interval(p * groups, groups, confidence)
        return Interval(p, found.low, found.high, int(array.size), "wilson", found.standard_error)
    if error == 0:
        return Interval(p, p, p, int(array.size), "score", 0.0)
    quantile = float(stats.t.ppf(0.5 + confidence / 2, groups - 1))
    low, high = _score_limits(p, p * (1 - p) / error**2, quantile)
    return Interval(p, low, high, int(array.size), "score", error)


def _require_counts(successes: float, n: int) -> None:
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"expected 0 <= successes <= n and n > 0, got {successes} of {n}")


def _score_limits(p: float, n: float, z: float) -> tuple[float, float]:
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    low = 0.0 if p == 0 else max(float(centre - half), 0.0)
    high = 1.0 if p == 1 else min(float(centre + half), 1.0)
    return low, high
