"""Reward over-optimisation: gold and proxy reward of a run against the distance it went, d = sqrt(KL).

Gao et al. 2022, Scaling Laws for Reward Model Overoptimization (arXiv 2210.10760). Pure functions on the rows
of a ppo stage's metrics.jsonl; `scripts/overoptimisation.py` runs the experiment and draws them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

WINDOW = 5
"""Updates in a moving mean, as in the warnings of a run: one rollout of 64 answers has a gold score with a
standard error of about 0.02."""


@dataclass(frozen=True)
class Trajectory:
    """One PPO run, an entry per update: distance = sqrt(KL in nats per response), proxy and gold reward."""

    distance: list[float]
    proxy: list[float]
    gold: list[float]

    def smoothed(self, window: int = WINDOW) -> Trajectory:
        """Moving means over `window` updates, full windows only; KL is averaged before its root is taken.

        Raises ValueError when the run is shorter than the window.
        """
        kl = moving_mean([d * d for d in self.distance], window)
        return Trajectory(
            [math.sqrt(value) for value in kl],
            moving_mean(self.proxy, window),
            moving_mean(self.gold, window),
        )


@dataclass(frozen=True)
class Fit:
    """gold(d) = start + d (alpha - beta log d), by least squares over the updates.

    rmse: root of the mean squared residual. scatter: of one update about its neighbours' trend, which no
    curve could fit. Both in units of gold. r2: share of the variance explained.
    """

    start: float
    alpha: float
    beta: float
    rmse: float
    scatter: float
    r2: float

    def __call__(self, distance: float) -> float:
        return self.start + distance * self.alpha - self.beta * _d_log_d(distance)

    @property
    def peak(self) -> float | None:
        """Where the fitted curve is highest, exp(alpha / beta - 1); None where it has no maximum."""
        return math.exp(self.alpha / self.beta - 1) if self.beta > 0 else None

    @property
    def is_good(self) -> bool:
        """Whether the residuals are little more than the scatter between neighbouring updates."""
        return self.rmse <= 1.25 * self.scatter


@dataclass(frozen=True)
class Summary:
    """What the table says about a run: means over `WINDOW` updates at the start, at gold's peak, at the end.

    fall: from gold's peak to its end, in standard errors of a difference of two such means.
    """

    kl_peak: float
    kl_end: float
    gold_start: float
    gold_peak: float
    gold_end: float
    proxy_start: float
    proxy_peak: float
    proxy_end: float
    peak_update: int
    fall: float

    @property
    def over_optimised(self) -> bool:
        """Gold fell beyond its noise although the proxy went on rising."""
        return self.fall > 3 and self.proxy_end > self.proxy_peak


def trajectory(rows: Sequence[Mapping[str, Any]]) -> Trajectory:
    """From metric rows with `kl`, `score` and `reward/gold`.

    KL is estimated from samples and may come out below 0 near the reference: that counts as 0.
    Raises KeyError when a row has no gold score.
    """
    return Trajectory(
        [math.sqrt(max(row["kl"], 0.0)) for row in rows],
        [row["score"] for row in rows],
        [row["reward/gold"] for row in rows],
    )


def moving_mean(values: Sequence[float], window: int) -> list[float]:
    """Means over `window` neighbours: len(values) - window + 1 of them. Raises ValueError if too few."""
    if not 0 < window <= len(values):
        raise ValueError(f"{len(values)} updates are too few for a mean over {window}")
    return [sum(values[i : i + window]) / window for i in range(len(values) - window + 1)]


def scatter(values: Sequence[float]) -> float:
    """Standard deviation of independent noise about a slow trend, from neighbouring differences (von Neumann
    1941): sqrt(mean (x[i+1] - x[i])^2 / 2)."""
    steps = [after - before for before, after in zip(values, values[1:], strict=False)]
    return math.sqrt(sum(step * step for step in steps) / len(steps) / 2)


def fit_gao(distance: Sequence[float], gold: Sequence[float]) -> Fit:
    """Least squares of gold = start + d (alpha - beta log d), Gao et al.'s form for RL.

    They set the gold reward of the initial policy to 0; here it is the third coefficient, since it is only
    known from noisy samples. Raises ValueError with fewer than four updates or a constant distance.
    """
    d, y = np.asarray(distance, dtype=float), np.asarray(gold, dtype=float)
    if len(d) < 4 or np.ptp(d) == 0:
        raise ValueError(
            f"a curve of three coefficients needs four updates at different KL; there are {len(d)}"
        )
    columns = np.stack([np.ones_like(d), d, [-_d_log_d(value) for value in distance]], axis=1)
    (start, alpha, beta), *_ = np.linalg.lstsq(columns, y, rcond=None)
    residuals = y - columns @ np.array([start, alpha, beta])
    total = float(((y - y.mean()) ** 2).sum())
    return Fit(
        float(start),
        float(alpha),
        float(beta),
        rmse=float(np.sqrt((residuals**2).mean())),
        scatter=scatter(gold),
        r2=1 - float((residuals**2).sum()) / total if total > 0 else 0.0,
    )


def summarise(run: Trajectory, window: int = WINDOW) -> Summary:
    """Start, peak and end of the smoothed curves. Raises ValueError when the run is shorter than `window`."""
    smooth = run.smoothed(window)
    best = max(range(len(smooth.gold)), key=smooth.gold.__getitem__)
    error = scatter(run.gold) * math.sqrt(2 / window)
    fall = smooth.gold[best] - smooth.gold[-1]
    return Summary(
        kl_peak=smooth.distance[best] ** 2,
        kl_end=smooth.distance[-1] ** 2,
        gold_start=smooth.gold[0],
        gold_peak=smooth.gold[best],
        gold_end=smooth.gold[-1],
        proxy_start=smooth.proxy[0],
        proxy_peak=smooth.proxy[best],
        proxy_end=smooth.proxy[-1],
        peak_update=best + (window + 1) // 2,
        fall=fall / error if error > 0 else (math.inf if fall > 0 else 0.0),
    )


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of text cells, the first column left-aligned, the others right-aligned."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _d_log_d(distance: float) -> float:
    """d log d, with its limit 0 at 0."""
    return distance * math.log(distance) if distance > 0 else 0.0
