"""Win rates: the share of comparisons won, a tie counting half."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from eval.statistics.intervals import Clusters, Interval, Values, finite_array
from eval.statistics.proportions import proportion_interval


@dataclass(frozen=True)
class WinRate:
    """Share of comparisons won, a tie counting half, with its interval and the raw counts."""

    rate: Interval
    wins: int
    ties: int
    losses: int

    def as_dict(self) -> dict[str, Any]:
        return {**self.rate.as_dict(), "wins": self.wins, "ties": self.ties, "losses": self.losses}


def outcomes_of(first: Values, second: Values, tie_tolerance: float = 0.0) -> np.ndarray:
    """1 where `first` is higher, 0 where lower, 0.5 where at most `tie_tolerance` apart; shape (n,)."""
    difference = finite_array(first) - finite_array(second)
    return np.where(np.abs(difference) <= tie_tolerance, 0.5, (difference > 0).astype(np.float64))


def win_rate(outcomes: Values, clusters: Clusters | None = None, confidence: float = 0.95) -> Interval:
    """Mean outcome (1 won, 0.5 tied, 0 lost; graded preferences in between are allowed).

    `clusters` names the prompt of each outcome: several answers, orders or votes on one prompt are not
    independent. The standard error is robust to that (`eval.statistics.mean_standard_error`), the
    interval is the score interval at the effective sample size (`proportion_interval`).
    """
    return proportion_interval(outcomes, clusters, confidence)


def counted_win_rate(outcomes: Values, clusters: Clusters | None = None, confidence: float = 0.95) -> WinRate:
    """`win_rate` with the number of outcomes above, at and below one half."""
    array = finite_array(outcomes)
    rate = win_rate(array, clusters, confidence)
    return WinRate(rate, int((array > 0.5).sum()), int((array == 0.5).sum()), int((array < 0.5).sum()))
