"""Win rate at equal length: what a judge would say if neither answer were longer.

The outcome is regressed on the difference in length by logistic regression,

    logit E[outcome] = a + b tanh(d / sd(d)),

d the characters of the first answer less those of the second, and the controlled win rate is the model's at
d = 0, expit(a). Fitted without a penalty this overcorrects: b then also takes up what length only stands for
(hard questions get long answers), and the result is further from the official length-controlled rates of
AlpacaEval 2.0 (Dubois et al. 2024, arXiv:2404.04475) than the raw rate is. So b carries a ridge penalty, its
strength per comparison chosen on AlpacaEval's models, each held out in turn (docs/judging.md has the figures,
scripts/reproduce_judging.py the computation). No difficulty of prompts is needed: two models are enough.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import expit

from eval.statistics import Clusters, Interval, Values, bootstrap_limits, proportion_interval
from eval.statistics.intervals import cluster_codes, finite_array

PENALTY = 0.015
"""Ridge penalty on b per comparison: PENALTY * n * b^2 / 2 is added to the negative log-likelihood."""
FEWEST = 20
"""Comparisons below which no controlled rate is given."""
OVERLAP = 0.1
"""Share of comparisons that has to lie on either side of equal length; else d = 0 is an extrapolation."""
_LIMIT = 15.0


@dataclass(frozen=True)
class LengthControlled:
    """rate: at equal length. slope: b, above 0 where longer answers win. extrapolated: see OVERLAP."""

    rate: Interval
    slope: float
    extrapolated: bool

    def as_dict(self) -> dict[str, Any]:
        return {**self.rate.as_dict(), "slope": self.slope, "extrapolated": self.extrapolated}


def fit(
    outcomes: np.ndarray, x: np.ndarray, weights: np.ndarray, penalty: float = PENALTY, iterations: int = 60
) -> tuple[np.ndarray, np.ndarray]:
    """Intercepts a and slopes b, shape (rows,) each, by damped Newton steps for all rows of weights at once.

    outcomes (n,) in [0, 1], x (n,), weights (rows, n). |a| stops at 15, where all outcomes are 0 or all 1.
    """
    total = weights.sum(axis=1)
    ridge = penalty * total
    a, b = np.zeros(len(weights)), np.zeros(len(weights))
    for _ in range(iterations):
        p = expit(a[:, None] + b[:, None] * x)
        residual = weights * (outcomes - p)
        curvature = weights * p * (1 - p)
        ga, gb = residual.sum(axis=1), residual @ x - ridge * b
        haa, hab, hbb = (
            curvature.sum(axis=1) + 1e-9 * total,
            curvature @ x,
            curvature @ x**2 + ridge + 1e-9 * total,
        )
        determinant = haa * hbb - hab**2
        step_a, step_b = (hbb * ga - hab * gb) / determinant, (haa * gb - hab * ga) / determinant
        largest = np.maximum(np.abs(step_a), np.abs(step_b))
        damping = np.minimum(1.0, 2.0 / np.maximum(largest, 2.0))
        a = np.clip(a + damping * step_a, -_LIMIT, _LIMIT)
        b = np.clip(b + damping * step_b, -_LIMIT, _LIMIT)
        if largest.max() < 1e-10:
            break
    return a, b


def length_controlled_win_rate(
    outcomes: Values,
    length_differences: Values,
    clusters: Clusters | None = None,
    confidence: float = 0.95,
    samples: int = 1000,
    seed: int = 0,
    penalty: float = PENALTY,
) -> LengthControlled | None:
    """The win rate at equal length, bootstrap interval over clusters; None for fewer than 20 comparisons.

    Args:
        outcomes: of the first answer, in [0, 1], shape (n,).
        length_differences: length of the first answer less that of the second, shape (n,).
        clusters: prompt of each comparison, shape (n,).

    Where all outcomes or all differences are equal, it is the raw rate with its own interval.
    """
    y, d = finite_array(outcomes), finite_array(length_differences)
    if y.size != d.size:
        raise ValueError(f"{y.size} outcomes but {d.size} differences in length")
    if y.size < FEWEST:
        return None
    extrapolated = bool(min((d <= 0).mean(), (d >= 0).mean()) < OVERLAP)
    if np.ptp(y) == 0 or np.ptp(d) == 0:
        return LengthControlled(proportion_interval(y, clusters, confidence), 0.0, extrapolated)
    x = np.tanh(d / d.std())
    codes = cluster_codes(clusters, y.size)

    def statistic(weights: np.ndarray) -> np.ndarray:
        return expit(fit(y, x, weights[:, codes], penalty)[0])

    a, b = fit(y, x, np.ones((1, y.size)), penalty)
    low, high, error = bootstrap_limits(statistic, int(codes.max()) + 1, confidence, samples, seed)
    interval = Interval(
        float(expit(a[0])), float(low), float(high), y.size, "length-controlled, bootstrap-bca", float(error)
    )
    return LengthControlled(interval, float(b[0]), extrapolated)
