"""The reward-model report on pairs whose numbers can be counted by hand."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest

from eval.rm_baselines import shorter_wins, tfidf_bradley_terry
from eval.rm_report import PairScores, Settings, judge_summary, reward_report

SHARED = Path(os.environ.get("POSTTRAIN_SHARED_DATA", Path(__file__).parents[2] / "../shared/data"))
HH_RLHF = SHARED / "hh_rlhf/harmless-base/test.jsonl.gz"


def pairs(
    chosen: list[float], rejected: list[float], gold: list[tuple[float, float]] | None = None
) -> PairScores:
    n = len(chosen)
    return PairScores(
        np.array(chosen),
        np.array(rejected),
        [f"chosen answer {i}" for i in range(n)],
        [f"rejected answer number {i}" for i in range(n)],
        [f"p{i}" for i in range(n)],
        [f"g{i}" for i in range(n)],
        np.array([a for a, _ in gold]) if gold else None,
        np.array([b for _, b in gold]) if gold else None,
    )


def test_labels_count_a_model_tie_as_half() -> None:
    report = reward_report(pairs([2, 1, 0, 1], [1, 1, 1, 0]), Settings())
    assert report["gold"] is None
    assert report["labels"]["accuracy"]["value"] == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert report["labels"]["ties"] == 1
    assert report["labels"]["margin_mean"] == pytest.approx((1 + 0 - 1 + 1) / 4)


def test_gold_follows_the_noiseless_winner_and_leaves_ties_out() -> None:
    # Pair 0: label and gold agree. Pair 1: flipped label, model sides with gold. Pair 2: gold tie.
    # Pair 3: label and gold agree, model is wrong.
    report = reward_report(
        pairs([2, 0, 5, 0], [1, 3, 0, 1], [(0.9, 0.1), (0.2, 0.8), (0.5, 0.5), (0.7, 0.6)]),
        Settings(baselines=False),
    )
    assert report["labels"]["accuracy"]["value"] == 0.5
    gold = report["gold"]
    assert gold["accuracy"]["n"] == 3
    assert gold["accuracy"]["value"] == pytest.approx(2 / 3)
    assert gold["pairs_without_winner"] == 1
    assert gold["label_noise"] == pytest.approx(1 / 3)
    assert gold["margin_mean"] == pytest.approx((1 + 3 - 1) / 3)
    assert gold["baselines"] == {}


def test_all_gold_ties_means_no_gold_section() -> None:
    assert reward_report(pairs([1, 0], [0, 1], [(0.5, 0.5), (1, 1)]), Settings())["gold"] is None


def test_histogram_and_bins_count_every_pair() -> None:
    rng = np.random.default_rng(0)
    report = reward_report(pairs(list(rng.normal(1, 1, 50)), list(rng.normal(0, 1, 50))), Settings())
    assert sum(report["labels"]["margin_histogram"]["counts"]) == 50
    for when in ("before", "after"):
        assert sum(row["count"] for row in report["labels"][when]["bins"]) == 50
    json.dumps(report)


def test_length_correlation_sees_a_model_that_pays_for_length() -> None:
    words = [1, 2, 3, 4, 5, 6]
    by_length = PairScores(
        np.array(words, dtype=float),
        np.array(words[::-1], dtype=float),
        ["x" * w for w in words],
        ["x" * w for w in words[::-1]],
        [str(w) for w in words],
        [str(w) for w in words],
    )
    found = reward_report(by_length, Settings())["length"]["margin_vs_length_difference"]
    assert found["spearman"] == pytest.approx(1.0)


def test_shorter_wins_margin() -> None:
    assert shorter_wins(["abc", "a"], ["a", "a"]).tolist() == [-2.0, 0.0]


def test_tfidf_learns_a_word_and_needs_five_groups() -> None:
    better = [f"please see order {i}" for i in range(60)]
    worse = [f"whatever see order {i}" for i in range(60)]
    groups = [f"g{i % 12}" for i in range(60)]
    margins = tfidf_bradley_terry(better, worse, groups)
    assert margins is not None
    assert (margins > 0).all()
    assert tfidf_bradley_terry(better, worse, [f"g{i % 4}" for i in range(60)]) is None


def test_tfidf_learns_from_the_other_folds_it_is_given() -> None:
    """A word that decides is known to a fold only where another fold holds it."""
    better, worse = ["good a", "good b", "kind a", "kind b"], ["bad a", "bad b", "rude a", "rude b"]
    margins = tfidf_bradley_terry(better, worse, list("wxyz"), fold=[0, 1, 2, 2])
    assert margins is not None
    assert (margins[:2] > 0.01).all()
    assert np.abs(margins[2:]).max() < 1e-9


def test_tfidf_does_not_see_its_own_fold() -> None:
    # Winner and loser differ by one random word each, so nothing carries over from fold to fold.
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in rng.permutation(800)]
    margins = tfidf_bradley_terry(words[:400], words[400:], [str(i) for i in range(400)])
    assert margins is not None
    assert np.abs(margins).max() < 1e-9


@pytest.mark.slow
@pytest.mark.skipif(
    not HH_RLHF.exists(),
    reason="no hh_rlhf here: set POSTTRAIN_SHARED_DATA to the folder of shared test data",
)
def test_baselines_on_human_pairs() -> None:
    """2,312 harmless-base pairs: published here as .553 for shorter, .630 for TF-IDF Bradley-Terry."""
    with gzip.open(HH_RLHF, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    split = "\n\nAssistant:"
    chosen, rejected = (
        [row[side].rsplit(split, 1)[1].strip() for row in rows] for side in ("chosen", "rejected")
    )
    prompts = [row["chosen"].rsplit(split, 1)[0] for row in rows]
    shorter = judge_summary(shorter_wins(chosen, rejected), prompts, Settings())
    assert shorter["accuracy"]["value"] == pytest.approx(0.553, abs=0.005)
    margins = tfidf_bradley_terry(chosen, rejected, prompts)
    assert margins is not None
    assert judge_summary(margins, prompts, Settings())["accuracy"]["value"] == pytest.approx(0.63, abs=0.01)
