"""scripts/bench_coverage.py: intervals against simulated data sets whose truth is known."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from eval.agreement import cohen_kappa, fleiss_kappa, krippendorff_alpha
from eval.statistics import t_interval

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from bench_coverage import SCENARIOS, Scenario, coverage, peeking
from bench_coverage_worlds import annotations, clustered_outcomes, label_distances, true_agreement

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_intervals_cover_the_truth(scenario: Scenario) -> None:
    found = coverage(scenario, 500)
    assert found["passed"], found


@pytest.mark.slow
def test_peeking_is_safe() -> None:
    found = peeking(1000, 2000, 0.3)
    assert found["passed"] and found["false_alarms_of_a_t_test"] > 0.3


def test_an_interval_that_ignores_prompts_misses_the_bar() -> None:
    def trial(rng: np.random.Generator, _: int):
        outcomes, _ = clustered_outcomes(rng, 60, 0.6, 0.2, 12)
        return [(0.6, t_interval(outcomes))]

    found = coverage(Scenario("naive", "", trial, "t"), 300)
    assert found["coverage"] < 0.9 and not found["passed"]


def test_the_truths_are_the_truths_of_a_large_sample() -> None:
    rng = np.random.default_rng(0)
    outcomes, _ = clustered_outcomes(rng, 100_000, 0.6, 0.2, 4)
    assert outcomes.mean() == pytest.approx(0.6, abs=0.004)
    labels = annotations(rng, 40_000, 3)
    distances = label_distances()
    kappa, weighted = true_agreement(distances["nominal"]), true_agreement(distances["interval"])
    assert cohen_kappa(labels[:, 0], labels[:, 1]).value == pytest.approx(kappa, abs=0.01)
    assert cohen_kappa(labels[:, 0], labels[:, 1], "quadratic").value == pytest.approx(weighted, abs=0.01)
    counts = np.stack([(labels == k).sum(axis=1) for k in range(3)], axis=1)
    assert fleiss_kappa(counts).value == pytest.approx(kappa, abs=0.01)
    ordinal = krippendorff_alpha(labels[:5000], "ordinal", samples=10)
    assert ordinal.value == pytest.approx(true_agreement(distances["ordinal"]), abs=0.02)


def test_the_committed_figures_meet_their_bars() -> None:
    report = json.loads((ROOT / "docs/benchmarks/coverage.json").read_text(encoding="utf-8"))
    assert {row["scenario"] for row in report["coverage"]} == {scenario.name for scenario in SCENARIOS}
    low, high = report["bars"]["coverage"]
    for row in report["coverage"]:
        assert row["data_sets"] >= 500
        assert all(low <= share <= high for share in row["coverage_each"]), row["scenario"]
    assert all(look["false_alarms"] <= report["bars"]["false_alarms"] for look in report["peeking"])
