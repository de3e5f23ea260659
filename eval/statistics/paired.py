"""Is the difference between two systems on the same prompts real? Paired tests and their correction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from eval.statistics.bootstrap import bootstrap_interval
from eval.statistics.intervals import Clusters, Interval, Values, cluster_sums, finite_array, unit_array


@dataclass(frozen=True)
class Significance:
    """A two-sided test: its p-value, the statistic behind it and how many pairs took part."""

    p_value: float
    statistic: float
    n: int
    method: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def paired_differences(treatment: Values, control: Values) -> np.ndarray:
    """treatment - control, shape (n,). Raises ValueError where the lengths differ."""
    a, b = finite_array(treatment), finite_array(control)
    if a.size != b.size:
        raise ValueError(f"paired comparison of {a.size} against {b.size} values")
    return a - b


def paired_difference(
    treatment: Values,
    control: Values,
    clusters: Clusters | None = None,
    confidence: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean of treatment - control over the same prompts, with the paired bootstrap interval."""
    return bootstrap_interval(paired_differences(treatment, control), clusters, confidence, samples, seed)


def mcnemar(treatment: Values, control: Values, mid_p: bool = False) -> Significance:
    """McNemar's (1947) exact test of two systems' right (1) and wrong (0) verdicts on the same items.

    Only items on which they differ count: under no difference each goes either way with probability 1/2.
    `mid_p` counts the observed table half, which is less conservative (Fagerland et al. 2013). The
    statistic is the smaller of the two counts.
    """
    difference = paired_differences(treatment, control)
    if not np.isin(np.concatenate([np.asarray(treatment), np.asarray(control)]), (0, 1)).all():
        raise ValueError("McNemar's test takes verdicts 0 and 1; for ties or scores use the sign test")
    return _binomial(difference, mid_p, "mcnemar-mid-p" if mid_p else "mcnemar-exact")


def sign_test(treatment: Values, control: Values, mid_p: bool = False) -> Significance:
    """Exact sign test: how often treatment is higher, equal pairs left out (Dixon and Mood 1946)."""
    return _binomial(paired_differences(treatment, control), mid_p, "sign-mid-p" if mid_p else "sign-exact")


def _binomial(difference: np.ndarray, mid_p: bool, method: str) -> Significance:
    up, down = int((difference > 0).sum()), int((difference < 0).sum())
    fewer, n = min(up, down), up + down
    if n == 0:
        return Significance(1.0, 0.0, int(difference.size), method)
    p = float(stats.binomtest(fewer, n).pvalue)
    if mid_p:
        observed = float(stats.binom.pmf(fewer, n, 0.5))
        p -= observed if up != down else observed / 2
    return Significance(min(p, 1.0), float(fewer), int(difference.size), method)


def wilcoxon(treatment: Values, control: Values) -> Significance:
    """Wilcoxon's (1945) signed-rank test as scipy runs it: exact for few pairs without ties, else normal."""
    difference = paired_differences(treatment, control)
    if not difference.any():
        return Significance(1.0, 0.0, int(difference.size), "wilcoxon")
    found = stats.wilcoxon(difference)
    return Significance(float(found.pvalue), float(found.statistic), int(difference.size), "wilcoxon")


def permutation_test(
    treatment: Values, control: Values, clusters: Clusters | None = None, samples: int = 10_000, seed: int = 0
) -> Significance:
    """Paired permutation test of the mean difference, the signs of whole clusters flipped together.

    p = (1 + resamples at least as far from 0) / (1 + samples), never 0 (Phipson and Smyth 2010).
    """
    difference = paired_differences(treatment, control)
    sums, _ = cluster_sums(difference, clusters)
    rng = np.random.default_rng(seed)
    observed, beyond = abs(sums.sum()), 0
    rounding = 1e-12 * np.abs(sums).sum()
    rows = max(1, 4_000_000 // sums.size)
    for start in range(0, samples, rows):
        signs = rng.integers(0, 2, size=(min(rows, samples - start), sums.size)) * 2.0 - 1.0
        beyond += int((np.abs(signs @ sums) >= observed - rounding).sum())
    return Significance(
        (1 + beyond) / (1 + samples), float(difference.mean()), int(difference.size), "paired-permutation"
    )


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Adjusted p-values of Holm (1979): at level a, the chance of any false finding is at most a."""
    p = unit_array(p_values, "p-values")
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * (p.size - np.arange(p.size)))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def benjamini_hochberg(p_values: Sequence[float]) -> np.ndarray:
    """Adjusted p-values of Benjamini and Hochberg (1995): of the findings at most a share a is false."""
    return np.asarray(stats.false_discovery_control(unit_array(p_values, "p-values"), method="bh"))
