"""Bootstrap over whole units (prompts, items), for any statistic that can be computed from unit weights.

A resample is how often each unit was drawn, so a statistic over unit totals is a matrix product over all
resamples at once. Intervals are bias-corrected and accelerated (Efron 1987) or percentile ones, their tail
probabilities widened for few units as Hesterberg (2015) proposes: without it, n units give an
interval too short by sqrt((n - 1) / n) and by the difference between the normal and Student's t.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
from scipy import stats

from eval.statistics.intervals import Clusters, Interval, Values, cluster_sums

Statistic = Callable[[np.ndarray], np.ndarray]
"""Takes weights (rows, units) and gives the statistic of each row, shape (rows,) or (rows, k)."""

Method = Literal["bca", "percentile"]
JACKKNIFE_GROUPS = 1000
_CELLS = 4_000_000
"""Most weights held at a time."""


def resample_weights(units: int, samples: int, seed: int = 0) -> Iterator[np.ndarray]:
    """How often each unit is drawn, in blocks of shape (rows, units), `samples` rows in all."""
    rng = np.random.default_rng(seed)
    rows = max(1, _CELLS // units)
    for start in range(0, samples, rows):
        count = min(rows, samples - start)
        drawn = rng.integers(0, units, size=(count, units))
        drawn += (np.arange(count) * units)[:, None]
        yield np.bincount(drawn.ravel(), minlength=count * units).reshape(count, units).astype(np.float64)


def bootstrap_distribution(
    statistic: Statistic, units: int, samples: int = 2000, seed: int = 0
) -> np.ndarray:
    """The statistic of `samples` resamples, shape (samples,) or (samples, k)."""
    return np.concatenate([statistic(weights) for weights in resample_weights(units, samples, seed)])


def jackknife(statistic: Statistic, units: int) -> np.ndarray:
    """The statistic with each unit left out in turn, shape (units,) or (units, k).

    Of more than JACKKNIFE_GROUPS units that many groups are left out instead, dealt in turn: the skewness it
    is needed for has the same expectation, and time grows with the units, not with their square.
    """
    groups = min(units, JACKKNIFE_GROUPS)
    group_of = np.arange(units) % groups
    rows = max(1, _CELLS // units)
    return np.concatenate(
        [
            statistic((group_of[None, :] != np.arange(start, min(start + rows, groups))[:, None]) * 1.0)
            for start in range(0, groups, rows)
        ]
    )


def bootstrap_limits(
    statistic: Statistic,
    units: int,
    confidence: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
    method: Method = "bca",
    widen: bool = True,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lower limits, upper limits and standard errors, each shape () or (k,).

    Resamples in which the statistic is not defined (nan) are left out. `widen=False` gives the textbook
    interval, as `scipy.stats.bootstrap` makes it.
    """
    drawn = bootstrap_distribution(statistic, units, samples, seed)
    shape = drawn.shape[1:]
    drawn = drawn.reshape(len(drawn), -1)
    tail = (1 - confidence) / 2
    z = stats.norm.ppf(tail)
    if widen and units > 1:
        z = stats.t.ppf(tail, units - 1) * np.sqrt(units / (units - 1))
    probabilities = np.broadcast_to(stats.norm.cdf([z, -z]), (drawn.shape[1], 2))
    if method == "bca" and units > 1:
        whole = np.asarray(statistic(np.ones((1, units)))).reshape(-1)
        left_out = jackknife(statistic, units)
        left_out = left_out.reshape(len(left_out), -1)
        probabilities = _bca_probabilities(drawn, whole, left_out, z)
    limits = np.array(
        [np.nanquantile(column, p) for column, p in zip(drawn.T, probabilities, strict=True)]
    ).reshape(*shape, 2)
    return limits[..., 0], limits[..., 1], np.nanstd(drawn, axis=0, ddof=1).reshape(shape)


def _bca_probabilities(drawn: np.ndarray, whole: np.ndarray, left_out: np.ndarray, z: float) -> np.ndarray:
    """Tail probabilities (k, 2) of Efron 1987; the plain ones where the statistic does not vary."""
    defined = np.maximum((~np.isnan(drawn)).sum(axis=0), 1)
    # Resamples equal to the whole but for rounding count half.
    rounding = 1e-10 * np.maximum(np.abs(whole), 1.0)
    lower, upper = (drawn < whole - rounding).sum(axis=0), (drawn <= whole + rounding).sum(axis=0)
    below = (lower + upper) / (2 * defined)
    deviation = np.nanmean(left_out, axis=0) - left_out
    spread = np.nansum(deviation**2, axis=0)
    with np.errstate(all="ignore"):
        bias = stats.norm.ppf(below)
        acceleration = np.nansum(deviation**3, axis=0) / (6 * spread**1.5)
        ends = np.stack([bias + z, bias - z], axis=1)
        moved = stats.norm.cdf(bias[:, None] + ends / (1 - acceleration[:, None] * ends))
    plain = stats.norm.cdf([z, -z])
    usable = np.isfinite(moved).all(axis=1) & (np.ptp(drawn, axis=0) > 0)
    return np.where(usable[:, None], moved, plain)


def mean_statistic(values: Values, clusters: Clusters | None = None) -> tuple[Statistic, int]:
    """The mean as a function of cluster weights, and the number of clusters."""
    sums, counts = cluster_sums(values, clusters)
    return lambda weights: (weights @ sums) / (weights @ counts), int(sums.size)


def bootstrap_means(
    values: Values, clusters: Clusters | None = None, samples: int = 2000, seed: int = 0
) -> np.ndarray:
    """Means of `samples` resamples, shape (samples,). Whole clusters are drawn, or single values."""
    return bootstrap_distribution(*mean_statistic(values, clusters), samples, seed)


def bootstrap_interval(
    values: Values,
    clusters: Clusters | None = None,
    confidence: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
    method: Method = "bca",
) -> Interval:
    """Mean with its bootstrap interval, whole clusters resampled."""
    statistic, units = mean_statistic(values, clusters)
    low, high, error = bootstrap_limits(statistic, units, confidence, samples, seed, method)
    mean = float(np.asarray(values, dtype=np.float64).mean())
    return Interval(mean, float(low), float(high), len(values), f"bootstrap-{method}", float(error))
