"""How far a reward model's margins can be read as probabilities. Pure functions over numpy arrays.

A pair has a margin m = score(preferred) - score(other). Bradley-Terry (1952) reads it as
P(preferred wins) = sigmoid(m / T), with temperature T = 1 unless fitted (Guo et al. 2017, sec. 4.2).
Since the preferred answer always stands first, everything here is in terms of confidence
max(p, 1 - p), which lies in [0.5, 1] and does not depend on which answer is written first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit
from scipy.stats import rankdata

LOG_TEMPERATURE_BOUNDS = (-5.0, 7.0)


def log_loss(margins: np.ndarray, temperature: float | np.ndarray = 1.0) -> float:
    """Mean negative log-likelihood of the preferred side, -log sigmoid(m / T), in nats."""
    return float(np.logaddexp(0.0, -np.asarray(margins) / temperature).mean())


def brier(margins: np.ndarray, temperature: float | np.ndarray = 1.0) -> float:
    """Mean squared distance of the probability given to the preferred side from 1 (Brier 1950)."""
    return float(np.mean((1.0 - expit(np.asarray(margins) / temperature)) ** 2))


def pair_auc(margins: np.ndarray) -> float:
    """AUC of telling (preferred, other) from (other, preferred): P(m_i > -m_j), equality counting half."""
    m = np.asarray(margins, dtype=np.float64)
    ranks = rankdata(np.concatenate([m, -m]))
    return float((ranks[: m.size].sum() - m.size * (m.size + 1) / 2) / m.size**2)


def reliability_bins(
    margins: np.ndarray, temperature: float | np.ndarray = 1.0, bins: int = 10
) -> list[dict[str, float | int]]:
    """Equal-width confidence bins over [0.5, 1]; empty ones are left out. A zero margin is half correct."""
    m = np.asarray(margins, dtype=np.float64)
    confidence = expit(np.abs(m) / temperature)
    correct = np.where(m == 0, 0.5, (m > 0).astype(np.float64))
    index = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    rows = []
    for b in range(bins):
        inside = index == b
        if inside.any():
            rows.append(
                {
                    "low": 0.5 + b / (2 * bins),
                    "high": 0.5 + (b + 1) / (2 * bins),
                    "confidence": float(confidence[inside].mean()),
                    "accuracy": float(correct[inside].mean()),
                    "count": int(inside.sum()),
                }
            )
    return rows


def expected_calibration_error(rows: Sequence[dict[str, float | int]]) -> float:
    """Count-weighted mean of |accuracy - confidence| over reliability bins (Naeini et al. 2015)."""
    total = sum(row["count"] for row in rows)
    return float(sum(row["count"] * abs(row["accuracy"] - row["confidence"]) for row in rows) / total)


def fit_temperature(margins: np.ndarray) -> float:
    """The T > 0 with the least log-loss; the bounds exp(-5) to exp(7) stop perfectly separated pairs."""
    m = np.asarray(margins, dtype=np.float64)
    found = minimize_scalar(
        lambda log_t: log_loss(m, np.exp(log_t)), bounds=LOG_TEMPERATURE_BOUNDS, method="bounded"
    )
    return float(np.exp(found.x))


def two_folds(groups: Sequence[Any], seed: int = 0) -> np.ndarray:
    """Fold 0 or 1 of every row, all rows of one group together; two groups or more fill both."""
    labels = np.unique(np.asarray(groups, dtype=str), return_inverse=True)[1]
    order = np.random.default_rng(seed).permutation(labels.max() + 1)
    return (order % 2)[labels]


def out_of_fold_temperature(margins: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Temperature per row, fitted on the rows of the other folds, shape as `margins`.

    With a single fold there are no others, and the temperature stays 1.
    """
    m = np.asarray(margins, dtype=np.float64)
    temperature = np.ones_like(m)
    folds = np.unique(fold)
    if folds.size > 1:
        for one in folds:
            temperature[fold == one] = fit_temperature(m[fold != one])
    return temperature


def cross_fitted_temperature(margins: np.ndarray, groups: Sequence[Any], seed: int = 0) -> np.ndarray:
    """`out_of_fold_temperature` with two folds, each of half the groups."""
    return out_of_fold_temperature(margins, two_folds(groups, seed))


def calibration_report(
    margins: np.ndarray, temperature: float | np.ndarray = 1.0, bins: int = 10
) -> dict[str, Any]:
    """Log-loss, Brier score, ECE and the bins behind it, at one temperature."""
    rows = reliability_bins(margins, temperature, bins)
    return {
        "temperature": float(np.mean(temperature)),
        "log_loss": log_loss(margins, temperature),
        "brier": brier(margins, temperature),
        "ece": expected_calibration_error(rows),
        "bins": rows,
    }
