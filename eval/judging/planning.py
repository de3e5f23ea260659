"""Enough prompts? Enough votes? Before a comparison, and while votes come in."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from scipy import stats

from eval.statistics import Clusters, Values, mean_standard_error
from eval.statistics.intervals import cluster_codes, finite_array

TUNED_FOR = 200
"""Prompts at which the confidence sequence is tightest."""


@dataclass(frozen=True)
class Enough:
    """Whether to stop collecting. low, high hold at every moment at once, so one may look at any time."""

    decided: bool
    low: float
    high: float
    prompts: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def prompts_needed(
    outcomes: Values, clusters: Clusters | None, margin: float, confidence: float = 0.95, power: float = 0.8
) -> int | None:
    """Prompts so that a win rate `margin` away from one half is found with probability `power`.

    ((z_(1 - alpha/2) + z_power) s / margin)^2 for a two-sided z-test, s the standard deviation per prompt
    that these outcomes show: ties make it smaller, several judgements per prompt too. None for a single
    prompt or where all outcomes are equal. With s = 1/2 (no ties), 3 points at 95 % and
    80 % take 2,181 prompts.
    """
    values = finite_array(outcomes)
    error = mean_standard_error(values, clusters)
    if math.isnan(error) or error == 0:
        return None
    groups = int(cluster_codes(clusters, values.size).max()) + 1
    return sample_size(error * math.sqrt(groups), margin, confidence, power)


def sample_size(deviation: float, margin: float, confidence: float = 0.95, power: float = 0.8) -> int:
    """Observations of that standard deviation for a mean `margin` off to be found (see `prompts_needed`)."""
    z = float(stats.norm.ppf(0.5 + confidence / 2) + stats.norm.ppf(power))
    return math.ceil((z * deviation / margin) ** 2)


def enough(outcomes: Values, clusters: Clusters | None, confidence: float = 0.95) -> Enough:
    """Whether the win rate differs from one half, by an asymptotic confidence sequence.

    Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas (2021, arXiv:2103.06476), theorem 2.2: with t prompts, the
    mean +- s sqrt(2 (t r^2 + 1) / (t r)^2 log(sqrt(t r^2 + 1) / alpha)), r chosen for `TUNED_FOR` prompts.
    An interval for one moment would, looked at after every vote, name a winner between equals far too often.
    """
    values = finite_array(outcomes)
    error = mean_standard_error(values, clusters)
    groups = int(cluster_codes(clusters, values.size).max()) + 1
    mean = float(values.mean())
    if math.isnan(error) or error == 0:
        return Enough(False, 0.0, 1.0, groups)
    alpha = 1 - confidence
    r2 = (-2 * math.log(alpha) + math.log(-2 * math.log(alpha) + 1)) / TUNED_FOR
    half = (
        error
        * math.sqrt(groups)
        * math.sqrt(2 * (groups * r2 + 1) / (groups**2 * r2) * math.log(math.sqrt(groups * r2 + 1) / alpha))
    )
    low, high = max(mean - half, 0.0), min(mean + half, 1.0)
    return Enough(low > 0.5 or high < 0.5, low, high, groups)
