"""Simulated data sets whose truth is known, for `bench_coverage.py`: comparisons, annotations, gains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.special import expit
from scipy.stats import norm

from eval.agreement import cohen_kappa, fleiss_kappa, krippendorff_alpha
from eval.bradley_terry import ratings
from eval.statistics import Interval, bootstrap_interval, paired_difference, proportion_interval
from eval.win_rate import win_rate

RESAMPLES = 1000
STRENGTHS = {"a": 0.9, "b": 0.4, "c": 0.0, "d": -0.4, "e": -0.9}
CONFUSION = np.array([[0.8, 0.15, 0.05], [0.15, 0.7, 0.15], [0.05, 0.2, 0.75]])
"""What an annotator says (columns) of an item that is one of three classes (rows)."""
CAREFUL = np.array([[0.97, 0.02, 0.01], [0.03, 0.95, 0.02], [0.01, 0.03, 0.96]])
CLASSES = np.array([0.5, 0.3, 0.2])

Trial = Callable[[np.random.Generator, int], list[tuple[float, Interval]]]
"""One data set: the truths and their intervals."""


def clustered_outcomes(
    rng: np.random.Generator, prompts: int, mean: float, ties: float, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """Outcomes of 1 to `most` comparisons per prompt, win rates of prompts spread around `mean`.

    A tie comes with probability `ties`, else a win with the prompt's own probability, Beta-distributed with
    concentration 4 (a correlation of 1/5 within prompts).
    """
    counts = rng.integers(1, most + 1, size=prompts)
    decided = (mean - ties / 2) / (1 - ties)
    own = rng.beta(4 * decided, 4 * (1 - decided), size=prompts)
    clusters = np.repeat(np.arange(prompts), counts)
    wins = (rng.random(clusters.size) < own[clusters]).astype(float)
    return np.where(rng.random(clusters.size) < ties, 0.5, wins), clusters


def win_rates(prompts: int, mean: float, ties: float, most: int) -> Trial:
    def trial(rng: np.random.Generator, _: int) -> list[tuple[float, Interval]]:
        return [(mean, win_rate(*clustered_outcomes(rng, prompts, mean, ties, most)))]

    return trial


def accuracies(prompts: int, mean: float, bootstrap: bool) -> Trial:
    def trial(rng: np.random.Generator, seed: int) -> list[tuple[float, Interval]]:
        outcomes, clusters = clustered_outcomes(rng, prompts, mean, 0.02, 5)
        if bootstrap:
            return [(mean, bootstrap_interval(outcomes, clusters, samples=RESAMPLES, seed=seed))]
        return [(mean, proportion_interval(outcomes, clusters))]

    return trial


def bradley_terry(prompts: int) -> Trial:
    """Six comparisons per prompt; a prompt's outcomes correlate through a common normal variable."""
    names = list(STRENGTHS)

    def trial(rng: np.random.Generator, seed: int) -> list[tuple[float, Interval]]:
        clusters = np.repeat(np.arange(prompts), 6)
        pairs = np.array([rng.choice(5, 2, replace=False) for _ in clusters])
        strength = np.array(list(STRENGTHS.values()))
        p = expit(strength[pairs[:, 0]] - strength[pairs[:, 1]])
        # The common part favours whoever is earlier in the alphabet, so it carries over within a prompt.
        side = np.where(pairs[:, 0] < pairs[:, 1], 1.0, -1.0)
        common = rng.normal(size=prompts)[clusters]
        level = norm.cdf(np.sqrt(0.3) * side * common + np.sqrt(0.7) * rng.normal(size=clusters.size))
        tie = 0.3 * np.minimum(p, 1 - p)
        outcomes = np.where(level < p - tie / 2, 1.0, np.where(level < p + tie / 2, 0.5, 0.0))
        first, second = (np.array(names)[pairs[:, k]].tolist() for k in (0, 1))
        table = {
            row.name: row for row in ratings(first, second, outcomes, clusters, samples=RESAMPLES, seed=seed)
        }
        return [(STRENGTHS[name], table[name].strength) for name in names]

    return trial


def annotations(
    rng: np.random.Generator, items: int, raters: int, confusion: np.ndarray = CONFUSION
) -> np.ndarray:
    """Labels 0 to 2 by independent annotators of items of three classes, shape (items, raters)."""
    classes = rng.choice(3, p=CLASSES, size=items)
    levels = confusion.cumsum(axis=1)[classes]
    return (rng.random((items, raters, 1)) > levels[:, None, :2]).sum(axis=2)


def true_agreement(distance: np.ndarray, confusion: np.ndarray = CONFUSION) -> float:
    """1 - observed / expected disagreement in the population; kappa and alpha alike."""
    shares = CLASSES @ confusion
    observed = np.einsum("c,ck,cl,kl->", CLASSES, confusion, confusion, distance)
    return float(1 - observed / (shares @ distance @ shares))


def label_distances() -> dict[str, np.ndarray]:
    shares = CLASSES @ CONFUSION
    middle = shares.cumsum() - shares / 2
    return {
        "nominal": 1 - np.eye(3),
        "ordinal": np.subtract.outer(middle, middle) ** 2,
        "interval": np.subtract.outer(np.arange(3), np.arange(3)) ** 2.0,
    }


def cohen(items: int, weighted: bool, confusion: np.ndarray = CONFUSION) -> Trial:
    truth = true_agreement(label_distances()["interval" if weighted else "nominal"], confusion)

    def trial(rng: np.random.Generator, _: int) -> list[tuple[float, Interval]]:
        labels = annotations(rng, items, 2, confusion)
        return [(truth, cohen_kappa(labels[:, 0], labels[:, 1], "quadratic" if weighted else None))]

    return trial


def fleiss(items: int, raters: int, confusion: np.ndarray = CONFUSION) -> Trial:
    truth = true_agreement(label_distances()["nominal"], confusion)

    def trial(rng: np.random.Generator, _: int) -> list[tuple[float, Interval]]:
        labels = annotations(rng, items, raters, confusion)
        return [(truth, fleiss_kappa(np.stack([(labels == k).sum(axis=1) for k in range(3)], axis=1)))]

    return trial


def alpha(items: int, raters: int, level: Any) -> Trial:
    """A fifth of the ratings is missing at random."""
    truth = true_agreement(label_distances()[level])

    def trial(rng: np.random.Generator, seed: int) -> list[tuple[float, Interval]]:
        labels = annotations(rng, items, raters).astype(float)
        labels[rng.random(labels.shape) < 0.2] = np.nan
        return [(truth, krippendorff_alpha(labels, level, samples=RESAMPLES, seed=seed))]

    return trial


def gains(prompts: int) -> Trial:
    """Skewed gains in score over the same prompts."""

    def trial(rng: np.random.Generator, seed: int) -> list[tuple[float, Interval]]:
        control = rng.normal(size=prompts)
        treatment = control + rng.exponential(1.0, size=prompts) - 0.7
        return [(0.3, paired_difference(treatment, control, samples=RESAMPLES, seed=seed))]

    return trial
