"""Do 95 % intervals contain the truth 95 times in 100? Simulated data sets whose truth is known exactly.

    python scripts/bench_coverage.py --output docs/benchmarks/coverage.json

Each scenario draws 2,000 data sets (`--sets`), makes the interval of each by the functions that reports use,
and counts how often it contains the truth. Then the sequential test is looked at after every vote while
nothing differs. Writes the shares as JSON, prints a Markdown table, and exits 1 when a bar is missed:
coverage from 93 to 97 %, at most 5 % false alarms under peeking.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit
from scipy.stats import norm
from scipy.stats import t as student

from eval.agreement import cohen_kappa, fleiss_kappa, krippendorff_alpha
from eval.bradley_terry import ratings
from eval.statistics import Interval, bootstrap_interval, paired_difference, proportion_interval
from eval.statistics.sequential import capital
from eval.win_rate import win_rate
from posttrain.environment import hardware, package_versions

BARS = (0.93, 0.97)
RESAMPLES = 1000
STRENGTHS = {"a": 0.9, "b": 0.4, "c": 0.0, "d": -0.4, "e": -0.9}
CONFUSION = np.array([[0.8, 0.15, 0.05], [0.15, 0.7, 0.15], [0.05, 0.2, 0.75]])
"""What an annotator says (columns) of an item that is one of three classes (rows)."""
CAREFUL = np.array([[0.97, 0.02, 0.01], [0.03, 0.95, 0.02], [0.01, 0.03, 0.96]])
CLASSES = np.array([0.5, 0.3, 0.2])

Trial = Callable[[np.random.Generator, int], list[tuple[float, Interval]]]
"""One data set: the truths and their intervals."""


@dataclass(frozen=True)
class Scenario:
    name: str
    what: str
    trial: Trial
    interval: str


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


SCENARIOS = (
    Scenario(
        "win_rate",
        "150 prompts, 1-4 comparisons each, 20 % ties, rate .6",
        win_rates(150, 0.6, 0.2, 4),
        "score",
    ),
    Scenario(
        "win_rate_few",
        "40 prompts, 1-4 comparisons each, 20 % ties, rate .6",
        win_rates(40, 0.6, 0.2, 4),
        "score",
    ),
    Scenario(
        "win_rate_extreme",
        "150 prompts, 1-4 comparisons each, 4 % ties, rate .92",
        win_rates(150, 0.92, 0.04, 4),
        "score",
    ),
    Scenario(
        "win_rate_single",
        "100 prompts, one comparison each, 30 % ties, rate .5",
        win_rates(100, 0.5, 0.3, 1),
        "score",
    ),
    Scenario(
        "bradley_terry",
        "5 players, 100 prompts of 6 correlated comparisons, ties 30 % of the weaker's share",
        bradley_terry(100),
        "BCa",
    ),
    Scenario(
        "rm_accuracy",
        "120 prompts, 1-5 pairs each, accuracy .7",
        accuracies(120, 0.7, bootstrap=False),
        "score",
    ),
    Scenario(
        "rm_accuracy_bootstrap",
        "120 prompts, 1-5 pairs each, accuracy .7",
        accuracies(120, 0.7, bootstrap=True),
        "BCa",
    ),
    Scenario("cohen_kappa", "150 items, 3 labels, kappa .40", cohen(150, weighted=False), "delta"),
    Scenario("cohen_kappa_quadratic", "150 items, 3 labels", cohen(150, weighted=True), "delta"),
    Scenario("fleiss_kappa", "100 items, 4 annotators, 3 labels", fleiss(100, 4), "delta"),
    Scenario("cohen_kappa_high", "100 items, 3 labels, kappa .88", cohen(100, False, CAREFUL), "delta"),
    Scenario(
        "fleiss_kappa_high", "100 items, 3 annotators, 3 labels, kappa .88", fleiss(100, 3, CAREFUL), "delta"
    ),
    Scenario("alpha_nominal", "100 items, 4 annotators, 20 % missing", alpha(100, 4, "nominal"), "BCa"),
    Scenario("alpha_ordinal", "100 items, 4 annotators, 20 % missing", alpha(100, 4, "ordinal"), "BCa"),
    Scenario("alpha_interval", "100 items, 4 annotators, 20 % missing", alpha(100, 4, "interval"), "BCa"),
    Scenario("paired_gain", "80 prompts, exponential gains", gains(80), "BCa"),
)


def coverage(scenario: Scenario, sets: int) -> dict[str, Any]:
    """Share of intervals that contain the truth, over all and for each truth of the scenario."""
    rng = np.random.default_rng(20_000)
    start = time.perf_counter()
    inside, widths = [], []
    for seed in range(sets):
        found = scenario.trial(rng, seed)
        inside.append([one.low <= truth <= one.high for truth, one in found])
        widths.append([one.high - one.low for _, one in found])
    hits = np.array(inside)
    each = hits.mean(axis=0)
    return {
        "scenario": scenario.name,
        "data": scenario.what,
        "interval": scenario.interval,
        "data_sets": sets,
        "coverage": float(hits.mean()),
        "coverage_each": each.tolist(),
        "mean_width": float(np.mean(widths)),
        "seconds": round(time.perf_counter() - start, 1),
        "passed": bool(BARS[0] <= each.min() and each.max() <= BARS[1]),
    }


def peeking(runs: int, votes: int, ties: float) -> dict[str, Any]:
    """How often a test that is looked at after every vote finds a difference where there is none."""
    rng = np.random.default_rng(7)
    lost = (1 - ties) / 2
    alarms = naive = 0
    t = np.arange(1, votes + 1)
    quantiles = student.ppf(0.975, np.maximum(t - 1, 1))
    for _ in range(runs):
        x = rng.choice([0, 0.5, 1], p=[lost, ties, lost], size=votes)
        alarms += bool((capital(x, np.array([0.5])) >= np.log(20)).any())
        mean = x.cumsum() / t
        spread = np.sqrt(np.maximum((x**2).cumsum() / t - mean**2, 0) / np.maximum(t - 1, 1))
        naive += bool((np.abs(mean - 0.5) > quantiles * spread)[20:].any())
    return {
        "runs": runs,
        "votes": votes,
        "tie_share": ties,
        "false_alarms": alarms / runs,
        "false_alarms_of_a_t_test": naive / runs,
        "passed": alarms / runs <= 0.05,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--sets", type=int, default=2000, help="simulated data sets of each scenario")
    arguments = parser.parse_args()
    rows = [coverage(scenario, arguments.sets) for scenario in SCENARIOS]
    looks = [peeking(1000, 2000, ties) for ties in (0.0, 0.3, 0.7)]
    print("| scenario | data | interval | coverage | mean width |\n| --- | --- | --- | ---: | ---: |")
    for row in rows:
        each = row["coverage_each"]
        spread = f" ({min(each):.1%} to {max(each):.1%})" if len(each) > 1 else ""
        print(
            f"| {row['scenario']} | {row['data']} | {row['interval']} | {row['coverage']:.1%}{spread} | "
            f"{row['mean_width']:.3f} |"
        )
    for look in looks:
        print(
            f"peeking after each of {look['votes']} votes, {look['tie_share']:.0%} ties: "
            f"{look['false_alarms']:.1%} false alarms, {look['false_alarms_of_a_t_test']:.1%} by a t-test"
        )
    if arguments.output is not None:
        report = {
            "command": "python scripts/bench_coverage.py --output docs/benchmarks/coverage.json",
            "hardware": hardware(),
            "packages": package_versions(),
            "bars": {"coverage": BARS, "false_alarms": 0.05},
            "coverage": rows,
            "peeking": looks,
        }
        arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    missed = [row for row in [*rows, *looks] if not row["passed"]]
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
