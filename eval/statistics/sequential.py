"""Are there enough votes? Intervals and tests that stay valid however often one looks.

Outcomes in [0, 1] (ties 0.5) arrive one after another. For every candidate mean m a gambler bets against m;
if m is the mean, the capital is unlikely ever to reach 1 / alpha (Ville 1939). The means against which it
has not are a confidence sequence: it covers the mean at all times together with probability 1 - alpha. Bets
are the predictable plug-in ones of Waudby-Smith and Ramdas (2024, Estimating means of bounded random
variables by betting), two-sided by hedging half of the capital each way (their theorem 3).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from eval.statistics.intervals import Clusters, Values, cluster_codes, unit_array

_TRUNCATION = 0.5
"""A bet risks at most this part of the capital: c in the paper."""

Verdict = Literal["better", "worse", "equivalent", "undecided"]


@dataclass(frozen=True)
class Decision:
    """What `n` units show so far about a mean.

    `low` and `high` bound it at every time together; `p_value` is of the mean being the null and may be read
    at any time; `decided_at` is the first unit after which the verdict could be given.
    """

    verdict: Verdict
    value: float
    low: float
    high: float
    n: int
    p_value: float
    decided_at: int | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def capital(outcomes: Values, means: np.ndarray, alpha: float = 0.05) -> np.ndarray:
    """Log of the hedged capital after each outcome, shape (n, means): the evidence against each mean."""
    x = unit_array(outcomes, "outcomes")
    bets = _bets(x, alpha)[:, None]
    m = np.asarray(means, dtype=np.float64)[None, :]
    with np.errstate(divide="ignore"):
        up = np.log1p(np.minimum(bets, _TRUNCATION / m) * (x[:, None] - m)).cumsum(axis=0)
        down = np.log1p(-np.minimum(bets, _TRUNCATION / (1 - m)) * (x[:, None] - m)).cumsum(axis=0)
    return np.maximum(up, down) + np.log(0.5)


def confidence_sequence(
    outcomes: Values, confidence: float = 0.95, grid: int = 1000
) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper limits after each outcome, each shape (n,), never widening.

    Means are tried on a grid of `grid` cells; limits are moved out by one cell, so it errs on the safe side.
    """
    x = unit_array(outcomes, "outcomes")
    means = np.arange(1, grid) / grid
    low, high = np.empty(x.size), np.empty(x.size)
    kept = capital(x, means, 1 - confidence) < -np.log(1 - confidence)
    some = kept.any(axis=1)
    low[:] = np.where(some, means[kept.argmax(axis=1)] - 1 / grid, 0.0)
    high[:] = np.where(some, means[grid - 2 - kept[:, ::-1].argmax(axis=1)] + 1 / grid, 1.0)
    low, high = np.maximum.accumulate(low), np.minimum.accumulate(high)
    return low, np.maximum(low, high)


def decide(
    outcomes: Values,
    clusters: Clusters | None = None,
    null: float = 0.5,
    margin: float | None = None,
    confidence: float = 0.95,
) -> Decision:
    """Whether the outcomes so far, in order of arrival, settle if their mean is above or below `null`.

    Args:
        outcomes: of single comparisons, shape (n,).
        clusters: prompt of each; one unit then is a prompt's mean outcome, in order of its first vote, since
            only prompts are independent of each other. Votes on a prompt should be complete before the next.
        null: the mean to beat.
        margin: a mean surely within `null` +- `margin` is "equivalent": more votes would not matter.
        confidence: 1 minus the chance of a wrong verdict, over all the times one looks.
    """
    x = _unit_means(unit_array(outcomes, "outcomes"), clusters)
    low, high = confidence_sequence(x, confidence)
    wealth = np.maximum.accumulate(capital(x, np.array([null]), 1 - confidence)[:, 0])
    against = wealth >= -np.log(1 - confidence)
    above = against & (np.cumsum(x) / np.arange(1, x.size + 1) > null)
    verdict: Verdict = "undecided"
    decided: int | None = None
    if against.any():
        first = int(against.argmax())
        verdict, decided = ("better" if above[first] else "worse"), first + 1
    elif margin is not None:
        inside = (low > null - margin) & (high < null + margin)
        if inside.any():
            verdict, decided = "equivalent", int(inside.argmax()) + 1
    return Decision(
        verdict,
        float(x.mean()),
        float(low[-1]),
        float(high[-1]),
        int(x.size),
        float(min(1.0, np.exp(-wealth[-1]))),
        decided,
    )


def _bets(x: np.ndarray, alpha: float) -> np.ndarray:
    """The bet before each outcome, from the ones before it alone, shape (n,)."""
    t = np.arange(1, x.size + 1)
    mean = (0.5 + x.cumsum()) / (t + 1)
    variance = (0.25 + ((x - mean) ** 2).cumsum()) / (t + 1)
    before = np.concatenate([[0.25], variance[:-1]])
    return np.sqrt(2 * np.log(2 / alpha) / (before * t * np.log1p(t)))


def _unit_means(x: np.ndarray, clusters: Clusters | None) -> np.ndarray:
    if clusters is None:
        return x
    codes = cluster_codes(clusters, x.size)
    means = np.bincount(codes, weights=x) / np.bincount(codes)
    first = np.unique(codes, return_index=True)[1]
    return np.asarray(means[np.argsort(first, kind="stable")])
