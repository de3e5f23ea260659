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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_coverage_worlds as worlds
import numpy as np
from scipy.stats import t as student

from eval.statistics.sequential import capital
from posttrain.environment import hardware, package_versions

BARS = (0.93, 0.97)


@dataclass(frozen=True)
class Scenario:
    name: str
    what: str
    trial: worlds.Trial
    interval: str


SCENARIOS = (
    Scenario(
        "win_rate",
        "150 prompts, 1-4 comparisons each, 20 % ties, rate .6",
        worlds.win_rates(150, 0.6, 0.2, 4),
        "score",
    ),
    Scenario(
        "win_rate_few",
        "40 prompts, 1-4 comparisons each, 20 % ties, rate .6",
        worlds.win_rates(40, 0.6, 0.2, 4),
        "score",
    ),
    Scenario(
        "win_rate_extreme",
        "150 prompts, 1-4 comparisons each, 4 % ties, rate .92",
        worlds.win_rates(150, 0.92, 0.04, 4),
        "score",
    ),
    Scenario(
        "win_rate_single",
        "100 prompts, one comparison each, 30 % ties, rate .5",
        worlds.win_rates(100, 0.5, 0.3, 1),
        "score",
    ),
    Scenario(
        "bradley_terry",
        "5 players, 100 prompts of 6 correlated comparisons, ties 30 % of the weaker's share",
        worlds.bradley_terry(100),
        "BCa",
    ),
    Scenario(
        "rm_accuracy",
        "120 prompts, 1-5 pairs each, accuracy .7",
        worlds.accuracies(120, 0.7, bootstrap=False),
        "score",
    ),
    Scenario(
        "rm_accuracy_bootstrap",
        "120 prompts, 1-5 pairs each, accuracy .7",
        worlds.accuracies(120, 0.7, bootstrap=True),
        "BCa",
    ),
    Scenario("cohen_kappa", "150 items, 3 labels, kappa .40", worlds.cohen(150, weighted=False), "delta"),
    Scenario("cohen_kappa_quadratic", "150 items, 3 labels", worlds.cohen(150, weighted=True), "delta"),
    Scenario("fleiss_kappa", "100 items, 4 annotators, 3 labels", worlds.fleiss(100, 4), "delta"),
    Scenario(
        "cohen_kappa_high",
        "100 items, 3 labels, kappa .88",
        worlds.cohen(100, False, worlds.CAREFUL),
        "delta",
    ),
    Scenario(
        "fleiss_kappa_high",
        "100 items, 3 annotators, 3 labels, kappa .88",
        worlds.fleiss(100, 3, worlds.CAREFUL),
        "delta",
    ),
    Scenario(
        "alpha_nominal", "100 items, 4 annotators, 20 % missing", worlds.alpha(100, 4, "nominal"), "BCa"
    ),
    Scenario(
        "alpha_ordinal", "100 items, 4 annotators, 20 % missing", worlds.alpha(100, 4, "ordinal"), "BCa"
    ),
    Scenario(
        "alpha_interval", "100 items, 4 annotators, 20 % missing", worlds.alpha(100, 4, "interval"), "BCa"
    ),
    Scenario("paired_gain", "80 prompts, exponential gains", worlds.gains(80), "BCa"),
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
