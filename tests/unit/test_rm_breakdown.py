"""Where a reward model is right, on pairs whose numbers can be counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from eval.rm_breakdown import (
    MAX_SUBSETS,
    OTHER_SUBSETS,
    accuracy_by_confidence,
    accuracy_by_subset,
    classification,
    length_controlled_accuracy,
)
from eval.rm_report import PairScores, Settings, out_of_distribution_report, reward_report
from eval.statistics import bootstrap_distribution
from posttrain.calibration import pair_auc

PROMPTS = [f"p{i}" for i in range(8)]


def test_pairs_both_ways_round_have_one_rate() -> None:
    # Two right, one wrong, one tie: 2.5 of 4 either way round.
    margins = np.array([2.0, 1.0, -1.0, 0.0])
    found = classification(margins, np.array([1.0, 2.0, -1.0, 0.5]), np.array([-1.0, 1.0, 0.0, 0.5]))
    pairs = found["pairs"]
    assert pairs["confusion"] == {"tp": 2.5, "fp": 1.5, "fn": 1.5, "tn": 2.5}
    assert {pairs[name] for name in ("accuracy", "precision", "recall", "f1")} == {0.625}
    assert pairs["auc_roc"] == pytest.approx(pair_auc(margins))
    # Single answers at score 0: preferred 1, 2, -1, .5; others -1, 1, 0 (half), .5.
    assert found["answers"]["confusion"] == {"tp": 3.0, "fp": 2.5, "fn": 1.0, "tn": 1.5}


def test_accuracy_rises_with_confidence() -> None:
    margins = np.array([4.0, 3.0, 2.0, -2.0, 1.0, -1.0, 0.5, -0.5])
    rows = accuracy_by_confidence(margins, PROMPTS, 0.95)
    assert [row["accuracy"]["value"] for row in rows] == [5 / 8, 4 / 6, 3 / 4, 1.0]
    assert [row["least_margin"] for row in rows] == [0.5, 1.0, 2.0, 3.0]


def test_subsets_are_named_and_small_ones_put_together() -> None:
    margins = np.array([1.0, -1.0, 0.0, 1.0])
    found = accuracy_by_subset(margins, ["a", "b", "b", "b"], PROMPTS[:4], 0.95)
    assert list(found) == ["b", "a"]
    assert found["b"]["value"] == 0.5 and found["a"]["n"] == 1
    assert accuracy_by_subset(margins, ["a"] * 4, PROMPTS[:4], 0.95) == {}
    many = [f"s{i:02d}" for i in range(MAX_SUBSETS + 5)]
    names = [*many[:MAX_SUBSETS] * 9, *many[MAX_SUBSETS:]]
    found = accuracy_by_subset(np.ones(len(names)), names, names, 0.95)
    assert found[OTHER_SUBSETS]["n"] == 5 and len(found) == MAX_SUBSETS + 1


@pytest.mark.parametrize("lean", [1, -1])
def test_length_alone_gets_one_half(lean: int) -> None:
    difference = np.array([3.0, 5.0, 1.0, 9.0, 2.0, -4.0])
    found = length_controlled_accuracy(lean * difference, difference, PROMPTS[:6], 0.95)
    assert found is not None and found["accuracy"]["value"] == 0.5


def test_length_controlled_accuracy_by_hand() -> None:
    # Longer is better: 3 of 4 right. Shorter: 1 of 2. One pair of equal length stays out.
    margins = np.array([1.0, 1, 1, -1, 1, -1, 1])
    difference = np.array([1.0, 2, 3, 4, -1, -2, 0])
    found = length_controlled_accuracy(margins, difference, PROMPTS[:7], 0.95)
    assert found is not None
    assert found["accuracy"]["value"] == (3 / 4 + 1 / 2) / 2
    assert (found["accuracy"]["n"], found["equal_length"]) == (6, 1)
    assert length_controlled_accuracy(margins, np.abs(difference) + 1, PROMPTS[:7], 0.95) is None


def test_length_controlled_error_is_the_cluster_bootstraps() -> None:
    rng = np.random.default_rng(0)
    prompts = np.repeat(np.arange(150), 3)
    margins = rng.normal(0.3, 1, size=450) + np.repeat(rng.normal(0, 1, size=150), 3)
    difference = rng.normal(-0.5, 1, size=450)
    found = length_controlled_accuracy(margins, difference, prompts.tolist(), 0.95)
    right = (margins > 0).reshape(150, 3)
    longer = (difference > 0).reshape(150, 3)

    def statistic(weights: np.ndarray) -> np.ndarray:
        rates = [
            (weights @ (right & part).sum(axis=1)) / (weights @ part.sum(axis=1))
            for part in (longer, ~longer)
        ]
        return (rates[0] + rates[1]) / 2

    drawn = bootstrap_distribution(statistic, 150, 4000)
    assert found is not None
    assert found["accuracy"]["standard_error"] == pytest.approx(drawn.std(), rel=0.05)


def scored(margins: list[float], prefix: str) -> PairScores:
    n = len(margins)
    names = [f"{prefix}{i}" for i in range(n)]
    return PairScores(
        np.array(margins), np.zeros(n), ["aa", "b"] * (n // 2), ["b", "aa"] * (n // 2), names, names
    )


def test_away_from_home_the_temperature_of_home_is_used() -> None:
    settings = Settings(baselines=False)
    home = reward_report(scored([1.0, 1.0, 1.0, -1.0] * 20, "h"), settings)
    away = out_of_distribution_report(scored([1.0, -1.0] * 20, "a"), home, settings)
    labels = away["labels"]
    assert labels["accuracy"]["value"] == 0.5
    assert labels["drop"]["value"] == pytest.approx(0.25)
    assert labels["drop"]["low"] < 0.25 < labels["drop"]["high"]
    # At home T gives sigmoid(1 / T) = 3/4, which here is right half of the time.
    assert labels["transferred"]["ece"] == pytest.approx(0.25, abs=1e-3)
    assert away["gold"] is None
